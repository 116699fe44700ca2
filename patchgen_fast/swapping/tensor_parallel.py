"""How the ops run on DTensors: each process its own images, its own heads, or its own features.

Without a strategy a DTensor raises at an operator that torch does not know. Splitting images and
heads is exact without communication, as they never meet in these ops; splitting features leaves, in
one direction, partial sums that torch adds when somebody needs the whole.

A strategy is the pair (placements of the results, placements of the arguments), None for what is no
tensor. Sizes that do not divide evenly are not split.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

BACKENDS = ("cpu", "cuda", "triton", "reference")
IMAGES, HEADS = 0, 1
WHOLE = Replicate()

Strategy = tuple[list[Any], list[Any]]


@lru_cache(maxsize=1)
def register() -> None:
    """Register the strategies of the ops and their backwards, once a process."""
    for name, (forward, backward) in STRATEGIES.items():
        import_module(f"patchgen_fast.ops.{name}")
        for operator, strategies in ((name, forward), (f"{name}_backward", backward)):
            packet = getattr(torch.ops.patchgen_fast, operator)
            for backend in BACKENDS:
                if backend in packet.overloads():
                    register_sharding(getattr(packet, backend))(strategies)


def _even(tensor: Any, *dims: int) -> list[int]:
    """Those of the dimensions that divide evenly among the processes."""
    return [dim for dim in dims if tensor.shape[dim] % tensor.mesh.size() == 0]


def _given(placement: Any, *tensors: Any) -> list[Any]:
    """One placement for all of the tensors that are there."""
    return [None if tensor is None else placement for tensor in tensors]


def _place(dim: int | None) -> Any:
    return WHOLE if dim is None else Shard(dim)


def _broadcast(dim: int | None, *tensors: Any) -> list[Any]:
    """Split where the tensor has the dimension in full, whole where it is broadcast or absent."""
    return [
        None if tensor is None else _place(None if dim is None or tensor.shape[dim] == 1 else dim)
        for tensor in tensors
    ]


# --------------------------------------------------------------------------------------- attention


def _attention(query, key, value, attn_mask, kv_lengths, query_offset, is_causal, scale):
    return [
        (
            [_place(dim)] * 2,
            [*[_place(dim)] * 3, *_masks(dim, attn_mask, kv_lengths, query_offset), None, None],
        )
        for dim in (None, *_even(key, IMAGES, HEADS))
    ]


def _attention_backward(
    grad_out, grad_lse, query, key, value, out, lse, attn_mask, kv_lengths, query_offset,
    is_causal, scale, mask_grad,
):  # fmt: skip
    found = []
    # the gradient of a mask that all images or heads share would have to be summed over processes
    for dim in (None,) if mask_grad else (None, *_even(key, IMAGES, HEADS)):
        place = _place(dim)
        inputs = [place, *_given(place, grad_lse), *[place] * 5]
        inputs += _masks(dim, attn_mask, kv_lengths, query_offset)
        found.append(([place] * 3 + [WHOLE], [*inputs, None, None, None]))
    return found


def _masks(dim: int | None, attn_mask: Any, kv_lengths: Any, query_offset: Any) -> list[Any]:
    counts = Shard(0) if dim == IMAGES else WHOLE
    return [*_broadcast(dim, attn_mask), *_given(counts, kv_lengths, query_offset)]


def _varlen_attention(query, key, value, cu_q, cu_k, max_q, max_k, is_causal, scale):
    found = []
    for dim in (None, *_even(key, HEADS)):
        lse = WHOLE if dim is None else Shard(0)  # [H, T]
        inputs = [*[_place(dim)] * 3, WHOLE, WHOLE, None, None, None, None]
        found.append(([_place(dim), lse], inputs))
    return found


def _varlen_attention_backward(
    grad_out, grad_lse, query, key, value, out, lse, cu_q, cu_k, max_q, max_k, is_causal, scale
):
    found = []
    for dim in (None, *_even(key, HEADS)):
        place, of_lse = _place(dim), WHOLE if dim is None else Shard(0)
        inputs = [place, *_given(of_lse, grad_lse), *[place] * 4, of_lse]
        found.append(([place] * 3, [*inputs, WHOLE, WHOLE, None, None, None, None]))
    return found


def _qk_norm_rope(query, key, q_weight, k_weight, q_bias, k_bias, cos, sin, *options):
    return [
        (
            [_place(dim)] * 2,
            [
                *[_place(dim)] * 2,
                *_given(WHOLE, q_weight, k_weight, q_bias, k_bias),
                *_broadcast(dim, cos, sin),
                *[None] * len(options),
            ],
        )
        for dim in (None, *_even(key, IMAGES, HEADS))
    ]


def _qk_norm_rope_backward(
    grad_query, grad_key, query, key, q_weight, k_weight, q_bias, k_bias, cos, sin, *options
):
    found = []
    weights = (q_weight, k_weight, q_bias, k_bias)
    for dim in (None, *_even(key, IMAGES, HEADS)):
        rotary = _broadcast(dim, cos, sin)
        inputs = [*[_place(dim)] * 4, *_given(WHOLE, *weights), *rotary]
        grads: list[Any] = [WHOLE] * 8
        if dim is not None:
            cos_sin_grad = options[-1]
            of_rotary = [
                WHOLE if placed is None or not cos_sin_grad else _summed(placed)
                for placed in rotary
            ]
            of_weights = [WHOLE if weight is None else Partial() for weight in weights]
            grads = [Shard(dim), Shard(dim), *of_weights, *of_rotary]
        found.append((grads, [*inputs, *[None] * len(options)]))
    return found


def _summed(placed: Any) -> Any:
    """Where the gradient of an argument is, if what used it was split."""
    return Partial() if placed == WHOLE else placed


# --------------------------------------------------------------------------------- linear and norm


def _linear(input, weight, bias, activation, residual, save_preactivation):
    last = len(input.shape) - 1
    rest = [None, *_given(WHOLE, residual), None]
    found: list[Strategy] = [([WHOLE] * 2, [WHOLE, WHOLE, *_given(WHOLE, bias), *rest])]

    def kept(place):
        return [place, place if save_preactivation else WHOLE]

    if last and _even(input, 0):  # rows
        rest = [None, *_given(Shard(0), residual), None]
        found.append((kept(Shard(0)), [Shard(0), WHOLE, *_given(WHOLE, bias), *rest]))
    if _even(weight, 0):  # columns
        rest = [None, *_given(Shard(last), residual), None]
        found.append((kept(Shard(last)), [WHOLE, Shard(0), *_given(Shard(0), bias), *rest]))
    if activation == "none" and bias is None and residual is None and _even(weight, 1):
        found.append(([Partial(), WHOLE], [Shard(last), Shard(1), None, None, None, None]))
    return found


def _linear_backward(
    grad_out, input, weight, preactivation, activation, input_grad, weight_grad, bias_grad
):
    last = len(input.shape) - 1
    saved = activation != "none"

    def strategy(grads, places, of_preactivation):
        wanted = (input_grad, weight_grad, bias_grad)
        outputs = [place if want else WHOLE for place, want in zip(grads, wanted, strict=True)]
        before = of_preactivation if saved else WHOLE
        return outputs, [*places, before, None, None, None, None]

    found = [strategy([WHOLE] * 3, [WHOLE] * 3, WHOLE)]
    if last and _even(input, 0):
        grads = [Shard(0), Partial(), Partial()]
        found.append(strategy(grads, [Shard(0), Shard(0), WHOLE], Shard(0)))
    if _even(weight, 0):
        grads = [Partial(), Shard(0), Shard(0)]
        found.append(strategy(grads, [Shard(last), WHOLE, Shard(0)], Shard(last)))
    if not saved and _even(weight, 1):
        grads = [Shard(last), Shard(1), WHOLE]
        found.append(strategy(grads, [WHOLE, Shard(last), Shard(1)], WHOLE))
    return found


def _layer_norm(input, weight, bias, eps):
    affine = _given(WHOLE, weight, bias)
    # the statistics are one number a row, rows in order: only the first dimension can be split
    dims = _even(input, 0) if len(input.shape) > 1 else []
    return [([_place(dim)] * 3, [_place(dim), *affine, None]) for dim in (None, *dims)]


def _add_layer_norm(input, residual, weight, bias, eps):
    # the sum and the residual lie as the input does
    alone = _layer_norm(input, weight, bias, eps)
    return [([place, *outs], [place, place, *rest]) for outs, (place, *rest) in alone]


def _add_layer_norm_backward(grad_normalised, grad_sum, sum, weight, mean, rstd):
    found = []
    dims = _even(sum, 0) if len(sum.shape) > 1 else []
    for dim in (None, *dims):
        place = _place(dim)
        of_weights = WHOLE if dim is None else Partial()
        inputs = [place, *_given(place, grad_sum), place, *_given(WHOLE, weight), place, place]
        found.append(([place, of_weights, of_weights], inputs))
    return found


def _layer_norm_backward(grad_out, input, weight, mean, rstd):
    return _add_layer_norm_backward(grad_out, None, input, weight, mean, rstd)


# ------------------------------------------------------------------------------------------ patches


def _patch_embed(images, weight, bias, pos_embed, prefix, mean, std):
    statistics = _given(WHOLE, mean, std)
    others = _given(WHOLE, bias, pos_embed, prefix)
    found: list[Strategy] = [([WHOLE], [WHOLE, WHOLE, *others, *statistics])]
    if _even(images, 0):
        found.append(([Shard(0)], [Shard(0), WHOLE, *others, *statistics]))
    if _even(weight, 0):  # features
        others = [*_given(Shard(0), bias), *_given(Shard(1), pos_embed, prefix)]
        found.append(([Shard(2)], [WHOLE, Shard(0), *others, *statistics]))
    return found


def _patch_embed_backward(grad_out, images, weight, mean, std, images_grad, weight_grad):
    statistics = [*_given(WHOLE, mean, std), None, None]

    def strategy(grads, places):
        wanted = (images_grad, weight_grad, True)
        outputs = [place if want else WHOLE for place, want in zip(grads, wanted, strict=True)]
        return outputs, [*places, *statistics]

    found = [strategy([WHOLE] * 3, [WHOLE] * 3)]
    if _even(images, 0):
        found.append(strategy([Shard(0), Partial(), Partial()], [Shard(0), Shard(0), WHOLE]))
    if _even(weight, 0):
        found.append(strategy([Partial(), Shard(0), Shard(1)], [Shard(2), WHOLE, Shard(0)]))
    return found


def _patch_unembed(tokens, weight, bias, grid_h, grid_w):
    rest = [*_given(WHOLE, bias), None, None]
    found: list[Strategy] = [([WHOLE], [WHOLE, WHOLE, *rest])]
    if _even(tokens, 0):
        found.append(([Shard(0)], [Shard(0), WHOLE, *rest]))
    if bias is None and _even(weight, 0):  # features
        found.append(([Partial()], [Shard(2), Shard(0), *rest]))
    return found


def _patch_unembed_backward(grad_images, tokens, weight, bias_grad):
    found: list[Strategy] = [([WHOLE] * 3, [WHOLE, WHOLE, WHOLE, None])]
    if _even(tokens, 0):
        of_bias = Partial() if bias_grad else WHOLE
        found.append(([Shard(0), Partial(), of_bias], [Shard(0), Shard(0), WHOLE, None]))
    if _even(weight, 0):
        found.append(([Shard(2), Shard(0), WHOLE], [WHOLE, Shard(2), Shard(0), None]))
    return found


# op -> strategies of its forward and of its backward
STRATEGIES = {
    "attention": (_attention, _attention_backward),
    "varlen_attention": (_varlen_attention, _varlen_attention_backward),
    "qk_norm_rope": (_qk_norm_rope, _qk_norm_rope_backward),
    "linear": (_linear, _linear_backward),
    "layer_norm": (_layer_norm, _layer_norm_backward),
    "add_layer_norm": (_add_layer_norm, _add_layer_norm_backward),
    "patch_embed": (_patch_embed, _patch_embed_backward),
    "patch_unembed": (_patch_unembed, _patch_unembed_backward),
}
