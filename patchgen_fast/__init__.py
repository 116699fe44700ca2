"""Fast layers for patch transformers: kernels behind torch ops, drop-in modules, benchmarks.

Everything public is imported from here and loaded when it is first asked for, so that
`import patchgen_fast` costs nothing and imports neither torch nor triton.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "attention": "patchgen_fast.ops.attention",
}

__all__ = ["__version__", *_EXPORTS]

if TYPE_CHECKING:
    from .ops.attention import attention as attention


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'patchgen_fast' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
