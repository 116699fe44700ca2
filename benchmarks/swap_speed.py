"""How much faster does `swap` make whole timm models? Eager and swapped, in turns, in one process.

    python benchmarks/swap_speed.py                        # the list, batch 1, float32 and bfloat16
    python benchmarks/swap_speed.py --match vit_base_patch16_224 --batch 8

Prints a line a model: medians, and the median of the paired ratios. With --json, entries are added
to that file as they come.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import click
import torch

import patchgen_fast
from patchgen_fast._torchvision import make_importable

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


def measure(name: str, batch: int, dtype: str, rounds: int) -> dict:
    """Milliseconds of a forward, eager and swapped, and their paired ratios."""
    import timm

    torch.manual_seed(0)
    # DINOv2 is timed at the size of the others; its own is 518
    size = {"img_size": 224} if name.endswith("dinov2") else {}
    model = timm.create_model(name, **size).eval().to(DTYPES[dtype])
    side = size.get("img_size") or model.pretrained_cfg["input_size"][-1]
    images = torch.randn(batch, 3, side, side).to(DTYPES[dtype])
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
        "ratios": [round(min(ratios), 3), round(max(ratios), 3)],
    }


def _milliseconds(model, images) -> float:
    begin = time.perf_counter()
    model(images)
    return (time.perf_counter() - begin) * 1e3


@click.command()
@click.option("--batch", default=1, show_default=True)
@click.option("--match", default="", help="Only models whose name holds this.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), multiple=True, help="Default: both.")
@click.option("--rounds", default=7, show_default=True, help="Pairs of runs.")
@click.option("--threads", default=1, show_default=True)
@click.option("--json", "path", type=click.Path(path_type=Path, dir_okay=False))
def main(
    batch: int, match: str, dtype: tuple[str, ...], rounds: int, threads: int, path: Path | None
) -> None:
    """Time eager and swapped timm models against each other."""
    make_importable()
    torch.set_num_threads(threads)
    entries = json.loads(path.read_text()) if path is not None and path.exists() else []
    for name in (name for name in MODELS if match in name):
        for kind in dtype or DTYPES:
            entry = measure(name, batch, kind, rounds)
            click.echo(
                f"{name:30} B{batch} {kind:9} {entry['eager_ms']:9.2f} -> "
                f"{entry['swapped_ms']:9.2f} ms  {entry['speedup']:.3f} {entry['ratios']}"
            )
            entries.append(entry)
            if path is not None:
                path.with_suffix(".part").write_text(json.dumps(entries, indent=1) + "\n")
                path.with_suffix(".part").replace(path)


if __name__ == "__main__":
    main()
