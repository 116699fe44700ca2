"""Making an existing model fast: find, replace, report, undo, verify."""

from .apply import swap, swapped, unswap
from .maps import AttentionMaps, attention_maps
from .report import Row, SwapError, SwapReport
from .verification import Parity, VerifyReport, parity, verify

__all__ = [
    "AttentionMaps",
    "Parity",
    "Row",
    "SwapError",
    "SwapReport",
    "VerifyReport",
    "attention_maps",
    "parity",
    "swap",
    "swapped",
    "unswap",
    "verify",
]
