"""MODEL on the command line: a name becomes a model with random weights, and inputs for it.

    timm:vit_base_patch16_224     any name of timm
    torchvision:vit_b_16          any name of torchvision
    transformers:ViTConfig        a configuration class of transformers, with its defaults
    patchgen:vit_b_16             a configuration of `patchgen_fast.models`
    mymodule:build_model          a callable: it returns a module, or a pair (module, inputs)

Nothing is downloaded. The weights of a model of your own come with your callable.
"""

from __future__ import annotations

import difflib
import inspect
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ._torchvision import make_importable

LIBRARIES = ("timm", "torchvision", "transformers", "patchgen")
FORMS = "timm:NAME, torchvision:NAME, transformers:CONFIG_CLASS, patchgen:NAME or module:callable"
TEXT_TOKENS = 64  # of a text that goes with the images


class Arguments(NamedTuple):
    """What a model's forward takes."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}


@dataclass(frozen=True)
class ModelSource:
    """A named model that can be made, and inputs that fit it.

    Args:
        name: as it was asked for.
        make: a new module, float32 on the CPU (or the default device), weights random.
        image_shape: (C, H, W) of an image, None where the source has no images or does not say.
        make_inputs: `make_inputs(module, batch)`: the arguments of its forward in float32.
    """

    name: str
    make: Callable[[], nn.Module]
    image_shape: tuple[int, int, int] | None
    make_inputs: Callable[[nn.Module, int], Arguments]

    def model(
        self, *, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0
    ) -> nn.Module:
        """A model in evaluation mode, on this device and in this dtype; the same for a seed."""
        torch.manual_seed(seed)
        return self.make().to(device, dtype).eval()

    def inputs(
        self,
        module: nn.Module,
        batch: int = 1,
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> Arguments:
        """Random inputs for `batch` images (or texts); floats in this dtype."""
        if batch < 1:
            raise ValueError(f"expected a batch of at least 1, got {batch}")
        torch.manual_seed(seed)
        return _converted(self.make_inputs(module, batch), device, dtype)


def find(name: str) -> ModelSource:
    """The source called `LIBRARY:NAME` or `module:callable`.

    Raises ValueError for a name that is not there, with those nearest to it, and for a library
    that is not installed or can't be imported.
    """
    library, colon, model = name.partition(":")
    if not colon or not library or not model:
        near = "" if library in LIBRARIES else _near(library, LIBRARIES)
        raise ValueError(f"expected a model as {FORMS}, got {name!r}{near}")
    named = {
        "timm": _timm,
        "torchvision": _torchvision,
        "transformers": _transformers,
        "patchgen": _patchgen,
    }
    return named[library](name, model) if library in named else _callable(name, library, model)


def _converted(arguments: Arguments, device: str, dtype: torch.dtype) -> Arguments:
    from torch.utils import _pytree as pytree

    def convert(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.to(device, dtype if x.is_floating_point() else x.dtype)

    args, kwargs = pytree.tree_map(convert, (arguments.args, arguments.kwargs))
    return Arguments(args, kwargs)


def _near(name: str, known: Iterable[str]) -> str:
    """`; did you mean a, b?`, or nothing: names like `name`, and names that begin like it."""
    lower = {other.lower(): other for other in known}
    matcher = difflib.SequenceMatcher(b=name.lower())

    def likeness(other: str) -> float:
        ratios = []
        for text in (other, other[: len(name) + 1]):
            matcher.set_seq1(text)
            ratios.append(matcher.ratio())
        return max(ratios)

    rated = sorted((-likeness(other), len(other), other) for other in lower)
    found = [other for rating, _, other in rated[:5] if rating <= -0.6]
    if not found and len(name) > 2:
        found = sorted(other for other in lower if name.lower() in other)[:5]
    return f"; did you mean {', '.join(lower[other] for other in found)}?" if found else ""


def _library(name: str) -> ModuleType:
    make_importable()  # all of them import torchvision
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise ValueError(f"{name} can't be imported: {error}; install what it needs") from error
        raise ValueError(f"{name} is not installed; pip install {name}") from error
    except Exception as error:  # built for another torch, it fails in ways of its own
        raise ValueError(
            f"{name} can't be imported: {error}; install a build that fits torch "
            f"{torch.__version__}"
        ) from error


def _image_source(
    name: str, make: Callable[[], nn.Module], shape: tuple[int, int, int], *, unit: bool = False
) -> ModelSource:
    """A source of one batch of images: normal values, or on the scale 0 to 1."""
    draw = torch.rand if unit else torch.randn
    return ModelSource(name, make, shape, lambda module, batch: Arguments((draw(batch, *shape),)))


def _timm(name: str, model: str) -> ModelSource:
    timm = _library("timm")
    if not timm.is_model(model.partition(".")[0]):
        raise ValueError(f"timm has no model {model!r}{_near(model, timm.list_models())}")
    try:
        shape = timm.get_pretrained_cfg(model).input_size
    except RuntimeError as error:  # the name is right, and the tag behind its point is not
        tags = timm.list_models(f"{model.partition('.')[0]}.*", pretrained=True)
        raise ValueError(f"timm has no model {model!r}{_near(model, tags)}") from error
    return _image_source(name, lambda: timm.create_model(model, pretrained=False), shape)


def _torchvision(name: str, model: str) -> ModelSource:
    models = _library("torchvision").models
    if model not in models.list_models():
        raise ValueError(f"torchvision has no model {model!r}{_near(model, models.list_models())}")
    size = 224  # where its weights do not say
    if weights := list(models.get_model_weights(model)):
        size = getattr(weights[0].transforms(), "crop_size", [size])[0]
    return _image_source(name, lambda: models.get_model(model, weights=None), (3, size, size))


def _patchgen(name: str, model: str) -> ModelSource:
    from patchgen_fast.models import CONFIGS, PatchTransformer
    from patchgen_fast.models.patches import pair

    if model not in CONFIGS:
        raise ValueError(
            f"patchgen has no model {model!r}; expected one of {', '.join(CONFIGS)}"
            f"{_near(model, CONFIGS)}"
        )
    config = CONFIGS[model]
    shape = (config.channels, *pair(config.image_size))
    return _image_source(name, lambda: PatchTransformer(config), shape, unit=True)


def _transformers(name: str, model: str) -> ModelSource:
    transformers = _library("transformers")
    configs = [other for other in dir(transformers) if other.endswith("Config")]
    if model not in configs:
        raise ValueError(
            f"transformers has no configuration class {model!r}{_near(model, configs)}"
        )
    config = getattr(transformers, model)()

    def make() -> nn.Module:
        try:
            return transformers.AutoModel.from_config(config)
        except ValueError as error:
            raise ValueError(
                f"transformers has no base model for {model}; pass a callable of your own, "
                "module:callable"
            ) from error

    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None)
    height, width = (size if isinstance(size, (list, tuple)) else (size, size)) if size else (0, 0)
    shape = (getattr(vision, "num_channels", 3), height, width) if size else None

    def make_inputs(module: nn.Module, batch: int) -> Arguments:
        takes = inspect.signature(module.forward).parameters
        inputs = {}
        if "pixel_values" in takes and shape:
            frames = getattr(vision, "num_frames", None)  # of a video model
            dims = (frames, *shape) if frames else shape
            inputs["pixel_values"] = torch.randn(batch, *dims)
        text = getattr(config, "text_config", config)
        if "input_ids" in takes and hasattr(text, "vocab_size"):
            longest = min(getattr(text, "max_position_embeddings", TEXT_TOKENS), TEXT_TOKENS)
            inputs["input_ids"] = torch.randint(0, text.vocab_size, (batch, longest))
        if not inputs:
            raise ValueError(
                f"{name}: no inputs known for {type(module).__name__}.forward"
                f"({', '.join(takes)}); pass module:callable, which returns (model, inputs)"
            )
        return Arguments((), inputs)

    return ModelSource(name, make, shape, make_inputs)


def _callable(name: str, module_name: str, function_name: str) -> ModelSource:
    """`module:callable`, with the working directory searched as `python -m` does."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if module_name != missing and not module_name.startswith(f"{missing}."):
            raise ValueError(f"{module_name} can't be imported: {error}") from error
        raise ValueError(
            f"no library or module {module_name!r}; expected {FORMS}{_near(module_name, LIBRARIES)}"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        names = [other for other in dir(module) if callable(getattr(module, other))]
        raise ValueError(
            f"{module_name} has no callable {function_name!r}{_near(function_name, names)}"
        )
    returned: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()  # inputs by their module

    def make() -> nn.Module:
        made = function()
        model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
        if not isinstance(model, nn.Module):
            raise ValueError(
                f"{name}: expected a torch.nn.Module, or a pair (module, inputs), got "
                f"{type(made).__name__}"
            )
        returned[model] = inputs
        return model

    def make_inputs(model: nn.Module, batch: int) -> Arguments:
        """As they were returned: their batch is the callable's to choose."""
        inputs = returned.get(model)
        if inputs is None:
            raise ValueError(
                f"{name} returns no inputs; let it return (model, inputs), inputs a tensor, a "
                "tuple of arguments or a dictionary of them"
            )
        if isinstance(inputs, dict):
            return Arguments((), inputs)
        return Arguments(tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,))

    return ModelSource(name, make, None, make_inputs)
