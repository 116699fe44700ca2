"""A long result in short: a row an op, and every case that a peer won."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from patchgen_fast.bench.schema import OK, CaseResult, Cell, ResultFile
from patchgen_fast.bench.tables import label, markdown_table, percent_of_peak, ratio, short

HEADINGS = ("op", "dtype", "cases", "× eager", "× best", "slower than a peer", "of peak")


def fastest_peer(case: CaseResult) -> Cell | None:
    """The peer, eager among them, that ours beats by the least or loses to."""
    others = [c for c in case.cells if c.role != "ours" and c.speedup_of_ours]
    return min(others, key=_speedup, default=None)


def losses(result: ResultFile) -> list[CaseResult]:
    """The cases in which a peer is faster, the slowest of ours first."""
    return sorted(filter(is_lost, result.cases), key=_against_best)


def is_lost(case: CaseResult) -> bool:
    """Whether a peer is faster beyond chance: the ratio's whole interval is below 1."""
    peer = fastest_peer(case)
    return bool(peer and peer.speedup_of_ours and peer.speedup_of_ours.high < 1.0)


def markdown(result: ResultFile) -> str:
    """The table by op, phase, threads and dtype, and the cases lost."""
    groups: dict[tuple[str, str], list[CaseResult]] = {}
    for case in result.cases:
        name = label(case).replace(f"{case.op} {case.case}", case.op, 1)
        groups.setdefault((name, short(case.dtype)), []).append(case)
    rows = [[*key, *_sums(cases)] for key, cases in groups.items()]
    parts = [
        markdown_table(HEADINGS, rows),
        "",
        "Medians over the cases, in brackets the least and the largest. Best: the fastest of eager "
        "and all peers, case by case. Slower: the ratio's whole interval is below 1.",
    ]
    lost = losses(result)
    if lost:
        parts += ["", "Where a peer is faster:", ""]
        parts += [
            markdown_table(
                ("case", "shape", "dtype", "× peer", "peer"),
                [
                    [label(case), case.shape, short(case.dtype), ratio(peer), peer.name]
                    for case in lost
                    if (peer := fastest_peer(case))
                ],
            )
        ]
    return "\n".join(parts)


def _sums(cases: Sequence[CaseResult]) -> list[str]:
    timed = [case for case in cases if case.status == OK]
    eager = [_speedup(c.eager) for c in timed if c.eager and c.eager.speedup_of_ours]
    best = [_against_best(c) for c in timed if fastest_peer(c)]
    shares = [share for c in timed if (share := percent_of_peak(c)) is not None]
    count = str(len(timed)) + (f" of {len(cases)}" if len(timed) < len(cases) else "")
    lost = str(sum(map(is_lost, timed)))
    return [count, _spread(eager), _spread(best), lost, _spread(shares, "{:.0f}", " %")]


def _spread(values: Sequence[float], form: str = "{:.2f}", unit: str = "") -> str:
    if not values:
        return ""
    middle, least, most = map(form.format, (median(values), min(values), max(values)))
    return f"{middle}{unit}" + (f" ({least}–{most})" if len(values) > 1 else "")


def _speedup(cell: Cell) -> float:
    return cell.speedup_of_ours.median if cell.speedup_of_ours else 0.0


def _against_best(case: CaseResult) -> float:
    peer = fastest_peer(case)
    return _speedup(peer) if peer else float("inf")
