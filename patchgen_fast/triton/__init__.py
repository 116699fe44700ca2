"""Triton kernels, a file per op. Importing this package imports neither torch nor triton.

Launchers have exactly their op's schema. They run on CUDA tensors, and on CPU tensors in a process
started with TRITON_INTERPRET=1, where Triton's interpreter takes the place of the compiler.
"""

from __future__ import annotations

import os
from importlib.util import find_spec


def unavailable_reason() -> str | None:
    """Why no Triton kernel can run in this process, or None."""
    if find_spec("triton") is None:
        return "triton is not installed; torch's CUDA builds bring it, or pip install triton"
    if not interpreting() and os.environ.get("PATCHGEN_FAST_TRITON") != "1":
        # No GPU has run them, and their suites are not green yet: nobody gets them unasked.
        return "the Triton kernels are not proved yet; PATCHGEN_FAST_TRITON=1 takes them"
    return None


def interpreting() -> bool:
    """Whether kernels are interpreted on the CPU; Triton reads the variable when it is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"
