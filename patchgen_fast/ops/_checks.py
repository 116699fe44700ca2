"""What every op checks or settles before any kernel runs: dtypes, devices, autocast, memory
layout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..registry import autocasts

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def describe(x: Any) -> str:
    """A tensor's shape, dtype and device, or anything else's type."""
    if isinstance(x, Tensor):
        return f"{list(x.shape)} {x.dtype} on {x.device}"
    return f"{type(x).__name__} {x!r}"


def check_tensors(op: str, required: dict[str, Any], /, **optional: Any) -> None:
    """All of ``required`` are tensors, those of ``optional`` tensors or None; all on one device."""
    device = None
    for name, x in (required | optional).items():
        if x is None and name not in required:
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{op}: expected {name} to be a tensor; got {describe(x)}")
        if device is None:
            device = x.device
        if x.device != device:
            raise ValueError(
                f"{op}: expected {name} on {device}, like the first argument; "
                f"got {describe(x)}. Move it with .to({str(device)!r})"
            )


def check_float(op: str, **tensors: Tensor | None) -> None:
    """Each of ``tensors`` has a floating dtype that the op computes in."""
    for name, x in tensors.items():
        if x is not None and x.dtype not in FLOATS:
            raise TypeError(
                f"{op}: expected {name} in float32, bfloat16, float16 or float64; "
                f"got {describe(x)}. Convert it with .float()"
            )


def check_same_dtype(op: str, dtype: torch.dtype, of: str, /, **tensors: Tensor | None) -> None:
    """Each of ``tensors`` is None or of ``dtype``, that of the argument named ``of``."""
    for name, x in tensors.items():
        if x is not None and x.dtype != dtype:
            raise TypeError(
                f"{op}: expected {name} in {dtype}, the dtype of {of}; got {describe(x)}. "
                f"Convert it with .to({dtype}), or run under torch.autocast"
            )


def _matches(shape: tuple, pattern: tuple) -> bool:
    if len(shape) != len(pattern):
        return False
    for have, want in zip(shape, pattern, strict=True):
        if want is not None and have != want:
            return False
    return True


def check_shape(op: str, name: str, x: Tensor | None, *allowed: tuple) -> None:
    """``x`` is None or has one of the shapes; None in a shape allows any size."""
    if x is None or x.shape in allowed:
        return
    for shape in allowed:
        if _matches(x.shape, shape):
            return
    wanted = " or ".join(
        "[" + ", ".join("any" if n is None else str(n) for n in shape) + "]" for shape in allowed
    )
    raise ValueError(f"{op}: expected {name} of shape {wanted}; got {describe(x)}")


def is_like(x: Any, shape: tuple, device: torch.device, dtypes: tuple) -> bool:
    """Whether ``x`` is a tensor of that shape, on that device, in one of the dtypes."""
    return isinstance(x, Tensor) and x.shape == shape and x.dtype in dtypes and x.device == device


def autocast(first: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """The tensors as autocast would hand them to a matrix product: float32 and half types in its
    dtype.
    """
    if not isinstance(first, Tensor) or not autocasts(first):
        return (first, *others)  # What is no tensor is refused by the checks that follow.
    dtype = torch.get_autocast_dtype(first.device.type)
    return tuple(
        x.to(dtype) if x is not None and x.is_floating_point() and x.dtype != torch.float64 else x
        for x in (first, *others)
    )


def is_readable(x: Tensor) -> bool:
    """Whether values may be read on the host: not a GPU's, a traced graph's, or a DTensor's."""
    return (
        x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and (type(x) is Tensor or not hasattr(x, "__tensor_flatten__"))
    )


def inner_contiguous(x: Tensor) -> Tensor:
    """``x`` with stride 1 in its last dimension: itself, or a copy where it must be."""
    return x if x.stride(-1) == 1 else x.contiguous()


def check_heads(op: str, heads: int, kv_heads: int, enable_gqa: bool) -> None:
    """Key and value have the query's heads, or with ``enable_gqa`` a divisor of them."""
    if kv_heads == heads or (enable_gqa and kv_heads > 0 and heads % kv_heads == 0):
        return
    raise ValueError(
        f"{op}: expected key and value with the query's {heads} heads"
        + (" or a divisor of them" if enable_gqa else "")
        + f"; got {kv_heads}."
        + ("" if enable_gqa else " Pass enable_gqa=True to share each among several query heads")
    )
