"""The result as one picture: how many times faster ours is than eager and than each peer."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from patchgen_fast.bench import tables
from patchgen_fast.bench.results import write_atomically
from patchgen_fast.bench.schema import OK, CaseResult, ResultFile

# Okabe and Ito's colours: told apart by colour-blind readers, and in grey.
OURS, EAGER, BEST, INK, FAINT = "#0072B2", "#9A9A9A", "#E69F00", "#222222", "#D8D8D8"


class PlotUnavailable(Exception):
    """matplotlib is not installed."""


def save(result: ResultFile, path: Path) -> bool:
    """Write a PNG; False when there is nothing to draw."""
    try:
        import matplotlib
    except ImportError as error:
        raise PlotUnavailable(
            "no plot: matplotlib is not installed; pip install 'patchgen-fast[bench]'"
        ) from error
    matplotlib.use("Agg")
    cases = [case for case in result.cases if case.status == OK and case.ours and case.ours.timing]
    if not cases:
        return False
    buffer = io.BytesIO()
    _draw(result, cases, buffer)
    write_atomically(path, buffer.getvalue())
    return True


def _draw(result: ResultFile, cases: list[CaseResult], buffer: io.BytesIO) -> None:
    import matplotlib.pyplot as plt

    cases = sorted(cases, key=lambda case: tables.LEVELS.index(case.level))
    height = 1.6 + 0.62 * len(cases)
    figure, (left, right) = plt.subplots(
        1,
        2,
        figsize=(13, height),
        sharey=True,
        gridspec_kw={"width_ratios": [3, 2]},
        layout="constrained",
    )
    positions = [-index for index in range(len(cases))]
    _speedups(left, cases, positions)
    _shares(right, cases, positions)
    left.set_yticks(positions, [f"{tables.label(c)} · {tables.short(c.dtype)}" for c in cases])
    left.set_ylim(positions[-1] - 0.6, 0.6)
    for axes in (left, right):
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.tick_params(labelsize=9, colors=INK)
        axes.set_axisbelow(True)
        axes.grid(axis="x", color=FAINT, linewidth=0.8)
        for above, below in zip(range(len(cases)), range(1, len(cases)), strict=False):
            if cases[above].level != cases[below].level:
                axes.axhline(positions[above] - 0.5, color=FAINT, linewidth=0.8)
    env = result.environment
    commit = env.commit[:10] or "unknown commit"
    figure.suptitle(
        f"patchgen_fast {env.version} ({commit}) on {env.gpu.get('name') or env.cpu}, "
        f"torch {env.packages.get('torch', '?')}",
        fontsize=11,
        color=INK,
        x=0.01,
        ha="left",
    )
    figure.savefig(buffer, format="png", dpi=130)
    plt.close(figure)


def _legend(axes: Any) -> None:
    """Above the axes, where no bar can lie under it."""
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=2, fontsize=8, frameon=False, borderaxespad=0
    )


def _speedups(axes: Any, cases: list[CaseResult], positions: list[int]) -> None:
    """Bars of the paired ratio with its interval: against eager, and against the best peer."""
    bars = (
        ("eager", EAGER, 0.18, lambda c: c.eager),
        ("best other peer", BEST, -0.18, lambda c: c.best_peer),
    )
    for name, colour, shift, pick in bars:
        first = True
        for case, y in zip(cases, positions, strict=True):
            cell = pick(case)
            if not cell or not cell.speedup_of_ours:
                continue
            r = cell.speedup_of_ours
            axes.barh(
                y + shift,
                r.median,
                height=0.32,
                color=colour,
                label=f"time of {name} / ours" if first else None,
                xerr=[[r.median - r.low], [r.high - r.median]],
                error_kw={"ecolor": INK, "elinewidth": 1, "capsize": 2},
            )
            text = f"{r.median:.2f}" + (f"  {cell.name}" if cell.role == "peer" else "")
            axes.annotate(
                text,
                (r.high, y + shift),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color=INK,
            )
            first = False
    axes.axvline(1.0, color=INK, linewidth=1)
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    axes.set_xlabel("times faster than (1 = as fast)", fontsize=9)
    _legend(axes)


def _shares(axes: Any, cases: list[CaseResult], positions: list[int]) -> None:
    """Dots: share of the measured arithmetic peak, ours and eager."""
    for case, y in zip(cases, positions, strict=True):
        share = tables.percent_of_peak(case)
        if share is None or not case.cost or not case.cost.peak_flops:
            continue
        eager = case.eager.timing if case.eager else None
        if eager:
            old = 100 * case.cost.flops / eager.median / case.cost.peak_flops
            axes.plot([old, share], [y, y], color=FAINT, linewidth=3, zorder=1)
            axes.scatter([old], [y], color=EAGER, s=36, zorder=2)
        axes.scatter([share], [y], color=OURS, s=44, zorder=3)
        ahead = not eager or share >= old  # write on the side away from eager's dot
        axes.annotate(
            f"{share:.0f} %",
            (share, y),
            xytext=(7 if ahead else -7, 0),
            ha="left" if ahead else "right",
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=INK,
        )
    axes.scatter([], [], color=EAGER, s=36, label="eager")
    axes.scatter([], [], color=OURS, s=44, label="ours")
    axes.set_xlim(0, 110)
    axes.set_xlabel("percent of the measured arithmetic peak", fontsize=9)
    _legend(axes)
