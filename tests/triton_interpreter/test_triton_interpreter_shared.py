"""The shared cases of every op, with Triton's interpreter as the backend's device."""

from __future__ import annotations

from typing import Any

import interpreter  # noqa: F401  (first: it repairs bfloat16, or skips this module)
import pytest
import torch
from cases import (
    add_layer_norm,
    attention,
    patch_embed,
    patch_unembed,
    qk_norm_rope,
    varlen_attention,
)
from oracle import Target

INTERPRETED = Target("triton", "cpu")
# Multiply-adds of a product that the interpreter does in about a second; a tile costs as much as
# 50,000 of them whatever is in it.
AFFORDABLE = 1_500_000


def attention_cost(case: attention.Case) -> int:
    tiles = -(-case.nq // 64) * -(-case.keys // 64)
    return case.batch * case.heads[0] * max(case.nq * case.keys * case.dim, 50_000 * tiles)


# Every named case, the representative ones (float16 and bfloat16 run one code), and so many of the
# pairwise-covering sweeps, without their largest, that both Triton suites take two quiet cores less
# than three minutes.
REPRESENTATIVE = [case for case in attention.REPRESENTATIVE if case.dtype != torch.float16]
ATTENTION = [*attention.NAMED.values(), *REPRESENTATIVE, *attention.SWEPT[::4]]


@pytest.mark.parametrize(
    "case", [case for case in ATTENTION if attention_cost(case) <= AFFORDABLE], ids=str
)
def test_attention(case: attention.Case) -> None:
    attention.check(case, INTERPRETED)


OTHERS: list[tuple[Any, Any]] = [
    *((patch_embed, case) for case in (*patch_embed.NAMED.values(), *patch_embed.SWEPT[::4])),
    *((patch_unembed, case) for case in patch_unembed.CASES[::3]),
    *((varlen_attention, case) for case in varlen_attention.CASES[::4]),
    *((qk_norm_rope, case) for case in qk_norm_rope.CASES[::8]),
    *((add_layer_norm, case) for case in add_layer_norm.CASES[::4]),
]


@pytest.mark.parametrize(
    ("op", "case"), [pytest.param(op, case, id=f"{op.__name__}-{case}") for op, case in OTHERS]
)
def test_other_ops(op: Any, case: Any) -> None:
    op.check(case, INTERPRETED)
