"""A profile as text: a table of layers and the lines below it."""

from __future__ import annotations

from collections.abc import Sequence

from .result import Profile, Row

HEADINGS = ("layer", "class", "calls", "shape", "backend", "ms", "IQR", "share", "GFLOP",
            "TFLOP/s", "of peak", "GB/s", "peak MiB", "× eager", "error ours / eager",
            "why not fast")  # fmt: skip
LEFT = {"layer", "class", "shape", "backend", "error ours / eager", "why not fast"}
MEBIBYTE = 1 << 20


def cells(row: Row, profile: Profile) -> list[str]:
    """One row under HEADINGS; empty where there is nothing to say."""
    rate, memory = row.flop_rate, row.peak_memory
    share_of_peak = rate / profile.peak_flops if rate and profile.peak_flops else None
    return [
        f"  {row.op}" if row.op else row.name,
        row.cls,
        str(row.calls or ""),
        row.shape,
        row.backend,
        number(row.seconds.median * 1e3),
        f"{number(row.seconds.q1 * 1e3)}–{number(row.seconds.q3 * 1e3)}",
        f"{row.share:.1%}",
        number(row.flops / 1e9) if row.flops else "",
        number(rate / 1e12) if rate else "",
        f"{share_of_peak:.0%}" if share_of_peak else "",
        number(row.byte_rate / 1e9) if row.byte_rate else "",
        number(memory / MEBIBYTE) if memory else "",
        f"{row.speedup:.2f}" if row.speedup else "",
        f"{row.error:.1e} / {row.eager_error:.1e}" if row.error is not None else "",
        row.reason,
    ]


def number(value: float) -> str:
    """Three significant digits."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def table(profile: Profile, *, every_layer: bool = False) -> tuple[list[str], list[list[str]]]:
    """Headings and rows, without the columns that are empty in this profile."""
    rows = [cells(row, profile) for row in (profile.rows if every_layer else profile.collapsed())]
    used = [i for i in range(len(HEADINGS)) if any(row[i] for row in rows)]
    return [HEADINGS[i] for i in used], [[row[i] for i in used] for row in rows]


def as_text(profile: Profile, *, every_layer: bool = False) -> str:
    """The whole profile in aligned columns."""
    headings, rows = table(profile, every_layer=every_layer)
    widths = [max(len(row[i]) for row in [headings, *rows]) for i in range(len(headings))]

    def line(row: Sequence[str]) -> str:
        parts = [
            text.ljust(width) if heading in LEFT else text.rjust(width)
            for text, width, heading in zip(row, widths, headings, strict=True)
        ]
        return "  ".join(parts).rstrip()

    rule = "─" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([title(profile), "", line(headings), rule, *map(line, rows), rule,
                      *summary(profile)])  # fmt: skip


def as_markdown(profile: Profile, *, every_layer: bool = False) -> str:
    """The same as a GitHub table."""
    headings, rows = table(profile, every_layer=every_layer)

    def line(row: Sequence[str]) -> str:
        return "| " + " | ".join(text.strip().replace("|", "\\|") for text in row) + " |"

    marked = [[("↳ " + row[0].strip()) if row[0].startswith(" ") else row[0], *row[1:]]
              for row in rows]  # fmt: skip
    lines = [line(headings), "|" + "---|" * len(headings), *map(line, marked)]
    return "\n".join(
        [f"### {title(profile)}", "", *lines, "", *(f"- {x}" for x in summary(profile))]
    )


def title(profile: Profile) -> str:
    step = "training step" if profile.training else "forward"
    compiled = ", compiled" if profile.compiled else ""
    threads = f", {profile.threads} thread{'s' * (profile.threads != 1)}"
    where = profile.device + (threads if profile.device == "cpu" else "")
    return f"{profile.model}: {step}{compiled}, batch {profile.batch}, {profile.dtype}, {where}"


def summary(profile: Profile) -> list[str]:
    """The lines below the table."""
    step = profile.step
    lines = [
        f"step {number(step.median * 1e3)} ms (IQR {number(step.q1 * 1e3)}–"
        f"{number(step.q3 * 1e3)}) without the profiler; the rows add up to {profile.coverage:.1%} "
        "of it" + (" (other work disturbed it)" if profile.disturbed else "")
    ]
    if profile.eager_step and profile.speedup:
        lines.append(
            f"eager step {number(profile.eager_step.median * 1e3)} ms: {profile.speedup:.2f} times "
            "as fast"
        )
    if amdahl := profile.amdahl():
        lines.append(amdahl)
    rate = f"{number(profile.images_per_second)} images/s"
    if profile.tokens_per_second:
        rate += f", {number(profile.tokens_per_second)} tokens/s"
    if profile.mfu is not None and profile.peak_flops:
        rate += (
            f", MFU {profile.mfu:.0%} of {number(profile.peak_flops / 1e12)} TFLOP/s "
            f"({profile.peak_note})"
        )
    elif profile.peak_note:
        rate += f"; no share of peak: {profile.peak_note}"
    lines.append(rate)
    lines.append(f"{number(profile.flops / 1e9)} GFLOP a step; {_count(profile)}")
    if profile.peak_memory:
        lines.append(f"peak memory of a step {number(profile.peak_memory / MEBIBYTE)} MiB beyond "
                     "weights and inputs")  # fmt: skip
    if profile.trace:
        lines.append(f"trace: {profile.trace} (opens in ui.perfetto.dev)")
    return lines


def _count(profile: Profile) -> str:
    if profile.eager_flops is None:
        return f"not compared with the eager model: {profile.flops_note}"
    if profile.flops_agree:
        return "the eager model on the meta device counts the same"
    return f"the eager model on the meta device counts {number(profile.eager_flops / 1e9)}"
