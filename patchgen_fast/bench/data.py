"""Real images for the benchmark: two photographs and scanned digits that scikit-learn ships.

Nothing is downloaded. Arithmetic on real pixels is as fast as on noise, but a parity check on
real images says more than one on noise.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

REMEDY = "real images need scikit-learn: pip install 'patchgen-fast[bench]'"


class NoImages(Exception):
    """scikit-learn or its images are not there."""


@lru_cache(maxsize=1)
def _photographs() -> tuple[torch.Tensor, ...]:
    try:
        from sklearn.datasets import load_sample_images

        images = load_sample_images().images
    except (ImportError, OSError) as error:
        raise NoImages(f"{REMEDY} ({error})") from error
    return tuple(torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images)


def photographs(batch: int, size: int, *, seed: int = 0) -> torch.Tensor:
    """uint8 [batch, 3, size, size]: crops at random places of the photographs, some mirrored."""
    pictures = _photographs()
    random = np.random.default_rng(seed)
    crops = []
    for index in range(batch):
        picture = pictures[index % len(pictures)]
        _, height, width = picture.shape
        if size > min(height, width):
            raise ValueError(f"photographs: expected size at most {min(height, width)}, got {size}")
        top = int(random.integers(0, height - size + 1))
        left = int(random.integers(0, width - size + 1))
        crop = picture[:, top : top + size, left : left + size]
        crops.append(crop.flip(-1) if random.integers(0, 2) else crop)
    return torch.stack(crops).contiguous()


@lru_cache(maxsize=1)
def _digits() -> torch.Tensor:
    try:
        from sklearn.datasets import load_digits

        images = load_digits().images
    except (ImportError, OSError) as error:
        raise NoImages(f"{REMEDY} ({error})") from error
    return torch.from_numpy(images).to(torch.float32).div_(16.0).unsqueeze(1)


def digits(batch: int, size: int = 8, *, channels: int = 1) -> torch.Tensor:
    """float32 [batch, channels, size, size] in 0 to 1: scanned digits, enlarged if asked."""
    images = _digits()
    images = images[torch.arange(batch) % images.shape[0]]
    if size != images.shape[-1]:
        images = torch.nn.functional.interpolate(images, size=(size, size), mode="bilinear")
    return images.expand(batch, channels, size, size).contiguous()
