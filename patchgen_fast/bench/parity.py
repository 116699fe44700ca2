"""Parity before every number: the rule of `patchgen_fast.swapping.parity`, as rows of a result.

max|got - truth| <= 2 max|eager - truth| + 2 eps max|truth| and
mean|got - truth| <= 2 mean|eager - truth| + eps mean|truth|, eps that of the output's dtype.

Peers have the numerics that their projects gave them (torch's SDPA on the CPU computes exponentials
to 20 units in the last place), so theirs may be PEER_FACTOR times eager's error instead of twice:
enough to see that a peer computes something else, and their error stands beside their time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec
import torch

from patchgen_fast import swapping
from patchgen_fast.bench.schema import Parity

FACTOR, PEER_FACTOR = 2.0, 8.0


def check(
    got: Mapping[str, torch.Tensor],
    eager: Mapping[str, torch.Tensor],
    truth: Mapping[str, torch.Tensor],
    factor: float = FACTOR,
) -> list[Parity]:
    """Compare each output and gradient by name; `truth` is float64."""
    return [
        compare_one(name, got[name], eager[name], expected, factor)
        if name in got
        else _failed(name, "missing")
        for name, expected in truth.items()
    ]


def compare_one(
    name: str,
    got: torch.Tensor,
    eager: torch.Tensor,
    truth: torch.Tensor,
    factor: float = FACTOR,
) -> Parity:
    """The rule for one tensor."""
    try:
        return as_row(swapping.parity(name, got.detach(), eager.detach(), truth.detach()), factor)
    except (ValueError, TypeError) as error:  # another shape or dtype
        return _failed(name, str(error).removeprefix(f"{name}: "))


def from_verify(report: swapping.VerifyReport) -> tuple[list[Parity], list[Parity]]:
    """The rows of `patchgen_fast.verify`, outputs before gradients: ours, and eager's errors."""
    found = [
        *((row, "") for row in report.outputs),
        *((row, "grad ") for row in report.gradients),
    ]
    ours = [as_row(row, prefix=prefix) for row, prefix in found]
    eager = [
        msgspec.structs.replace(
            mine, max_error=row.max_error_eager, mean_error=row.mean_error_eager, ok=True, reason=""
        )
        for mine, (row, _) in zip(ours, found, strict=True)
    ]
    return ours, eager


def as_row(found: swapping.Parity, factor: float = FACTOR, prefix: str = "") -> Parity:
    """A comparison as it is stored."""
    if not found.finite:
        return _failed(prefix + found.name, "not finite")
    more = factor - FACTOR
    row = Parity(
        output=prefix + found.name,
        ok=False,
        max_error=found.max_error,
        mean_error=found.mean_error,
        max_allowed=found.max_allowed + more * found.max_error_eager,
        mean_allowed=found.mean_allowed + more * found.mean_error_eager,
        truth_max=found.scale,
    )
    row.ok = row.max_error <= row.max_allowed and row.mean_error <= row.mean_allowed
    if not row.ok:
        row.reason = (
            f"{row.output}: max error {row.max_error:.2e} (allowed {row.max_allowed:.2e}), "
            f"mean error {row.mean_error:.2e} (allowed {row.mean_allowed:.2e})"
        )
    return row


def wrong(rows: Iterable[Parity]) -> list[str]:
    """Why each failing row fails."""
    return [row.reason for row in rows if not row.ok]


def _failed(name: str, reason: str) -> Parity:
    # JSON has no infinity: -1 stands for "no error can be given".
    nothing = dict.fromkeys(
        ("max_error", "mean_error", "max_allowed", "mean_allowed", "truth_max"), -1.0
    )
    return Parity(output=name, ok=False, reason=f"{name}: {reason}", **nothing)
