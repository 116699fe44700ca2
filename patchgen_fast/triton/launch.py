"""One way to start a kernel, for the GPU, the interpreter and the compiler alike.

Launchers hand every kernel to `launch`. On a GPU it runs; under TRITON_INTERPRET=1 Triton's
interpreter runs it on CPU tensors; inside `recording(capability)` nothing runs and the launch is
kept, so that a test compiles exactly the specialisation that a user's call would have compiled.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
import triton


class Launch(NamedTuple):
    """A kernel, its grid, its positional arguments and its constexprs and options by name."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]


class _Recorder(NamedTuple):
    capability: int
    launches: list[Launch]


_recorder: _Recorder | None = None


class Observer(Protocol):
    """Is told what a launcher does while it does it."""

    def allocated(self, tensor: torch.Tensor) -> None: ...

    def started(self, item: Launch, compiled: Any) -> None: ...


class _Watch(threading.local):
    observer: Observer | None = None  # autograd's threads have none of the caller's


_watch = _Watch()


@contextmanager
def observed_by(observer: Observer) -> Iterator[None]:
    """Tells `observer` of this thread's allocations and launches, which happen as ever."""
    before, _watch.observer = _watch.observer, observer
    try:
        yield
    finally:
        _watch.observer = before


def is_recording() -> bool:
    """Whether launches are kept instead of run."""
    return _recorder is not None


@contextmanager
def recording(capability: int) -> Iterator[list[Launch]]:
    """Collects launches instead of running them, configured for `capability` (90 is sm_90)."""
    global _recorder
    before, _recorder = _recorder, _Recorder(capability, [])
    try:
        yield _recorder.launches
    finally:
        _recorder = before


@cache
def _device_capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def capability(tensor: torch.Tensor) -> int:
    """Compute capability of the tensor's GPU as one number; 0 in the interpreter."""
    if _recorder is not None:
        return _recorder.capability
    return _device_capability(tensor.device.index) if tensor.is_cuda else 0


@cache
def multiprocessors(index: int | None) -> int:
    """Multiprocessors of a GPU; 132 (an H100 or H200) where there is none."""
    if index is None or not torch.cuda.is_available():
        return 132
    return torch.cuda.get_device_properties(index).multi_processor_count


def launch(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], **options: Any) -> None:
    """Starts `kernel` on its first argument's device, on that device's current stream."""
    if _recorder is not None:
        _recorder.launches.append(Launch(kernel, grid, args, options))
        return
    device = args[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            compiled = kernel[grid](*args, **options)
    else:
        compiled = kernel[grid](*args, **options)
    if _watch.observer is not None:
        _watch.observer.started(Launch(kernel, grid, args, options), compiled)


def current_stream(device: torch.device) -> int:
    """The stream that torch uses on `device`, as Triton asks for it."""
    return triton.runtime.driver.active.get_current_stream(device.index)


def starter(compiled: Any, grid: tuple[int, ...]) -> Callable[[int, Sequence[Any]], None]:
    """Starts a compiled kernel on a stream with all of its arguments.

    It does what ``compiled[grid](*arguments, stream=stream)`` does, which takes the host twice as
    long for the sake of hooks that a profiler of Triton's may have set.
    """
    grid = (*grid, 1, 1)[:3]
    run = compiled.run
    fixed = compiled.function, compiled.packed_metadata, None, None, None
    hooks = triton.knobs.runtime

    def start(stream: int, arguments: Sequence[Any]) -> None:
        if hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls:
            compiled[grid](*arguments, stream=stream)
        else:
            run(*grid, stream, *fixed, *arguments)

    return start


_allocate = torch.empty


def empty(like: torch.Tensor, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Where launchers get their outputs, so that a test can guard and poison them."""
    tensor = _allocate(shape, dtype=dtype or like.dtype, device=like.device)
    if _watch.observer is not None:
        _watch.observer.allocated(tensor)
    return tensor


def vector(itemsize: int, *strides: int) -> int:
    """Elements in 16 bytes when every stride is a multiple of them, else 1.

    Kernels are given strides divided by it and multiply them back: the compiler then knows the
    alignment whatever the value is, where specialising on multiples of 16 would lose it for D = 72.
    """
    width = 16 // itemsize
    combined = 0
    for stride in strides:
        combined |= stride
    return width if combined % width == 0 else 1


def dot_precision(dtype: torch.dtype) -> str:
    """How float32 products are taken: as torch.backends.cuda.matmul says; 16-bit ones are exact."""
    # Not allow_tf32: it raises where a user has set fp32_precision.
    if dtype is torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32":
        return "ieee"
    return "tf32"
