"""Which class is replaced by which: the table that the adapter files of the libraries fill."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Literal, NamedTuple

from torch import nn

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

    `refuse` looks at a module of the class and names what the fast class can't do.
    """

    source: type[nn.Module]
    target: type[nn.Module]
    kind: Kind
    refuse: Callable[[nn.Module], Reason | None] | None = None
    op: str | None = None

    @property
    def main_op(self) -> str | None:
        """The op that does most of the work; None where the layer's children do it."""
        return self.op or MAIN_OP[self.kind]


@dataclass
class Known:
    """All adapters of the libraries that are loaded."""

    adapters: dict[type, Adapter] = field(default_factory=dict)
    targets: dict[type, Adapter] = field(default_factory=dict)
    unsupported: dict[type, Reason] = field(default_factory=dict)
    """Classes that are known, and known not to be what a fast layer does."""
    unusable: dict[str, Reason] = field(default_factory=dict)
    """Libraries whose adapters can't serve the version that is installed."""


# library -> adapter file. A file defines ADAPTERS, and where it needs them UNSUPPORTED
# (class -> Reason) and version_problem() -> Reason | None.
LIBRARIES = {
    "patchgen_fast.models": "patchgen_fast.swapping.patchgen",
    "torch.nn": "patchgen_fast.swapping.torch_nn",
}


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
        problem = getattr(adapter_file, "version_problem", lambda: None)()
        if problem is not None:
            table.unusable[library] = problem
            continue
        for adapter in adapter_file.ADAPTERS:
            table.adapters[adapter.source] = adapter
            table.targets[adapter.target] = adapter
        table.unsupported.update(getattr(adapter_file, "UNSUPPORTED", {}))
    return table
