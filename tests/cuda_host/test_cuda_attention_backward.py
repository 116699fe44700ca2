"""The gradients of the short-sequence attention kernel, against float64."""

from __future__ import annotations

import pytest
import torch
import truth
from truth import LARGE_NEGATIVE, inputs


def check(host, query, key, value, *, grad_out=None, with_grad_lse=True, **options):
    options.setdefault("scale", query.shape[-1] ** -0.5)
    out, lse = host.attention(query, key, value, **options)
    grad_out = torch.randn(out.shape).to(out.dtype) if grad_out is None else grad_out
    grad_lse = torch.randn(lse.shape) if with_grad_lse else None
    got = host.attention_backward(grad_out, grad_lse, query, key, value, out, lse, **options)
    tensors = (query, key, value, grad_out)
    eager = truth.attention_gradients(*tensors, grad_lse, **options)
    exact = truth.attention_gradients(*[t.double() for t in tensors], grad_lse, **options)
    for ours, theirs, true in zip(got, eager, exact, strict=True):
        truth.assert_parity(ours, theirs, true)
    assert host.wavefronts_per_matrix == 1 or key.shape[2] == 0, "bank conflicts"
    return got


@pytest.mark.parametrize("tokens", [1, 16, 17, 50, 65, 197, 272])
def test_tokens(host, tokens):
    check(host, *inputs(tokens, tokens, 64, heads=1))


@pytest.mark.parametrize("head_dim", [32, 40, 64, 72, 80, 96, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_head_dims(host, head_dim, dtype):
    check(host, *inputs(37, 52, head_dim, dtype=dtype))


@pytest.mark.parametrize("queries, keys", [(1, 130), (130, 3), (40, 0)])
def test_cross_attention(host, queries, keys):
    check(host, *inputs(queries, keys, 32, heads=1))


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_query_heads_add_up(host, kv_heads):
    check(host, *inputs(20, 70, 32, batch=2, heads=4, kv_heads=kv_heads))


@pytest.mark.parametrize("shape", [(2, 2, 20, 33), (1, 2, 20, 1)])
@pytest.mark.parametrize("kind", ["bool", "element", "float32"])
def test_mask_by_broadcast(host, shape, kind):
    tensors = inputs(20, 33, 32, batch=2)
    mask = torch.randn(shape)
    mask = {"bool": mask > 0, "element": mask.bfloat16(), "float32": mask}[kind]
    check(host, *tensors, attn_mask=mask)


def test_empty_rows_and_the_least_float(host):
    tensors = inputs(20, 33, 32)
    mask = torch.zeros(1, 1, 20, 33)
    mask[..., 5:] = LARGE_NEGATIVE
    mask[:, :, 3] = LARGE_NEGATIVE
    mask[:, :, 17] = -torch.inf
    grad_query, _, _ = check(host, *tensors, attn_mask=mask)
    assert (grad_query[:, :, 17] == 0).all()


@pytest.mark.parametrize("causal", [False, True])
def test_lengths_and_offsets(host, causal):
    tensors = inputs(20, 33, 32, batch=4)
    lengths = torch.tensor([33, 16, 0, 7], dtype=torch.int32)
    offset = torch.tensor([0, 13, -3, 5], dtype=torch.int32)
    check(host, *tensors, kv_lengths=lengths, query_offset=offset, is_causal=causal)


def test_what_lies_beyond_the_length_is_never_read(host):
    query, key, value = inputs(20, 33, 32)
    key[:, :, 7:], value[:, :, 7:] = torch.nan, torch.nan
    lengths = torch.tensor([7], dtype=torch.int32)
    out, lse = host.attention(query, key, value, kv_lengths=lengths)
    grads = host.attention_backward(
        torch.ones_like(out), None, query, key, value, out, lse, kv_lengths=lengths
    )
    assert all(grad.isfinite().all() for grad in (out, lse, *grads))
    assert (grads[1][:, :, 7:] == 0).all() and (grads[2][:, :, 7:] == 0).all()


@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_any_scale(host, scale):
    check(host, *inputs(20, 33, 32), scale=scale, with_grad_lse=False)


def test_bitwise_the_same_whatever_the_order_of_warps(host):
    query, key, value = inputs(100, 70, 64, heads=1)
    out, lse = host.attention(query, key, value, scale=0.125)
    seen = []
    for seed in range(4):
        host.seed = seed
        seen.append(host.attention_backward(out, None, query, key, value, out, lse, scale=0.125))
    for grads in seen[1:]:
        assert all(a.equal(b) for a, b in zip(grads, seen[0], strict=True))
