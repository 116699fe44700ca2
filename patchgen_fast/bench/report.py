"""One self-contained HTML page from one or more results: charts, tables, history, no network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from markupsafe import Markup

from patchgen_fast.bench import nvml, svg, tables
from patchgen_fast.bench.schema import OK, Calibration, CaseResult, Cell, ResultFile

PEER_COLOURS = ("c6", "c2", "c4", "c5")  # told apart from ours and from eager
MARGIN = 1.6  # of the roofline's axes around the points


@dataclass
class Figure:
    """A chart with its heading and the sentence that says how to read it."""

    title: str
    text: str
    picture: Markup
    narrow: Markup | None = None  # the same for a phone, where it has to be drawn differently


@dataclass
class Row:
    """One line of the page's table: what is shown, and what sorting compares."""

    cells: list[tuple[str, float | str]]
    state: str
    search: str
    history: Markup = field(default_factory=Markup)
    details: list[tuple[str, str]] = field(default_factory=list)


def render(results: Sequence[ResultFile]) -> str:
    """The page for the newest of these results; the others are its history."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    if not results:
        raise ValueError("render: expected at least one result, got none")
    ordered = sorted(results, key=lambda result: result.started)
    newest = ordered[-1]
    environment = Environment(
        loader=PackageLoader("patchgen_fast.bench", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
    )
    return environment.get_template("report.html.j2").render(
        result=newest,
        machine=tables.machine_lines(newest),
        figures=figures(newest),
        headings=[tables.HEADINGS[0], *["history"] * (len(ordered) > 1), *tables.HEADINGS[1:]],
        rows=[row(case, ordered) for case in newest.cases],
        missing=tables.missing_peers(newest),
        several=len(ordered) > 1,
        red=len(newest.red),
    )


def figures(result: ResultFile) -> list[Figure]:
    """The charts that this result has data for."""
    makers = (speedups, rooflines, attention_by_tokens, blocks, memory_by_tokens)
    return [figure for maker in makers for figure in maker(result)]


def timed(result: ResultFile) -> list[CaseResult]:
    """Cases with a time of ours."""
    return [c for c in result.cases if c.status == OK and c.ours and c.ours.timing]


def speedups(result: ResultFile) -> list[Figure]:
    """Bars: how many times faster ours is than eager, and than the best other peer."""
    groups = []
    for case in timed(result):
        group = []
        for cell, colour in ((case.eager, "eager"), (case.best_peer, "peer")):
            if cell and cell.speedup_of_ours:
                r = cell.speedup_of_ours
                text = f"{r.median:.2f} × {cell.name}"
                group.append(svg.Bar(r.median, r.low, r.high, colour, text))
        if group:
            groups.append((f"{tables.label(case)} · {tables.short(case.dtype)}", group))
    if not groups:
        return []
    names = [("time of eager / ours", "eager"), ("time of the best other peer / ours", "peer")]
    return [
        Figure(
            "Speed-up",
            "Longer is better; 1 is as fast. Whiskers are the 95 % bootstrap interval of the "
            "median of paired ratios.",
            svg.bars(groups, "Speed-up of each case", names),
            svg.bars(groups, "Speed-up of each case", names, narrow=True),
        )
    ]


def rooflines(result: ResultFile) -> list[Figure]:
    """Scatter per machine setting: products per second against products per byte."""
    found = []
    for peaks in result.calibrations:
        cases = [
            c
            for c in timed(result)
            if (c.device, c.threads) == (peaks.device, peaks.threads)
            and c.cost
            and c.cost.flops
            and c.cost.bytes
        ]
        if cases:
            found.append(_roofline(peaks, cases))
    return found


def _roofline(peaks: Calibration, cases: list[CaseResult]) -> Figure:
    series = []
    for name, colour, pick in (
        ("eager", "eager", lambda case: case.eager),
        ("best other peer", "peer", lambda case: case.best_peer),
        ("ours", "ours", lambda case: case.ours),
    ):
        one = svg.Series(name, [], colour, line=False)
        for case in cases:
            cell: Cell | None = pick(case)
            if cell and cell.timing and case.cost:
                rate = case.cost.flops / cell.timing.median
                one.points.append((case.cost.flops / case.cost.bytes, rate))
                one.diamonds.append(case.dtype != "float32")
                one.titles.append(
                    f"{cell.name}: {tables.label(case)} {case.dtype}, {rate / 1e9:.0f} GFLOP/s"
                )
        if one.points:
            series.append(one)
    where = "GPU" if peaks.device != "cpu" else f"CPU, {peaks.threads} thread"
    where += "s" if peaks.device == "cpu" and peaks.threads != 1 else ""
    return Figure(
        f"Roofline ({where})",
        "Lines are the peaks measured in this run: arithmetic, and main memory on the slope. "
        "Higher is better; a dot is fp32, a diamond half precision. Point at one for its case.",
        svg.chart(
            series,
            label=f"Roofline, {where}",
            x_title="products per byte of the tensors (FLOP/byte)",
            y_title="FLOP/s",
            roofs=_roofs(peaks, [x for one in series for x, _ in one.points]),
        ),
    )


def _roofs(peaks: Calibration, xs: list[float]) -> list[tuple[str, list[tuple[float, float]]]]:
    """A line for each peak: along the memory's slope up to its knee, then level."""
    memory = peaks.bandwidth.get("DRAM") or next(iter(peaks.bandwidth.values()), None)
    rates = [
        (name, peak)
        for name, peak in (("fp32", peaks.fp32_flops), ("bf16", peaks.bf16_flops))
        if peak
    ]
    knees = [peak / memory for _, peak in rates if memory]
    low, high = min([*xs, *knees]) / MARGIN, max([*xs, *knees]) * MARGIN
    roofs = []
    for name, peak in rates:
        slope = [(low, low * memory), (peak / memory, peak)] if memory else [(low, peak)]
        roofs.append((f"{name} {peak / 1e9:.0f} GFLOP/s", [*slope, (high, peak)]))
    return roofs


