"""What a patch is: the worked examples, and that cutting and putting together are inverse."""

import doctest

import pytest
import torch

from patchgen_fast.models import patches as patches_module
from patchgen_fast.models import patchify, unpatchify


def test_worked_example():
    image = torch.arange(1, 17).reshape(1, 1, 4, 4)
    x1, x2, x3, x4 = patchify(image, 2)[0, :, 0]
    assert x1.tolist() == [[1, 2], [5, 6]]
    assert x2.tolist() == [[3, 4], [7, 8]]
    assert x3.tolist() == [[9, 10], [13, 14]]
    assert x4.tolist() == [[11, 12], [15, 16]]


@pytest.mark.parametrize(("side", "patch", "tokens"), [(256, 32, 64), (32, 16, 4)])
def test_number_of_tokens(side, patch, tokens):
    assert patchify(torch.zeros(2, 3, side, side), patch).shape == (2, tokens, 3, patch, patch)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("size", "patch"), [((12, 8), (3, 2)), ((4, 4), 4), ((4, 4), 1), ((2, 10), (2, 5))]
)
def test_patchify_then_unpatchify_is_the_identity(size, patch, channels_last):
    images = torch.randn(2, 3, *size)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    cut = patchify(images, patch)
    height, width = (patch, patch) if isinstance(patch, int) else patch
    assert torch.equal(unpatchify(cut, (size[0] // height, size[1] // width)), images)


def test_vectors_lie_as_a_convolution_weight_does():
    images, weight = torch.randn(2, 3, 8, 8), torch.randn(5, 3, 4, 4)
    by_convolution = torch.nn.functional.conv2d(images, weight, stride=4).flatten(2).mT
    by_product = patchify(images, 4).flatten(2) @ weight.reshape(5, -1).T
    torch.testing.assert_close(by_product, by_convolution)


def test_empty_batch():
    assert patchify(torch.zeros(0, 3, 4, 4), 2).shape == (0, 4, 3, 2, 2)
    assert unpatchify(torch.zeros(0, 4, 3, 2, 2), 2).shape == (0, 3, 4, 4)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (
            lambda: patchify(torch.zeros(1, 1, 5, 4), 2),
            r"multiples of the patch \(2, 2\), got \(5, 4\)",
        ),
        (
            lambda: patchify(torch.zeros(4, 4), 2),
            r"expected images \[B, C, H, W\], got shape \(4, 4\)",
        ),
        (lambda: patchify(torch.zeros(1, 1, 4, 4), 0), "positive patch size"),
        (lambda: unpatchify(torch.zeros(1, 4, 1, 2, 2), (2, 3)), "expected 6 patches .* got 4"),
        (lambda: unpatchify(torch.zeros(1, 4, 4), 2), r"unflatten\(2"),
    ],
)
def test_wrong_input_says_expected_got_and_remedy(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_docstring_examples():
    failed, tried = doctest.testmod(patches_module)
    assert tried >= 6
    assert failed == 0
