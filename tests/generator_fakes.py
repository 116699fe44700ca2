"""A generator small enough to train in a test, and image files in the formats that are read."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from patchgen_fast.generator.data import Data, ImageSet
from patchgen_fast.generator.model import GeneratorConfig, PatchGenerator
from patchgen_fast.models import CONFIGS

TINY = dataclasses.replace(
    CONFIGS["small"],
    dim=16,
    depth=1,
    num_heads=2,
    decoder_dim=16,
    decoder_depth=2,
    decoder_num_heads=2,
)


def config(**changes) -> GeneratorConfig:
    """8 x 8 grey images in 16 patches, ten classes."""
    small = {"num_classes": 10, "flow_width": 16, "flow_depth": 1, "flow_repeats": 1, "levels": 17}
    return GeneratorConfig(TINY, **{**small, **changes})


def model(**changes) -> PatchGenerator:
    """Random weights everywhere, also where training starts at zero."""
    torch.manual_seed(0)
    made = PatchGenerator(config(**changes))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made.eval()


def random_data(count: int = 40) -> Data:
    """Noise with labels, in memory."""
    chance = torch.Generator().manual_seed(1)
    images = torch.rand(count, 1, 8, 8, generator=chance)
    labels = torch.arange(count) % 10
    names = [str(number) for number in range(10)]
    half = count // 2
    train = ImageSet(images[:half], labels[:half], names)
    return Data(train, ImageSet(images[half:], labels[half:], names), 256)


def write_image(path: Path, size: tuple[int, int] = (12, 10), value: int | None = None) -> None:
    """An RGB image of a width and height; noise, or one value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size
    chance = np.random.default_rng(len(path.name))
    pixels = chance.integers(0, 256, (height, width, 3), dtype=np.uint8)
    if value is not None:
        pixels[:] = value
    Image.fromarray(pixels).save(path)


def write_cifar10(root: Path, per_batch: int = 4) -> np.ndarray:
    """CIFAR-10's python version with few images; the pixels of the first batch `[n, 3072]`."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    chance = np.random.default_rng(0)
    first = None
    for name in [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]:
        data = chance.integers(0, 256, (per_batch, 3072), dtype=np.uint8)
        first = data if first is None else first
        labels = [int(label) for label in chance.integers(0, 10, per_batch)]
        batch = {b"batch_label": b"made up", b"labels": labels, b"data": data}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    names = [f"class{number}".encode() for number in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": names}, protocol=2))
    return first
