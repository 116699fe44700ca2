"""A launcher's work, done once for calls that look alike and repeated from then on.

What a launcher does follows from its arguments' shapes, strides, dtypes and alignment and from its
numbers; only addresses change between two calls that agree in those. Computing it anew, and asking
Triton which binary it needs, takes the host longer than many kernels run. So the second such call
is recorded: what was allocated and filled, and which compiled kernel was started with what, every
tensor as an offset from an argument or from an allocation. From the third call on the recording is
played, with new addresses.

A call always runs its launcher if that does other work on a tensor (copies an argument that has the
wrong strides, negates a query), if an address is no multiple of 16 bytes, in the interpreter, and
while a test or a search looks on.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple, TypeVar

import torch
from torch._C._dynamo import guards
from torch.utils._python_dispatch import TorchDispatchMode

from . import interpreting
from .configs import changes, is_asking
from .launch import (
    Launch,
    current_stream,
    dot_precision,
    is_recording,
    observed_by,
    starter,
)

# Of a shape, strides and a dtype on the current device: torch.compile's own way to allocate, which
# takes half of the time of torch.empty_strided's.
_allocate_on_cpu = guards._empty_strided_cpu  # type: ignore[attr-defined]
_allocate_on_gpu = guards._empty_strided_cuda  # type: ignore[attr-defined]
MOST = 1024  # calls that a launcher remembers: then it starts afresh, so that memory stays bounded

Launcher = TypeVar("Launcher", bound=Callable[..., Any])
Place = tuple[int, int]  # an argument or allocation by number, and bytes from its start


class Start(NamedTuple):
    """A compiled kernel on its grid, to be called with a stream and arguments; its arguments; and
    which of those are addresses: (index, source, offset).
    """

    run: Callable[[int, list[Any]], None]
    arguments: list[Any]
    places: list[tuple[int, int, int]]


class Fill(NamedTuple):
    """An allocation, by its number among them, filled with one value."""

    allocation: int
    value: float


class Recording(NamedTuple):
    """What to do again. Sources number the tensors among the arguments, then the allocations."""

    allocations: list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype]]
    steps: list[Start | Fill]
    results: list[int]
    is_tuple: bool

    def play(self, addresses: list[int], device: torch.device, is_cuda: bool) -> Any:
        """The results of a call whose tensors lie at `addresses`, which is added to, on the current
        device.
        """
        allocate = _allocate_on_gpu if is_cuda else _allocate_on_cpu
        made = [allocate(*spec) for spec in self.allocations]
        addresses += [tensor.data_ptr() for tensor in made]
        stream = current_stream(device)
        for step in self.steps:
            if isinstance(step, Fill):
                tensor = made[step.allocation]
                tensor.fill_(step.value) if step.value else tensor.zero_()
                continue
            arguments = step.arguments.copy()
            for index, source, offset in step.places:
                arguments[index] = addresses[source] + offset
            step.run(stream, arguments)
        if self.is_tuple:
            return tuple([made[i] for i in self.results])
        return made[self.results[0]]


class _Recorder(TorchDispatchMode):
    """Listens to one call of a launcher: to torch as a dispatch mode, to `launch` as its observer.

    Tensors are known by the objects themselves, which `known` keeps alive: two arguments may be one
    tensor, or views of one, in this call and not in the next.
    """

    def __init__(self, arguments: list[torch.Tensor]) -> None:
        super().__init__()
        self.known: dict[int, tuple[Place, torch.Tensor]] = {}
        self.inputs = len(arguments)
        self.allocations: list[torch.Tensor] = []
        self.steps: list[Start | Fill] = []
        self.repeatable = True
        for number, tensor in enumerate(arguments):
            self.knows(tensor, (number, 0))

    def knows(self, tensor: torch.Tensor, place: Place) -> None:
        self.known[id(tensor)] = place, tensor

    def place(self, tensor: torch.Tensor) -> Place | None:
        found = self.known.get(id(tensor))
        return None if found is None else found[0]

    def allocation(self, tensor: torch.Tensor) -> int | None:
        """Which allocation a tensor is all of."""
        source, offset = self.place(tensor) or (0, 1)
        number = source - self.inputs
        whole = number >= 0 and offset == 0 and tensor.numel() == self.allocations[number].numel()
        return number if whole else None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in _FILLS:
            number = self.allocation(args[0])
            if number is None:
                self.repeatable = False
            else:
                self.steps.append(Fill(number, args[1] if len(args) > 1 else 0.0))
        elif func.is_view and isinstance(result, torch.Tensor):
            place = self.place(args[0])
            if place is not None:
                moved = result.data_ptr() - args[0].data_ptr()
                self.knows(result, (place[0], place[1] + moved))
        elif func is not torch.ops.aten.empty.memory_format:
            self.repeatable = False
        return result

    def allocated(self, tensor: torch.Tensor) -> None:
        self.knows(tensor, (self.inputs + len(self.allocations), 0))
        self.allocations.append(tensor)

    def started(self, item: Launch, compiled: Any) -> None:
        names = item.kernel.arg_names[len(item.args) :]
        arguments = [*item.args, *[item.options[name] for name in names]]
        places = []
        for index, value in enumerate(arguments):
            if isinstance(value, torch.Tensor):
                source, offset = self.place(value) or (-1, 0)
                places.append((index, source, offset))
                arguments[index] = None
        if compiled is None or any(source < 0 for _, source, _ in places):
            self.repeatable = False
            return
        self.steps.append(Start(starter(compiled, item.grid), arguments, places))

    def recording(self, results: Any) -> Recording | None:
        """What was heard; None if it can't be done again."""
        is_tuple = isinstance(results, tuple)
        specs = [(tuple(x.shape), x.stride(), x.dtype) for x in self.allocations]
        numbers = []
        for tensor in results if is_tuple else (results,):
            number = self.allocation(tensor)
            if number is None or number in numbers:
                return None
            numbers.append(number)
            specs[number] = tuple(tensor.shape), tensor.stride(), tensor.dtype
        return Recording(specs, self.steps, numbers, is_tuple) if self.repeatable else None


