"""`swap` held against every attention model of a library: what is replaced, and is it right?

    python benchmarks/sweep.py timm                 # resumes where it stopped
    python benchmarks/sweep.py timm --shard 0/2     # half of it; the files of shards join
    python benchmarks/sweep.py timm --table         # the table alone, from what is there

Every model is built on the meta device. Those with attention are then built small (one block a
stage, few patches), with random weights, and run: eager and swapped are counted while they run, so
that "fully" means that no softmax, no attention of torch and no convolution that cuts patches was
left; and `verify` holds the results against float64.

A line of JSON a model goes to `benchmarks/results/sweep-LIBRARY.jsonl` as soon as it is done.
"""

from __future__ import annotations

import json
import signal
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import sweep_diffusers
import sweep_timm
import sweep_transformers
from sweep_examine import Entry

RESULTS = Path(__file__).parent / "results"
MOST_SECONDS = 300  # for a model
STATUSES = ("fully", "partly", "refused", "not run")


class TooSlow(BaseException):
    """Past whoever catches exceptions on the way: the model took too long."""


# library -> (the names of its models, what examines one)
LIBRARIES: dict[str, tuple[Callable[[], list[str]], Callable[[str], Entry]]] = {
    "timm": (sweep_timm.models, sweep_timm.examine_model),
    "transformers": (sweep_transformers.models, sweep_transformers.examine_model),
    "diffusers": (sweep_diffusers.models, sweep_diffusers.examine_model),
}


# ------------------------------------------------------------------------------- running, results


def _guarded(examine_one: Callable[[str], Entry], name: str) -> Entry:
    signal.signal(signal.SIGALRM, _stop)
    signal.alarm(MOST_SECONDS)
    try:
        return examine_one(name)
    except TooSlow:
        return Entry(name, "not run", note=f"it took longer than {MOST_SECONDS} s")
    except Exception as error:  # a model that fails is a finding, and the others are still wanted
        return Entry(name, "error", note=f"{type(error).__name__}: {error}"[:2000])
    finally:
        signal.alarm(0)


def _stop(*_: Any) -> None:
    raise TooSlow


def run(library: str, shard: tuple[int, int], match: str, quiet: bool) -> Path:
    """Examine what is not in the file yet; the file's path."""
    names, examine_one = LIBRARIES[library]
    index, count = shard
    part = "" if count == 1 else f".{index}of{count}"
    path = RESULTS / f"sweep-{library}{part}.jsonl"
    done = {entry["name"] for entry in read(library)}
    todo = [n for i, n in enumerate(names()) if i % count == index and match in n and n not in done]
    cut_off = path.exists() and not path.read_text().endswith("\n")
    with path.open("a") as file:
        file.write("\n" if cut_off else "")
        for name in _progress(todo, quiet):
            file.write(json.dumps(asdict(_guarded(examine_one, name))) + "\n")
            file.flush()
    return path


def _progress(names: list[str], quiet: bool):
    """The names, with a bar on a terminal and a line for every 25 elsewhere."""
    if quiet:
        yield from names
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track

        yield from track(names, "models", console=Console(stderr=True))
    else:
        for i, name in enumerate(names):
            if i % 25 == 0:
                print(f"[{i}/{len(names)}] {name}", file=sys.stderr, flush=True)
            yield name


def read(library: str) -> list[dict[str, Any]]:
    """All entries of a library, of whatever shard; a line cut off by an interruption is redone."""
    entries: dict[str, dict[str, Any]] = {}
    for path in sorted(RESULTS.glob(f"sweep-{library}*.jsonl")):
        for line in path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            entries[entry["name"]] = entry
    return sorted(entries.values(), key=lambda entry: entry["name"])


