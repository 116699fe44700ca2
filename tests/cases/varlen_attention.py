"""varlen_attention: packed sequences, empty and unequal ones, and how a case is checked."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from oracle import DTYPE_NAMES, Problem, Target, carve, normal, rng
from torch import Tensor

from patchgen_fast import reference, varlen_attention

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """One call: the sequences' lengths, ``spare`` rows past the last offset, and the rest.

    layout: ``packed`` (views of one ``[T, 3, H, D]``), ``dense``, ``sliced`` or ``strided``.
    slack: by how much max_seqlen is more than the longest sequence.
    """

    lengths: tuple[int, ...]
    lengths_k: tuple[int, ...] | None = None
    dim: int = 32
    heads: tuple[int, int] = (2, 2)
    dtype: torch.dtype = torch.float32
    is_causal: bool = False
    layout: str = "dense"
    grad: str = "contiguous"
    spare: int = 0
    slack: int = 0
    scale: float | None = None

    def __str__(self) -> str:
        def brief(lengths: tuple[int, ...]) -> str:
            return ".".join(str(n) for n in lengths[:5]) + ("..." if len(lengths) > 5 else "")

        parts = [brief(self.lengths), f"D{self.dim}", f"H{self.heads[0]}of{self.heads[1]}"]
        parts += [DTYPE_NAMES[self.dtype], self.layout]
        parts += [f"keys.{brief(self.lengths_k)}"] if self.lengths_k is not None else []
        parts += ["causal"] if self.is_causal else []
        parts += [f"spare{self.spare}"] if self.spare else []
        parts += [] if self.grad == "contiguous" else [f"grad.{self.grad}"]
        return "-".join(parts)


def make_inputs(case: Case, device: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    generator = rng("varlen_attention", case)
    lengths_k = case.lengths if case.lengths_k is None else case.lengths_k
    rows, keys = (sum(x) + case.spare for x in (case.lengths, lengths_k))
    heads, kv_heads = case.heads
    q = normal(generator, (rows, heads, case.dim), case.dtype)
    k, v = (normal(generator, (keys, kv_heads, case.dim), case.dtype) for _ in range(2))
    if case.layout == "packed":
        query, key, value = carve(torch.stack((q, k, v), dim=1), "contiguous", device).unbind(1)
    else:
        layout = "contiguous" if case.layout == "dense" else case.layout
        query, key, value = (carve(x, layout, device) for x in (q, k, v))
    offsets = [
        F.pad(torch.tensor(x, dtype=torch.int64).cumsum(0), (1, 0)).to(device, torch.int32)
        for x in (case.lengths, lengths_k)
    ]
    inputs = {
        "query": query,
        "key": key,
        "value": value,
        "cu_seqlens_q": offsets[0],
        "cu_seqlens_k": offsets[1],
        "max_seqlen_q": max(case.lengths, default=0) + case.slack,
        "max_seqlen_k": max(lengths_k, default=0) + case.slack,
    }
    if case.grad == "stride0":
        grad = torch.ones((), dtype=case.dtype, device=device).expand(q.shape)
    else:
        grad = carve(normal(generator, q.shape, case.dtype), case.grad, device)
    return inputs, {"out": grad}


def reference_results(case: Case, arithmetic: torch.dtype, **inputs: Any) -> dict[str, Tensor]:
    """Sequence by sequence through the reference of dense attention, without a packed mask."""
    q, k, v = (inputs[name].transpose(0, 1).unsqueeze(0) for name in ("query", "key", "value"))
    offsets_q, offsets_k = (inputs[f"cu_seqlens_{x}"].tolist() for x in "qk")
    scale = 1 / math.sqrt(case.dim) if case.scale is None else case.scale
    parts = []
    for s in range(len(offsets_q) - 1):
        rows, keys = (slice(o[s], o[s + 1]) for o in (offsets_q, offsets_k))
        shift = (keys.stop - keys.start) - (rows.stop - rows.start)
        out, _ = reference.attention(
            q[:, :, rows],
            k[:, :, keys],
            v[:, :, keys],
            None,
            None,
            torch.tensor([shift], device=q.device),
            case.is_causal,
            scale,
            return_lse=False,
            arithmetic=arithmetic,
        )
        parts.append(out)
    # What no sequence owns takes part by nothing, but has gradients, of zero.
    parts.append(0 * q[:, :, offsets_q[-1] :])
    rest = 0 * (k.sum() + v.sum())
    return {"out": torch.cat(parts, dim=2).squeeze(0).transpose(0, 1).contiguous() + rest}


def call(case: Case, backend: str | None, **inputs: Any) -> dict[str, Tensor]:
    out = varlen_attention(
        **inputs,
        is_causal=case.is_causal,
        scale=case.scale,
        enable_gqa=case.heads[0] != case.heads[1],
        backend=backend,
    )
    return {"out": out}


@functools.lru_cache(maxsize=64)
def problem(case: Case, device: str) -> Problem:
    inputs, cotangents = make_inputs(case, device)
    return Problem(
        "varlen_attention",
        case.dtype,
        inputs,
        cotangents,
        ["query", "key", "value"],
        functools.partial(reference_results, case),
    )


def check(case: Case, target: Target) -> None:
    stated = problem(case, target.device)
    got = stated.run(target, functools.partial(call, case, target.backend))
    out = got.results["out"]
    assert out.dtype == case.dtype and out.is_contiguous()
    owned = sum(case.lengths)
    assert (out[owned:] == 0).all(), "rows past the last offset aren't 0"
    assert (got.grads["query"][owned:] == 0).all(), "rows past the last offset have a gradient"
    stated.compare(got, target.factor)


CASES = [
    Case((50, 64, 65)),
    Case((197, 1, 257, 63), dim=64, layout="packed"),
    Case((3, 0, 17, 0, 0, 40), dim=40, spare=5, grad="stride0"),
    Case((0, 0, 0), spare=4),
    Case((), spare=4),
    Case((), spare=3, is_causal=True),
    Case((), spare=0),
    Case((0, 9)),
    Case((9, 0)),
    Case((1,) * 20, (2, 3, 5, 7) * 5, dim=24),
    Case((60, 33, 12), (33, 60, 12), dim=72, is_causal=True, spare=3),
    Case((7, 7, 7), (0, 3, 90), dim=80, is_causal=True),
    Case((130, 66), dim=88, is_causal=True, layout="packed"),
    Case((1, 1, 1), (129, 40, 7), dim=128, is_causal=True, heads=(4, 2)),
    Case((65, 50), (50, 65), dim=96, heads=(6, 1), layout="sliced", grad="sliced"),
    Case((40, 41, 42), dim=256, layout="strided", grad="strided", slack=100),
    Case((33, 31), dim=7, heads=(3, 3), is_causal=True),
    Case((33, 31), dim=33, heads=(3, 3), layout="strided"),
    Case((64, 64), dim=104, scale=0.2, slack=1),
    Case((577,), dim=64, is_causal=True),
]
CASES = [
    Case(**{**case.__dict__, "dtype": dtype})
    for i, case in enumerate(CASES)
    for dtype in (DTYPES if i % 3 == 1 else (torch.float32, DTYPES[1 + i % 2]))
]
