"""Patch embedding, forward and backward, against float64."""

from __future__ import annotations

import pytest
import torch
import truth

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def images_of(shape, dtype):
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, dtype=torch.uint8)
    return torch.randn(shape).to(dtype)


def double(tensors):
    return {k: t if t is None or t.dtype == torch.uint8 else t.double() for k, t in tensors.items()}


def inputs(images, patch, embed, *, prefix=1, dtype=torch.bfloat16, normalise=True):
    torch.manual_seed(0)
    channels = images.shape[1]
    grid = [n // p for n, p in zip(images.shape[2:], patch, strict=True)]
    patches = torch.Size(grid).numel()
    return {
        "images": images,
        "weight": (torch.randn(embed, channels, *patch) * 0.05).to(dtype),
        "bias": torch.randn(embed).to(dtype),
        "pos_embed": torch.randn(patches, embed).to(dtype),
        "prefix": torch.randn(prefix, embed).to(dtype) if prefix else None,
        "mean": MEAN[:channels].contiguous() if normalise else None,
        "std": STD[:channels].contiguous() if normalise else None,
    }


def check(host, tensors, *, images_grad=None):
    """Forward, then all gradients by the same inputs."""
    out = host.patch_embed(**tensors)
    exact = double(tensors)
    truth.assert_parity(out, truth.patch_embed(**tensors), truth.patch_embed(**exact))
    assert host.wavefronts_per_matrix == 1, "bank conflicts"

    if images_grad is None:
        images_grad = tensors["images"].dtype != torch.uint8
    grad_out = torch.randn(out.shape).to(out.dtype)
    chosen = {name: tensors[name] for name in ("images", "weight", "mean", "std")}
    got = host.patch_embed_backward(grad_out, **chosen, images_grad=images_grad)
    assert host.wavefronts_per_matrix == 1, "bank conflicts"
    eager, precise = (gradients(t, grad_out, images_grad) for t in (tensors, exact))
    for ours, theirs, true in zip(got, eager, precise, strict=True):
        if ours is not None:
            truth.assert_parity(ours, theirs, true)
    return out


def gradients(tensors, grad_out, images_grad):
    images, weight = tensors["images"], tensors["weight"].clone().requires_grad_()
    if images_grad:
        images = images.clone().requires_grad_()
    out = truth.patch_embed(images, weight, mean=tensors["mean"], std=tensors["std"])
    prefix = grad_out.shape[1] - out.shape[1]
    out.backward(grad_out[:, prefix:].to(out.dtype))
    wide = torch.float64 if out.dtype == torch.float64 else torch.float32
    return (images.grad if images_grad else None, weight.grad, grad_out.to(wide).sum(0))


@pytest.mark.parametrize("side, patch", [(64, 32), (48, 16), (40, 8), (28, 14), (10, 2), (9, 3)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
def test_patches_and_pixels(host, side, patch, dtype):
    check(host, inputs(images_of((2, 3, side, side), dtype), (patch, patch), 48))


def test_many_tokens_and_columns(host):
    check(host, inputs(images_of((3, 3, 80, 80), torch.uint8), (8, 8), 200))


def test_channels_last_and_float16_weights(host):
    images = images_of((2, 3, 32, 48), torch.float16).to(memory_format=torch.channels_last)
    check(host, inputs(images, (16, 16), 40, dtype=torch.float16))


def test_a_crop_is_read_where_it_lies(host):
    images = images_of((2, 3, 50, 51), torch.bfloat16)[:, :, 1:, 3:]
    check(host, inputs(images, (16, 16), 40, prefix=0))


def test_pixels_that_fill_no_patch_are_left_out(host):
    tensors = inputs(images_of((1, 3, 37, 45), torch.float32), (16, 16), 24)
    check(host, tensors)
    tensors["images"][:, :, 32:], tensors["images"][:, :, :, 32:] = torch.nan, torch.nan
    assert host.patch_embed(**tensors).isfinite().all()


@pytest.mark.parametrize("patch", [(2, 16, 16), (2, 14, 14)])
def test_video(host, patch):
    images = images_of((2, 3, 4, 32, 32), torch.float32)
    check(host, inputs(images, patch, 40, normalise=False))


@pytest.mark.parametrize("embed", [1, 7, 130])
def test_any_embedding(host, embed):
    check(host, inputs(images_of((1, 1, 32, 32), torch.float32), (16, 16), embed, normalise=False))


def test_nothing_added(host):
    tensors = inputs(images_of((2, 3, 32, 32), torch.uint8), (16, 16), 32, prefix=3)
    out = host.patch_embed(**{**tensors, "bias": None, "pos_embed": None})
    exact = truth.patch_embed(**{**double(tensors), "bias": None, "pos_embed": None})
    eager = truth.patch_embed(**{**tensors, "bias": None, "pos_embed": None})
    truth.assert_parity(out, eager, exact)
    assert out[:, :3].equal(tensors["prefix"].expand(2, 3, 32)), "prefix tokens are copied"


def test_weight_gradient_in_parts(host):
    """With many multiprocessors the patches are summed in parts, in a fixed order."""
    host.multiprocessors = 132
    tensors = inputs(images_of((8, 3, 64, 64), torch.uint8), (4, 4), 24)
    check(host, tensors)
