"""The "torch" backend: for each op the best composition of stock operators, with torch's own
autograd.

Peers that a kernel has to beat, and what runs where it does not.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference


def _joined_mask(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    kv_lengths: Tensor | None,
    query_offset: Tensor | None,
    is_causal: bool,
) -> Tensor | None:
    """Mask, lengths and causality as the one mask that SDPA takes."""
    if kv_lengths is None and not is_causal:
        return attn_mask
    seen = reference.attendable(query, key, attn_mask, kv_lengths, query_offset, is_causal)
    if seen is None or attn_mask is None or attn_mask.dtype == torch.bool:
        return seen
    return attn_mask.masked_fill(~seen, -torch.inf)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    kv_lengths: Tensor | None,
    query_offset: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """``F.scaled_dot_product_attention``; the log-sum-exp, which it keeps to itself, is made
    apart.
    """
    plain_causal = is_causal and attn_mask is None and kv_lengths is None and query_offset is None
    mask = None
    if not plain_causal:
        mask = _joined_mask(query, key, attn_mask, kv_lengths, query_offset, is_causal)
    # A branch, since a comparison of sizes is no bool to SDPA under torch.compile.
    shared_heads = False
    if query.shape[1] != key.shape[1]:
        shared_heads = True
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        mask,
        dropout_p,
        plain_causal,
        scale=scale,
        enable_gqa=shared_heads,
    )
    lse = None
    if return_lse:
        lse = reference.attention_lse(
            query, key, attn_mask, kv_lengths, query_offset, is_causal, scale
        )
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, None]:
    """SDPA of one sequence after the other."""
    starts, ends = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    outs = [query[:0] + key[:0].sum() + value[:0].sum()]  # no sequences have gradients too
    for s in range(len(starts) - 1):
        rows, keys = slice(starts[s], starts[s + 1]), slice(ends[s], ends[s + 1])
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query[rows], key[keys], value[keys]))
        offset = torch.full((1,), k.shape[2] - q.shape[2], dtype=torch.int32, device=q.device)
        out, _ = attention(q, k, v, None, None, offset, is_causal, scale, 0.0, False)
        outs.append(out.squeeze(0).transpose(0, 1))
    outs.append(query.new_zeros((query.shape[0] - starts[-1], *query.shape[1:])))
    return torch.cat(outs), None


def _norm_rope(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    norm: str,
    eps: float,
    interleaved: bool,
    num_prefix_tokens: int,
) -> Tensor:
    y, width = x, (x.shape[-1],)
    weight, bias = (None if w is None else w.to(x.dtype) for w in (weight, bias))
    if norm == "layer":
        y = F.layer_norm(y, width, weight, bias, eps)
    elif norm == "rms":
        y = F.rms_norm(y, width, weight, eps)
        y = y if bias is None else y + bias
    if cos is not None and sin is not None:
        prefix, rest = y[:, :, :num_prefix_tokens], y[:, :, num_prefix_tokens:]
        rest = rest * cos + reference.rotate(rest, interleaved) * sin
        y = torch.cat((prefix, rest.to(x.dtype)), dim=2)
    return y.transpose(1, 2).contiguous().transpose(1, 2)


def qk_norm_rope(
    query: Tensor,
    key: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    norm: str,
    eps: float,
    interleaved: bool,
    num_prefix_tokens: int,
) -> tuple[Tensor, Tensor]:
    """``F.layer_norm`` or ``F.rms_norm``, then the rotation as products and a concatenation."""
    rest = (cos, sin, norm, eps, interleaved, num_prefix_tokens)
    return _norm_rope(query, q_weight, q_bias, *rest), _norm_rope(key, k_weight, k_bias, *rest)


def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    prefix: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
) -> Tensor:
    """Unfold and ``F.linear``: the fastest stock form of bfloat16 on the CPUs measured so far, and
    about as fast as the convolution in float32.
    """
    pixels = reference.normalised_pixels(images, weight, mean, std, torch.float32)
    tokens = F.linear(reference.cut(pixels, weight.shape[2:]), weight.flatten(1), bias)
    if pos_embed is not None:
        tokens = tokens + pos_embed
    if prefix is not None:
        tokens = torch.cat((prefix.expand(tokens.shape[0], -1, -1), tokens), dim=1)
    return tokens


def patch_unembed(
    tokens: Tensor, weight: Tensor, bias: Tensor | None, grid_h: int, grid_w: int
) -> Tensor:
    """``F.linear`` and a fold; the bias is the same for all pixels of a channel."""
    patch = weight.shape[2:]
    rows_bias = None if bias is None else bias.repeat_interleave(patch.numel())
    rows = F.linear(tokens, weight.flatten(1).mT, rows_bias)
    return reference.paste(rows, weight.shape[1], patch, [grid_h, grid_w]).contiguous()


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    save_preactivation: bool,
) -> tuple[Tensor, None]:
    """``F.linear``, the activation, the sum."""
    out = reference.ACTIVATIONS[activation](F.linear(input, weight, bias))
    return (out if residual is None else out + residual), None


def layer_norm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, None, None]:
    """``F.layer_norm``."""
    weight, bias = (None if w is None else w.to(input.dtype) for w in (weight, bias))
    return F.layer_norm(input, (input.shape[-1],), weight, bias, eps), None, None


def add_layer_norm(
    input: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, None, None]:
    """The sum and ``F.layer_norm``."""
    total = input + residual
    out, _, _ = layer_norm(total, weight, bias, eps)
    return out, total, None, None
