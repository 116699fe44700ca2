"""The parity rule of every number: against float64, with eager in the same dtype as yardstick."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from patchgen_fast.bench.schema import Parity


def check(
    got: Mapping[str, torch.Tensor],
    eager: Mapping[str, torch.Tensor],
    truth: Mapping[str, torch.Tensor],
) -> list[Parity]:
    """Compare each output and gradient; the names must agree.

    max|got - truth| <= 2 max|eager - truth| + 2 eps max|truth| and
    mean|got - truth| <= 2 mean|eager - truth| + eps mean|truth|, eps that of the output's dtype.
    """
    rows = []
    for name, expected in truth.items():
        if name not in got:
            rows.append(_failed(name, "missing"))
            continue
        rows.append(compare_one(name, got[name], eager[name], expected))
    return rows


def compare_one(name: str, got: torch.Tensor, eager: torch.Tensor, truth: torch.Tensor) -> Parity:
    """The rule for one tensor; `truth` is float64, `got` and `eager` of one dtype and its shape."""
    if got.shape != truth.shape:
        return _failed(name, f"shape {tuple(got.shape)}, expected {tuple(truth.shape)}")
    if got.dtype != eager.dtype:
        return _failed(name, f"dtype {got.dtype}, expected {eager.dtype}")
    if truth.numel() == 0:
        return Parity(
            output=name,
            ok=True,
            max_error=0.0,
            mean_error=0.0,
            max_allowed=0.0,
            mean_allowed=0.0,
            truth_max=0.0,
        )
    truth = truth.detach()
    size = truth.abs()
    ours = (got.detach().to(truth.device, torch.float64) - truth).abs()
    yard = (eager.detach().to(truth.device, torch.float64) - truth).abs()
    eps = torch.finfo(got.dtype).eps
    row = Parity(
        output=name,
        ok=False,
        max_error=float(ours.max()),
        mean_error=float(ours.mean()),
        max_allowed=2.0 * float(yard.max()) + 2.0 * eps * float(size.max()),
        mean_allowed=2.0 * float(yard.mean()) + eps * float(size.mean()),
        truth_max=float(size.max()),
    )
    if not (math.isfinite(row.max_error) and math.isfinite(row.mean_error)):
        return _failed(name, "not finite")
    row.ok = row.max_error <= row.max_allowed and row.mean_error <= row.mean_allowed
    if not row.ok:
        row.reason = (
            f"{name}: max error {row.max_error:.2e} (allowed {row.max_allowed:.2e}), "
            f"mean error {row.mean_error:.2e} (allowed {row.mean_allowed:.2e})"
        )
    return row


def _failed(name: str, reason: str) -> Parity:
    # JSON has no infinity: -1 stands for "no error can be given".
    return Parity(
        output=name,
        ok=False,
        max_error=-1.0,
        mean_error=-1.0,
        max_allowed=-1.0,
        mean_allowed=-1.0,
        truth_max=-1.0,
        reason=f"{name}: {reason}",
    )
