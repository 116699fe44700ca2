"""Train on scanned digits, generate, evaluate, and leave pictures: what `make demo` runs.

    python benchmarks/generator_demo.py [--out results/demo] [--record benchmarks/results/FILE.json]

Everything but the combined pictures is done by the commands that users have; each is printed first.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

import patchgen_fast
from patchgen_fast.generator import checkpoint, pictures
from patchgen_fast.generator.data import Data, open_data
from patchgen_fast.generator.evaluation import complete_upper, pixels, reconstruct
from patchgen_fast.generator.files import write_json
from patchgen_fast.generator.heads import SamplingOptions
from patchgen_fast.generator.model import PatchGenerator, Task
from patchgen_fast.generator.orders import drawing_order
from patchgen_fast.generator.sampling import noise_for, sample

GUIDANCE = SamplingOptions(guidance=2.0)


def command(*arguments: str | Path) -> None:
    """Run `patchgen-fast ...` and say so."""
    words = [str(word) for word in arguments]
    print("$ patchgen-fast", *words, flush=True)
    subprocess.run([sys.executable, "-m", "patchgen_fast", *words], check=True)


def draw_classes(model: PatchGenerator, count: int) -> torch.Tensor:
    """Ten columns, a class each."""
    labels = torch.arange(count) % 10
    order = drawing_order(model.config.order, model.config.transformer.grid_size)
    return sample(model, labels, Task(order), noise_for(model, count, 0), options=GUIDANCE)


def nearest(images: torch.Tensor, training: torch.Tensor) -> torch.Tensor:
    """The training image nearest to each image."""
    return training[torch.cdist(images.flatten(1), training.flatten(1)).argmin(dim=1)]


def one_of_each(data: Data) -> torch.Tensor:
    """A held-out image of each class, `[10, 1, 8, 8]`."""
    images, labels = pixels(data.held_out, len(data.held_out))
    return torch.stack([images[labels == label][0] for label in range(10)])


def draw_pictures(run: Path, out: Path, data: Data) -> list[tuple[str, str]]:
    """The combined pictures: (file, what it shows)."""
    model, _ = checkpoint.load_model(checkpoint.find(run))
    patchgen_fast.swap(model)
    training, _ = pixels(data.train, len(data.train))
    drawn = draw_classes(model, 100)
    real = one_of_each(data)
    upper = real.clone()
    upper[:, :, 4:] = 0.3
    completed = [complete_upper(model, real, 0.5, seed=seed) for seed in range(3)]
    rebuilt = reconstruct(model, real)
    rows = {
        "classes.png": (drawn, "drawn for each class, ten times"),
        "nearest.png": (
            pictures.interleaved(drawn[:30], nearest(drawn[:30], training), columns=10),
            "drawn, and below each the training image nearest to it",
        ),
        "completion.png": (
            torch.cat((real, upper, *completed)),
            "held-out images, their upper half, and three completions of it",
        ),
        "reconstruction.png": (
            torch.cat((real, rebuilt)), "held-out images, and drawn anew from their encoding"
        ),
        "sheet.png": (
            torch.cat((drawn[:40], real, upper, completed[0], real, rebuilt)),
            "four rows drawn for each class; held-out, upper half, completed; held-out, redrawn",
        ),
    }  # fmt: skip
    for name, (images, _) in rows.items():
        pictures.save_sheet(out / name, images, 10, scale=5 if name == "sheet.png" else None)
    pictures.save_single(out / "originals", real, "digit")
    return [(name, text) for name, (_, text) in rows.items()]


def record(path: Path, table: dict, times: dict, settings: dict) -> None:
    """The figures with the machine that they were measured on."""
    import msgspec

    from patchgen_fast.bench import environment

    write_json(
        path,
        {
            "kind": "patchgen_fast.generator.demo",
            "command": "make demo",
            "evaluation": table,
            "seconds": times,
            "settings": settings,
            "environment": msgspec.to_builtins(environment.collect()),
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results/demo"))
    parser.add_argument("--record", type=Path, help="also write figures, and the sheet beside them")
    parser.add_argument("--train", default="", help="further options of patchgen-fast train")
    options = parser.parse_args()
    out, began = options.out, time.perf_counter()
    run = out / f"run-{time.strftime('%Y%m%d-%H%M%S')}"

    command("train", "--data", "digits", "--out", run, "--device", "cpu", *options.train.split())
    trained = time.perf_counter()
    data = open_data("digits", image_size=(8, 8), channels=1)
    shown = draw_pictures(run, out, data)
    original = out / "originals" / "digit-0003.png"
    how = ["--count", "10", "--device", "cpu"]
    command("generate", run, "--class", "3", *how, "--out", out / "threes.png",
            "--animation", out / "threes.gif")  # fmt: skip
    command("generate", run, "--variations", original, *how, "--out", out / "variations.png")
    command("generate", run, "--reconstruct", original, "--head", "mse", "--count", "1",
            "--device", "cpu", "--out", out / "redrawn.png",
            "--attention", out / "attention")  # fmt: skip
    seconds = {
        "training and its evaluation": round(trained - began, 1),
        "pictures": round(time.perf_counter() - trained, 1),
        "total": round(time.perf_counter() - began, 1),
        "processor time, total": round(_processor_seconds(), 1),
    }
    if options.record:
        table = json.loads((run / "evaluation.json").read_text())
        settings = checkpoint.describe(checkpoint.find(run)).settings
        record(options.record, table, seconds, settings)
        shutil.copyfile(out / "sheet.png", options.record.with_suffix(".png"))
    print(
        f"\n{seconds['total']:.0f} s, {seconds['processor time, total']:.0f} s of processor time."
    )
    print(f"The pictures are in {out}:")
    shown += [
        ("threes.png, threes.gif", "drawn for one class, and how, patch by patch"),
        ("variations.png", "others like one held-out image"),
        ("attention/", "where a patch looked as it was drawn"),
        (f"{run.name}/", "checkpoints, log, losses, evaluation.json"),
    ]
    for name, text in shown:
        print(f"  {name:24} {text}")


def _processor_seconds() -> float:
    """User and system time of this process and of those that it ran."""
    own, theirs = (
        resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return own.ru_utime + own.ru_stime + theirs.ru_utime + theirs.ru_stime


if __name__ == "__main__":
    os.environ.setdefault("PYTHONWARNINGS", "default")
    main()
