"""transformers' models of images for the sweep, built from their configurations, made small."""

from __future__ import annotations

import inspect
import re
from functools import partial
from typing import Any

import torch
from sweep_examine import Entry, Small, examine, first_that_runs
from torch import Tensor, nn

from patchgen_fast._torchvision import make_importable

DEPTH = re.compile(r"(layers|depth|blocks)$")
IMAGES = ("pixel_values", "pixel_values_videos")
TOKENS = 5  # of a text
SAMPLE = 3  # one model of so many is run in bfloat16 and with gradients too


def models() -> list[str]:
    """Configuration classes whose base model takes images, and images first."""
    make_importable()
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    found = []
    for kind, named in MODEL_MAPPING_NAMES.items():
        for model in (named,) if isinstance(named, str) else named:
            try:
                takes = inspect.signature(getattr(transformers, model).forward).parameters
            except Exception:  # it needs a package that is not here
                continue
            if list(takes)[1:2] in ([name] for name in IMAGES):
                found.append(CONFIG_MAPPING_NAMES[kind])
                break
    return sorted(set(found))


def examine_model(name: str) -> Entry:
    import transformers

    config_class = getattr(transformers, name)

    def build(shallow: bool = False, **changes: Any) -> nn.Module:
        config = config_class(**changes)
        if shallow:
            _flatten(config)
        model: nn.Module = transformers.AutoModel.from_config(config)
        return model

    def candidate(change: dict[str, Any]) -> Small:
        model = build(**change)
        return model, (), arguments(model)

    def small(whole: nn.Module) -> Small:
        side = _first_of(config_class(), "patch_size", default=8)
        side = 4 * (side if isinstance(side, int) else max(side))
        narrow = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
        one = {"num_hidden_layers": 1}
        return first_that_runs(
            partial(candidate, change)
            for change in (
                {**narrow, **one, "image_size": side},
                {**narrow, **one, "image_size": [side, side]},
                {**one, "image_size": side},
                {"depths": [1, 1], "num_heads": [2, 4], "embed_dim": 32},
                one,
                {"shallow": True},
                {},
            )
        )

    return examine(name, build, small, SAMPLE)


def _flatten(config: Any) -> None:
    """One layer of each kind, in the configurations inside too."""
    from transformers import PretrainedConfig

    for name, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            _flatten(value)
        elif DEPTH.search(name) and type(value) is int and value > 1:
            setattr(config, name, 1)


def _first_of(config: Any, *names: str, default: Any = None) -> Any:
    """The first of these attributes that a configuration has, or one of those inside it."""
    from transformers import PretrainedConfig

    for name in names:
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    for value in vars(config).values():
        if isinstance(value, PretrainedConfig):
            found = _first_of(value, *names)
            if found is not None:
                return found
    return default


def arguments(model: Any) -> dict[str, Tensor]:
    """What the model's forward demands, by name: images, and what belongs to them."""
    config = model.config
    takes = inspect.signature(model.forward).parameters
    images = next(name for name in IMAGES if name in takes)
    demanded = {
        name
        for name, parameter in takes.items()
        if parameter.default is inspect.Parameter.empty
        and parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }
    given = {images: _images(config, video=images.endswith("videos"))}
    grid = next((name for name in takes if name.endswith("grid_thw")), None)
    if grid is not None:
        given |= _packed_patches(config, images, grid)
    if "merge_sizes" in takes:
        given["merge_sizes"] = torch.tensor([2])
    if "pixel_position_ids" in demanded:
        side = _first_of(config, "patch_size")
        places = torch.cartesian_prod(torch.arange(6), torch.arange(6))
        given["pixel_position_ids"] = places[None]
        given[images] = torch.rand(1, 36, 3 * side * side)
    if "spatial_shapes" in demanded:  # SigLIP 2's patches
        side = config.patch_size
        given[images] = torch.randn(1, config.num_patches, 3 * side * side)
        rows = round(config.num_patches**0.5)
        given["spatial_shapes"] = torch.tensor([[rows, rows]])
        given["pixel_attention_mask"] = torch.ones(1, config.num_patches, dtype=torch.long)
    if "prompt_pixel_values" in demanded:  # SegGPT's
        height, width = config.image_size
        given = {
            name: torch.randn(1, 3, height // 2, width)
            for name in (images, "prompt_pixel_values", "prompt_masks")
        }
    for name in demanded - given.keys():
        if name.endswith(("input_ids", "inputs")):
            given[name] = torch.arange(1, TOKENS + 1)[None]
        elif name.endswith("attention_mask"):
            given[name] = torch.ones(1, TOKENS, dtype=torch.long)
    if "input_points" in takes:  # SAM's
        given["input_points"] = torch.tensor([[[[10.0, 10.0]]]])
        given["input_labels"] = torch.tensor([[[1]]])
    if "decoder_input_ids" in takes and "labels" in takes:
        given["decoder_input_ids"] = torch.arange(1, TOKENS + 1)[None]
    return given


def _images(config: Any, video: bool) -> Tensor:
    size = _first_of(config, "image_size", "input_size", default=224)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    channels = _first_of(config, "num_channels", default=3)
    frames = _first_of(config, "num_frames", "frames_per_clip", default=2 if video else None)
    return torch.randn(1, *((frames,) if frames else ()), channels, height, width)


def _packed_patches(config: Any, images: str, grid: str) -> dict[str, Tensor]:
    """Patches cut already, of two images in one sequence."""
    side = _first_of(config, "patch_size")
    frames = _first_of(config, "temporal_patch_size", default=1)
    channels = _first_of(config, "in_channels", "in_chans", "num_channels", default=3)
    shapes = torch.tensor([[1, 4, 6], [1, 8, 4]])
    return {images: torch.rand(24 + 32, channels * frames * side * side), grid: shapes}
