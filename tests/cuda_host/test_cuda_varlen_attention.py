"""Packed sequences by the short-sequence kernels, forward and backward, against float64."""

from __future__ import annotations

import pytest
import torch
import truth


def starts(lengths) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def inputs(lengths, keys, spare, *, head_dim=32, heads=2, kv_heads=2, dtype=torch.bfloat16):
    """query, key, value and grad_out, with `spare` rows that no sequence owns."""
    torch.manual_seed(0)
    query, grad_out = torch.randn(2, sum(lengths) + spare, heads, head_dim).to(dtype)
    key, value = torch.randn(2, sum(keys) + spare, kv_heads, head_dim).to(dtype)
    return query, key, value, grad_out


def one_by_one(query, key, value, grad_out, grad_lse, lengths, keys, is_causal, scale):
    """out, lse and the gradients of each sequence by itself; zeros and -inf where none is."""
    out, lse = torch.zeros_like(query), torch.full(query.shape[1::-1], -torch.inf)
    lse = lse.to(query.dtype)
    grads = [torch.zeros_like(tensor) for tensor in (query, key, value)]
    at, at_key = 0, 0
    for n, m in zip(lengths, keys, strict=True):
        rows, columns = slice(at, at + n), slice(at_key, at_key + m)
        at, at_key = at + n, at_key + m
        here = [
            t[s].transpose(0, 1).unsqueeze(0)
            for t, s in ((query, rows), (key, columns), (value, columns), (grad_out, rows))
        ]
        options = {
            "query_offset": torch.tensor([m - n]),
            "is_causal": is_causal,
            "scale": scale,
        }
        results = truth.attention(*here[:3], **options)
        out[rows], lse[:, rows] = results[0][0].transpose(0, 1), results[1][0].to(lse.dtype)
        found = truth.attention_gradients(*here, grad_lse[:, rows].unsqueeze(0), **options)
        for grad, s, part in zip(grads, (rows, columns, columns), found, strict=True):
            grad[s] = part[0].transpose(0, 1)
    return out, lse, *grads


def check(host, lengths, keys=None, *, spare=0, slack=0, is_causal=False, **sizes):
    keys = lengths if keys is None else keys
    query, key, value, grad_out = inputs(lengths, keys, spare, **sizes)
    scale = query.shape[-1] ** -0.5
    longest = (max(lengths, default=0) + slack, max(keys, default=0) + slack)
    sequences = (starts(lengths), starts(keys), *longest, is_causal, scale)
    out, lse = host.varlen_attention(query, key, value, *sequences)
    grad_lse = torch.randn(lse.shape)
    grads = host.varlen_attention_backward(
        grad_out, grad_lse, query, key, value, out, lse, *sequences
    )
    tensors, rest = (query, key, value, grad_out), (grad_lse, lengths, keys, is_causal, scale)
    eager = one_by_one(*tensors, *rest)
    exact = one_by_one(*[t.double() for t in tensors], *rest)
    for ours, theirs, true in zip((out, *grads), (eager[0], *eager[2:]),
                                  (exact[0], *exact[2:]), strict=True):  # fmt: skip
        truth.assert_parity(ours, theirs, true)
    assert (lse.isneginf() == exact[1].isneginf()).all()
    seen = ~exact[1].isneginf()
    torch.testing.assert_close(lse[seen].double(), exact[1][seen], rtol=1e-4, atol=1e-4)
    tail, tail_keys = sum(lengths), sum(keys)
    assert (out[tail:] == 0).all() and (grads[0][tail:] == 0).all()
    assert all((grad[tail_keys:] == 0).all() for grad in grads[1:])


@pytest.mark.parametrize("is_causal", [False, True])
def test_unequal_sequences(host, is_causal):
    check(host, (33, 1, 70, 16), is_causal=is_causal)


def test_the_longest_and_the_shortest(host):
    check(host, (272, 1), head_dim=64, heads=1, kv_heads=1)


@pytest.mark.parametrize("is_causal", [False, True])
def test_keys_of_another_length_and_empty_sequences(host, is_causal):
    check(host, (20, 0, 5, 9), (7, 12, 0, 40), is_causal=is_causal)


@pytest.mark.parametrize("lengths", [(20, 5), (0, 0), ()])
def test_rows_that_no_sequence_owns(host, lengths):
    check(host, lengths, spare=300, slack=3)


@pytest.mark.parametrize("head_dim", [40, 64, 72, 80, 96, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_head_dims(host, head_dim, dtype):
    check(host, (19, 37), head_dim=head_dim, dtype=dtype)


def test_grouped_query_heads(host):
    check(host, (20, 33), heads=4, kv_heads=2)


def test_packed_projection_is_read_by_strides(host):
    torch.manual_seed(0)
    query, key, value = torch.randn(50, 3, 2, 64).bfloat16().unbind(1)
    sequences = (starts((17, 33)), starts((17, 33)), 33, 33, False, 0.125)
    out, lse = host.varlen_attention(query, key, value, *sequences)
    whole = [tensor.contiguous() for tensor in (query, key, value)]
    wanted, wanted_lse = host.varlen_attention(*whole, *sequences)
    assert out.equal(wanted) and lse.equal(wanted_lse)


def test_query_tiles_shared_among_blocks(host):
    host.multiprocessors = 132
    check(host, (150, 70), spare=5)


@pytest.mark.parametrize("offsets", [[0, 40, 10, 30], [-5, 7, 9, 2**31 - 1], [3, 3, 3, 3]])
def test_offsets_that_nothing_checked_stay_within_the_tensors(host, offsets):
    """On a GPU offsets have no values to check: the kernel must not leave memory."""
    torch.manual_seed(0)
    query, key, value, grad_out = torch.randn(4, 20, 2, 32).bfloat16()
    cu = torch.tensor(offsets, dtype=torch.int32)
    sequences = (cu, cu, 12, 12, True, 0.25)
    out, lse = host.varlen_attention(query, key, value, *sequences)
    host.varlen_attention_backward(grad_out, None, query, key, value, out, lse, *sequences)
