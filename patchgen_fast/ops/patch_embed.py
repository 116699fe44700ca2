"""Images to tokens: normalise, cut into patches, embed, add positions, put prefix tokens before,
in one op.

``tokens = conv(round((float32(images) - mean) / std), weight, stride = kernel) + bias +
pos_embed``, patches row by row; prefix tokens, which get no position, before them. uint8 images
are divided by 255 first; ``round`` is to the weight's dtype. H and W (and T) are floored to whole
patches, as a convolution does.

Shapes: images ``[B, C, H, W]`` or ``[B, C, T, H, W]``, any strides; weight ``[E, C, Ph, Pw]`` or
``[E, C, Pt, Ph, Pw]``; result ``[B, P + N, E]``, contiguous, in the weight's dtype. Sums in
float32. The backward saves images and weight; the gradients of bias, positions and prefix are
sums of the output's over the batch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference, stock, triton
from ..registry import Op
from ..triton import thresholds
from . import _cuda_limits
from ._checks import (
    FLOATS,
    autocast,
    check_float,
    check_same_dtype,
    check_shape,
    check_tensors,
    describe,
    is_like,
)
from ._refusals import NOT_FOR_TRITON, NOT_ON_CPU, float64_of


class PatchEmbedArguments(NamedTuple):
    images: Tensor
    weight: Tensor
    bias: Tensor | None
    pos_embed: Tensor | None
    prefix: Tensor | None
    mean: Tensor | None
    std: Tensor | None


class PatchEmbedBackwardArguments(NamedTuple):
    grad_out: Tensor
    images: Tensor
    weight: Tensor
    mean: Tensor | None
    std: Tensor | None
    images_grad: bool
    weight_grad: bool


SCHEMA = (
    "(Tensor images, Tensor weight, Tensor? bias, Tensor? pos_embed, Tensor? prefix, "
    "Tensor? mean, Tensor? std) -> Tensor"
)
BACKWARD_SCHEMA = (
    "(Tensor grad_out, Tensor images, Tensor weight, Tensor? mean, Tensor? std, bool images_grad, "
    "bool weight_grad) -> (Tensor grad_images, Tensor grad_weight, Tensor grad_tokens_sum)"
)


def _tokens(images: Tensor, weight: Tensor) -> int:
    return math.prod(reference.grid_of(images, weight))


def _fake(images, weight, bias, pos_embed, prefix, mean, std):
    tokens = _tokens(images, weight) + (0 if prefix is None else prefix.shape[0])
    return weight.new_empty((images.shape[0], tokens, weight.shape[0]))


def _backward_fake(grad_out, images, weight, mean, std, images_grad, weight_grad):
    grad_images = images.new_empty(images.shape) if images_grad else weight.new_empty(0)
    grad_weight = weight.new_empty(weight.shape if weight_grad else 0)
    sums = weight.new_empty(grad_out.shape[1:], dtype=reference.arithmetic_dtype(weight.dtype))
    return grad_images, grad_weight, sums


def _save(ctx, inputs, output):
    images, weight, bias, pos_embed, prefix, mean, std = inputs
    ctx.save_for_backward(images, weight, mean, std)
    ctx.prefix = 0 if prefix is None else prefix.shape[0]


def _backward(ctx, grad_out):
    images_grad, weight_grad, bias_grad, pos_grad, prefix_grad = ctx.needs_input_grad[:5]
    images, weight, mean, std = ctx.saved_tensors
    grad_images, grad_weight, sums = OP.run_backward(
        ctx, grad_out, images, weight, mean, std, images_grad, weight_grad
    )
    patches = sums[ctx.prefix :]
    return (
        grad_images if images_grad else None,
        grad_weight if weight_grad else None,
        patches.sum(0).to(weight.dtype) if bias_grad else None,
        patches.to(weight.dtype) if pos_grad else None,
        sums[: ctx.prefix].to(weight.dtype) if prefix_grad else None,
        None,
        None,
    )


def _flops(images_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    """As torch's own counter counts the convolution."""
    grid = [n // p for n, p in zip(images_shape[2:], weight_shape[2:], strict=True)]
    return 2 * images_shape[0] * math.prod(grid) * math.prod(weight_shape)


def _backward_flops(
    grad_shape, images_shape, weight_shape, mean, std, images_grad, weight_grad, **kwargs
) -> int:
    return _flops(images_shape, weight_shape) * (int(images_grad) + int(weight_grad))


OP = Op(
    "patch_embed",
    SCHEMA,
    BACKWARD_SCHEMA,
    PatchEmbedBackwardArguments,
    fake=_fake,
    backward_fake=_backward_fake,
    save=_save,
    backward=_backward,
    reference=reference.patch_embed,
    reference_backward=reference.patch_embed_backward,
    flops=_flops,
    backward_flops=_backward_flops,
    prefer=thresholds.patch_embed,
)
FLOAT64 = float64_of("weight")
OP.add_torch(stock.patch_embed, refuses=(FLOAT64,))
OP.add_native("cpu", refuses=(NOT_ON_CPU, FLOAT64), refuses_backward=(NOT_ON_CPU, FLOAT64))
OP.add_native("cuda", _cuda_limits.PATCH_EMBED, _cuda_limits.PATCH_EMBED)
OP.add_kernels(
    "triton",
    "patchgen_fast.triton.patch_embed:patch_embed",
    "patchgen_fast.triton.patch_embed:patch_embed_backward",
    refuses=(NOT_FOR_TRITON, FLOAT64),
    refuses_backward=(NOT_FOR_TRITON, FLOAT64),
    unavailable=triton.unavailable_reason(),
)


@functools.lru_cache(maxsize=64)
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """A statistic on its device, made once, so that no call copies to a GPU."""
    with torch.inference_mode(False):  # what is kept must serve training too
        return torch.tensor(values, dtype=torch.float32, device=device)


def _statistic(name: str, value: Any, images: Tensor) -> Tensor | None:
    """mean or std as float32 ``[C]``, from a float, floats or a tensor."""
    if value is None:
        return None
    channels = images.shape[1]
    if isinstance(value, Tensor):
        if not is_like(value, (channels,), images.device, (value.dtype,)):
            check_tensors("patch_embed", {"images": images, name: value})
            check_shape("patch_embed", name, value, (channels,))
        return (value.detach() if value.requires_grad else value).float().contiguous()
    if isinstance(value, str) or not isinstance(value, (int, float, Iterable)):
        raise TypeError(
            f"patch_embed: expected {name} as a float, {channels} floats or a tensor; "
            f"got {describe(value)}"
        )
    values = (value,) * channels if isinstance(value, (int, float)) else tuple(value)
    if len(values) != channels:
        raise ValueError(
            f"patch_embed: expected {name} as one float or {channels}, one a channel; "
            f"got {len(values)}"
        )
    if torch.compiler.is_compiling():
        return torch.tensor(values, dtype=torch.float32, device=images.device)
    return _constant(tuple(float(v) for v in values), images.device)


def _is_usual(images: Any, weight: Any, bias: Any, pos_embed: Any, prefix: Any) -> bool:
    """Whether the tensors are right in all that ``_check`` looks at one by one."""
    if not isinstance(images, Tensor) or not isinstance(weight, Tensor):
        return False
    shape, patch, dtype, device = images.shape, weight.shape, weight.dtype, images.device
    if not (
        len(shape) == len(patch) == 4
        and dtype in FLOATS
        and (images.dtype == torch.uint8 or images.dtype in FLOATS)
        and weight.device == device
        and shape[1] == patch[1]
        and 0 not in patch
        and shape[2] >= patch[2]
        and shape[3] >= patch[3]
    ):
        return False
    embed, dtypes = patch[0], (dtype,)
    tokens = (shape[2] // patch[2]) * (shape[3] // patch[3])
    return (
        (bias is None or is_like(bias, (embed,), device, dtypes))
        and (
            pos_embed is None
            or is_like(pos_embed, (tokens, embed), device, dtypes)
            or is_like(pos_embed, (1, tokens, embed), device, dtypes)
        )
        and (
            prefix is None
            or isinstance(prefix, Tensor)
            and (prefix.dim() == 2 or (prefix.dim() == 3 and prefix.shape[0] == 1))
            and is_like(prefix, (*prefix.shape[:-1], embed), device, dtypes)
        )
    )


def _check(images: Any, weight: Any, **others: Any) -> None:
    if _is_usual(images, weight, **others):
        return
    inputs = {"images": images, "weight": weight}
    check_tensors("patch_embed", inputs, **others)
    for name, x in inputs.items():
        if x.dim() not in (4, 5):
            raise ValueError(
                f"patch_embed: expected {name} of 4 dimensions, or 5 for video; got {describe(x)}"
            )
    check_float("patch_embed", weight=weight)
    if images.dtype != torch.uint8 and images.dtype not in FLOATS:
        raise TypeError(
            "patch_embed: expected images in uint8 (0 to 255), float32, bfloat16 or float16; "
            f"got {describe(images)}. Convert them with .float()"
        )
    check_same_dtype("patch_embed", weight.dtype, "weight", **others)
    embed, channels, *patch = weight.shape
    if images.dim() != weight.dim() or images.shape[1] != channels:
        raise ValueError(
            f"patch_embed: expected images of {channels} channels and {weight.dim()} dimensions, "
            f"as weight {list(weight.shape)} has; got {describe(images)}"
        )
    if 0 in weight.shape or any(n < p for n, p in zip(images.shape[2:], patch, strict=True)):
        raise ValueError(
            f"patch_embed: expected images of at least one patch of {patch} pixels; "
            f"got {describe(images)}"
        )
    check_shape("patch_embed", "bias", others["bias"], (embed,))
    tokens = _tokens(images, weight)
    check_shape(
        "patch_embed", "pos_embed", others["pos_embed"], (tokens, embed), (1, tokens, embed)
    )
    check_shape("patch_embed", "prefix", others["prefix"], (None, embed), (1, None, embed))


def _rows(tokens: Tensor | None) -> Tensor | None:
    """``[1, N, E]`` or ``[N, E]`` as ``[N, E]``, contiguous."""
    if tokens is None:
        return None
    return (tokens if tokens.dim() == 2 else tokens.flatten(0, 1)).contiguous()


def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    pos_embed: Tensor | None = None,
    prefix: Tensor | None = None,
    mean: float | Sequence[float] | Tensor | None = None,
    std: float | Sequence[float] | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Embed the patches of images, or of videos.

    Args:
        images: ``[B, C, H, W]`` or ``[B, C, T, H, W]``; float32, bfloat16, float16, or uint8 from
            0 to 255; any memory format. At least one patch; what fills no patch at the right and
            below is left out.
        weight: ``[E, C, Ph, Pw]`` or ``[E, C, Pt, Ph, Pw]``, as of a convolution, in float32,
            bfloat16 or float16.
        bias: ``[E]`` in the weight's dtype.
        pos_embed: ``[N, E]`` or ``[1, N, E]`` in the weight's dtype, added to the patches' tokens.
        prefix: ``[P, E]`` or ``[1, P, E]`` in the weight's dtype, tokens put before, without
            position.
        mean: subtracted from the images on the 0 to 1 scale: a float, one a channel, or a tensor
            ``[C]``.
        std: then divided by, as mean.
        backend: None for the fastest, or "cuda", "triton", "cpu", "torch", "reference".

    Returns:
        ``[B, P + N, E]``, contiguous, in the weight's dtype.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or value; BackendRefused: ``backend``
            can't run this call.
    """
    weight, bias, pos_embed, prefix = autocast(weight, bias, pos_embed, prefix)
    _check(images, weight, bias=bias, pos_embed=pos_embed, prefix=prefix)
    if images.dtype == torch.float64 and weight.dtype != torch.float64:
        images = images.float()
    args = PatchEmbedArguments(
        images,
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        _rows(pos_embed),
        _rows(prefix),
        _statistic("mean", mean, images),
        _statistic("std", std, images),
    )
    return OP(args, backend)
