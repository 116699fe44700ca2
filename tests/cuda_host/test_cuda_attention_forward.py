"""The short-sequence attention kernel, forward, against float64."""

from __future__ import annotations

import pytest
import torch
import truth
from truth import LARGE_NEGATIVE, inputs


def check(host, query, key, value, **options):
    options.setdefault("scale", query.shape[-1] ** -0.5)
    out, lse = host.attention(query, key, value, **options)
    eager, _ = truth.attention(query, key, value, **options)
    exact, exact_lse = truth.attention(query.double(), key.double(), value.double(), **options)
    truth.assert_parity(out, eager, exact)
    empty = exact_lse == -torch.inf
    assert (lse[empty] == -torch.inf).all() and (out[empty] == 0).all()
    torch.testing.assert_close(
        lse[~empty].double(), exact_lse[~empty].double(), rtol=1e-4, atol=1e-4
    )
    assert host.wavefronts_per_matrix == 1 or key.shape[2] == 0, "bank conflicts"
    return out


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 50, 64, 65, 129, 197, 256, 272])
def test_tokens(host, tokens):
    check(host, *inputs(tokens, tokens, 64, heads=1))


@pytest.mark.parametrize("head_dim", [32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_head_dims(host, head_dim, dtype):
    check(host, *inputs(37, 52, head_dim, dtype=dtype))


@pytest.mark.parametrize("queries, keys", [(1, 272), (130, 3), (70, 0), (300, 77)])
def test_cross_attention(host, queries, keys):
    check(host, *inputs(queries, keys, 32, heads=1))


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_query_heads(host, kv_heads):
    check(host, *inputs(20, 33, 32, batch=2, heads=4, kv_heads=kv_heads))


def test_packed_projection_is_read_by_strides(host):
    torch.manual_seed(0)
    packed = torch.randn(2, 33, 3, 2, 64).bfloat16()
    query, key, value = packed.permute(2, 0, 3, 1, 4)
    assert not query.is_contiguous()
    check(host, query, key, value)


@pytest.mark.parametrize("shape", [(2, 2, 20, 33), (2, 1, 1, 33), (1, 2, 20, 1), (1, 1, 20, 33)])
@pytest.mark.parametrize("kind", ["bool", "element", "float32"])
def test_mask_by_broadcast(host, shape, kind):
    tensors = inputs(20, 33, 32, batch=2)
    mask = torch.randn(shape)
    mask = {"bool": mask > 0, "element": mask.bfloat16(), "float32": mask}[kind]
    check(host, *tensors, attn_mask=mask)


def test_mask_of_any_strides(host):
    tensors = inputs(20, 33, 32, batch=2)
    mask = torch.randn(33, 20, 2, 2).permute(3, 2, 1, 0)
    check(host, *tensors, attn_mask=mask)


def test_rows_without_a_key_give_zero(host):
    tensors = inputs(20, 33, 32)
    mask = torch.ones(1, 1, 20, 33, dtype=torch.bool)
    mask[:, :, 3] = False
    mask[:, :, 17] = False
    check(host, *tensors, attn_mask=mask)
    check(host, *tensors, attn_mask=torch.zeros(mask.shape).masked_fill(~mask, -torch.inf))


def test_the_least_float_is_a_number_like_any_other(host):
    tensors = inputs(20, 33, 32)
    mask = torch.zeros(1, 1, 20, 33)
    mask[..., 5:] = LARGE_NEGATIVE
    mask[:, :, 3] = LARGE_NEGATIVE  # a row of nothing else attends to all keys alike
    out = check(host, *tensors, attn_mask=mask)
    value = tensors[2].float().mean(2)
    torch.testing.assert_close(out[:, :, 3].float(), value, rtol=0.02, atol=0.01)


@pytest.mark.parametrize("causal", [False, True])
def test_lengths_and_offsets(host, causal):
    tensors = inputs(20, 33, 32, batch=4)
    lengths = torch.tensor([33, 16, 0, 7], dtype=torch.int32)
    offset = torch.tensor([0, 13, -3, 5], dtype=torch.int32)
    check(host, *tensors, kv_lengths=lengths, query_offset=offset, is_causal=causal)


def test_lengths_and_offsets_out_of_range_are_clamped(host):
    tensors = inputs(20, 33, 32, batch=2)
    big = torch.tensor([2**31 - 1, -(2**31)], dtype=torch.int32)
    clamped = torch.tensor([33, 0], dtype=torch.int32)
    out, _ = host.attention(*tensors, kv_lengths=big, query_offset=big, is_causal=True)
    same, _ = host.attention(*tensors, kv_lengths=clamped, query_offset=clamped, is_causal=True)
    assert out.equal(same)


@pytest.mark.parametrize("tokens", [65, 197])
def test_causal_with_a_mask(host, tokens):
    tensors = inputs(tokens, tokens, 64, heads=1)
    mask = torch.rand(1, 1, tokens, tokens) > 0.3
    check(host, *tensors, is_causal=True, attn_mask=mask)


@pytest.mark.parametrize("scale", [0.0, -0.5, 3.0])
def test_any_scale(host, scale):
    check(host, *inputs(20, 33, 32), scale=scale)


@pytest.mark.parametrize("multiprocessors", [4, 132])
def test_query_tiles_shared_among_blocks(host, multiprocessors):
    host.multiprocessors = multiprocessors
    check(host, *inputs(197, 197, 32, heads=1))


@pytest.mark.parametrize("seed", range(4))
def test_any_order_of_warps(host, seed):
    host.seed = seed
    check(host, *inputs(130, 70, 64, heads=1))
