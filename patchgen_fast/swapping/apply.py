"""`swap`: find the layers that have a fast class, and give them that class.

A layer is replaced by assigning `module.__class__` a subclass of its exact class. It stays the
same object: parameters, names of the state dict, hooks, `isinstance`, pickle, deepcopy, compile and
export go on as before, and undoing assigns the class back. Nothing is patched outside the model.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..modules.state import check_backend, state_of
from .adapters import Adapter, Known, known
from .inspection import looks_like, qualified, reason_against, reason_unknown, walk
from .report import Change, Row, SwapError, SwapReport, restore

Filter = Callable[[nn.Module, str], bool]


def swap(
    model: nn.Module,
    *,
    attention: bool = True,
    patch_embed: bool = True,
    feed_forward: bool = True,
    backend: str | None = None,
    filter_fn: Filter | None = None,
    strict: bool = False,
    dry_run: bool = False,
) -> SwapReport:
    """Give a model fast layers, in place, and say what was done.

    Args:
        model: any module; layers of classes that are exactly known are replaced, wherever they
            lie in it.
        attention: replace attention layers.
        patch_embed: replace patch embeddings and unembeddings.
        feed_forward: replace feed-forward layers.
        backend: for all of them: None for the fastest that accepts each call, or a name, which
            then runs or raises.
        filter_fn: `filter_fn(module, qualified_name)` returning False leaves a layer as it is.
        strict: raise unless every layer that was recognised is replaced, and at least one is.
        dry_run: change nothing; the report tells what would be done.

    Returns:
        A `SwapReport`: `print(report)`, `report.undo()`, `report.to_json()`.

    Raises:
        TypeError: model is no module. ValueError: an unknown backend. SwapError (a ValueError):
            by `strict`, before anything was changed.

    Swapping twice is swapping once; a second swap with another backend sets that.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"expected a torch.nn.Module to swap, got {type(model).__name__}; "
            "build the model first and pass the object"
        )
    check_backend(backend)
    options = {"attention": attention, "patch_embed": patch_embed, "feed_forward": feed_forward}
    if "torch.distributed.tensor" in sys.modules:
        from .tensor_parallel import register

        register()
    table = known()
    parts = _parts(model, table)
    report = SwapReport(qualified(type(model)), [], dry_run)
    plan: list[tuple[str, nn.Module, Adapter]] = []
    for name, module, sharded in walk(model):
        part = parts.get(module)
        row, adapter = _decide(
            name, module, part, sharded, table, options, backend, filter_fn, dry_run
        )
        if row is None:
            continue
        report.rows.append(row)
        if adapter is not None:
            plan.append((name, module, adapter))
    if strict:
        _demand_all(report)
    if not dry_run:
        for name, module, adapter in plan:
            _replace(report, name, module, adapter, backend)
    return report


@contextmanager
def swapped(model: nn.Module, **options) -> Iterator[SwapReport]:
    """`swap` for the length of a block: undone on leaving it, however that happens."""
    report = swap(model, **options)
    try:
        yield report
    finally:
        report.undo()


def unswap(model: nn.Module) -> int:
    """Undo every swap in a model, also one whose report is lost; how many layers that were.

    Works on copies and on unpickled models, which carry what undoing needs.
    """
    layers = [m for m in model.modules() if (s := state_of(m)) is not None and s.original]
    for layer in layers:
        restore(layer)
    return len(layers)


def _parts(model: nn.Module, table: Known) -> dict[nn.Module, Adapter]:
    """The layers that are known by where they are: their class says too little."""
    found = {}
    for whole in model.modules():
        for path, adapter in table.parts_of(whole).items():
            part: Any = whole
            for name in path.split("."):
                part = getattr(part, name, None)
            if type(part) is adapter.source:
                found[part] = adapter
    return found


def _decide(
    name: str,
    module: nn.Module,
    part: Adapter | None,
    sharded: bool,
    table: Known,
    options: dict[str, bool],
    backend: str | None,
    filter_fn: Filter | None,
    dry_run: bool,
) -> tuple[Row | None, Adapter | None]:
    """The row of one module, and its adapter where something is to be done."""
    cls = type(module)
    shown = qualified(cls)
    chosen = backend or "auto"
    state = state_of(module)
    if state is not None:
        adapter = table.adapter_of_target(cls)
        if adapter is None or state.original is None:
            kind = looks_like(module) or "layer"
            return Row(name, kind, shown, "already", state.backend or "auto", "fast_module"), None
        wanted = _wanted(adapter.kind, options) and (filter_fn is None or filter_fn(module, name))
        backend_shown = chosen if wanted else state.backend or "auto"
        row = Row(name, adapter.kind, qualified(state.original), "already", backend_shown)
        return row, adapter if wanted else None
    adapter = part or table.adapter(cls)
    if adapter is None:
        look = "attention" if cls in table.unsupported else looks_like(module)
        if look is None or not options[look] or _is_around_known(module, look, table):
            return None, None
        if filter_fn is not None and not filter_fn(module, name):
            return Row(name, look, shown, "skipped", "", "filter"), None
        why = reason_unknown(module, table)
        refused = why.code in ("subclass", "parametrised", "scripted")
        action = "refused" if refused else "unsupported"
        return Row(name, look, shown, action, "", *why), None
    if not _wanted(adapter.kind, options):
        return Row(name, adapter.kind, shown, "skipped", "", "option"), None
    if filter_fn is not None and not filter_fn(module, name):
        return Row(name, adapter.kind, shown, "skipped", "", "filter"), None
    reason = reason_against(module, adapter, backend, sharded)
    if reason is not None:
        return Row(name, adapter.kind, shown, "refused", "", *reason), None
    return Row(name, adapter.kind, shown, "would swap" if dry_run else "swapped", chosen), adapter


def _is_around_known(module: nn.Module, kind: str, table: Known) -> bool:
    """Whether it only holds the layer that its name suggests, which has a row of its own."""
    if table.parts_of(module):
        return True
    found = (table.adapter_of_target(type(m)) for m in module.modules())
    return any(adapter is not None and adapter.kind == kind for adapter in found)


def _wanted(kind: str, options: dict[str, bool]) -> bool:
    if kind == "layer":  # it joins what its children do
        return options["attention"] or options["feed_forward"]
    return options[kind]


def _replace(
    report: SwapReport, name: str, module: nn.Module, adapter: Adapter, backend: str | None
) -> None:
    state = state_of(module)
    if state is not None:
        report._changes.append(Change(module, state, False, state.backend))
        state.backend = backend
    else:
        state = adapter.state(backend, original=type(module), name=name)
        state.install(module, adapter.target)
        report._changes.append(Change(module, state, True))
    report._modules[name] = module


def _demand_all(report: SwapReport) -> None:
    left = report.with_action("refused", "unsupported")
    if left:
        lines = [
            f"  {row.name or '(model)'} ({row.cls}): {row.reason}: {row.detail}" for row in left
        ]
        raise SwapError(
            f"expected to swap every layer of {report.model_class} (strict=True), got "
            f"{len(left)} that can't be:\n" + "\n".join(lines) + "\n"
            "exclude them with filter_fn, or pass strict=False; nothing was changed"
        )
    if not report.with_action("swapped", "would swap", "already"):
        raise SwapError(f"{report._headline()} (strict=True)")
