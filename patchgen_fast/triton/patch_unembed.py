"""patch_unembed: tokens to images, the transposed convolution with stride = kernel.

    images[b, :, patch n] = tokens[b, n] weight + bias

One kernel forward; the gradients are patch_embed's kernels with the roles changed: grad_tokens are
the patches of grad_images times weight^T, grad_weight is tokens^T times those patches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import empty, launch, multiprocessors
from .patches import pixels_to_rows, rows_to_pixels, weight_gradient
from .replay import replayed
from .sums import sum_shares
from .tiles import wide


@triton.jit(
    do_not_specialize=[
        "stride_b",
        "stride_c",
        "stride_h",
        "stride_w",
        "batches",
        "width",
        "pixels",
        "shares",
    ]
)
def _channel_sum_kernel(
    grad, result, stride_b, stride_c, stride_h, stride_w, batches, width, pixels, shares,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Result [shares, channels]: one program sums its share of one channel's blocks of pixels."""
    share = tl.program_id(0) % shares
    channel = tl.program_id(0) // shares
    channels = tl.num_programs(0) // shares
    blocks = tl.cdiv(pixels, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for item in range(share, batches * blocks, shares):
        pixel = item % blocks * BLOCK + tl.arange(0, BLOCK)
        start = grad + wide(item // blocks) * stride_b + wide(channel) * stride_c
        offset = wide(pixel // width) * stride_h + wide(pixel % width) * stride_w
        total += tl.load(start + offset, mask=pixel < pixels, other=0.0).to(tl.float32)
    tl.store(result + share * channels + channel, tl.sum(total, 0))


@replayed
def patch_unembed(
    tokens: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    grid_h: int,
    grid_w: int,
) -> torch.Tensor:
    """tokens [B, N, E] -> images [B, C, grid_h * Ph, grid_w * Pw] in the tokens' dtype."""
    if tokens.stride(2) != 1:
        tokens = tokens.contiguous()
    _, channels, high, wide_ = weight.shape
    images = empty(tokens, tokens.shape[0], channels, grid_h * high, grid_w * wide_)
    return rows_to_pixels(tokens, weight, images, bias=bias)


@replayed
def patch_unembed_backward(
    grad_images: torch.Tensor, tokens: torch.Tensor, weight: torch.Tensor, bias_grad: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """grad_tokens [B, N, E], grad_weight as weight, grad_bias [C] (size 0 where not asked for)."""
    if tokens.stride(2) != 1:
        tokens = tokens.contiguous()
    grad_tokens = pixels_to_rows(grad_images, weight)
    grad_weight = weight_gradient(tokens, grad_images, weight)
    grad_bias = empty(weight, 0)
    if bias_grad:
        batches, channels, height, width = grad_images.shape
        grad_bias = empty(weight, channels)
        items = batches * triton.cdiv(height * width, 1024)
        if items == 0:
            return grad_tokens, grad_weight, grad_bias.zero_()
        fill = triton.cdiv(4 * multiprocessors(weight.device.index), channels)
        shares = min(items, fill)
        partial = empty(weight, shares, channels, dtype=torch.float32)
        launch(
            _channel_sum_kernel,
            (channels * shares,),
            (grad_images, partial, *grad_images.stride(), batches, width, height * width, shares),
            BLOCK=1024,
            num_warps=4,
        )
        sum_shares(partial, grad_bias)
    return grad_tokens, grad_weight, grad_bias
