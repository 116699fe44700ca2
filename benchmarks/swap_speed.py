"""How much faster does `swap` make whole timm models? Eager and swapped, in turns, in one process.

    python benchmarks/swap_speed.py                        # the list, batch 1, float32 and bfloat16
    python benchmarks/swap_speed.py --match vit_base_patch16_224 --batch 8
    python benchmarks/swap_speed.py --at-least 1.0 --record benchmarks/results/zen5-swap-speed.json

A line a model: medians, and the median of the paired ratios. One thread is timed by its processor
time, which other work on the machine lengthens less. A model is timed only after `verify` has
passed it. With --record, each entry is added to that file as it comes, a table is written beside
it, and what the file has already is not measured again.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
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

SCHEMA_VERSION = 1
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

Entry = dict[str, Any]


def measure(name: str, batch: int, dtype: str, rounds: int) -> Entry:
    """Milliseconds of a forward, eager and swapped, and their paired ratios."""
    import timm

    torch.manual_seed(0)
    # DINOv2 is timed at the size of the others; its own is 518
    size = {"img_size": 224} if name.endswith("dinov2") else {}
    model = timm.create_model(name, **size).eval().to(DTYPES[dtype])
    side = size.get("img_size") or model.pretrained_cfg["input_size"][-1]
    images = torch.randn(batch, 3, side, side).to(DTYPES[dtype])
    report = patchgen_fast.verify(model, images[:1], gradients=False, runs=1)
    if not report.ok:
        raise click.ClickException(f"{name}, {dtype}: a wrong model is not timed\n{report}")
    eager, fast = [], []
    with torch.inference_mode():
        for _ in range(rounds + 1):
            eager.append(_milliseconds(model, images))
            with patchgen_fast.swapped(model):
                fast.append(_milliseconds(model, images))
    eager, fast = eager[1:], fast[1:]  # the first run of each allocates
    ratios = [a / b for a, b in zip(eager, fast, strict=True)]
    return {
        "model": name,
        "batch": batch,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "eager_ms": round(statistics.median(eager), 2),
        "swapped_ms": round(statistics.median(fast), 2),
        "speedup": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
    }


def _clock() -> Callable[[], float]:
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def _milliseconds(model: Any, images: torch.Tensor) -> float:
    clock = _clock()
    begin = clock()
    model(images)
    return (clock() - begin) * 1e3


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
        "quartiles stand beside it.",
        "",
        f"Slower than eager: {', '.join(slower) or 'none'}.",
        "",
        "| model | batch | dtype | threads | eager ms | swapped ms | speed-up | quartiles |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for e in entries:
        low, _, high = statistics.quantiles(e["ratios"], n=4)
        lines.append(
            f"| {e['model']} | {e['batch']} | {e['dtype']} | {e['threads']} | {e['eager_ms']:.1f} "
            f"| {e['swapped_ms']:.1f} | {e['speedup']:.3f} | {low:.3f} to {high:.3f} |"
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
@click.option("--record", "path", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--at-least", type=float, help="Exit status 1 if a median ratio is below this.")
def main(
    batch: int,
    match: str,
    dtype: tuple[str, ...],
    rounds: int,
    threads: int,
    path: Path | None,
    at_least: float | None,
) -> None:
    """Time eager and swapped timm models against each other."""
    names = [name for name in MODELS if match in name]
    if not names:
        raise click.UsageError(f"expected --match to fit one of {', '.join(MODELS)}; got {match!r}")
    make_importable()
    torch.set_num_threads(threads)
    known = path is not None and path.exists()
    record = msgspec.json.decode(path.read_bytes()) if path and known else new_record()
    asked = ("model", "batch", "dtype", "threads")
    found = {tuple(entry[key] for key in asked): entry for entry in record["entries"]}
    low = []
    for case in ((name, batch, kind, threads) for name in names for kind in dtype or DTYPES):
        entry = found.get(case)
        if entry is None:
            entry = measure(case[0], batch, case[2], rounds)
            record["entries"].append(entry)
            if path is not None:
                save(record, path)
        click.echo(
            f"{entry['model']:30} B{batch} {entry['dtype']:9} {entry['eager_ms']:9.2f} -> "
            f"{entry['swapped_ms']:9.2f} ms  {entry['speedup']:.3f} "
            f"[{min(entry['ratios']):.3f}, {max(entry['ratios']):.3f}]"
        )
        if at_least is not None and entry["speedup"] < at_least:
            low.append(f"{entry['model']} ({entry['dtype']}) {entry['speedup']:.3f}")
    if low:
        click.echo(f"below {at_least}: {', '.join(low)}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
