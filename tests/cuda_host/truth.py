"""Attention spelled out, in float64 for the truth and in the inputs' dtype for the yardstick."""

from __future__ import annotations

import torch

LARGE_NEGATIVE = torch.finfo(torch.float32).min


def inputs(queries, keys, head_dim, *, batch=1, heads=2, kv_heads=None, dtype=torch.bfloat16):
    """query, key and value of the same random numbers for the same sizes."""
    torch.manual_seed(queries * 1000 + keys + head_dim)
    kv_heads = kv_heads or heads
    query = torch.randn(batch, heads, queries, head_dim, dtype=dtype)
    key, value = (torch.randn(batch, kv_heads, keys, head_dim, dtype=dtype) for _ in range(2))
    return query, key, value


def attention(
    query,
    key,
    value,
    attn_mask=None,
    kv_lengths=None,
    query_offset=None,
    is_causal=False,
    scale=1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse, every step rounded to the dtype of the query."""
    group = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(group, 1) for t in (key, value))
    batch, _, queries, _ = query.shape
    keys = key.shape[2]
    logits = query @ key.mT * scale
    seen = torch.ones(batch, 1, queries, keys, dtype=torch.bool)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            seen = seen & attn_mask
        else:
            logits = logits + attn_mask.to(logits.dtype)
    if kv_lengths is not None:
        seen = seen & (torch.arange(keys) < kv_lengths.view(-1, 1, 1, 1))
    if is_causal:
        offset = 0 if query_offset is None else query_offset.view(-1, 1, 1, 1)
        seen = seen & (torch.arange(keys) <= torch.arange(queries).view(-1, 1) + offset)
    logits = logits.masked_fill(~seen, -torch.inf)
    if keys == 0:
        return query * 0, torch.full(query.shape[:3], -torch.inf)
    # Rows that see nothing are computed as rows of zeros and overwritten: autograd of an empty
    # softmax is NaN. exp(logits - lse) would lose log(sum) beside finfo.min; the softmax does not.
    empty = ~(logits > -torch.inf).any(-1)
    logits = logits.masked_fill(empty.unsqueeze(-1), 0)
    weights = logits.softmax(-1).masked_fill(empty.unsqueeze(-1), 0)
    return weights @ value, logits.logsumexp(-1).masked_fill(empty, -torch.inf)


def attention_gradients(query, key, value, grad_out, grad_lse, **options):
    """Gradients by autograd of the same formula, in the inputs' dtype."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (query, key, value)]
    out, lse = attention(*leaves, **options)
    torch.autograd.backward(out, grad_out.to(out.dtype), retain_graph=grad_lse is not None)
    if grad_lse is not None and lse.requires_grad:
        torch.autograd.backward(lse, grad_lse.to(lse.dtype))
    return [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]


def patch_embed(
    images, weight, bias=None, pos_embed=None, prefix=None, mean=None, std=None
) -> torch.Tensor:
    """Patch embedding in weight's dtype; in float64 nothing is rounded on the way."""
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    x = images.to(wide) / (255 if images.dtype == torch.uint8 else 1)
    broadcast = (1, -1) + (1,) * (x.dim() - 2)
    if mean is not None:
        x = x - mean.view(broadcast)
    if std is not None:
        x = x / std.view(broadcast)
    convolve = torch.nn.functional.conv3d if x.dim() == 5 else torch.nn.functional.conv2d
    out = convolve(x.to(weight.dtype), weight, stride=weight.shape[2:]).flatten(2).mT
    if bias is not None:
        out = out + bias
    if pos_embed is not None:
        out = out + pos_embed
    if prefix is not None:
        out = torch.cat([prefix.expand(out.shape[0], *prefix.shape), out], 1)
    return out


def assert_parity(got: torch.Tensor, eager: torch.Tensor, truth: torch.Tensor) -> None:
    """Error of `got` at most twice that of eager in the same dtype, plus a rounding floor."""
    eps = torch.finfo(got.dtype).eps
    assert got.isfinite().all(), "not finite"
    if got.numel() == 0:
        return
    ours, theirs = (got.double() - truth).abs(), (eager.double() - truth).abs()
    size = truth.abs()
    assert ours.max() <= 2 * theirs.max() + 2 * eps * size.max(), (ours.max(), theirs.max())
    assert ours.mean() <= 2 * theirs.mean() + eps * size.mean(), (ours.mean(), theirs.mean())
