"""Making an existing model fast: find, replace, report, undo, verify."""

from .apply import swap, swapped, unswap
from .report import Row, SwapError, SwapReport
from .verification import Parity, VerifyReport, parity, verify

__all__ = [
    "Parity",
    "Row",
    "SwapError",
    "SwapReport",
    "VerifyReport",
    "parity",
    "swap",
    "swapped",
    "unswap",
    "verify",
]
