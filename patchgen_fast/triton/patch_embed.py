"""patch_embed: images to tokens in one kernel, and its gradients.

    out[b, P + n] = weight . patch(b, n) + bias + pos_embed[n],   out[b, p] = prefix[p]

where a patch's pixels are (uint8: / 255), (- mean) / std, rounded to the weight's dtype. The
products are those of patches.py; here stands what is specific to the op. Gradients: grad_weight =
grad_out^T patches, grad_images = grad_out weight / std, and grad_out summed over the batch, from
which those of bias, pos_embed and prefix follow.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import empty, launch
from .patches import Patches, pixels_to_rows, row_strides, rows_to_pixels, weight_gradient
from .replay import replayed
from .tiles import wide


@triton.jit(do_not_specialize=["stride_b", "stride_n", "batches", "tokens"])
def _batch_sum_kernel(
    grad, result, stride_b, stride_n, batches, tokens,
    EMBED: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Result [tokens, E] float32: the sum of grad [batches, tokens, E], first entry first.

    One program owns BLOCK features of one token.
    """
    blocks: tl.constexpr = (EMBED + BLOCK - 1) // BLOCK
    token = wide(tl.program_id(0) // blocks)
    feature = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    real = feature < EMBED
    total = tl.zeros([BLOCK], tl.float32)
    for batch in range(batches):
        row = grad + (wide(batch) * stride_b + token * stride_n) * VEC
        total += tl.load(row + feature, mask=real, other=0.0).to(tl.float32)
    tl.store(result + token * EMBED + feature, total, mask=real)


@replayed
def patch_embed(
    images: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    pos_embed: torch.Tensor | None,
    prefix: torch.Tensor | None,
    mean: torch.Tensor | None,
    std: torch.Tensor | None,
) -> torch.Tensor:
    """Arguments and result as in the op's schema: [B, P + N, E] in the weight's dtype."""
    return pixels_to_rows(images, weight, bias, pos_embed, prefix, mean, std)


@replayed
def patch_embed_backward(
    grad_out: torch.Tensor,
    images: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor | None,
    std: torch.Tensor | None,
    images_grad: bool,
    weight_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """grad_images, grad_weight (size 0 where not asked for) and float32 [P + N, E], the batch's
    sum.
    """
    if grad_out.stride(2) != 1:
        grad_out = grad_out.contiguous()
    batches, tokens, embed = grad_out.shape
    cut = Patches(images, weight)
    rows = grad_out[:, tokens - cut.tokens :]
    grad_images = empty(images if images.is_floating_point() else weight, 0)
    if images_grad:
        grad_images = empty(images, *images.shape)
        if not cut.exact:
            grad_images.zero_()
        rows_to_pixels(rows, weight, grad_images, std=std)
    grad_weight = empty(weight, 0)
    if weight_grad:
        grad_weight = weight_gradient(rows, images, weight, mean, std)
    total = empty(weight, tokens, embed, dtype=torch.float32)
    if total.numel():
        strides, vec = row_strides(grad_out)
        launch(
            _batch_sum_kernel,
            (tokens * triton.cdiv(embed, 256),),
            (grad_out, total, *strides, batches, tokens),
            EMBED=embed,
            VEC=vec,
            BLOCK=256,
            num_warps=1,
        )
    return grad_images, grad_weight, total
