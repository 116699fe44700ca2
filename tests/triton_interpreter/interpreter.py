"""Runs the Triton kernels on the CPU: bf16 made right, calls made quick, guarded buffers.

Triton's interpreter computes bfloat16 on its raw 16 bits (3.6 to 3.8). `repair_bfloat16` makes its
builder widen to float32 before arithmetic and round to nearest even after it. Importing this module
skips the importing tests, visibly, unless the process was started for the interpreter.
"""

from __future__ import annotations

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a process of its own with TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")

import numpy as np
import torch
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter as runtime

Handle = runtime.TensorHandle


def _widen(bits: np.ndarray) -> np.ndarray:
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def _narrow(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, dtype=np.float32)
    bits = np.atleast_1d(values).view(np.uint32).reshape(values.shape)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _is_bfloat16(operand: object) -> bool:
    return isinstance(operand, Handle) and operand.dtype.scalar == tl.bfloat16


def _as_float32(operand: object) -> object:
    return Handle(_widen(operand.data), tl.float32) if _is_bfloat16(operand) else operand


def repair_bfloat16() -> None:
    """Patches the interpreter once; test-only."""
    builder, reductions = runtime.InterpreterBuilder, runtime.ReduceOps
    if getattr(builder, "_bfloat16_repaired", False):
        return
    builder._bfloat16_repaired = True

    def elementwise(name: str) -> None:
        original = getattr(builder, name)

        def call(self, *args):
            if not any(_is_bfloat16(arg) for arg in args):
                return original(self, *args)
            operands, function = [_as_float32(arg).data for arg in args[:-1]], args[-1]
            with np.errstate(all="ignore"):
                result = function(*operands)
            if result.dtype == np.bool_:
                return Handle(result, tl.int1)
            return Handle(_narrow(result), tl.bfloat16)

        setattr(builder, name, call)

    elementwise("binary_op")
    elementwise("unary_op")
    cast, fp_to_fp = builder.cast_impl, builder.create_fp_to_fp
    dot, fma, reduce = builder.create_dot, builder.create_fma, reductions.apply_impl

    def repaired_cast(self, source, target):
        have, want = source.dtype.scalar, target.scalar
        if have != want and want == tl.bfloat16:
            return Handle(_narrow(source.data), want)
        if have != want and have == tl.bfloat16:
            return Handle(_widen(source.data).astype(runtime._get_np_dtype(target)), want)
        return cast(self, source, target)

    def repaired_fp_to_fp(self, source, target, rounding):
        if tl.bfloat16 in (source.dtype.scalar, target.scalar):
            return repaired_cast(self, source, target)
        return fp_to_fp(self, source, target, rounding)

    def repaired_dot(self, a, b, accumulator, *rest):
        return dot(self, _as_float32(a), _as_float32(b), accumulator, *rest)

    def repaired_fma(self, x, y, z):
        if not _is_bfloat16(x):
            return fma(self, x, y, z)
        return Handle(_narrow(_widen(x.data) * _widen(y.data) + _widen(z.data)), tl.bfloat16)

    def repaired_reduce(self, argument):
        x = argument[0] if isinstance(argument, tuple) else argument
        if x.dtype.scalar == tl.bfloat16:
            raise NotImplementedError("reduce in float32: the kernels do, and so must a new one")
        return reduce(self, argument)

    builder.cast_impl, builder.create_fp_to_fp = repaired_cast, repaired_fp_to_fp
    builder.create_dot, builder.create_fma = repaired_dot, repaired_fma
    builder.get_bf16 = lambda self, value: Handle(
        _narrow(np.array([value], np.float32)), tl.bfloat16
    )
    reductions.apply_impl = repaired_reduce


def patch_language_once() -> None:
    """Lets the interpreter patch triton.language once a launch, not at every call of a helper.

    It does so before each call of a jitted function, 0.3 ms every time: most of a test's time.
    """
    original = runtime._patch_lang
    modules: dict[object, frozenset[str]] = {}
    patched: set[frozenset[str]] = set()

    def patch(function):
        if function not in modules:
            modules[function] = frozenset(
                value.__name__
                for value in function.__globals__.values()
                if value is tl or value is tl.core
            )
        if modules[function] in patched:
            return None
        patched.add(modules[function])
        scope = original(function)
        restore = scope.restore

        def restore_and_forget() -> None:
            patched.clear()
            restore()

        scope.restore = restore_and_forget  # called when the launch ends
        return scope

    runtime._patch_lang = patch


def check_overflow_quickly() -> None:
    """Looks for integer overflow with NumPy, as exactly as the interpreter does itself: with eight
    operations of triton.language for each, four tenths of a test's time.
    """
    exact = {"add": np.add, "sub": np.subtract, "mul": np.multiply}

    def check(self, left, right, operation) -> None:
        kind = left.type.scalar
        if kind.int_bitwidth >= 64:
            return
        a, b = (np.asarray(x.handle.data).astype(np.int64) for x in (left, right))
        result = exact[operation.__name__](a, b)
        fits = kind.get_int_min_value() <= result.min() <= result.max() <= kind.get_int_max_value()
        assert fits, f"int{kind.int_bitwidth} overflow in {operation.__name__}"

    TritonSemantic.binary_op_sanitize_overflow_impl = check


def remember_dtypes() -> None:
    """NumPy's dtype of a scalar type, looked up by its name: the interpreter makes its table of all
    types anew at every look.
    """
    look_up, found = runtime._get_np_dtype, {}

    def numpy_dtype(dtype):
        if isinstance(dtype, tl.pointer_type):
            return look_up(dtype)
        if dtype.name not in found:
            found[dtype.name] = look_up(dtype)
        return found[dtype.name]

    runtime._get_np_dtype = numpy_dtype


repair_bfloat16()
patch_language_once()
check_overflow_quickly()
remember_dtypes()


def guarded(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that keeps shape and strides, carved out of a buffer filled with NaN (255 for bytes).

    A kernel that reads beside its input computes NaN, which no parity check lets through.
    """
    extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    margin = 512
    buffer = torch.empty(extent + 2 * margin, dtype=tensor.dtype)
    buffer.fill_(float("nan") if tensor.is_floating_point() else 1)
    view = torch.as_strided(buffer, tensor.shape, tensor.stride(), margin)
    view.copy_(tensor)
    return view


class Allocations:
    """Stands in for `torch.empty` in the launchers: NaN inside, a sentinel on both sides."""

    margin = 256

    def __init__(self) -> None:
        self.buffers: list[torch.Tensor] = []

    def __call__(self, shape, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        count = int(np.prod(shape))
        poison, sentinel = (float("nan"), 321.0) if dtype.is_floating_point else (99, 99)
        buffer = torch.full((count + 2 * self.margin,), poison, dtype=dtype)
        buffer[: self.margin] = sentinel
        buffer[self.margin + count :] = sentinel
        self.buffers.append(buffer)
        return buffer[self.margin : self.margin + count].view(shape)

    def check(self) -> None:
        """Fails where a kernel stored beside its output."""
        for buffer in self.buffers:
            edge = torch.cat((buffer[: self.margin], buffer[-self.margin :]))
            assert bool((edge == edge[0]).all()), "a kernel stored outside its output"
