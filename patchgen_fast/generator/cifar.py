"""CIFAR-10's "python version" (Krizhevsky, 2009), read without running what a pickle says.

A batch is a pickled dict: b"data" uint8 [10000, 3072], each row the red, green and blue plane of a
32 x 32 image, and b"labels", a list of 10000 classes. `batches.meta` has the names of the classes.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .files import FileError

FOLDER = "cifar-10-batches-py"
TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))
TEST, META = "test_batch", "batches.meta"

# All that a pickle of dicts, lists, strings and arrays needs.
ALLOWED = {
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("_codecs", "encode"),
}


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a CIFAR-10 batch")
        return super().find_class(module, name)


def _unpickle(path: Path) -> dict[bytes, Any]:
    try:
        with path.open("rb") as file:
            found = _ArraysOnly(file, encoding="bytes").load()
    except FileNotFoundError as error:
        raise FileError(
            f"expected CIFAR-10's {path.name} in {path.parent}, got no such file; unpack "
            "cifar-10-python.tar.gz there"
        ) from error
    except Exception as error:  # a pickle that is damaged can raise anything
        raise FileError(f"cannot read {path} as a batch of CIFAR-10: {error}") from error
    if not isinstance(found, dict):
        raise FileError(f"expected a dict in {path}, got {type(found).__name__}")
    return {k if isinstance(k, bytes) else str(k).encode(): v for k, v in found.items()}


def _batch(path: Path) -> tuple[Tensor, Tensor]:
    found = _unpickle(path)
    data, labels = found.get(b"data"), found.get(b"labels")
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (3072,):
        raise FileError(f"expected uint8 data [n, 3072] in {path}")
    if not isinstance(labels, list) or len(labels) != len(data):
        raise FileError(f"expected {len(data)} labels in {path}")
    images = torch.from_numpy(data.reshape(-1, 3, 32, 32).copy())
    return images, torch.tensor(labels, dtype=torch.int64)


def read_cifar10(
    root: Path,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], tuple[str, ...]]:
    """(images, labels) to train and to test, and the names of the classes.

    Images uint8 `[n, 3, 32, 32]`, labels int64 `[n]`. Raises FileError for what is missing, damaged
    or something else.
    """
    folder = root / FOLDER if (root / FOLDER).is_dir() else root
    parts = [_batch(folder / name) for name in TRAIN]
    names = _unpickle(folder / META).get(b"label_names")
    if not isinstance(names, list):
        raise FileError(f"expected label_names in {folder / META}")
    classes = tuple(n.decode() if isinstance(n, bytes) else str(n) for n in names)
    train = torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts])
    test = _batch(folder / TEST)
    for labels in (train[1], test[1]):
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(classes):
            raise FileError(f"expected labels below {len(classes)} in {folder}")
    return train, test, classes
