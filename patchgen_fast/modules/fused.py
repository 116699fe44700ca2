"""What the fast layers share: when a child may be read instead of called, and fused steps.

A fused step does the work of several children at once, so it reads their weights. It may do so
only where nobody would notice: the child is exactly the known class, nothing hooks into it, and
its parameters are plain tensors. Otherwise the child is called, so that LoRA, hooks,
parametrisations, quantised weights and sharding keep working, and only the fusion is lost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..ops.add_layer_norm import add_layer_norm
from ..ops.layer_norm import layer_norm
from ..ops.linear import linear
from ..ops.qk_norm_rope import qk_norm_rope
from ..registry import autocasts

if TYPE_CHECKING:
    from .state import FastLayer

# Exact classes that are known to do nothing but their formula. Adapters add those of libraries.
LINEAR_TYPES: set[type[nn.Module]] = {nn.Linear, NonDynamicallyQuantizableLinear}
CONV_TYPES: set[type[nn.Module]] = {nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d}
NORM_TYPES: dict[type[nn.Module], str] = {nn.LayerNorm: "layer", nn.RMSNorm: "rms"}
DROP_TYPES: dict[type[nn.Module], str] = {nn.Dropout: "p"}
"""Dropouts, with the name of the attribute that holds their probability."""
ACTIVATION_TYPES: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.SiLU: "silu"}
"""Activations without options, with the name under which `linear` has them."""
IN_PLACE: dict[type[nn.Module], Callable[[Tensor], Tensor]] = {}
"""Activations that `linear` has not: the same numbers, written over what they are given."""
PLAIN_TYPES = (nn.Parameter, Tensor)
FEWEST_NORMALISED = 64 * 768
"""Numbers below which a call of `layer_norm` costs more than its kernel saves over torch's."""
RESIDUAL_TYPES: set[type] = set()
"""Fast layers, as exact classes, whose `fused_forward` takes a `residual`."""


def takes_residual(cls: type) -> type:
    """Class decorator: `fused_forward(..., residual=r)` of exactly this class adds r."""
    RESIDUAL_TYPES.add(cls)
    return cls


# ------------------------------------------------------------------- what may be read or bypassed


def unobserved(module: Any) -> bool:
    """Nothing notices whether the module is called or bypassed: no hooks, no rebound forward."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
        or "forward" in module.__dict__
    )


def is_plain_tensor(tensor: Tensor | None) -> bool:
    """Not a subclass that wraps others, as sharded (DTensor) and quantised weights are."""
    if tensor is None or type(tensor) in PLAIN_TYPES:
        return True
    return not hasattr(tensor, "__tensor_flatten__")


def linear_parameters(module: Any) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of a linear layer where they may be read, else None."""
    if type(module) not in LINEAR_TYPES or not unobserved(module):
        return None
    weight, bias = module.weight, module.bias
    return (weight, bias) if is_plain_tensor(weight) and is_plain_tensor(bias) else None


def plain_linear(module: Any) -> bool:
    """Whether the weight of a linear layer may be read."""
    return linear_parameters(module) is not None


def plain_patch_conv(module: Any) -> bool:
    """Whether a convolution, or its transpose, is exactly one product a patch and may be read."""
    return (
        isinstance(module, _ConvNd)
        and type(module) in CONV_TYPES
        and unobserved(module)
        and is_plain_tensor(module.weight)
        and is_plain_tensor(module.bias)
        and module.stride == module.kernel_size
        and module.groups == 1
        and all(dilation == 1 for dilation in module.dilation)
        and all(padding == 0 for padding in (*module.padding, *module.output_padding))
    )


def inactive(module: Any) -> bool:
    """Whether a dropout or placeholder does nothing and may be left out."""
    if not unobserved(module):
        return False
    if type(module) is nn.Identity:
        return True
    probability = DROP_TYPES.get(type(module))
    return probability is not None and (not module.training or getattr(module, probability) == 0.0)


