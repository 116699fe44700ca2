"""Results as text: one row a case, for people (markdown) and for programs (CSV)."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from patchgen_fast.bench.schema import OK, RED, CaseResult, Cell, ResultFile

LEVELS = ("op", "layer", "block", "model")
HEADINGS = (
    "case",
    "shape",
    "dtype",
    "backend",
    "eager ms",
    "best other",
    "ours ms",
    "× eager",
    "× SDPA",
    "× best",
    "of peak",
    "limit",
    "error ours / eager",
)


def short(dtype: str) -> str:
    """`float32` as `fp32`, and so on."""
    return {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}.get(dtype, dtype)


def milliseconds(seconds: float) -> str:
    """Three significant digits."""
    value = seconds * 1e3
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def error_pair(case: CaseResult) -> str:
    """Largest error of ours and of eager, each relative to the output's largest value."""
    ours, eager = case.ours, case.eager
    if not ours or not eager or not ours.parity or not eager.parity:
        return ""
    return f"{worst(ours):.1e} / {worst(eager):.1e}"


def worst(cell: Cell) -> float:
    """The largest error of any output or gradient, as a share of that tensor's largest value."""
    return max((row.max_error / row.truth_max if row.truth_max > 0 else 0.0) for row in cell.parity)


def percent_of_peak(case: CaseResult) -> float | None:
    """Ours as a share of the measured arithmetic peak, in percent."""
    timing = case.ours.timing if case.ours else None
    if not timing or not case.cost or not case.cost.peak_flops:
        return None
    return 100.0 * case.cost.flops / timing.median / case.cost.peak_flops


def percent_of_limit(case: CaseResult) -> float | None:
    """The binding limit's least time as a share of ours, in percent."""
    timing = case.ours.timing if case.ours else None
    if not timing or not case.cost or not case.cost.limit:
        return None
    return 100.0 * case.cost.floors[case.cost.limit] / timing.median


def ratio(cell: Cell | None) -> str:
    """`2.31 (2.28–2.35)`: the paired ratio and its interval."""
    if not cell or not cell.speedup_of_ours:
        return ""
    r = cell.speedup_of_ours
    return f"{r.median:.2f} ({r.low:.2f}–{r.high:.2f})"


def sdpa(case: CaseResult) -> Cell | None:
    """The cell of torch's scaled_dot_product_attention with its own choice of a kernel."""
    return next((c for c in case.cells if c.name in ("sdpa", "sdpa per sequence")), None)


def label(case: CaseResult) -> str:
    """`attention vit_b both, all threads`: what tells the case from others of its shape."""
    text = f"{case.op} {case.case}"
    if case.phase != "forward":
        text += f" {'fwd+bwd' if case.phase == 'both' else case.phase}"
    return text + (f", {case.threads} threads" if case.threads > 1 else "")


def row(case: CaseResult) -> list[str]:
    """The cells of one case under HEADINGS; without a time, what stands in its place and why."""
    start = [label(case), case.shape, short(case.dtype)]
    if case.status != OK:
        mark = "RED" if case.status == RED else case.status
        return [*start, "", "", "", f"{mark}: {case.reason}", "", "", "", "", "", error_pair(case)]
    ours, eager, best = case.ours, case.eager, case.best_peer
    share, of_limit = percent_of_peak(case), percent_of_limit(case)
    return [
        *start,
        _backend(ours),
        milliseconds(eager.timing.median) if eager and eager.timing else "",
        f"{milliseconds(best.timing.median)} {best.name}" if best and best.timing else "",
        (milliseconds(ours.timing.median) if ours and ours.timing else "")
        + ("" if case.undisturbed else " (disturbed)"),
        ratio(eager),
        ratio(sdpa(case)),
        ratio(best),
        _percent(share, case),
        ""
        if of_limit is None or not case.cost
        else f"{_percent(of_limit, case)} of {case.cost.limit}",
        error_pair(case),
    ]


def _percent(share: float | None, case: CaseResult) -> str:
    """`67 %`; `≤ 67 %` where the peak could only be bounded from below."""
    if share is None:
        return ""
    bound = "≤ " if case.cost and case.cost.peak_is_lower_bound else ""
    return f"{bound}{share:.0f} %"


def peer_rows(result: ResultFile) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of every peer's time and ratio, or what stands in their place."""
    cases = [case for case in result.cases if any(cell.role == "peer" for cell in case.cells)]
    names = list(
        dict.fromkeys(cell.name for case in cases for cell in case.cells if cell.role == "peer")
    )
    rows = []
    for case in cases:
        cells = [case.cell(name) for name in names]
        rows.append(
            [f"{label(case)}", short(case.dtype), *("" if not c else _peer(c) for c in cells)]
        )
    return ["case", "dtype", *names], rows


def _peer(cell: Cell) -> str:
    if not cell.timing:
        return "not timed" if cell.status == OK else cell.status
    r = cell.speedup_of_ours
    return f"{milliseconds(cell.timing.median)} ms" + (f", {r.median:.2f} ×" if r else "")


def _backend(cell: Cell | None) -> str:
    if not cell:
        return ""
    parts = cell.backend.split(", ")
    if len(parts) == 1:
        return cell.backend
    by_backend: dict[str, list[str]] = {}
    for part in parts:
        op, _, backend = part.rpartition(".")
        by_backend.setdefault(backend, []).append(op)
    return "; ".join(f"{backend}: {', '.join(ops)}" for backend, ops in by_backend.items())


