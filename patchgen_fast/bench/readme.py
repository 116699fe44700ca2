"""The README's benchmark tables, written from a committed result between two markers.

python -m patchgen_fast.bench.readme            # rewrite
python -m patchgen_fast.bench.readme --check    # 1 if it would change
"""

from __future__ import annotations

import sys
from pathlib import Path

from patchgen_fast.bench import results, tables
from patchgen_fast.bench.schema import ABSENT, ResultFile

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path("benchmarks") / "results"


def section(result: ResultFile, source: str, command: str) -> str:
    """What stands between the markers."""
    lines = [
        BEGIN,
        *[f"{line}  " for line in tables.machine_lines(result)],
        f"Written by `make readme` from [{source}]({source}), measured by `{command}`.",
        "",
        tables.tables_by_level(result, heading="###"),
        END,
    ]
    return "\n".join(lines)


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
    result = results.read(found[0])
    missing = absent_peers(result)
    if missing:
        raise ValueError(f"{found[0].name}: peers absent from the run: {', '.join(missing)}")
    arguments = "" if result.settings.suite == "standard" else f" --suite {result.settings.suite}"
    return replaced(
        text,
        section(result, found[0].relative_to(root).as_posix(), f"patchgen-fast bench{arguments}"),
    )


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
