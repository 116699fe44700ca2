"""The README's benchmark tables, written from the committed results between two markers: the last
of them by name as it is, what the others found, in short, and of whole suites the sums.

python -m patchgen_fast.bench.readme            # rewrite
python -m patchgen_fast.bench.readme --check    # 1 if it would change
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from patchgen_fast.bench import results, summary, tables
from patchgen_fast.bench.schema import ABSENT, ResultFile

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path("benchmarks") / "results"
WHOLE = "cpu"  # the suite that is too long to show
IN_SHORT = ("case", "shape", "dtype", "ours ms", "× eager", "× best", "of peak")


def section(result: ResultFile, source: str, others: Mapping[str, ResultFile]) -> str:
    """What stands between the markers."""
    lines = [
        BEGIN,
        *[f"{line}  " for line in tables.machine_lines(result)],
        f"Written by `make readme` from [{source}]({source}), measured by `{command(result)}`.",
        "",
        tables.tables_by_level(result, heading="###"),
        *[
            line
            for source, other in others.items()
            for line in (in_sum if other.settings.suite == WHOLE else in_short)(other, source)
        ],
        END,
    ]
    return "\n".join(lines)


def command(result: ResultFile) -> str:
    """What measured it."""
    suite = result.settings.suite
    words = ["patchgen-fast", "bench"] + ([] if suite == "standard" else ["--suite", suite])
    for name, values in result.settings.filters.items():
        option = (
            "case" if name == "names" else name if name == "threads" else name.removesuffix("s")
        )
        words += [word for value in values for word in (f"--{option}", value)]
    return shlex.join(words)


def in_short(result: ResultFile, source: str) -> list[str]:
    """Another machine's ratios."""
    columns = [tables.HEADINGS.index(name) for name in IN_SHORT]
    rows = [[row[i] for i in columns] for row in map(tables.row, result.cases)]
    return [
        "",
        f"### On {result.environment.cpu}",
        "",
        f"From [{source}]({source}), measured by `{command(result)}`.",
        "",
        tables.markdown_table(IN_SHORT, rows),
    ]


def in_sum(result: ResultFile, source: str) -> list[str]:
    """A whole suite's sums, and what it lost; all cases stand in the page beside the source."""
    page = source.removesuffix(".json") + ".md"
    return [
        "",
        f"### The whole suite on {result.environment.cpu}",
        "",
        f"{len(result.cases)} cases, [all of them]({page}), from [{source}]({source}), measured by "
        f"`{command(result)}`" + ("." if result.complete else ", which was ended before its last."),
        "",
        summary.markdown(result),
    ]


def replaced(text: str, new: str) -> str:
    """The README with this section; ValueError when the markers are not there, once, in order."""
    begin, end = text.find(BEGIN), text.find(END)
    if text.count(BEGIN) != 1 or text.count(END) != 1 or end < begin:
        raise ValueError(f"expected {BEGIN} once and {END} once after it in the README")
    return text[:begin] + new + text[end + len(END) :]


def sources(root: Path = ROOT) -> list[Path]:
    """The committed results of bench, by name; other commands' results lie there too."""
    return [path for path in sorted((root / FOLDER).glob("*.json")) if results.is_ours(path)]


def absent_peers(result: ResultFile) -> list[str]:
    """Peers that a table of this result would miss because they were not installed."""
    return sorted(
        {
            f"{cell.name} in {case.id}"
            for case in result.cases
            for cell in case.cells
            if cell.status == ABSENT
        }
    )


def generate(root: Path = ROOT) -> str:
    """The README as it should be; unchanged while no result is committed."""
    text = (root / "README.md").read_text()
    found = sources(root)
    if not found:
        return text
    named = {path.relative_to(root).as_posix(): results.read(path) for path in found}
    for name, result in named.items():
        if missing := absent_peers(result):
            raise ValueError(f"{name}: peers absent from the run: {', '.join(missing)}")
    shown = [name for name, result in named.items() if result.settings.suite != WHOLE] or [*named]
    source = shown[-1]
    newest = named.pop(source)
    return replaced(text, section(newest, source, named))


def main(arguments: list[str]) -> int:
    """0 fine; 1 stale under --check; 2 wrong markers or result."""
    path = ROOT / "README.md"
    try:
        new = generate()
    except (ValueError, results.ResultError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    if new == path.read_text():
        return 0
    if "--check" in arguments:
        print("README.md differs from benchmarks/results: run `make readme`", file=sys.stderr)
        return 1
    results.write_atomically(path, new.encode())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
