"""The wgmma and TMA kernel, forward, against float64."""

from __future__ import annotations

import pytest
import torch
import truth
from harness import EmulatorError
from truth import LARGE_NEGATIVE, inputs

FUNCTION = "host_attention_forward_sm90"


def check(host, query, key, value, **options):
    options.setdefault("scale", query.shape[-1] ** -0.5)
    out, lse = host.attention(query, key, value, function=FUNCTION, **options)
    eager, _ = truth.attention(query, key, value, **options)
    exact, exact_lse = truth.attention(query.double(), key.double(), value.double(), **options)
    truth.assert_parity(out, eager, exact)
    empty = exact_lse == -torch.inf
    assert (lse[empty] == -torch.inf).all() and (out[empty] == 0).all()
    torch.testing.assert_close(
        lse[~empty].double(), exact_lse[~empty].double(), rtol=1e-4, atol=1e-4
    )
    assert host.wavefronts_per_matrix == 1, "bank conflicts"


@pytest.mark.parametrize("tokens", [1, 16, 50, 64, 65, 129, 197, 272])
def test_tokens(host, tokens):
    check(host, *inputs(tokens, tokens, 64, heads=1))


@pytest.mark.parametrize("head_dim", [56, 64, 104, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_head_dims(host, head_dim, dtype):
    check(host, *inputs(70, 85, head_dim, dtype=dtype))


def test_grouped_query_heads_in_packed_memory(host):
    torch.manual_seed(0)
    packed = torch.randn(2, 70, 6, 64).bfloat16().transpose(1, 2)
    check(host, packed[:, :4], packed[:, 4:5], packed[:, 5:6])


@pytest.mark.parametrize("kind", ["bool", "float32"])
def test_causal_and_mask(host, kind):
    tensors = inputs(130, 140, 64, heads=1)
    mask = torch.rand(1, 1, 130, 140) > 0.4
    mask[:, :, 7] = False
    if kind == "float32":
        mask = torch.randn(mask.shape).masked_fill(~mask, LARGE_NEGATIVE)
    check(host, *tensors, attn_mask=mask, is_causal=True)


def test_what_is_left_to_the_portable_kernel(host):
    """TMA is not known to take strides of 0."""
    query, key, value = inputs(20, 33, 64)
    with pytest.raises(EmulatorError, match="not served"):
        check(host, query, key[:, :1].expand_as(key), value)


@pytest.mark.parametrize("multiprocessors", [2, 132])
def test_query_tiles_shared_among_blocks(host, multiprocessors):
    host.multiprocessors = multiprocessors
    check(host, *inputs(260, 70, 64, heads=1))


@pytest.mark.parametrize("seed", range(4))
def test_any_order_of_warps_and_copies(host, seed):
    host.seed = seed
    check(host, *inputs(197, 70, 64, heads=1))
