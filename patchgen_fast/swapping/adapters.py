"""Which class is replaced by which: the table that the adapter files of the libraries fill."""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Literal, NamedTuple

from torch import nn

from ..modules.patch_conv import is_patch_conv
from ..modules.state import LayerState

Kind = Literal["attention", "patch_embed", "feed_forward", "layer"]

# the op that does a kind's work: a backend by name needs it
MAIN_OP: dict[str, str | None] = {
    "attention": "attention",
    "patch_embed": "patch_embed",
    "feed_forward": "linear",
    "layer": None,
}


class Reason(NamedTuple):
    """Why a layer is not swapped: a code for reports and a sentence for people."""

    code: str
    text: str


@dataclass(frozen=True)
class Adapter:
    """One exact class that is known, and the subclass of it that does the same faster.

    `refuse` looks at a module of the class and names what the fast class can't do. `fingerprints`
    are those of the class's source that the fast class was written and tested against: any other
    is refused, not guessed at. None for classes that change with us.
    """

    source: type[nn.Module]
    target: type[nn.Module]
    kind: Kind
    refuse: Callable[[nn.Module], Reason | None] | None = None
    op: str | None = None
    fingerprints: tuple[str, ...] | None = None
    state: type[LayerState] = LayerState

    @property
    def main_op(self) -> str | None:
        """The op that does most of the work; None where the layer's children do it."""
        return self.op or MAIN_OP[self.kind]


@dataclass
class Known:
    """All adapters of the libraries that are loaded."""

    adapters: dict[type, Adapter] = field(default_factory=dict)
    targets: dict[type, Adapter] = field(default_factory=dict)
    parts: dict[type, dict[str, Adapter]] = field(default_factory=dict)
    """Layers of general classes, as a bare convolution: class of the whole -> name in it."""
    rules: list[Callable[[type], Adapter | None]] = field(default_factory=list)
    """For libraries with many classes that keep one contract."""
    part_rules: list[Callable[[nn.Module], dict[str, Adapter]]] = field(default_factory=list)
    unsupported: dict[type, Reason] = field(default_factory=dict)
    """Classes that are known, and known not to be what a fast layer does."""
    unusable: dict[str, Reason] = field(default_factory=dict)
    """Libraries whose adapters can't serve the version that is installed."""

    def adapter(self, cls: type) -> Adapter | None:
        """The adapter of exactly this class, which is not a fast one."""
        if cls in self.adapters:
            return self.adapters[cls]
        return next((found for rule in self.rules if (found := rule(cls))), None)

    def adapter_of_target(self, cls: type) -> Adapter | None:
        """The adapter that made a layer of this class fast."""
        return self.targets.get(cls) or self.adapter(cls)

    def parts_of(self, module: nn.Module) -> dict[str, Adapter]:
        """The layers in a module that are known by their place in it, by name."""
        found = dict(self.parts.get(type(module), {}))
        for rule in self.part_rules:
            found |= rule(module)
        return found


# library -> adapter file. A file defines ADAPTERS, and where it needs them PARTS (class of a whole
# -> name in it -> adapter), UNSUPPORTED (class -> Reason), and the rules `adapter_for` (class) and
# `parts_of` (module), with TARGETS (fast class -> adapter) of the latter.
LIBRARIES = {
    "patchgen_fast.models": "patchgen_fast.swapping.patchgen",
    "patchgen_fast.generator.heads": "patchgen_fast.swapping.generator",
    "torch.nn": "patchgen_fast.swapping.torch_nn",
    "timm": "patchgen_fast.swapping.timm",
    "torchvision.models": "patchgen_fast.swapping.torchvision",
    "diffusers.models.attention_processor": "patchgen_fast.swapping.diffusers",
    "transformers.modeling_utils": "patchgen_fast.swapping.transformers",
}


def not_a_patch_conv(module: nn.Module) -> Reason | None:
    """Why a convolution is not replaced by the patch-embed op; None where it is."""
    if is_patch_conv(module):
        return None
    return Reason("overlapping", "it is not one product a patch (stride = kernel, no padding)")


def fingerprint(cls: type, method: str = "forward") -> str:
    """What a class does and what it is built of, as a short hash of its source.

    Of `__init__` and the method, spaces and line ends aside; empty where there is no source.
    """
    try:
        source = inspect.getsource(cls.__init__) + inspect.getsource(getattr(cls, method))  # type: ignore[misc]
    except (OSError, TypeError, AttributeError):
        return ""
    return hashlib.sha256(" ".join(source.split()).encode()).hexdigest()[:16]


def known() -> Known:
    """The adapters of every library that is imported: a model can't have layers of another."""
    table = Known()
    for library, file in LIBRARIES.items():
        if library not in sys.modules:
            continue
        try:
            adapter_file = import_module(file)
        except (ImportError, AttributeError) as error:
            table.unusable[library] = Reason(
                "unknown_version", f"this version of {library} lacks a class that is known: {error}"
            )
            continue
        for adapter in adapter_file.ADAPTERS:
            table.adapters[adapter.source] = adapter
            table.targets[adapter.target] = adapter
        for parent, parts in getattr(adapter_file, "PARTS", {}).items():
            table.parts[parent] = parts
            table.targets.update({part.target: part for part in parts.values()})
        table.targets.update(getattr(adapter_file, "TARGETS", {}))
        if hasattr(adapter_file, "adapter_for"):
            table.rules.append(adapter_file.adapter_for)
        if hasattr(adapter_file, "parts_of"):
            table.part_rules.append(adapter_file.parts_of)
        table.unsupported.update(getattr(adapter_file, "UNSUPPORTED", {}))
    return table
