"""`patchgen-fast` with one kernel made slower: what the gate of `compare` has to see.

python tests/slowed.py attention 1.15 bench --suite quick --json slow.json
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any


def slowed(call: Callable, factor: float) -> Callable:
    """`call`, made to take `factor` times as long: it works, then spins."""

    def slower(*args: Any) -> Any:
        # By the thread's own clock: a neighbour that took the core makes nothing slower here.
        start = time.thread_time()
        out = call(*args)
        end = start + (time.thread_time() - start) * factor
        while time.thread_time() < end:
            pass
        return out

    return slower


def slow_down(op: str, factor: float) -> None:
    """Every forward of the CPU kernel of this op takes `factor` times as long."""
    import_module(f"patchgen_fast.ops.{op}")
    declared = import_module("patchgen_fast.registry").OPS[op]
    missing = declared.backends["cpu"].unavailable
    if missing is not None:
        raise SystemExit(f"nothing to slow down: {missing}")
    declared.calls["cpu"] = slowed(declared.calls["cpu"], factor)


if __name__ == "__main__":
    from patchgen_fast.cli import main

    slow_down(sys.argv[1], float(sys.argv[2]))
    main(sys.argv[3:])