def missing_peers(result: ResultFile) -> list[str]:
    """One line for each peer and reason that kept it out of the tables."""
    seen: dict[tuple[str, str, str], list[str]] = {}
    for case in result.cases:
        for cell in case.cells:
            if cell.role == "peer" and cell.timing is None and cell.status != OK:
                key = (cell.name, cell.status, cell.reason)
                seen.setdefault(key, []).append(f"{case.op} {case.case} {short(case.dtype)}")
    lines = []
    for (name, status, reason), places in seen.items():
        where = f"{places[0]} and {len(places) - 1} more" if len(places) > 1 else places[0]
        lines.append(f"{name}, {status}: {reason} ({where})")
    return lines


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A GitHub table; every value escaped."""
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    lines += ["| " + " | ".join(_escape(value) for value in cells) + " |" for cells in rows]
    return "\n".join(lines)


def machine_lines(result: ResultFile) -> list[str]:
    """Processor, versions, commit and measured peaks, as sentences."""
    env = result.environment
    where = [f"{env.cpu}, {env.cores} core{'s' if env.cores != 1 else ''}"]
    if env.isa:
        where.append(f"instruction set {env.isa}")
    if env.gpu:
        where.append(env.gpu.get("name", "GPU"))
    versions = ", ".join(f"{name} {version}" for name, version in env.packages.items())
    commit = (env.commit[:12] or "unknown") + (" with changes" if env.dirty else "")
    lines = [
        "; ".join(where) + ".",
        f"patchgen_fast {env.version} at commit {commit}; Python {env.python}; {versions}.",
    ]
    for peak in result.calibrations:
        parts = []
        if peak.fp32_flops:
            parts.append(f"fp32 {peak.fp32_flops / 1e9:.0f} GFLOP/s")
        if peak.bf16_flops:
            parts.append(f"bf16 {peak.bf16_flops / 1e9:.0f} GFLOP/s")
        parts += [f"{name} {rate / 1e9:.0f} GB/s" for name, rate in peak.bandwidth.items()]
        threads = f"{peak.threads} thread{'s' if peak.threads != 1 else ''}"
        on = threads if peak.device == "cpu" else "GPU"
        lines.append(f"Measured peak, {on}: {', '.join(parts)} ({peak.source}).")
    return lines + env.notes


def markdown(result: ResultFile, *, title: str = "patchgen_fast benchmark") -> str:
    """The whole result as a markdown page."""
    parts = [f"# {title}", "", *[f"{line}  " for line in machine_lines(result)], ""]
    parts += [tables_by_level(result)]
    headings, rows = peer_rows(result)
    if rows:
        parts += ["", "## Every peer", "", "Its time, and how many times faster ours is.", ""]
        parts += [markdown_table(headings, rows)]
    missing = missing_peers(result)
    if missing:
        parts += ["", "Peers without a number:", "", *[f"- {_escape(line)}" for line in missing]]
    if not result.complete:
        parts += ["", "**This run was interrupted; `--resume` goes on with it.**"]
    return "\n".join(parts) + "\n"


def tables_by_level(result: ResultFile, *, heading: str = "##") -> str:
    """A table a level, and the sentence that says how to read it."""
    parts = []
    for level in LEVELS:
        cases = [case for case in result.cases if case.level == level]
        if cases:
            names = {"op": "Ops", "layer": "Layers", "block": "Blocks", "model": "Models"}
            parts += [
                f"{heading} {names[level]}",
                "",
                markdown_table(HEADINGS, [row(c) for c in cases]),
            ]
            parts.append("")
    parts.append(
        "Medians of interleaved rounds; × is the median of paired ratios with its 95 % bootstrap "
        "interval. Errors are the largest deviation from float64, as a share of the largest value."
    )
    return "\n".join(parts)


def csv_text(result: ResultFile) -> str:
    """One line a cell, times in seconds."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        [
            "id",
            "op",
            "case",
            "level",
            "shape",
            "dtype",
            "phase",
            "device",
            "threads",
            "contender",
            "role",
            "status",
            "reason",
            "backend",
            "median_s",
            "low_s",
            "high_s",
            "best_s",
            "first_call_s",
            "speedup_of_ours",
            "peak_memory_bytes",
            "max_error",
            "rounds",
            "discarded_rounds",
        ]
    )
    for case in result.cases:
        for cell in case.cells or [Cell(name="", role="", status=case.status, reason=case.reason)]:
            t, r = cell.timing, cell.speedup_of_ours
            writer.writerow(
                [
                    case.id,
                    case.op,
                    case.case,
                    case.level,
                    case.shape,
                    case.dtype,
                    case.phase,
                    case.device,
                    case.threads,
                    cell.name,
                    cell.role,
                    cell.status,
                    cell.reason,
                    cell.backend,
                    *((t.median, t.low, t.high, t.best, t.first_call) if t else [""] * 5),
                    r.median if r else "",
                    "" if cell.peak_memory is None else cell.peak_memory,
                    worst(cell) if cell.parity else "",
                    case.rounds,
                    case.discarded_rounds,
                ]
            )
    return out.getvalue()
