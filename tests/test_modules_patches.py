"""PatchEmbed and PatchUnembed modules: against convolutions, formats, sizes, pixels, errors."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from patchgen_fast import dispatch, models, modules
from patchgen_fast.dispatch import BackendRefused
from patchgen_fast.swapping import parity


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def same(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def convolved(layer, images):
    return F.conv2d(images, layer.proj.weight, layer.proj.bias, stride=layer.patch_size)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("patch", [4, (3, 5), 7])
def test_patch_embed_is_a_convolution(patch, channels_last, bias):
    layer = modules.PatchEmbed(None, patch, 3, 10, bias=bias, strict_img_size=False).double()
    height, width = (patch, patch) if isinstance(patch, int) else patch
    images = torch.randn(2, 3, 4 * height + 1, 3 * width + 2).double()  # the rest is floored
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
        layer = layer.to(memory_format=torch.channels_last)
    same(layer(images), convolved(layer, images).flatten(2).mT)


@pytest.mark.parametrize(
    ("output_fmt", "shape"),
    [("NCHW", (2, 10, 2, 3)), ("NHWC", (2, 2, 3, 10)), ("NCL", (2, 10, 6)), ("NLC", (2, 6, 10))],
)
def test_formats(output_fmt, shape):
    layer = modules.PatchEmbed((8, 12), 4, 3, 10, output_fmt=output_fmt).double()
    images = torch.randn(2, 3, 8, 12).double()
    maps = convolved(layer, images)
    expected = {
        "NCHW": maps,
        "NHWC": maps.permute(0, 2, 3, 1),
        "NCL": maps.flatten(2),
        "NLC": maps.flatten(2).mT,
    }[output_fmt]
    got = layer(images)
    assert got.shape == shape
    same(got, expected)


def test_no_flatten_gives_maps():
    layer = modules.PatchEmbed(8, 4, 3, 10, flatten=False).double()
    images = torch.randn(2, 3, 8, 8).double()
    same(layer(images), convolved(layer, images))


def test_norm_and_padding():
    layer = modules.PatchEmbed(
        None, 4, 3, 10, norm_layer=nn.LayerNorm, strict_img_size=False, dynamic_img_pad=True
    ).double()
    images = torch.randn(2, 3, 5, 9).double()
    expected = layer.norm(convolved(layer, F.pad(images, (0, 3, 0, 3))).flatten(2).mT)
    same(layer(images), expected)
    assert layer.dynamic_feat_size((5, 9)) == (2, 3)


def test_bytes_mean_std_positions_and_prefix_are_the_eager_ones():
    options = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    eager = models.PatchEmbed(8, 4, 3, 10, **options)
    fast = modules.PatchEmbed(8, 4, 3, 10, **options)
    fast.load_state_dict(eager.state_dict())
    eager.load_state_dict(fast.state_dict())
    raw = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    extra = {"pos_embed": torch.randn(1, 4, 10), "prefix": torch.randn(1, 2, 10)}
    for images in (raw, raw / 255):
        torch.testing.assert_close(fast(images), eager(images))
        torch.testing.assert_close(fast(images, **extra), eager(images, **extra))


def test_a_projection_that_is_not_plain_is_called():
    options = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    fast = modules.PatchEmbed(8, 4, 3, 10, **options)
    raw = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    extra = {"pos_embed": torch.randn(1, 4, 10), "prefix": torch.randn(1, 2, 10)}
    expected = fast(raw, **extra)
    calls = []
    fast.proj.register_forward_hook(lambda *a: calls.append(a))
    torch.testing.assert_close(fast(raw, **extra), expected)
    assert len(calls) == 1
    assert fast._fast.fell_back == {"proj_called": 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parity_with_gradients(dtype):
    eager = models.PatchEmbed(32, 8, 3, 48).to(dtype)
    fast = modules.PatchEmbed(32, 8, 3, 48).to(dtype)
    fast.load_state_dict(eager.state_dict())
    truth = copy.deepcopy(eager).double()
    images = torch.randn(4, 3, 32, 32).to(dtype)
    results = []
    for layer, given in ((fast, images), (eager, images), (truth, images.double())):
        given = given.clone().requires_grad_()
        out = layer(given)
        out.square().sum().backward()
        gradients = {name: p.grad for name, p in layer.named_parameters()}
        results.append({"out": out.detach(), "input": given.grad, **gradients})
    for name in results[0]:
        found = parity(name, *(result[name] for result in results))
        assert found.ok, found


def test_sizes_known_to_timm_users():
    layer = modules.PatchEmbed((32, 48), 16, 3, 8)
    assert layer.img_size == (32, 48)
    assert layer.grid_size == (2, 3)
    assert layer.num_patches == 6
    assert layer.patch_size == (16, 16)
    assert layer.feat_ratio() == 16
    assert layer.feat_ratio(as_scalar=False) == (16, 16)
    assert layer.dynamic_feat_size((64, 33)) == (4, 2)


def test_another_image_size():
    layer = modules.PatchEmbed(32, 16, 3, 8)
    layer.set_input_size(img_size=(48, 16))
    assert layer.grid_size == (3, 1)
    assert layer(torch.randn(2, 3, 48, 16)).shape == (2, 3, 8)


def test_larger_patches_give_resized_images_the_same_tokens():
    layer = modules.PatchEmbed(32, 8, 3, 10).double()
    images = torch.randn(2, 3, 8, 8).double()
    larger = F.interpolate(images, size=(12, 12), mode="bicubic", antialias=True)
    layer.set_input_size(img_size=8)
    expected = layer(images)
    layer.set_input_size(img_size=12, patch_size=12)
    assert layer.proj.kernel_size == (12, 12)
    torch.testing.assert_close(layer(larger), expected, rtol=1e-8, atol=1e-8)


def test_the_backend_named_runs_or_raises():
    images = torch.randn(2, 3, 8, 8)
    with dispatch.counting() as ran:
        modules.PatchEmbed(8, 4, 3, 10, backend="reference")(images)
    assert ran == {"patch_embed.reference": 1}
    with pytest.raises(BackendRefused):
        modules.PatchEmbed(8, 4, 3, 10, backend="cuda")(images)


@pytest.mark.parametrize("bias", [False, True])
def test_patch_unembed_is_the_eager_one(bias):
    eager = models.PatchUnembed((2, 3), (4, 2), 3, 10, bias=bias).double()
    fast = modules.PatchUnembed((2, 3), (4, 2), 3, 10, bias=bias).double()
    fast.load_state_dict(eager.state_dict())
    eager.load_state_dict(fast.state_dict())
    tokens = torch.randn(2, 6, 10).double()
    same(fast(tokens), eager(tokens))
    same(fast(tokens[:, :2], grid_size=(1, 2)), eager(tokens[:, :2], grid_size=(1, 2)))
    fast.proj.register_forward_hook(lambda module, args, out: out + 1)
    same(fast(tokens), eager(tokens) + 1)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (
            lambda layer: layer(torch.randn(2, 3, 8, 9)),
            ValueError,
            "images of 8 x 8, got 8 x 9; res",
        ),
        (lambda layer: layer(torch.randn(3, 8, 8)), ValueError, r"expected images \[B, C, H, W\]"),
        (lambda layer: layer(torch.randn(2, 1, 8, 8)), ValueError, "images"),
        (
            lambda layer: layer(torch.zeros(2, 3, 8, 8, dtype=torch.int32)),
            (TypeError, ValueError),
            "int32",
        ),
        (lambda layer: modules.PatchEmbed(8, output_fmt="HWC"), ValueError, "'NLC'.*got 'HWC'"),
        (lambda layer: modules.PatchEmbed(8, 4, 3, 8, mean=(1.0,)), ValueError, "3 numbers"),
        (
            lambda layer: modules.PatchEmbed(8, 4, 3, 8, strict_img_size=False)(
                torch.randn(1, 3, 8, 9)
            ),
            ValueError,
            r"multiples of the patch \(4, 4\), got \(8, 9\)",
        ),
        (
            lambda layer: modules.PatchEmbed(8, 4, 3, 8, output_fmt="NCHW")(
                torch.randn(1, 3, 8, 8), pos_embed=torch.zeros(4, 8)
            ),
            ValueError,
            "flatten=True",
        ),
        (
            lambda layer: modules.PatchUnembed(2, 4, 3, 8)(torch.randn(1, 5, 8)),
            ValueError,
            "expected 4 tokens .* got 5",
        ),
    ],
)
def test_wrong_input_says_expected_got_and_remedy(call, error, match):
    with pytest.raises(error, match=match):
        call(modules.PatchEmbed(8, 4, 3, 8))


def test_compiles_without_a_graph_break():
    fast = modules.PatchEmbed(8, 4, 3, 10)
    images = torch.randn(2, 3, 8, 8)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), fast(images))
