"""Few queries over many keys, split among blocks, against float64."""

from __future__ import annotations

import pytest
import torch
import truth
from truth import LARGE_NEGATIVE, inputs


@pytest.fixture(params=[1, 132], ids=["one split", "many splits"])
def gpu(request, host):
    """Small, so that one block takes all keys, or large, so that blocks must join their parts."""
    host.multiprocessors = request.param
    return host


def check(host, query, key, value, **options):
    options.setdefault("scale", query.shape[-1] ** -0.5)
    out, lse = host.attention(query, key, value, function="host_attention_decode", **options)
    eager, _ = truth.attention(query, key, value, **options)
    exact, exact_lse = truth.attention(query.double(), key.double(), value.double(), **options)
    truth.assert_parity(out, eager, exact)
    empty = exact_lse == -torch.inf
    assert (lse[empty] == -torch.inf).all() and (out[empty] == 0).all()
    torch.testing.assert_close(
        lse[~empty].double(), exact_lse[~empty].double(), rtol=1e-4, atol=1e-4
    )
    assert host.wavefronts_per_matrix == 1 or key.shape[2] == 0, "bank conflicts"


@pytest.mark.parametrize("keys", [0, 1, 16, 129, 700])
@pytest.mark.parametrize("queries", [1, 8])
def test_keys(gpu, queries, keys):
    check(gpu, *inputs(queries, keys, 64))


@pytest.mark.parametrize("head_dim", [32, 40, 64, 72, 80, 96, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_head_dims(gpu, head_dim, dtype):
    check(gpu, *inputs(2, 300, head_dim, dtype=dtype))


@pytest.mark.parametrize("kv_heads, queries", [(1, 1), (1, 5), (2, 8)])
def test_heads_that_share_keys_share_a_tile(gpu, kv_heads, queries):
    check(gpu, *inputs(queries, 300, 32, batch=2, heads=4, kv_heads=kv_heads))


@pytest.mark.parametrize("shape", [(2, 4, 3, 300), (2, 1, 1, 300), (1, 4, 3, 1)])
@pytest.mark.parametrize("kind", ["bool", "element", "float32"])
def test_mask_by_broadcast(gpu, shape, kind):
    tensors = inputs(3, 300, 32, batch=2, heads=4, kv_heads=2)
    mask = torch.randn(shape)
    mask = {"bool": mask > 0, "element": mask.bfloat16(), "float32": mask}[kind]
    check(gpu, *tensors, attn_mask=mask)


def test_empty_rows_and_the_least_float(gpu):
    tensors = inputs(3, 300, 32)
    mask = torch.zeros(1, 1, 3, 300)
    mask[:, :, 0] = LARGE_NEGATIVE
    mask[:, :, 1] = -torch.inf
    mask[:, :, 2, 200:] = LARGE_NEGATIVE
    check(gpu, *tensors, attn_mask=mask)


@pytest.mark.parametrize("causal", [False, True])
def test_a_cache_that_is_partly_filled(gpu, causal):
    query, key, value = inputs(4, 300, 32, batch=4)
    lengths = torch.tensor([300, 16, 0, 131], dtype=torch.int32)
    for batch, length in enumerate(lengths):
        key[batch, :, length:], value[batch, :, length:] = 7.0, torch.nan
    offset = lengths - 4
    host_options = {"kv_lengths": lengths, "query_offset": offset, "is_causal": causal}
    clean = value.masked_fill(value.isnan(), 0)
    check(gpu, query, key, clean, **host_options)
    dirty, _ = gpu.attention(query, key, value, function="host_attention_decode", **host_options)
    assert dirty.isfinite().all(), "what lies beyond the length is never read"


def test_negative_scale(gpu):
    check(gpu, *inputs(1, 300, 32), scale=-0.5)
