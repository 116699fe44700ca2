"""Triton kernels, a file per op. Importing this package imports neither torch nor triton.

Launchers have exactly their op's schema. They run on CUDA tensors, and on CPU tensors in a process
started with TRITON_INTERPRET=1, where Triton's interpreter takes the place of the compiler.
"""

from __future__ import annotations

import os
from importlib.util import find_spec


def unavailable_reason() -> str | None:
    """Why no Triton kernel can run in this process, or None. No GPU is asked: that waits for a
    call, whose tensors say where they are.
    """
    if find_spec("triton") is None:
        return "triton is not installed; torch's CUDA builds bring it, or pip install triton"
    if not interpreting():
        import torch

        if not torch.backends.cuda.is_built():
            return (
                f"torch {torch.__version__} was built without CUDA; TRITON_INTERPRET=1 runs the "
                "kernels in Triton's interpreter, slowly"
            )
        if torch.version.hip is not None:
            return "the Triton kernels are made for NVIDIA GPUs; on AMD's none has been tried"
    return None


def interpreting() -> bool:
    """Whether kernels are interpreted on the CPU; Triton reads the variable when it is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"