def attention_groups(result: ResultFile) -> list[tuple[str, list[CaseResult]]]:
    """Attention's forward by D, dtype and machine setting, by N, where there are at least two N."""
    groups: dict[tuple[str, int, str, int], list[CaseResult]] = {}
    for case in timed(result):
        sizes = _sizes(case)
        if case.op == "attention" and case.phase == "forward" and "N" in sizes:
            key = (case.device, case.threads, case.dtype, sizes["D"])
            groups.setdefault(key, []).append(case)
    found = []
    for (device, threads, dtype, width), cases in sorted(groups.items()):
        # One case for each N, the one with the most heads: a line has one value at a place.
        cases = sorted(cases, key=lambda case: (_sizes(case)["N"], _heads(case)))
        cases = list({_sizes(case)["N"]: case for case in cases}.values())
        where = f"D {width}, {tables.short(dtype)}, {device}"
        where += f" {threads} thread{'s' if threads != 1 else ''}" if device == "cpu" else ""
        if len(cases) > 1:
            found.append((where, cases))
    return found


def attention_by_tokens(result: ResultFile) -> list[Figure]:
    """Latency and rate against N."""
    found = []
    for where, cases in attention_groups(result):
        found.append(
            Figure(
                f"Attention against N ({where}): time a head",
                "Lower is better. Bands hold the middle half of the samples.",
                _against_tokens(cases, by_time=True, label=f"Attention time by N, {where}"),
            )
        )
        found.append(
            Figure(
                f"Attention against N ({where}): rate",
                "Higher is better. Bands hold the middle half of the samples.",
                _against_tokens(cases, by_time=False, label=f"Attention rate by N, {where}"),
            )
        )
    return found


def _against_tokens(cases: list[CaseResult], *, by_time: bool, label: str) -> Markup:
    names = ["eager", *_peer_names(cases), "ours"]
    colours = {"eager": "eager", "ours": "ours"}
    series = []
    for index, name in enumerate(names):
        points, bands = [], []
        for case in cases:
            cell = case.cell(name)
            if not cell or not cell.timing or not case.cost:
                continue
            sizes = _sizes(case)
            heads, n = _heads(case), sizes["N"]
            quarters = np.quantile(cell.timing.samples, [0.25, 0.5, 0.75])
            if by_time:
                low, middle, high = (float(q) * 1e6 / heads for q in quarters)
            else:
                high, middle, low = (case.cost.flops / float(q) for q in quarters)
            points.append((float(n), middle))
            bands.append((low, high))
        if points:
            colour = colours.get(name, PEER_COLOURS[index % len(PEER_COLOURS)])
            series.append(svg.Series(name, points, colour, bands))
    return svg.chart(
        series,
        label=label,
        x_title="N, tokens",
        y_title="µs a head" if by_time else "FLOP/s",
        log_y=by_time,
    )


def _peer_names(cases: Sequence[CaseResult]) -> list[str]:
    seen: dict[str, None] = {}
    for case in cases:
        for cell in case.cells:
            if cell.role == "peer" and cell.timing:
                seen[cell.name] = None
    return list(seen)


def _heads(case: CaseResult) -> int:
    """B · H."""
    sizes = _sizes(case)
    return sizes["B"] * sizes["H"]