def plain_layer_norm(module: Any) -> bool:
    """Whether a layer normalisation over the last dimension may be read."""
    return (
        NORM_TYPES.get(type(module)) == "layer"
        and len(module.normalized_shape) == 1
        and unobserved(module)
        and is_plain_tensor(module.weight)
        and is_plain_tensor(module.bias)
    )


def activation_name(module: Any) -> str | None:
    """The name under which `linear` has an activation, or None where it has not.

    `module` is a module, or a function such as `F.gelu`.
    """
    if isinstance(module, nn.Module) and not unobserved(module):
        return None
    if type(module) is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(module.approximate)
    if isinstance(module, nn.Module):
        return ACTIVATION_TYPES.get(type(module))
    functions = ((F.relu, "relu"), (F.gelu, "gelu"), (F.silu, "silu"))
    return next((name for function, name in functions if module is function), None)


def quick_gelu_(x: Tensor) -> Tensor:
    """`x * sigmoid(1.702 x)`, the GELU of CLIP, bit for bit, in place of x.

    Its formula makes three tensors of the hidden size, for which the system is asked anew each
    time: beside a product that costs more than the arithmetic.
    """
    return x.mul_(torch.mul(x, 1.702).sigmoid_())


# ------------------------------------------------------------------------------------ fused steps


def project(
    owner: FastLayer,
    x: Tensor,
    module: Any,
    activation: Any = None,
    residual: Tensor | None = None,
) -> Tensor:
    """`activation(module(x)) + residual`, in one op where the module may be read.

    A residual of another dtype than the product, as the float32 stream under autocast, is added
    afterwards, so that the stream keeps its precision.
    """
    name = None if activation is None else activation_name(activation)
    parameters = linear_parameters(module)
    if parameters is None or (activation is not None and name is None):
        out = module(x) if parameters is None else project(owner, x, module)
        if activation is not None:
            out = activation(out) if parameters is None else _activated(out, activation)
        return out if residual is None else residual + out
    if activation is None and residual is None and not owner._has_kernel("linear", x.device.type):
        return F.linear(x, *parameters)  # nothing to join: spares the dispatch
    inside = residual is not None and residual.dtype == product_dtype(x)
    out = linear(
        x,
        *parameters,
        activation=name,
        residual=residual if inside else None,
        backend=owner._backend("linear"),
    )
    return out if residual is None or inside else residual + out


def _activated(product: Tensor, activation: Any) -> Tensor:
    """`activation(product)`, of a product that nobody else holds."""
    in_place = IN_PLACE.get(type(activation))
    if in_place is None or product.requires_grad or not unobserved(activation):
        out: Tensor = activation(product)
        return out
    return in_place(product)


