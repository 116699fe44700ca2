"""Parity with float64, by the rule that all tests share; and inputs in guarded buffers."""

from __future__ import annotations

import torch


def assert_parity(name: str, got: torch.Tensor, eager: torch.Tensor, truth: torch.Tensor) -> None:
    """`got` against float64 `truth`, with eager in the same dtype as the yardstick."""
    eps = torch.finfo(got.dtype).eps
    assert got.shape == truth.shape, f"{name}: {got.shape}, expected {truth.shape}"
    assert torch.isfinite(got).all(), f"{name}: not finite"
    got, eager, truth = got.double(), eager.double(), truth.double()
    if truth.numel() == 0:
        return
    ours, theirs, size = (got - truth).abs(), (eager - truth).abs(), truth.abs()
    most = 2 * theirs.max() + 2 * eps * size.max()
    assert ours.max() <= most, f"{name}: max error {ours.max()}, allowed {most}"
    most = 2 * theirs.mean() + eps * size.mean()
    assert ours.mean() <= most, f"{name}: mean error {ours.mean()}, allowed {most}"
