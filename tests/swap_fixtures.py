"""What the tests of swap share: the patch transformer for digits, small."""

import dataclasses

import torch

from patchgen_fast.models import CONFIGS, PatchTransformer


def small(dtype=torch.float32, **changes):
    """The model for digits, with a memory prefix so that completion of nothing works too."""
    config = dataclasses.replace(CONFIGS["small"], prefix_tokens=1, **changes)
    return PatchTransformer(config).to(dtype).eval()


def digits(batch=8, dtype=torch.float32):
    return torch.rand(batch, 1, 8, 8).to(dtype)


def classes(model):
    return [type(module) for module in model.modules()]
