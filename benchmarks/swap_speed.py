"""How much faster does `swap` make whole timm models? Eager and swapped, in turns, in one process.

    python benchmarks/swap_speed.py                        # the list, batch 1, float32 and bfloat16
    python benchmarks/swap_speed.py --match vit_base_patch16_224 --batch 8
    python benchmarks/swap_speed.py --at-least 1.0 --record benchmarks/results/zen5-swap-speed.json

A line a model: medians, and the median of the paired ratios. One thread is timed by its processor
time, which other work on the machine lengthens less. A model is timed only after `verify` has
passed it, and in a process that has done nothing else: what was freed before decides how often
the C library hands memory back and faults it in again. Those faults are part of a user's time, so
they are counted and shown; --keep-memory shows the speed-up without them. With --record, each
entry is added to that file as it comes, a table is written beside it, and what the file has
already is not measured again.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click
import msgspec
import torch

import patchgen_fast
from patchgen_fast._torchvision import make_importable
from patchgen_fast.bench.environment import collect
from patchgen_fast.generator.files import write_json

SCHEMA_VERSION = 2
MODELS = (
    "vit_tiny_patch16_224",
    "vit_small_patch16_224",
    "vit_base_patch16_224",
    "vit_base_patch32_224",
    "vit_large_patch16_224",
    "deit3_small_patch16_224",
    "deit3_base_patch16_224",
    "vit_small_patch14_dinov2",
    "vit_base_patch14_dinov2",
    "vit_small_patch16_dinov3",
    "vit_base_patch16_dinov3",
    "eva02_tiny_patch14_224",
    "eva02_base_patch16_clip_224",
    "beit_base_patch16_224",
    "beitv2_base_patch16_224",
    "vit_base_patch16_siglip_224",
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256",
    "cait_xxs24_224",
    "cait_s24_224",
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# glibc's: memory that is freed stays with the process
KEEPS_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "1099511627776"}

Entry = dict[str, Any]


def in_fresh_process(
    function: Callable[..., Any], *args: Any, variables: dict[str, str] | None = None
) -> Any:
    """`function(*args)` in a process of its own, with environment variables besides."""
    before = dict(os.environ)
    os.environ.update(variables or {})
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(function, *args).result()
    finally:
        os.environ.clear()
        os.environ.update(before)


def prepared(name: str, batch: int, dtype: str, threads: int) -> tuple[Any, torch.Tensor]:
    """The model and images, the same in every process."""
    make_importable()
    import timm

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    # DINOv2 is timed at the size of the others; its own is 518
    size = {"img_size": 224} if name.endswith("dinov2") else {}
    model = timm.create_model(name, **size).eval().to(DTYPES[dtype])
    side = size.get("img_size") or model.pretrained_cfg["input_size"][-1]
    return model, torch.randn(batch, 3, side, side).to(DTYPES[dtype])


def check(name: str, dtype: str, threads: int) -> str | None:
    """What is wrong with the swapped model, by `verify`; None if nothing is."""
    model, image = prepared(name, 1, dtype, threads)
    report = patchgen_fast.verify(model, image, gradients=False, runs=1)
    return None if report.ok else str(report)


def measure(name: str, batch: int, dtype: str, threads: int, rounds: int) -> Entry:
    """Milliseconds and page faults of a forward, eager and swapped, and their paired ratios."""
    model, images = prepared(name, batch, dtype, threads)
    eager, fast = [], []
    with torch.inference_mode():
        for _ in range(rounds + 1):
            eager.append(_forward(model, images))
            with patchgen_fast.swapped(model):
                fast.append(_forward(model, images))
    eager, fast = eager[1:], fast[1:]  # the first run of each allocates
    (eager_ms, eager_faults), (fast_ms, fast_faults) = (
        (statistics.median(column) for column in zip(*runs, strict=True)) for runs in (eager, fast)
    )
    ratios = [a / b for (a, _), (b, _) in zip(eager, fast, strict=True)]
    return {
        "model": name,
        "batch": batch,
        "dtype": dtype,
        "threads": threads,
        "eager_ms": round(eager_ms, 2),
        "swapped_ms": round(fast_ms, 2),
        "eager_faults": round(eager_faults),
        "swapped_faults": round(fast_faults),
        "speedup": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
    }


def _forward(model: Any, images: torch.Tensor) -> tuple[float, int]:
    """Milliseconds and page faults."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    faults = _page_faults()
    begin = clock()
    model(images)
    return (clock() - begin) * 1e3, _page_faults() - faults


