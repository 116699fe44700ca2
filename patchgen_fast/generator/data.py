"""Images to train on, each with its own format on disk.

    digits                scanned digits, 8 x 8, ten classes; scikit-learn ships them
    folder:PATH           images in a folder; subfolders, if there are any, are the classes
    cifar10:PATH          the "python version": PATH or PATH/cifar-10-batches-py with its batches
    imagenet:PATH         PATH/train/CLASS/*.JPEG and PATH/val/CLASS/*.JPEG

A fifth of the images is held out where the format has no such part; which ones is the same in
every run. Small sets lie in memory, folders are decoded as they are asked for.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .cifar import read_cifar10
from .files import FileError

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
REMEDY = "pip install 'patchgen-fast[generator]'"
log = logging.getLogger(__name__)


class ImageSet:
    """Images in memory: `[n, C, H, W]`, float32 from 0 to 1 or uint8; labels `[n]` or None."""

    def __init__(self, images: Tensor, labels: Tensor | None, classes: Sequence[str]) -> None:
        self.images, self.labels, self.classes = images, labels, tuple(classes)
        self.unreadable: set[Path] = set()

    def __len__(self) -> int:
        return len(self.images)

    def load(self, indices: Tensor) -> Tensor:
        """The images `[b, C, H, W]` at indices `[b]`."""
        return self.images[indices]

    def labels_of(self, indices: Tensor) -> Tensor:
        """Their classes, int64 `[b]`; the number of classes, which says nothing, without any."""
        if self.labels is None:
            return torch.full((len(indices),), len(self.classes))
        return self.labels[indices]


class ImageFiles(ImageSet):
    """Images decoded as they are asked for: cut to the middle square, resized, uint8.

    A file that cannot be decoded is replaced by the next that can, logged once, and kept in
    `unreadable`; with `strict` it raises FileError.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        labels: Tensor | None,
        classes: Sequence[str],
        *,
        image_size: tuple[int, int],
        channels: int,
        strict: bool,
    ) -> None:
        self.paths, self.labels, self.classes = list(paths), labels, tuple(classes)
        self.image_size, self.channels, self.strict = image_size, channels, strict
        self.unreadable = set()
        self._threads = ThreadPoolExecutor(max_workers=8, thread_name_prefix="decode")

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, indices: Tensor) -> Tensor:
        return torch.stack(list(self._threads.map(self._load, indices.tolist())))

    def _load(self, index: int) -> Tensor:
        for path in (*self.paths[index:], *self.paths[:index]):
            if path in self.unreadable:
                continue
            try:
                return read_image(path, self.image_size, self.channels, fit=True)
            except FileError as error:
                if self.strict:
                    raise
                log.warning("skipped: %s", error)
                self.unreadable.add(path)
        raise FileError(f"expected images, got {len(self.paths)} files and none can be read")


class Data(NamedTuple):
    """What is trained on and what is held out. `levels` are the grey levels of a pixel."""

    train: ImageSet
    held_out: ImageSet
    levels: int

    @property
    def classes(self) -> tuple[str, ...]:
        return self.train.classes


def open_data(
    spec: str, *, image_size: tuple[int, int], channels: int, strict: bool = False
) -> Data:
    """The data set that `spec` names (see the module), as images `[C, *image_size]`.

    Raises FileError where it is missing, ValueError for a spec or a size that it does not have.
    """
    kind, _, place = spec.partition(":")
    if kind == "digits" and not place:
        return _digits(image_size, channels)
    if kind not in ("folder", "cifar10", "imagenet"):
        raise ValueError(
            f"expected data as digits, folder:PATH, cifar10:PATH or imagenet:PATH, got {spec!r}"
        )
    root = Path(place).expanduser()
    if not place or not root.is_dir():
        raise FileError(f"expected a folder after '{kind}:', got {place or 'nothing'!r}")
    if kind == "cifar10":
        return _cifar10(root, image_size, channels)
    how = {"image_size": image_size, "channels": channels, "strict": strict}
    if kind == "imagenet":
        train = _files(root / "train", how)
        return Data(train, _files(root / "val", how, train.classes), 256)
    every = _files(root, how)
    kept, held = split(len(every))
    return Data(_part_of_files(every, kept, how), _part_of_files(every, held, how), 256)