def multiply_weight(owner: FastLayer, x: Tensor, module: Any, bias: Tensor | None) -> Tensor:
    """`x @ module.weight.T + bias`, for a layer whose eager forward reads the weight too.

    What wraps the module (a low-rank adapter, hooks) is passed by there, and so it is here.
    """
    if plain_linear(module):
        return linear(x, module.weight, bias, backend=owner._backend("linear"))
    return F.linear(x, module.weight, bias)


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a product with x comes out: autocast's, or that of x."""
    if autocasts(x) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def split_heads(packed: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """`[B, N, parts * H * D]` as `parts` views `[B, H, N, D]`."""
    batch, tokens, features = packed.shape
    split = packed.reshape(batch, tokens, parts, heads, features // (parts * heads))
    # Parted before heads and tokens change places: gradients are then packed by one copy, not two.
    return tuple(part.transpose(1, 2) for part in split.unbind(2))


def child(module: Any, name: str) -> Any:
    """A child that not every class has, else None; cheaper than an attribute that lacks."""
    return module._modules.get(name)


def normalise_heads(
    owner: FastLayer,
    query: Tensor,
    key: Tensor,
    q_norm: Any,
    k_norm: Any,
    cos_sin: tuple[Tensor, Tensor] | None = None,
    *,
    interleaved: bool = False,
    num_prefix_tokens: int = 0,
) -> tuple[Tensor, Tensor]:
    """`q_norm(query), k_norm(key)` over D for `[B, H, N, D]`, then the rotary embedding.

    One op where both norms may be read; others are called, and the rotation comes after them.
    """
    norm = None
    if not (inactive(q_norm) and inactive(k_norm)):
        norm = _head_norm(q_norm, query.shape[-1])
        if norm is None or norm != _head_norm(k_norm, key.shape[-1]):
            query, key, norm = q_norm(query), k_norm(key), None
    if norm is None and cos_sin is None:
        return query, key
    kind, eps = norm or (None, 0.0)
    weights = {} if norm is None else _norm_weights(q_norm, k_norm)
    return qk_norm_rope(
        query,
        key,
        norm=kind,
        eps=eps,
        cos_sin=cos_sin,
        interleaved=interleaved,
        num_prefix_tokens=num_prefix_tokens,
        backend=owner._backend("qk_norm_rope"),
        **weights,
    )


def _norm_weights(q_norm: Any, k_norm: Any) -> dict[str, Tensor | None]:
    return {
        "q_weight": q_norm.weight,
        "k_weight": k_norm.weight,
        "q_bias": getattr(q_norm, "bias", None),
        "k_bias": getattr(k_norm, "bias", None),
    }


def _head_norm(module: Any, head_dim: int) -> tuple[str, float] | None:
    """("layer" | "rms", eps) of a normalisation that may be read, else None."""
    kind = NORM_TYPES.get(type(module))
    if kind is None or not unobserved(module):
        return None
    if tuple(module.normalized_shape) != (head_dim,) or module.eps is None:
        return None
    if not is_plain_tensor(module.weight) or not is_plain_tensor(getattr(module, "bias", None)):
        return None
    return kind, float(module.eps)


def adds_residual(module: Any) -> bool:
    """Whether a module can make the sum with a residual itself, in its last product."""
    return type(module) in RESIDUAL_TYPES and unobserved(module)


def add_to_residual(residual: Tensor, module: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`residual + module(x, ...)`, in the module's last product where it can do that."""
    if adds_residual(module):
        return module.fused_forward(x, *args, residual=residual, **kwargs)
    return residual + module(x, *args, **kwargs)


def normalise(owner: FastLayer, x: Tensor, norm: Any) -> Tensor:
    """`norm(x)`, by our kernel where there is one and the norm may be read."""
    if (
        not plain_layer_norm(norm)
        or autocasts(x)
        or x.dtype == torch.float64
        or not owner._has_kernel("layer_norm", x.device.type)
        or not (torch.compiler.is_compiling() or x.numel() >= FEWEST_NORMALISED)
    ):
        out: Tensor = norm(x)
        return out
    backend = owner._backend("layer_norm")
    return layer_norm(x, norm.weight, norm.bias, norm.eps, backend=backend)


def add_then_norm(
    owner: FastLayer, residual: Tensor, branch: Tensor, norm: Any
) -> tuple[Tensor, Tensor]:
    """`(residual + branch, norm(residual + branch))`, in one op where the norm may be read."""
    if autocasts(branch) or residual.dtype != branch.dtype or not plain_layer_norm(norm):
        total = residual + branch
        return total, norm(total)
    normalised, total = add_layer_norm(
        branch,
        residual,
        norm.weight,
        norm.bias,
        norm.eps,
        backend=owner._backend("add_layer_norm"),
    )
    return total, normalised


def add_branch_then_norm(
    owner: FastLayer,
    residual: Tensor,
    module: Any,
    norm: Any,
    x: Tensor,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """`(total, norm(total))` with `total = residual + module(x, ...)`.

    The sum is made in the module's last product where that is possible, which spares a pass over
    the branch, else together with the normalisation, which spares one over the total.
    """
    if adds_residual(module):
        total = module.fused_forward(x, *args, residual=residual, **kwargs)
        return total, normalise(owner, total, norm)
    return add_then_norm(owner, residual, module(x, *args, **kwargs), norm)
