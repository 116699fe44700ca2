"""What stands in the way of replacing a module: the reasons that hold for every library."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from ..registry import OPS
from .adapters import Adapter, Kind, Known, Reason, fingerprint

LOOKS_LIKE: tuple[tuple[Kind, re.Pattern[str]], ...] = (
    ("patch_embed", re.compile(r"Patch_?(Un)?Embed", re.IGNORECASE)),
    ("attention", re.compile(r"Attention|Attn", re.IGNORECASE)),
    ("feed_forward", re.compile(r"Mlp|FeedForward|SwiGLU|FFN", re.IGNORECASE)),
)
"""Names of classes that get a line in the report. Nothing is ever replaced because of its name."""


def qualified(cls: type) -> str:
    """Module and name of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def looks_like(module: nn.Module) -> Kind | None:
    """The kind that an unknown class seems to be, by its name, for the report alone."""
    if isinstance(module, (nn.ModuleList, nn.Sequential, nn.ModuleDict)):
        return None
    if next(module.parameters(), None) is None:
        return None
    for kind, pattern in LOOKS_LIKE:
        if pattern.search(type(module).__name__):
            return kind
    return None


def reason_against(
    module: nn.Module, adapter: Adapter, backend: str | None, sharded: bool
) -> Reason | None:
    """Why a module of an exactly known class is left as it is, or None."""
    return (
        _changed(adapter)
        or _wrapped(module, sharded)
        or _unusual_parameters(module)
        or (adapter.refuse(module) if adapter.refuse is not None else None)
        or _lacks_backend(adapter, backend)
    )


def _changed(adapter: Adapter) -> Reason | None:
    if adapter.fingerprints is None or fingerprint(adapter.source) in adapter.fingerprints:
        return None
    return Reason(
        "unknown_version",
        f"{qualified(adapter.source)} differs from the versions that are known; "
        "install one of those, or a newer patchgen_fast",
    )


def _wrapped(module: nn.Module, sharded: bool) -> Reason | None:
    if sharded or is_fsdp(module):
        return Reason("fsdp", "it is sharded by FSDP; swap the model before wrapping it")
    if "forward" in module.__dict__:
        return Reason(
            "rebound_forward", "its forward was rebound on the instance; undo that before swapping"
        )
    return None


def _unusual_parameters(module: nn.Module) -> Reason | None:
    for child in module.modules():
        if type(child).__module__.startswith(("torch.ao.nn", "torch.nn.quantized")):
            return Reason("quantised", f"it contains a quantised {type(child).__name__}")
    for tensor in (*module.parameters(), *module.buffers()):
        if is_dtensor(tensor):
            return Reason("sharded", "its parameters are DTensors; swap before distributing them")
        if tensor.is_quantized or hasattr(tensor, "__tensor_flatten__"):
            return Reason("quantised", f"its parameters are {type(tensor).__name__}, not plain")
        if is_lazy(tensor):
            return Reason("uninitialised", "its parameters have no shape yet; run it once first")
    return None


def _lacks_backend(adapter: Adapter, backend: str | None) -> Reason | None:
    if backend is None or adapter.main_op is None:
        return None
    unavailable = OPS[adapter.main_op].backends[backend].unavailable
    return None if unavailable is None else Reason("no_backend", unavailable)


def reason_unknown(module: nn.Module, table: Known) -> Reason:
    """Why a module that looks like attention and so on is of no class that can be replaced."""
    cls = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        return Reason("scripted", "it is TorchScript; swap the model before scripting it")
    if parametrize.is_parametrized(module):
        return Reason("parametrised", "its parameters are computed by parametrisations")
    if cls in table.unsupported:
        return table.unsupported[cls]
    for library, problem in table.unusable.items():
        if cls.__module__.split(".")[0] == library.split(".")[0]:
            return problem
    for source in table.adapters:
        if isinstance(module, source):
            return Reason(
                "subclass", f"it derives from {qualified(source)}; only exactly that class is known"
            )
    return Reason("unknown_class", "no fast layer is known for exactly this class")


def is_dtensor(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, without importing torch.distributed."""
    dtensor = sys.modules.get("torch.distributed.tensor")
    return dtensor is not None and isinstance(tensor, dtensor.DTensor)


def is_fsdp(module: nn.Module) -> bool:
    """Whether a module is wrapped by FSDP or FSDP2, without importing either."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return False
    return isinstance(module, (fsdp.FullyShardedDataParallel, fsdp.FSDPModule))


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module, bool]]:
    """(qualified name, module, whether it lies in an FSDP-wrapped one), each module once."""
    sharded: list[str] = []
    for name, module in model.named_modules():
        inside = any(name == root or name.startswith(f"{root}.") or not root for root in sharded)
        if is_fsdp(module):
            sharded.append(name)
            inside = True
        yield name, module, inside
