"""Bad calls: ValueError or TypeError before any kernel runs, with expected, got and remedy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import patchgen_fast
from patchgen_fast import dispatch

Q = torch.zeros(2, 4, 5, 8)
T = torch.zeros(6, 4, 8)
OFFSETS = torch.tensor([0, 2, 6], dtype=torch.int32)
IMAGES, FILTERS = torch.zeros(2, 3, 8, 8), torch.zeros(16, 3, 4, 4)
TOKENS, BACK = torch.zeros(2, 4, 16), torch.zeros(16, 3, 4, 4)
X, W = torch.zeros(2, 5, 8), torch.zeros(6, 8)


def attention(query: Any = Q, key: Any = Q, value: Any = Q, *args: Any, **kwargs: Any) -> None:
    patchgen_fast.attention(query, key, value, *args, **kwargs)


def varlen(query: Any = T, key: Any = T, value: Any = T, q: Any = OFFSETS, k: Any = OFFSETS,
           longest: tuple[int, int] = (4, 4), **kwargs: Any) -> None:  # fmt: skip
    patchgen_fast.varlen_attention(query, key, value, q, k, *longest, **kwargs)


def rope(query: Any = Q, key: Any = Q, **kwargs: Any) -> None:
    patchgen_fast.qk_norm_rope(query, key, **kwargs)


def embed(images: Any = IMAGES, weight: Any = FILTERS, bias: Any = None, **kwargs: Any) -> None:
    patchgen_fast.patch_embed(images, weight, bias, **kwargs)


def unembed(tokens: Any = TOKENS, weight: Any = BACK, bias: Any = None, grid: Any = (2, 2)) -> None:
    patchgen_fast.patch_unembed(tokens, weight, bias, grid_size=grid)


def linear(input: Any = X, weight: Any = W, bias: Any = None, **kwargs: Any) -> None:
    patchgen_fast.linear(input, weight, bias, **kwargs)


def norm(input: Any = X, residual: Any = X, weight: Any = None, bias: Any = None) -> None:
    patchgen_fast.add_layer_norm(input, residual, weight, bias)


def ints(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


# (what is wrong, the call, the error, what its text must hold)
BAD: list[tuple[str, Callable[[], None], type[Exception], tuple[str, ...]]] = [
    ("query isn't a tensor", lambda: attention([1.0]), TypeError, ("query", "tensor", "list")),
    ("key isn't a tensor", lambda: attention(Q, None), TypeError, ("key", "NoneType")),
    ("three dimensions", lambda: attention(Q[0]), ValueError,
     ("[B, H, N, D]", "[4, 5, 8]", ".unsqueeze")),
    ("integer query", lambda: attention(Q.int()), TypeError, ("float32", "torch.int32")),
    ("other dtypes", lambda: attention(Q, Q.half()), TypeError,
     ("torch.float32", "torch.float16", ".to(", "autocast")),
    ("another batch", lambda: attention(Q, Q[:1]), ValueError, ("key", "[2, any, any, 8]")),
    ("another D", lambda: attention(Q, Q[..., :4]), ValueError, ("key", "[2, 4, 5, 4]")),
    ("value unlike key", lambda: attention(Q, Q, Q[:, :, :3]),
     ValueError, ("value", "[2, 4, 3, 8]")),
    ("D of 0", lambda: attention(*[Q[..., :0]] * 3), ValueError, ("head dimension",)),
    ("fewer heads", lambda: attention(Q, Q[:, :2], Q[:, :2]), ValueError,
     ("4 heads", "got 2", "enable_gqa=True")),
    ("heads that don't divide", lambda: attention(Q, Q[:, :3], Q[:, :3], enable_gqa=True),
     ValueError, ("divisor", "got 3")),
    ("more kv heads", lambda: attention(Q[:, :2], Q, Q, enable_gqa=True), ValueError, ("got 4",)),
    ("mask of integers", lambda: attention(attn_mask=torch.zeros(5, 5, dtype=torch.int64)),
     TypeError, ("attn_mask", "bool", "torch.int64")),
    ("mask in another float", lambda: attention(attn_mask=torch.zeros(5, 5).half()), TypeError,
     ("attn_mask", "float32", "torch.float16")),
    ("mask of one dimension", lambda: attention(attn_mask=torch.zeros(5)), ValueError,
     ("2 to 4 dimensions", "[2, 4, 5, 5]", "[5]")),
    ("mask that doesn't broadcast", lambda: attention(attn_mask=torch.zeros(4, 5)), ValueError,
     ("broadcastable", "[4, 5]")),
    ("mask isn't a tensor", lambda: attention(attn_mask=[True]), TypeError, ("attn_mask", "list")),
    ("dropout above 1", lambda: attention(dropout_p=1.5),
     ValueError, ("dropout_p", "0 to 1", "1.5")),
    ("negative dropout", lambda: attention(dropout_p=-0.5), ValueError, ("dropout_p", "-0.5")),
    ("lengths of another batch", lambda: attention(kv_lengths=ints(1, 2, 3)), ValueError,
     ("kv_lengths", "[2]", "[3]")),
    ("float lengths", lambda: attention(kv_lengths=torch.ones(2)),
     TypeError, ("kv_lengths", "int32")),
    ("a length too long", lambda: attention(kv_lengths=ints(6, 1)), ValueError,
     ("kv_lengths", "0 to 5", "6")),
    ("a negative length", lambda: attention(kv_lengths=ints(-1, 1)),
     ValueError, ("kv_lengths", "-1")),
    ("offsets of another batch", lambda: attention(query_offset=ints(1)), ValueError,
     ("query_offset", "[2]", "[1]")),
    ("float offsets", lambda: attention(query_offset=torch.ones(2)), TypeError, ("query_offset",)),
    ("an unknown backend", lambda: attention(backend="gpu"),
     ValueError, ("backend", "'gpu'", "triton")),
    ("another device", lambda: attention(Q, Q.to("meta")),
     ValueError, ("key", "meta", ".to('cpu')")),
    ("packed in four dimensions", lambda: varlen(Q), ValueError, ("query", "[2, 4, 5, 8]")),
    ("no packed tensor", lambda: varlen(3.0), TypeError, ("query", "float")),
    ("offsets in int64", lambda: varlen(q=OFFSETS.long()), ValueError,
     ("cu_seqlens_q", "int32", "torch.int64", "cumsum")),
    ("offsets as a list", lambda: varlen(k=[0, 2, 6]), TypeError, ("cu_seqlens_k", "list")),
    ("offsets that don't start at 0", lambda: varlen(q=ints(1, 2, 6)),
     ValueError, ("rise from 0",)),
    ("offsets that fall", lambda: varlen(q=ints(0, 5, 4)),
     ValueError, ("cu_seqlens_q", "[0, 5, 4]")),
    ("offsets past the end", lambda: varlen(k=ints(0, 2, 9)),
     ValueError, ("cu_seqlens_k", "at most 6")),
    ("another number of sequences", lambda: varlen(k=ints(0, 6), longest=(4, 6)), ValueError,
     ("cu_seqlens_k", "[3]", "[2]")),
    ("a sequence longer than said", lambda: varlen(longest=(3, 4)), ValueError,
     ("max_seqlen", "3", "got 4")),
    ("packed heads that don't divide", lambda: varlen(T, T[:, :3], T[:, :3], enable_gqa=True),
     ValueError, ("divisor", "3")),
    ("an unknown norm", lambda: rope(norm="batch"), ValueError, ('"rms"', "'batch'")),
    ("a weight without a norm", lambda: rope(q_weight=torch.ones(8)),
     ValueError, ("q_weight", "norm")),
    ("a weight of another size", lambda: rope(norm="rms", k_weight=torch.ones(4)), ValueError,
     ("k_weight", "[8]", "[4]")),
    ("key of other tokens", lambda: rope(Q, Q[:, :, :3]), ValueError, ("key", "[2, 4, 3, 8]")),
    ("key in another dtype", lambda: rope(Q, Q.half()), TypeError, ("key", "torch.float16")),
    ("a table alone", lambda: rope(cos_sin=torch.ones(5, 8)),
     TypeError, ("cos_sin", "pair", "Tensor")),
    ("tables of other tokens", lambda: rope(cos_sin=[torch.ones(4, 8)] * 2), ValueError,
     ("cos", "broadcastable", "[4, 8]")),
    ("tables over prefix tokens too",
     lambda: rope(cos_sin=[torch.ones(5, 8)] * 2, num_prefix_tokens=1),
     ValueError, ("cos", "N - prefix", "[5, 8]")),
    ("more prefix than tokens", lambda: rope(num_prefix_tokens=6), ValueError,
     ("num_prefix_tokens", "0 to the 5", "6")),
    ("an odd D to rotate", lambda: rope(Q[..., :7], Q[..., :7], cos_sin=[torch.ones(5, 7)] * 2),
     ValueError, ("even", "7")),
    ("tables a head under shared heads",
     lambda: rope(Q, Q[:, :2], cos_sin=[torch.ones(1, 4, 5, 8)] * 2), ValueError,
     ("one head", "4 and 2")),
    ("images isn't a tensor", lambda: embed("cat.png"), TypeError, ("images", "cat.png")),
    ("one image without a batch", lambda: embed(IMAGES[0]), ValueError, ("images", "4 dimensions")),
    ("images of int32", lambda: embed(IMAGES.int()), TypeError, ("images", "uint8", ".float()")),
    ("weight of uint8", lambda: embed(IMAGES, FILTERS.byte()),
     TypeError, ("weight", "torch.uint8")),
    ("other channels", lambda: embed(IMAGES[:, :1]), ValueError, ("3 channels", "[2, 1, 8, 8]")),
    ("video with image weights", lambda: embed(IMAGES.unsqueeze(2)), ValueError, ("4 dimensions",)),
    ("images smaller than a patch", lambda: embed(IMAGES[..., :3]),
     ValueError, ("at least one patch",)),
    ("bias of another size", lambda: embed(bias=torch.zeros(3)),
     ValueError, ("bias", "[16]", "[3]")),
    ("bias in another dtype", lambda: embed(bias=torch.zeros(16).half()), TypeError,
     ("bias", "torch.float16", ".to(")),
    ("positions of another grid", lambda: embed(pos_embed=torch.zeros(5, 16)), ValueError,
     ("pos_embed", "[4, 16]", "[5, 16]")),
    ("prefix of another size", lambda: embed(prefix=torch.zeros(1, 8)),
     ValueError, ("prefix", "16")),
    ("mean of another size", lambda: embed(mean=[0.5, 0.5]), ValueError, ("mean", "3")),
    ("mean isn't a number", lambda: embed(mean="imagenet"), TypeError, ("mean", "imagenet")),
    ("tokens of another grid", lambda: unembed(grid=(3, 2)),
     ValueError, ("grid_size", "4 tokens", "(3, 2)")),
    ("a grid of one number", lambda: unembed(grid=4), ValueError, ("grid_size", "(rows, columns)")),
    ("weight of another E", lambda: unembed(weight=BACK[:8]), ValueError, ("weight", "16")),
    ("unembed's bias by E", lambda: unembed(bias=torch.zeros(16)),
     ValueError, ("bias", "[3]", "[16]")),
    ("tokens in two dimensions", lambda: unembed(TOKENS[0]), ValueError, ("tokens", "[4, 16]")),
    ("an unknown activation", lambda: linear(activation="tanh"),
     ValueError, ("activation", "'gelu'", "'tanh'")),
    ("weight of another K", lambda: linear(weight=W[:, :5]),
     ValueError, ("weight", "[any, 8]", "[6, 5]")),
    ("linear's bias of another size", lambda: linear(bias=torch.zeros(8)),
     ValueError, ("bias", "[6]")),
    ("a residual that doesn't broadcast", lambda: linear(residual=torch.zeros(4, 6)), ValueError,
     ("residual", "[2, 5, 6]", "[4, 6]")),
    ("weight in another dtype", lambda: linear(weight=W.half()),
     TypeError, ("weight", "torch.float16")),
    ("integer input", lambda: linear(X.long(), W.long()), TypeError, ("input", "torch.int64")),
    ("a scalar input", lambda: linear(torch.zeros(())), ValueError, ("[..., K]",)),
    ("residual of another shape", lambda: norm(X, X[:1]), ValueError, ("residual", "[2, 5, 8]")),
    ("residual in another dtype", lambda: norm(X, X.half()),
     TypeError, ("residual", "torch.float16")),
    ("norm's weight of another size", lambda: norm(weight=torch.ones(4)),
     ValueError, ("weight", "[8]", "[4]")),
    ("norm of no tensor", lambda: norm(None), TypeError, ("input", "NoneType")),
]  # fmt: skip


@pytest.mark.parametrize("gradients", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("call, error, fragments", [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_a_bad_call_says_what_was_expected_and_what_came(
    call: Callable[[], None], error: type[Exception], fragments: tuple[str, ...], gradients: bool
) -> None:
    with (
        dispatch.counting() as ran,
        torch.set_grad_enabled(gradients),
        pytest.raises(error) as caught,
    ):
        call()
    assert type(caught.value) is error, (
        f"{type(caught.value).__name__} rather than {error.__name__}"
    )
    text = str(caught.value)
    for fragment in ("expected", "got", *fragments):
        assert fragment in text, f"{fragment!r} isn't in: {text}"
    assert not ran, f"{ran} ran before the error"
