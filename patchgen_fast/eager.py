"""The short way of an eager call to its kernel.

torch's dispatcher offers a call to whoever may want it: autograd, a mode, a tensor subclass,
functorch, a tracer. On the way it turns arguments into C++ values and back up to three times, and
``torch.library.register_autograd`` walks the schema anew at every call. That takes the host longer
than many kernels run. So a call that nobody watches goes straight to its kernel, by an
``autograd.Function`` of ours where gradients are recorded; any other goes through the dispatcher,
where the same formulas are registered.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch.overrides import has_torch_function_unary


def _bits(*names: str) -> int:
    bits = 0
    for name in names:
        bits |= DispatchKeySet(getattr(DispatchKey, name)).raw_repr()
    return bits


try:
    # What dense tensors on the CPU or CUDA, and a thread that does nothing special, ask of the
    # dispatcher. Any other bit is somebody who wants to see the call: a mode or a subclass
    # (Python), functorch, a tracer, a negation that is still to be done, another device.
    _WATCHED = ~_bits(
        *("CPU", "CUDA", "AutogradCPU", "AutogradCUDA", "AutocastCPU", "AutocastCUDA"),
        *("ADInplaceOrView", "BackendSelect"),
    )
    _AUTOGRAD = _bits("AutogradFunctionality")
    _asked_by_thread = torch._C._dispatch_tls_local_include_set
    _kept_from_thread = torch._C._dispatch_tls_local_exclude_set
    _asked_by = torch._C._dispatch_keys
    _below_autograd = torch._C._AutoDispatchBelowAutograd
    _any_requires_grad = torch._C._any_requires_grad
    _is_profiler_on = torch._C._autograd._profiler_enabled
    _profilers = torch.autograd.profiler
    AVAILABLE = hasattr(_profilers, "_is_profiler_enabled")
except AttributeError:
    # torch promises none of these: a version without them goes through the dispatcher.
    AVAILABLE = False

_TENSORS = (Tensor, torch.nn.Parameter)
_TYPES = {
    "Tensor": _TENSORS,
    "Optional[Tensor]": (*_TENSORS, type(None)),
    "bool": (bool,),
    "int": (int,),
    "float": (float,),
    "str": (str,),
}


def _is_profiled() -> bool:
    return _profilers._is_profiler_enabled or _is_profiler_on()


def _places_of_tensors(schema: Any) -> Callable[[tuple[type, ...]], tuple[int, ...] | None]:
    """Which arguments of these types are tensors; None where one is not exactly of the type that
    ``schema`` names, but for the dispatcher to convert, hand on, or refuse.
    """
    kinds = [_TYPES[str(argument.type)] for argument in schema.arguments]

    @cache
    def places(types: tuple[type, ...]) -> tuple[int, ...] | None:
        if len(types) != len(kinds) or any(
            x not in kind for x, kind in zip(types, kinds, strict=True)
        ):
            return None
        return tuple([i for i, x in enumerate(types) if issubclass(x, Tensor)])

    return places


def short_cut(
    overload: Any, kernel: Callable | None, formula: type[torch.autograd.Function] | None = None
) -> Callable:
    """``overload``, called the short way where nobody watches.

    ``kernel`` is what the overload runs below autograd; None for a native one, to which the
    dispatcher is the shortest way. ``formula`` is how gradients are recorded; without one the
    overload does that.
    """
    if not AVAILABLE:
        return overload
    places = _places_of_tensors(overload._schema)
    run = overload if kernel is None else kernel
    if formula is not None:
        # What Function.apply comes to once functorch and its wrappers are ruled out.
        record = super(torch.autograd.Function, formula).apply  # type: ignore[misc]

    def call(*args: Any) -> Any:
        if kernel is None and torch.is_inference_mode_enabled():
            return overload(*args)  # autograd is out of the way already
        tensors = places(tuple(map(type, args)))
        if tensors is None or _is_profiled() or has_torch_function_unary(args[0]):
            return overload(*args)
        learns = torch.is_grad_enabled() and _any_requires_grad(*args)
        bits = _asked_by_thread().raw_repr()
        if learns or kernel is not None:
            for i in tensors:
                bits |= _asked_by(args[i]).raw_repr()
        if bits & _WATCHED:
            return overload(*args)
        if not learns:
            with _below_autograd():
                return run(*args)
        if formula is None or _kept_from_thread().raw_repr() & _AUTOGRAD:
            return overload(*args)
        return record(*args)

    return call


def formula(
    overload: Any, kernel: Callable | None, save: Callable, backward: Callable
) -> type[torch.autograd.Function]:
    """What ``torch.library.register_autograd`` makes of ``save`` and ``backward`` for an overload
    of ours, named alike, so that a graph reads alike whichever way a call went.
    """

    run = overload if kernel is None else kernel

    def forward(ctx: Any, *args: Any) -> Any:
        with _below_autograd():
            result = run(*args)
            save(ctx, args, result)
        return result

    functions = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    name = f"{overload._opname}_{overload._overloadname}"
    return type(f"GeneratedBackwardFor_patchgen_fast_{name}", (torch.autograd.Function,), functions)
