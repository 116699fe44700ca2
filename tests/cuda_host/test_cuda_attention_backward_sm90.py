"""The gradients by the wgmma and TMA kernels, against float64."""

from __future__ import annotations

import pytest
import torch
import truth
from harness import EmulatorError
from truth import LARGE_NEGATIVE, inputs

FUNCTION = "host_attention_backward_sm90"


def gradients(host, query, key, value, grad_out, grad_lse, **options):
    """By our kernels, from what the forward of mma.sync gave."""
    out, lse = host.attention(query, key, value, **options)
    return host.attention_backward(
        grad_out, grad_lse, query, key, value, out, lse, function=FUNCTION, **options
    )


def check(host, query, key, value, *, grad_out=None, with_grad_lse=True, **options):
    options.setdefault("scale", query.shape[-1] ** -0.5)
    grad_out = torch.randn(query.shape).to(query.dtype) if grad_out is None else grad_out
    grad_lse = torch.randn(query.shape[:3]) if with_grad_lse else None
    tensors = (query, key, value, grad_out)
    got = gradients(host, *tensors, grad_lse, **options)
    eager = truth.attention_gradients(*tensors, grad_lse, **options)
    exact = truth.attention_gradients(*[t.double() for t in tensors], grad_lse, **options)
    for ours, theirs, true in zip(got, eager, exact, strict=True):
        truth.assert_parity(ours, theirs, true)
    if query.shape[3] <= 64:  # wider ones load no fragments
        assert host.wavefronts_per_matrix == 1, "bank conflicts"
    return got


@pytest.mark.parametrize("tokens", [1, 16, 17, 50, 63, 64, 65, 196, 197, 257, 272])
def test_tokens(host, tokens):
    check(host, *inputs(tokens, tokens, 64, heads=1))


@pytest.mark.parametrize("tokens", [1, 65, 197, 272])
def test_tokens_of_wide_heads(host, tokens):
    check(host, *inputs(tokens, tokens, 128, heads=1))


@pytest.mark.parametrize("head_dim", [56, 64, 104, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_head_dims(host, head_dim, dtype):
    check(host, *inputs(70, 85, head_dim, dtype=dtype))


@pytest.mark.parametrize("queries, keys", [(1, 130), (130, 3), (65, 197)])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_cross_attention(host, queries, keys, head_dim):
    check(host, *inputs(queries, keys, head_dim, heads=1))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_query_heads_add_up(host, kv_heads, head_dim):
    check(host, *inputs(20, 150, head_dim, batch=2, heads=4, kv_heads=kv_heads))


def test_packed_projections(host):
    torch.manual_seed(0)
    packed = torch.randn(2, 70, 6, 64).bfloat16().transpose(1, 2)
    check(host, packed[:, :4], packed[:, 4:5], packed[:, 5:6])


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("queries, keys", [(140, 140), (70, 150), (150, 70)])
def test_causal(host, queries, keys, head_dim):
    offset = torch.tensor([keys - queries, -3], dtype=torch.int32)
    tensors = inputs(queries, keys, head_dim, batch=2, heads=1)
    check(host, *tensors, is_causal=True, query_offset=offset)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("kind", ["bool", "element", "float32"])
def test_mask(host, kind, head_dim):
    tensors = inputs(70, 140, head_dim, batch=2, heads=2)
    mask = torch.randn(2, 1, 70, 140)
    mask = {"bool": mask > 0, "element": mask.bfloat16(), "float32": mask}[kind]
    check(host, *tensors, attn_mask=mask)


def test_empty_rows_and_the_least_float(host):
    tensors = inputs(70, 85, 64)
    mask = torch.zeros(1, 1, 70, 85)
    mask[..., 50:] = LARGE_NEGATIVE
    mask[:, :, 3] = LARGE_NEGATIVE
    mask[:, :, 17] = -torch.inf
    grad_query, _, _ = check(host, *tensors, attn_mask=mask, is_causal=True)
    assert (grad_query[:, :, 17] == 0).all()


@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_any_scale(host, scale):
    check(host, *inputs(20, 33, 64), scale=scale, with_grad_lse=False)


def test_logits_of_any_size(host):
    """Weights are taken beside the log-sum-exp, however far that is from 0."""
    query, key, value = inputs(40, 50, 64, heads=1)
    key = -(query.mean(2, keepdim=True) * 80 + key)
    check(host, query, key, value, scale=1.0)


def test_what_is_left_to_the_portable_kernel(host):
    tensors = inputs(20, 33, 64)
    refused = {
        "lengths": (tensors, {"kv_lengths": torch.tensor([33], dtype=torch.int32)}),
        "padded width": (inputs(20, 33, 80), {}),
        "keys of no stride": (
            (tensors[0], tensors[1][:, :, :1].expand_as(tensors[1]), tensors[2]),
            {},
        ),
    }
    for what, ((query, key, value), options) in refused.items():
        with pytest.raises(EmulatorError, match="not served"):
            gradients(host, query, key, value, query, None, **options)
            pytest.fail(what)
    with pytest.raises(EmulatorError, match="not served"):
        check(host, *tensors, grad_out=torch.ones(1, 2, 1, 64).bfloat16().expand(1, 2, 20, 64))
    many = inputs(272, 272, 128, heads=6, kv_heads=1)  # what is known of queries does not fit
    with pytest.raises(EmulatorError, match="not served"):
        check(host, *many)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_bitwise_the_same_whatever_the_order_of_warps(host, head_dim):
    query, key, value = inputs(100, 140, head_dim, heads=1)
    grad_out = torch.randn(query.shape).bfloat16()
    seen = []
    for seed in range(4):
        host.seed = seed
        seen.append(gradients(host, query, key, value, grad_out, None, scale=0.125))
    for grads in seen[1:]:
        assert all(a.equal(b) for a, b in zip(grads, seen[0], strict=True))