def _page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def new_record() -> dict[str, Any]:
    """What a record holds before the first entry: how and on what it was measured."""
    return {
        "kind": "patchgen_fast.swap_speed",
        "schema_version": SCHEMA_VERSION,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "environment": msgspec.to_builtins(collect()),
        "entries": [],
    }


def table(record: dict[str, Any]) -> str:
    """Markdown: a row a model, batch and dtype; the slower ones named first."""
    entries, environment = record["entries"], record["environment"]
    slower = [f"{e['model']} ({e['dtype']})" for e in entries if e["speedup"] < 1.0]
    lines = [
        "# swap over whole timm models",
        "",
        f"{environment['cpu']}, {environment['isa']}, torch "
        f"{environment['packages'].get('torch', '?')}, begun {record['started']}, by "
        f"`{record['command']}`. Milliseconds of a forward are medians, of processor time where "
        "there is one thread; the speed-up is the median of the ratios of paired runs, and their "
        "quartiles stand beside it. Page faults are those of a forward, eager and swapped; with "
        "memory kept, the C library was told to keep what is freed.",
        "",
        f"Slower than eager: {', '.join(slower) or 'none'}.",
        "",
        "| model | batch | dtype | threads | memory | eager ms | swapped ms | speed-up | quartiles "
        "| page faults |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for e in entries:
        low, _, high = statistics.quantiles(e["ratios"], n=4)
        lines.append(
            f"| {e['model']} | {e['batch']} | {e['dtype']} | {e['threads']} | {e['memory']} "
            f"| {e['eager_ms']:.1f} | {e['swapped_ms']:.1f} | {e['speedup']:.3f} "
            f"| {low:.3f} to {high:.3f} | {e['eager_faults']}, {e['swapped_faults']} |"
        )
    return "\n".join(lines) + "\n"


def save(record: dict[str, Any], path: Path) -> None:
    """The record, and its table beside it; whole or not at all."""
    write_json(path, record)
    part = path.with_suffix(".md.part")
    part.write_text(table(record))
    part.replace(path.with_suffix(".md"))


@click.command()
@click.option("--batch", default=1, show_default=True)
@click.option("--match", default="", help="Only models whose name holds this.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), multiple=True, help="Default: both.")
@click.option("--rounds", type=click.IntRange(2), default=9, show_default=True, help="Pairs.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option("--keep-memory", is_flag=True, help="glibc keeps what is freed: no page faults.")
@click.option("--record", "path", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--at-least", type=float, help="Exit status 1 if a median ratio is below this.")
def main(
    batch: int,
    match: str,
    dtype: tuple[str, ...],
    rounds: int,
    threads: int,
    keep_memory: bool,
    path: Path | None,
    at_least: float | None,
) -> None:
    """Time eager and swapped timm models against each other."""
    names = [name for name in MODELS if match in name]
    if not names:
        raise click.UsageError(f"expected --match to fit one of {', '.join(MODELS)}; got {match!r}")
    torch.set_num_threads(threads)
    known = path is not None and path.exists()
    record = msgspec.json.decode(path.read_bytes()) if path and known else new_record()
    if record["schema_version"] != SCHEMA_VERSION:
        raise click.UsageError(f"{path} was written by another version; name another file")
    memory = "kept" if keep_memory else "as it is"
    asked = ("model", "batch", "dtype", "threads", "memory")
    found = {tuple(entry[key] for key in asked): entry for entry in record["entries"]}
    low = []
    for name, kind in ((name, kind) for name in names for kind in dtype or DTYPES):
        entry = found.get((name, batch, kind, threads, memory))
        if entry is None:
            wrong = in_fresh_process(check, name, kind, threads)
            if wrong is not None:
                raise click.ClickException(f"{name}, {kind}: a wrong model is not timed\n{wrong}")
            variables = KEEPS_MEMORY if keep_memory else {}
            sizes = (name, batch, kind, threads, rounds)
            entry = {**in_fresh_process(measure, *sizes, variables=variables), "memory": memory}
            record["entries"].append(entry)
            if path is not None:
                save(record, path)
        click.echo(
            f"{entry['model']:30} B{batch} {entry['dtype']:9} {entry['eager_ms']:9.2f} -> "
            f"{entry['swapped_ms']:9.2f} ms  {entry['speedup']:.3f} "
            f"[{min(entry['ratios']):.3f}, {max(entry['ratios']):.3f}], page faults "
            f"{entry['eager_faults']}, {entry['swapped_faults']}"
        )
        if at_least is not None and entry["speedup"] < at_least:
            low.append(f"{entry['model']} ({entry['dtype']}) {entry['speedup']:.3f}")
    if low:
        click.echo(f"below {at_least}: {', '.join(low)}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
