"""qk_norm_rope: normalisation over D and rotary embedding of queries and keys in one pass.

    a = (x - mean) * rstd * weight + bias  ("rms" without the mean; "none" without both)
    y = a * cos + turn(a) * sin,  turn((a1, a2)) = (-a2, a1) of halves or of neighbouring pairs

Forward: one program owns BLOCK tokens of one head of the query or of the key. Backward: one program
owns BLOCK tokens and a share of the (batch, head) pairs that have the same cos and sin, and keeps
its sums for weight, bias, cos and sin in registers; shares are added in order. Each tensor moves
once. Arithmetic in float32.
"""

from __future__ import annotations

import torch
import triton

from .launch import empty, launch, multiprocessors, vector
from .qk_norm_rope_kernels import RopeSpec, _qk_norm_rope_bwd_kernel, _qk_norm_rope_fwd_kernel
from .replay import replayed
from .sums import sum_shares

BLOCK = 16  # tokens of a program: two tiles of [16, 128] float32 at D 256 stay in registers


def _spec(
    tensors: tuple[torch.Tensor, ...], norm: str, interleaved: bool, rotate: bool
) -> tuple[RopeSpec, tuple[int, ...]]:
    """The spec of a launch, and the strides of its [B, H, N, D] tensors, three each."""
    first = tensors[0]
    strides = tuple(stride for tensor in tensors for stride in tensor.stride()[:3])
    vec = vector(first.element_size(), *strides)
    d = first.shape[3]
    half = (d + 1) // 2
    width = triton.next_power_of_2(half)
    spec = RopeSpec(d, vec, half, width, norm, interleaved, rotate)
    return spec, tuple(stride // vec for stride in strides)


def _angle_strides(cos: torch.Tensor | None) -> tuple[int, int, int]:
    if cos is None:
        return 0, 0, 0
    batch, head, token, _ = (
        0 if size == 1 else stride for size, stride in zip(cos.shape, cos.stride(), strict=True)
    )
    return batch, head, token


def _dense_angles(
    cos: torch.Tensor | None, sin: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """cos and sin with equal strides, the last 1: one set of strides serves both."""
    if cos is None or sin is None:
        return None, None
    if cos.stride(3) != 1 or cos.stride() != sin.stride():
        return cos.contiguous(), sin.contiguous()
    return cos, sin


@replayed
def qk_norm_rope(
    query: torch.Tensor,
    key: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    q_bias: torch.Tensor | None,
    k_bias: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    norm: str,
    eps: float,
    interleaved: bool,
    num_prefix_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Arguments and results as in the op's schema; the results lie in memory as [B, N, H, D]."""
    batches, heads, tokens, d = query.shape
    kv_heads = key.shape[1]
    q_out = empty(query, batches, tokens, heads, d).transpose(1, 2)
    k_out = empty(key, batches, tokens, kv_heads, d).transpose(1, 2)
    cos, sin = _dense_angles(cos, sin)
    blocks = triton.cdiv(tokens, BLOCK)
    programs = batches * (heads + kv_heads) * blocks
    if programs:
        spec, strides = _spec((query, key), norm, interleaved, cos is not None)
        launch(
            _qk_norm_rope_fwd_kernel,
            (programs,),
            (query, key, q_weight, k_weight, q_bias, k_bias, cos, sin, q_out, k_out,
             *strides, *_angle_strides(cos), heads, kv_heads, tokens,
             num_prefix_tokens, blocks, eps),
            SPEC=spec,
            BLOCK=BLOCK,
            num_warps=4,
        )  # fmt: skip
    return q_out, k_out


@replayed
def qk_norm_rope_backward(
    grad_query: torch.Tensor,
    grad_key: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    q_bias: torch.Tensor | None,
    k_bias: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    norm: str,
    eps: float,
    interleaved: bool,
    num_prefix_tokens: int,
    cos_sin_grad: bool,
) -> tuple[torch.Tensor, ...]:
    """Gradients of query, key, the weights, the biases, cos and sin; size 0 where there is none."""
    dense_cos, dense_sin = _dense_angles(cos, sin)
    angle_sums: list[list[torch.Tensor]] = []
    results: list[torch.Tensor] = []
    for grad, x, vectors in (
        (grad_query, query, (q_weight, q_bias)),
        (grad_key, key, (k_weight, k_bias)),
    ):
        if grad.stride(3) != 1:
            grad = grad.contiguous()
        batches, heads, tokens, d = x.shape
        groups = (1, 1) if cos is None else (cos.shape[0], cos.shape[1])
        blocks = triton.cdiv(tokens, BLOCK)
        pairs = (batches // groups[0]) * (heads // groups[1])
        owners = max(1, blocks * groups[0] * groups[1])
        fill = triton.cdiv(4 * multiprocessors(x.device.index), owners)
        shares = max(1, min(pairs, fill))
        grad_x = empty(x, batches, tokens, heads, d).transpose(1, 2)
        sums = [
            None if vector is None else empty(x, owners * shares, d, dtype=torch.float32)
            for vector in vectors
        ]
        angles: list[torch.Tensor] = []
        if cos_sin_grad and cos is not None:
            angles = [empty(x, shares, *cos.shape, dtype=torch.float32) for _ in range(2)]
            angle_sums.append(angles)
        if x.numel():
            spec, strides = _spec((grad, x), norm, interleaved, cos is not None)
            angle_sizes = (*_angle_strides(dense_cos), batches, heads, tokens, num_prefix_tokens)
            launch(
                _qk_norm_rope_bwd_kernel,
                (owners * shares,),
                (grad, x, *vectors, dense_cos, dense_sin, grad_x, *sums,
                 *(angles or (None, None)), *strides, *angle_sizes, blocks, *groups, shares, eps),
                SPEC=spec,
                BLOCK=BLOCK,
                num_warps=4,
            )  # fmt: skip
        else:
            for partial in (*sums, *angles):
                if partial is not None:
                    partial.zero_()
        results.append(grad_x)
        for parameter, partial in zip(vectors, sums, strict=True):
            if parameter is None or partial is None:
                results.append(empty(x, 0))
            else:
                results.append(sum_shares(partial, empty(parameter, d)))
    grad_angles = [empty(query, 0), empty(query, 0)]
    if cos is not None and angle_sums:
        grad_angles = [
            sum_shares(torch.cat([angles[i] for angles in angle_sums]), empty(cos, *cos.shape))
            for i in range(2)
        ]
    grad_q, q_w, q_b, grad_k, k_w, k_b = results
    return grad_q, grad_k, q_w, k_w, q_b, k_b, *grad_angles
