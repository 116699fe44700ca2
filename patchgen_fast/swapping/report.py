"""The report of a swap: what was done to each layer and why, and what it did since."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .. import __version__
from ..modules.state import LayerState, state_of

SCHEMA_VERSION = 1
KINDS = {"attention": "attention", "patch_embed": "patch embed", "feed_forward": "feed-forward"}


class SwapError(ValueError):
    """A strict swap found a layer that it could not replace; nothing was changed."""


@dataclass(frozen=True)
class Row:
    """One layer.

    Args:
        name: qualified name in the model; empty for the model itself.
        kind: "attention", "patch_embed", "feed_forward" or "layer".
        cls: its class, qualified, before the swap.
        action: "swapped", "would swap" (dry run), "already", "skipped", "refused", "unsupported".
        backend: "auto" or a name; empty where nothing was swapped.
        reason: code, empty where there is none.
        detail: the reason in words.
    """

    name: str
    kind: str
    cls: str
    action: str
    backend: str = ""
    reason: str = ""
    detail: str = ""


@dataclass
class Change:
    """What undoing needs: the module, its state, and the backend that the state had before."""

    module: nn.Module
    state: LayerState
    created: bool
    backend_before: str | None = None


@dataclass
class SwapReport:
    """What `swap` did. Print it, `to_json()` it, `undo()` it."""

    model_class: str
    rows: list[Row]
    dry_run: bool = False
    undone: bool = False
    _changes: list[Change] = field(default_factory=list, repr=False)
    _modules: dict[str, nn.Module] = field(default_factory=dict, repr=False)

    def undo(self) -> None:
        """Give every layer that this swap replaced its class back; a second time does nothing."""
        for change in reversed(self._changes):
            if state_of(change.module) is not change.state:
                continue  # undone by another hand
            if change.created:
                restore(change.module)
            else:
                change.state.backend = change.backend_before
        self._changes.clear()
        self.undone = True

    def counters(self) -> dict[str, dict[str, Any]]:
        """Per swapped layer: how often it was called, and how often it fell back, by reason.

        Compiled and exported runs are not counted here; `patchgen_fast.dispatch.counters` counts
        the kernels themselves.
        """
        found = {}
        for name, module in self._modules.items():
            state = state_of(module)
            if state is not None:
                found[name] = {"calls": state.calls, "fell_back": dict(state.fell_back)}
        return found

    def with_action(self, *actions: str) -> list[Row]:
        """The rows with one of these actions."""
        return [row for row in self.rows if row.action in actions]

    def to_json(self, indent: int | None = 2) -> str:
        """The report as JSON, counters included."""
        counters = self.counters()
        rows = []
        for row in self.rows:
            entry = {
                "name": row.name,
                "kind": row.kind,
                "class": row.cls,
                "action": row.action,
                "backend": row.backend or None,
                "reason": row.reason or None,
                "detail": row.detail or None,
            }
            rows.append({**entry, **counters.get(row.name, {})})
        return json.dumps(
            {
                "schema_version": SCHEMA_VERSION,
                "kind": "swap_report",
                "patchgen_fast": __version__,
                "torch": torch.__version__,
                "model": self.model_class,
                "dry_run": self.dry_run,
                "undone": self.undone,
                "rows": rows,
            },
            indent=indent,
        )

    def __str__(self) -> str:
        lines = [self._headline()]
        if self.rows:
            lines += _table(self._collapsed())
        details = {row.reason: row.detail for row in self.rows if row.reason and row.detail}
        lines += [f"{code}: {text}" for code, text in sorted(details.items())]
        return "\n".join(lines)

    def _headline(self) -> str:
        done = "would swap" if self.dry_run else "swapped"
        rows = self.with_action("swapped", "would swap")
        already = len(self.with_action("already"))
        if not rows and already:
            return f"patchgen_fast: {self.model_class} is swapped already ({already} layers)"
        if not rows:
            left = len(self.rows)
            why = f"{left} left as they are" if left else "no layer of a known class in it"
            return f"patchgen_fast: nothing to swap in {self.model_class}: {why}"
        kinds = Counter(row.kind for row in rows)
        parts = [f"{kinds[kind]} {label}" for kind, label in KINDS.items() if kinds[kind]]
        if kinds["layer"]:
            parts.append(f"{kinds['layer']} around them")
        undone = ", undone since" if self.undone and not self.dry_run else ""
        return f"patchgen_fast: {done} in {self.model_class}: {', '.join(parts)}{undone}"

    def _collapsed(self) -> list[tuple[str, ...]]:
        counters = self.counters()
        keyed = []
        for row in self.rows:
            counter = counters.get(row.name)
            calls = str(counter["calls"]) if counter else ""
            fell_back = (
                ", ".join(f"{n} x {code}" for code, n in counter["fell_back"].items())
                if counter
                else ""
            )
            cls = row.cls.rpartition(".")[2]
            keyed.append((row.name, (cls, row.action, row.backend, row.reason, calls, fell_back)))
        header = ("layer", "class", "action", "backend", "reason", "calls", "fell back")
        return [header, *((name or "(model)", *rest) for name, rest in collapse(keyed))]


def restore(module: nn.Module) -> None:
    """Make one swapped module what it was."""
    state = state_of(module)
    if state is not None and state.original is not None:
        state.remove(module)


def collapse(rows: Sequence[tuple[str, tuple]]) -> list[tuple[str, tuple]]:
    """Rows of equal content whose names differ by numbers alone as one: `blocks.0-11.attn`."""
    entries: list[tuple[tuple, tuple]] = [
        (
            tuple(frozenset({int(part)}) if part.isdigit() else part for part in name.split(".")),
            content,
        )
        for name, content in rows
    ]
    depth = max((len(parts) for parts, _ in entries), default=0)
    for position in range(depth - 1, -1, -1):
        merged: dict[tuple, tuple[tuple, tuple]] = {}
        for parts, content in entries:
            if position >= len(parts) or not isinstance(parts[position], frozenset):
                merged[(parts, content)] = (parts, content)
                continue
            rest = (parts[:position], parts[position + 1 :])
            key = (position, rest, content)
            if key in merged:
                union = merged[key][0][position] | parts[position]
                parts = (*parts[:position], union, *parts[position + 1 :])
            merged[key] = (parts, content)
        entries = list(merged.values())
    return [
        (".".join(p if isinstance(p, str) else ranges(p) for p in parts), content)
        for parts, content in entries
    ]


def ranges(numbers: frozenset[int]) -> str:
    """Numbers as runs: {0, 1, 2, 5} is "0-2,5"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns aligned; those that are empty below their header left out."""
    used = [i for i in range(len(rows[0])) if any(row[i] for row in rows[1:])]
    widths = [max(len(row[i]) for row in rows) for i in used]
    return [
        "  " + "  ".join(row[i].ljust(w) for i, w in zip(used, widths, strict=True)).rstrip()
        for row in rows
    ]