def _sizes(case: CaseResult) -> dict[str, int]:
    """`B8 H12 N197` as numbers by letter."""
    sizes = {}
    for word in case.shape.split():
        letters = word.rstrip("0123456789")
        if word[len(letters) :]:
            sizes[letters] = int(word[len(letters) :])
    return sizes


def blocks(result: ResultFile) -> list[Figure]:
    """Stacked time of an encoder block: attention layer, feed-forward, the rest."""
    by_key = {(c.op, c.case, c.dtype, c.phase, c.device, c.threads): c for c in timed(result)}
    groups = []
    for case in timed(result):
        if case.op != "encoder_block":
            continue
        rest = (case.case, case.dtype, case.phase, case.device, case.threads)
        parts = [by_key.get((op, *rest)) for op in ("attention_layer", "feed_forward")]
        for role in ("eager", "ours"):
            whole = getattr(case, role)
            if not whole or not whole.timing:
                continue
            stack, spent = [], 0.0
            for part, colour, name in zip(
                parts, ("c1", "c2"), ("attention layer", "feed-forward"), strict=True
            ):
                cell = getattr(part, role) if part else None
                if cell and cell.timing:
                    value = cell.timing.median * 1e3
                    stack.append((value, colour, f"{name} {value:.3g} ms"))
                    spent += value
            total = whole.timing.median * 1e3
            left = max(total - spent, 0.0)
            stack.append((left, "c3", f"the rest {left:.3g} ms"))
            groups.append((f"{tables.label(case)} · {tables.short(case.dtype)}, {role}", stack))
    if not groups:
        return []
    used = {colour for _, stack in groups for _, colour, _ in stack}
    names = [("attention layer", "c1"), ("feed-forward", "c2"), ("the rest of the block", "c3")]
    names = [entry for entry in names if entry[1] in used]
    return [
        Figure(
            "Time of a block",
            "Eager above, ours below. The parts were measured by themselves; the rest is what the "
            "block takes beyond them.",
            svg.stacked(groups, "Time of each block by part", names, "ms"),
            svg.stacked(groups, "Time of each block by part", names, "ms", narrow=True),
        )
    ]


def memory_by_tokens(result: ResultFile) -> list[Figure]:
    """Peak memory of attention against N; peers with an allocator of their own have no line."""
    found = []
    for where, cases in attention_groups(result):
        series = []
        for index, name in enumerate(["eager", *_peer_names(cases), "ours"]):
            points = []
            for case in cases:
                cell = case.cell(name)
                if cell and cell.peak_memory:
                    points.append((float(_sizes(case)["N"]), cell.peak_memory / _heads(case)))
            if points:
                peer = PEER_COLOURS[index % len(PEER_COLOURS)]
                colour = {"eager": "eager", "ours": "ours"}.get(name, peer)
                series.append(svg.Series(name, points, colour))
        if series:
            found.append(
                Figure(
                    f"Attention against N ({where}): peak memory a head",
                    "What a call holds at most, its result included; torch's allocator alone. "
                    "Lower is better.",
                    svg.chart(
                        series,
                        label=f"Memory by N, {where}",
                        x_title="N, tokens",
                        y_title="bytes a head",
                    ),
                )
            )
    return found


def row(case: CaseResult, results: Sequence[ResultFile]) -> Row:
    """The table's line of a case, with a history over all results."""
    shown = tables.row(case)
    keys = [_sort_key(text) for text in shown]
    details = [
        (
            f"{cell.name}{f' ({cell.backend})' if cell.backend else ''}",
            f"{tables.milliseconds(cell.timing.median)} ms"
            if cell.timing
            else f"{cell.status}: {cell.reason}",
        )
        for cell in case.cells
    ]
    details += [
        (f"GPU {moment}", nvml.describe(state))
        for moment, state in (("before", case.gpu_before), ("after", case.gpu_after))
        if state
    ]
    found = Row(
        list(zip(shown, keys, strict=True)),
        case.status,
        " ".join([case.id, case.shape, case.level, *shown]).lower(),
        details=details,
    )
    past = [
        (result.environment.commit[:8], old.eager.speedup_of_ours.median)
        for result in results
        for old in result.cases
        if old.id == case.id and old.eager and old.eager.speedup_of_ours
    ]
    if len(results) > 1 and past:
        title = ", ".join(f"{commit or '?'}: {ratio:.2f}" for commit, ratio in past)
        found.history = svg.sparkline([ratio for _, ratio in past], title)
    return found


def _sort_key(text: str) -> float | str:
    """The number that a text starts with, for sorting; else the text itself."""
    head = text.split(" ", 1)[0].rstrip("%")
    try:
        value = float(head)
    except ValueError:
        return text
    return value if math.isfinite(value) else text
