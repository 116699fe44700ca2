"""patch_embed on every backend: results and gradients by the parity rule."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases.patch_embed import NAMED, REPRESENTATIVE, SWEPT, Case, call, check, problem
from oracle import Target, assert_parity, explicit_gradients, explicit_pairs, proving, require

import patchgen_fast
from patchgen_fast import patch_embed


@pytest.mark.representative
@pytest.mark.parametrize("case", REPRESENTATIVE, ids=str)
def test_representative(case: Case, target: Target) -> None:
    check(case, target)


@pytest.mark.parametrize("case", SWEPT, ids=str)
def test_sweep(case: Case, target: Target) -> None:
    check(case, target)


@pytest.mark.parametrize("name", NAMED)
def test_named(name: str, target: Target) -> None:
    check(NAMED[name], target)


@pytest.mark.parametrize(("forward", "backward"), explicit_pairs("patch_embed"))
@pytest.mark.parametrize("case", [*SWEPT[::4], *NAMED.values()], ids=str)
def test_any_backward_takes_any_forward(case: Case, forward: str, backward: str) -> None:
    stated = problem(case, "cpu")

    def by_reference(**inputs):
        return call(case, "reference", **inputs)

    stated.compare(explicit_gradients(stated, by_reference, forward, backward))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_a_models_convolution(dtype: torch.dtype, target: Target) -> None:
    """Eager here is the layer that users have: nn.Conv2d, flatten, transpose."""
    require("patch_embed", target)
    torch.manual_seed(3)
    layer = torch.nn.Conv2d(3, 48, 16, stride=16).to(target.device, dtype)
    images = torch.randn(2, 3, 50, 64, device=target.device).to(dtype)
    with torch.no_grad():
        with proving("patch_embed", target):
            got = patch_embed(images, layer.weight, layer.bias, backend=target.backend)
        eager = layer(images).flatten(2).mT
        wide = (x.double() for x in (images, layer.weight, layer.bias))
        truth = F.conv2d(*wide, stride=16).flatten(2).mT
    assert_parity(got, eager, truth, factor=target.factor)


def test_statistics_first_used_in_inference_mode_serve_training() -> None:
    images, weight = torch.rand(1, 3, 16, 16), torch.randn(4, 3, 8, 8, requires_grad=True)
    statistics = {"mean": (0.11, 0.22, 0.33), "std": (0.44, 0.55, 0.66)}
    with torch.inference_mode():
        patchgen_fast.patch_embed(images, weight, **statistics)
    patchgen_fast.patch_embed(images, weight, **statistics).sum().backward()
    assert weight.grad is not None and weight.grad.isfinite().all()