def split(count: int) -> tuple[Tensor, Tensor]:
    """Indices of four fifths and of one fifth, the same in every run. ValueError below 5 images."""
    if count < 5:
        raise FileError(f"expected at least 5 images, to hold one of them out, got {count}")
    shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return shuffled[count // 5 :], shuffled[: count // 5]


def _digits(image_size: tuple[int, int], channels: int) -> Data:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise FileError(f"the digits come with scikit-learn: {REMEDY}") from error
    found = load_digits()
    images = torch.from_numpy(found.images / 16.0).float()[:, None]
    if image_size != (8, 8):
        images = torch.nn.functional.interpolate(images, image_size, mode="bilinear").clamp(0, 1)
    images = images.expand(-1, channels, -1, -1).contiguous()
    labels = torch.from_numpy(found.target).long()
    classes = [str(name) for name in found.target_names]
    train, held_out = (ImageSet(images[part], labels[part], classes) for part in split(len(images)))
    return Data(train, held_out, 17 if image_size == (8, 8) else 256)


def _cifar10(root: Path, image_size: tuple[int, int], channels: int) -> Data:
    if image_size != (32, 32) or channels != 3:
        raise ValueError(
            f"expected a model for images of 32 x 32 with 3 channels, as CIFAR-10 has, got "
            f"{image_size[0]} x {image_size[1]} with {channels}"
        )
    train, test, classes = read_cifar10(root)
    return Data(ImageSet(*train, classes), ImageSet(*test, classes), 256)


def _files(root: Path, how: dict, classes: tuple[str, ...] | None = None) -> ImageFiles:
    if not root.is_dir():
        raise FileError(f"expected a folder {root}, got none")
    names = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    if classes is not None and set(names) - set(classes):
        raise FileError(
            f"expected in {root} the classes of the training set, got also "
            f"{', '.join(sorted(set(names) - set(classes))[:5])}"
        )
    classes = classes if classes is not None else tuple(names)
    if not names:
        paths, labels = _images_in(root), None
    else:
        found = [(path, classes.index(name)) for name in names for path in _images_in(root / name)]
        paths = [path for path, _ in found]
        labels = torch.tensor([label for _, label in found], dtype=torch.int64)
    if not paths:
        kinds = " ".join(sorted(SUFFIXES))
        raise FileError(f"expected images ({kinds}) in {root} or in its subfolders, got none")
    return ImageFiles(paths, labels, classes, **how)


def _images_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)


def _part_of_files(every: ImageFiles, part: Tensor, how: dict) -> ImageFiles:
    labels = None if every.labels is None else every.labels[part]
    return ImageFiles([every.paths[i] for i in part.tolist()], labels, every.classes, **how)


def read_image(
    path: Path, image_size: tuple[int, int], channels: int, *, fit: bool = False
) -> Tensor:
    """One image file as uint8 `[C, H, W]`; grey for one channel, RGB for three.

    With `fit` it is cut in the middle to the shape asked for and resized. Raises FileError for a
    file that is missing or no image, ValueError for another size without `fit`.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise FileError(f"reading images needs pillow: {REMEDY}") from error
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file).convert("L" if channels == 1 else "RGB")
    except FileNotFoundError as error:
        raise FileError(f"cannot read {path}: no such file") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise FileError(f"cannot read {path} as an image: {error}") from error
    height, width = image_size
    if fit:
        image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    elif image.size != (width, height):
        raise ValueError(
            f"expected an image of {height} x {width}, got {image.height} x {image.width} in "
            f"{path}; pass --resize to cut and resize it"
        )
    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1).contiguous()
