"""timm's registry for the sweep."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from sweep_examine import MANY_PARAMETERS, Entry, Small, examine, first_that_runs
from torch import nn

from patchgen_fast._torchvision import make_importable


def models() -> list[str]:
    make_importable()
    import timm

    return list(timm.list_models())


def examine_model(name: str) -> Entry:
    import timm

    def build(**kwargs: Any) -> nn.Module:
        return timm.create_model(name, pretrained=False, num_classes=10, **kwargs)

    def candidate(change: dict[str, Any]) -> Small:
        model = build(**change)
        config: Any = model.pretrained_cfg
        size = (change["img_size"],) * 2 if "img_size" in change else config["input_size"][1:]
        many = sum(p.numel() for p in model.parameters()) > MANY_PARAMETERS
        return model, (torch.randn(1 if many else 2, 3, *size),), {}

    def small(whole: nn.Module) -> Small:
        """The model with the first of these changes that it takes and runs with."""
        stages = max(len(getattr(whole, part, ())) for part in ("layers", "stages"))
        shallow: list[dict[str, Any]] = [
            {"depth": 1, **_four_heads(whole)},
            {"depth": 1},
            {"depths": (1,) * stages},
            {"layers": (1,) * 4},
            {"serial_depths": (1,) * 4, "parallel_depth": 1},
            {"depth": ((1, 1, 0),) * 3},  # CrossViT's
            {"depth": (1, 1, 1)},  # PiT's
            {},
        ]
        sizes: list[dict[str, Any]] = [{"img_size": _patch_side(whole) * 5}, {"img_size": 64}, {}]
        return first_that_runs(
            partial(candidate, change | size) for change in shallow for size in sizes
        )

    return examine(name, build, small)


def _four_heads(model: Any) -> dict[str, int]:
    """The width of four of the model's heads, where it has plain blocks."""
    try:
        heads = model.blocks[0].attn.num_heads
    except (AttributeError, IndexError, TypeError):
        return {}
    width = getattr(model, "embed_dim", None)
    if not isinstance(width, int) or width % heads or heads <= 4:
        return {}
    return {"embed_dim": 4 * (width // heads), "num_heads": 4}


def _patch_side(model: nn.Module) -> int:
    size = getattr(getattr(model, "patch_embed", None), "patch_size", 16)
    return int(size if isinstance(size, int) else max(size))
