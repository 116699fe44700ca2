"""patch_embed of uint8 images where integer arithmetic could lose what floats keep: images at their
mean, weights that stand out, extreme means, depths that fill no group, the largest sums.
"""

from __future__ import annotations

import pytest
import torch
from oracle import Target, assert_parity, proving, require

from patchgen_fast import patch_embed, reference

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def compare(
    target: Target,
    images: torch.Tensor,
    weight: torch.Tensor,
    mean: tuple[float, ...] | None = MEAN,
    std: tuple[float, ...] | None = STD,
) -> None:
    require("patch_embed", target)
    device = target.device
    statistics = [None if x is None else torch.tensor(x, device=device) for x in (mean, std)]
    images, weight = images.to(device), weight.to(device)
    bias = torch.linspace(-1, 1, weight.shape[0], device=device).to(weight.dtype)
    tokens = images[0, 0].numel() // weight[0, 0].numel()
    position = torch.linspace(-1, 1, tokens, device=device).to(weight.dtype)
    position = position[:, None].expand(tokens, weight.shape[0])
    arguments = (images, weight, bias, position, None, *statistics)
    with proving("patch_embed", target):
        got = patch_embed(
            images, weight, bias, pos_embed=position, mean=mean, std=std, backend=target.backend
        )
    eager = reference.patch_embed(*arguments)
    truth = reference.patch_embed(*arguments, arithmetic=torch.float64)
    assert_parity(got, eager, truth, factor=target.factor)


def pixels(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed)).byte()


def weights(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (w / w[0].numel() ** 0.5).to(dtype)


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("channels", "size", "patch", "embed"),
    [
        (3, 48, 16, 64),
        (3, 42, 14, 50),
        (3, 32, 8, 1),
        (4, 12, 2, 97),
        (1, 21, 7, 16),
        (5, 9, 3, 33),
    ],
)
def test_layouts_and_depths(channels, size, patch, embed, layout, dtype, target: Target) -> None:
    images = pixels(3, channels, size, size).to(memory_format=layout)
    statistics = [(0.1, 0.5, 0.9, 0.3, 0.2)[:channels], (0.2, 0.3, 0.25, 0.5, 1.0)[:channels]]
    compare(target, images, weights(embed, channels, patch, patch, dtype=dtype), *statistics)


@pytest.mark.parametrize("level", [0, 124, 255])
def test_constant_images(level: int, target: Target) -> None:
    """At the mean's nearest byte nearly all of the sum cancels."""
    images = torch.full((2, 3, 32, 32), level, dtype=torch.uint8)
    compare(target, images, weights(40, 3, 16, 16).abs())


def test_one_step_from_the_mean(target: Target) -> None:
    images = 124 + pixels(2, 3, 32, 32) % 2
    compare(target, images, weights(40, 3, 16, 16), (124 / 255,) * 3, STD)


def test_a_weight_that_stands_out(target: Target) -> None:
    """Beside it the others have fewer than 24 bits: floats it must be, for the whole result."""
    weight = weights(40, 3, 16, 16)
    weight[:, 0, 0, 0] = 1e4
    images = pixels(2, 3, 32, 32)
    images[..., ::16, ::16] = 0
    compare(target, images, weight, None, None)


def test_rows_of_zeros_and_of_many_sizes(target: Target) -> None:
    weight = weights(40, 3, 16, 16)
    weight[3] = 0
    weight *= 10 ** torch.linspace(-12, 6, 40).view(-1, 1, 1, 1)
    compare(target, pixels(2, 3, 32, 32), weight)


@pytest.mark.parametrize("mean", [(-3.0, 5.0, 0.0), None])
@pytest.mark.parametrize("std", [(1e-3, 1e2, 1.0), None])
def test_statistics_that_no_dataset_has(mean, std, target: Target) -> None:
    compare(target, pixels(2, 3, 32, 32), weights(40, 3, 16, 16), mean, std)


def test_the_largest_sums(target: Target) -> None:
    """White images, weights of one sign, the deepest patches that stay integers, and deeper."""
    for side in (144, 160):
        weight = weights(3, 3, side, side).abs() + 0.1
        compare(target, torch.full((1, 3, side, side), 255, dtype=torch.uint8), weight, None, None)


def test_video(dtype: torch.dtype, target: Target) -> None:
    compare(target, pixels(2, 3, 4, 32, 32), weights(40, 3, 2, 16, 16, dtype=dtype))
