"""What each case computes: inputs, float64 truth, eager, peers and ours.

A file per kind of case. `build(case)` gives a `Problem`; nothing heavy runs until a contender is
built, and an absent or refusing peer says why instead of vanishing.
"""

from __future__ import annotations

from collections.abc import Callable

from patchgen_fast.bench.cases import Case
from patchgen_fast.bench.problems.base import Absent, Contender, Problem, Refused, Runnable

__all__ = ["Absent", "Contender", "Problem", "Refused", "Runnable", "build"]


def build(case: Case) -> Problem:
    """The problem of this case."""
    return _builder(case.op)(case)


def _builder(op: str) -> Callable[[Case], Problem]:
    if op in ("attention", "varlen_attention"):
        from patchgen_fast.bench.problems import attention

        return getattr(attention, op)
    if op in ("patch_embed", "patch_unembed"):
        from patchgen_fast.bench.problems import patches

        return getattr(patches, op)
    if op in ("linear", "layer_norm", "add_layer_norm", "qk_norm_rope"):
        from patchgen_fast.bench.problems import dense

        return getattr(dense, op)
    from patchgen_fast.bench.problems import models

    return models.build