_FILLS = {torch.ops.aten.zero_.default, torch.ops.aten.fill_.Scalar}
_SEEN, _UNREPEATABLE = "seen", "unrepeatable"


def replayed(launcher: Launcher) -> Launcher:
    """`launcher`, recorded at the second of alike calls and played from the third."""
    if interpreting():
        return launcher
    memory: dict[Any, Any] = {}

    @wraps(launcher)
    def call(*args: Any) -> Any:
        key: list[Any] = [changes()]
        addresses = []
        bits, is_float32 = 0, False
        for value in args:
            if isinstance(value, torch.Tensor):
                dtype, address = value.dtype, value.data_ptr()
                key += (value.shape, value.stride(), dtype)
                addresses.append(address)
                bits |= address
                is_float32 |= dtype is torch.float32
            else:
                key.append(value)
        if bits % 16 or is_recording() or is_asking():
            return launcher(*args)
        if is_float32:
            key.append(dot_precision(torch.float32))
        device, is_cuda = args[0].device, args[0].is_cuda
        key.append(device.index)
        alike = tuple(key)
        found = memory.get(alike)
        if isinstance(found, Recording):
            if is_cuda and device.index != torch.cuda.current_device():
                with torch.cuda.device(device):
                    return found.play(addresses, device, is_cuda)
            return found.play(addresses, device, is_cuda)
        if found is _SEEN:
            # Aliases, so that one tensor given twice is two objects.
            args = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in args)
            recorder = _Recorder([x for x in args if isinstance(x, torch.Tensor)])
            with recorder, observed_by(recorder):
                results = launcher(*args)
            memory[alike] = recorder.recording(results) or _UNREPEATABLE
            return results
        if found is None:
            if len(memory) >= MOST:
                memory.clear()
            memory[alike] = _SEEN
        return launcher(*args)

    return call  # type: ignore[return-value]