def table(library: str) -> str:
    """Markdown: the sums, then the reasons, then whatever failed."""
    entries = [entry for entry in read(library) if entry["status"] != "no attention"]
    counts = Counter(entry["status"] for entry in entries)
    verdicts = Counter(entry["parity"] for entry in entries if entry["parity"])
    sampled = Counter(entry["sampled"] for entry in entries if entry["sampled"])
    reasons: Counter[tuple[str, str]] = Counter(
        (cls, reason) for entry in entries for cls, reason in entry["left"].items()
    )
    fell_back: Counter[str] = Counter(
        reason for entry in entries for reason in entry.get("fell_back", ())
    )
    lines = [
        f"# swap over {library}",
        "",
        f"{len(entries)} models with attention: "
        + ", ".join(f"{counts[status]} {status}" for status in (*STATUSES, "error"))
        + ". Fully: while it runs, no softmax, no attention of torch and no convolution that cuts "
        "an image into patches is left. Written by `python benchmarks/sweep.py "
        f"{library} --table`.",
        "",
        f"Parity against float64 in float32: {_sums(verdicts)}. "
        f"Sample with gradients, and in bfloat16: {_sums(sampled)}. Not run: no model of the kind "
        "that is small enough could be built, so nothing is claimed of it; what swap would do is "
        "in the JSON lines. Undecided: the model chooses by its numbers, and eager with another "
        "kernel of torch's chooses otherwise too.",
    ]
    if reasons:
        lines += ["", "| class that stays as it is | reason | models |", "|---|---|---|"]
        lines += [f"| {cls} | {why} | {n} |" for (cls, why), n in reasons.most_common()]
    wrong = [e for e in entries if e["parity"] == "fail" or "fail" in e["sampled"]]
    if fell_back:
        lines += ["", "| swapped layers took the eager way, as they | models |", "|---|---|"]
        lines += [f"| {reason} | {n} |" for reason, n in fell_back.most_common()]
    unsure = [e for e in entries if "undecided" in e["parity"] + e["sampled"]]
    odd = [e for e in entries if e["status"] in ("error", "not run")]
    for title, listed in (
        ("Parity failures", wrong), ("Undecided", unsure), ("Not examined", odd)
    ):  # fmt: skip
        if listed:
            lines += ["", f"## {title}", ""]
            lines += [f"- {e['name']}: {e['note'].splitlines()[0]}" for e in listed]
    for status in STATUSES:
        names = [e["name"] for e in entries if e["status"] == status]
        lines += ["", f"## {status.capitalize()} ({len(names)})", "", ", ".join(names)]
    return "\n".join(lines) + "\n"


def _sums(counts: Counter) -> str:
    return ", ".join(f"{n} {what}" for what, n in counts.most_common()) or "none"


def _shard(_context: Any, _parameter: Any, text: str) -> tuple[int, int]:
    index, slash, count = text.partition("/")
    if not (slash and index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise click.BadParameter(f"expected INDEX/COUNT as 0/2, got {text!r}")
    return int(index), int(count)


@click.command()
@click.argument("library", type=click.Choice(list(LIBRARIES)))
@click.option("--shard", default="0/1", callback=_shard, help="Part of the models, as 0/2 and 1/2.")
@click.option("--match", default="", help="Only models whose name holds this.")
@click.option("--table", "only_table", is_flag=True, help="Run nothing, write the table.")
@click.option("--quiet", is_flag=True, help="No progress.")
def main(library: str, shard: tuple[int, int], match: str, only_table: bool, quiet: bool) -> None:
    """Hold `swap` against every attention model of LIBRARY. Exit status 3: parity failures."""
    if not only_table:
        run(library, shard, match, quiet)
    text = table(library)
    path = RESULTS / f"sweep-{library}.md"
    path.with_suffix(".md.part").write_text(text)
    path.with_suffix(".md.part").replace(path)
    click.echo(text.split("\n| class")[0])
    failed = any(e["parity"] == "fail" or "fail" in e["sampled"] for e in read(library))
    sys.exit(3 if failed else 0)


if __name__ == "__main__":
    main()
