"""One op, every backend: schema, fake, autograd, FLOPs and implementations, registered in one
place.

An op is two torch operators, a forward and a backward, each with one overload a kernel backend
(``torch.ops.patchgen_fast.attention.cpu``, ``torch.ops.patchgen_fast.attention_backward.cpu``),
all under one schema and one fake. What a forward saves for its backward is said by the op, not by
the backend, so that any backend's backward takes any forward's. ``torch`` and ``reference`` are
plain compositions of stock operators with torch's own autograd; the reference has an explicit
backward too, which serves kernels that have none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import _native, dispatch, eager
from .dispatch import Refusal

NAMESPACE = "patchgen_fast"
KERNEL_BACKENDS = ("cpu", "triton", "cuda")
NATIVE_KEYS = {"cpu": "CPU", "cuda": "CUDA"}

OPS: dict[str, Op] = {}

_library = torch.library.Library(NAMESPACE, "DEF")


@dataclass
class Backend:
    """One backend of one op: why it is not there at all, or what it refuses."""

    name: str
    refuses: tuple[Refusal, ...] = ()
    refuses_backward: tuple[Refusal, ...] = ()
    unavailable: str | None = None
    has_backward: bool = False

    def refusal(self, args: Any, *, backward: bool = False) -> Refusal | None:
        """The first reason against this call, or None."""
        if self.unavailable is not None:
            return Refusal("unavailable", self.unavailable, _always)
        for refusal in self.refuses_backward if backward else self.refuses:
            if refusal.when(args):
                return refusal
        return None

    def refusals_of(self, args: Any) -> list[Refusal]:
        """Every reason against this call."""
        if self.unavailable is not None:
            return [Refusal("unavailable", self.unavailable, _always)]
        return [refusal for refusal in self.refuses if refusal.when(args)]


def _always(args: Any) -> bool:
    return True


# Asked once: Dynamo of torch 2.11 can't trace the question.
AUTOCAST_DEVICES = frozenset(
    device
    for device in ("cpu", "cuda", "hpu", "maia", "mps", "mtia", "xpu")
    if torch.amp.is_autocast_available(device)
)


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for the device of x; False for devices that have none, as meta."""
    if not torch._C._is_any_autocast_enabled():
        return False
    device = x.device.type
    return device in AUTOCAST_DEVICES and torch.is_autocast_enabled(device)


def counted(call: str, implementation: Callable) -> Callable:
    """``implementation``, counted at every run and shielded from autocast, which has had its say
    already.
    """

    def run(*args: Any) -> Any:
        dispatch.count(call)
        if autocasts(args[0]):
            with torch.autocast(args[0].device.type, enabled=False):
                return implementation(*args)
        return implementation(*args)

    return run


def lazily(target: str) -> Callable:
    """The function named by ``"module:function"``, imported when it is first called."""

    @cache
    def function() -> Callable:
        module, _, name = target.partition(":")
        return getattr(import_module(module), name)

    return lambda *args: function()(*args)


@dataclass
class Op:
    """An op, as its file in ``ops`` declares it.

    Args:
        name: of the op; its operators are ``patchgen_fast::{name}`` and
            ``patchgen_fast::{name}_backward``.
        schema: of the forward, without a name: ``"(Tensor input, ...) -> Tensor"``.
        backward_schema: of the backward.
        backward_arguments: the NamedTuple of the backward's arguments.
        fake: shapes, dtypes and strides of the forward's results.
        backward_fake: the same of the backward's.
        save: ``save(ctx, inputs, output)``, what a forward keeps for its backward.
        backward: ``backward(ctx, *grads)``, the gradients of the forward's arguments, by
            ``op.run_backward``.
        reference: the forward in eager PyTorch; takes all the arguments of the public function's
            NamedTuple.
        reference_backward: the explicit backward in eager PyTorch.
        flops: ``flops(*shapes, ...)`` of the forward for torch's FlopCounterMode.
        backward_flops: the same of the backward.
        prefer: the table: the backend to try first for these arguments, or None for the device's
            usual order.
    """

    name: str
    schema: str
    backward_schema: str
    backward_arguments: type
    fake: Callable
    backward_fake: Callable
    save: Callable
    backward: Callable
    reference: Callable
    reference_backward: Callable
    flops: Callable
    backward_flops: Callable
    prefer: Callable[[Any], str | None] | None = None
    backends: dict[str, Backend] = field(default_factory=dict)
    compositions: dict[str, Callable] = field(default_factory=dict)
    arity: int = 0

    def __post_init__(self) -> None:
        OPS[self.name] = self
        for backend in KERNEL_BACKENDS:
            self._define(backend)
            self._define_backward(backend)
            self.backends[backend] = Backend(
                backend, unavailable=f"{self.name} has no {backend} kernel yet"
            )
        self._define_backward("reference")
        self.backends["reference"] = Backend("reference", has_backward=True)
        self.backends["torch"] = Backend(
            "torch", unavailable=f"{self.name} has no torch composition"
        )
        self.compositions["reference"] = self.reference
        packet = getattr(torch.ops.patchgen_fast, self.name)
        self.overloads = {name: getattr(packet, name) for name in KERNEL_BACKENDS}
        self.arity = len(self.overloads["cpu"]._schema.arguments)
        register_flop_formula(packet)(self.flops)
        backward_packet = getattr(torch.ops.patchgen_fast, f"{self.name}_backward")
        self.backward_overloads = {
            name: getattr(backward_packet, name) for name in (*KERNEL_BACKENDS, "reference")
        }
        register_flop_formula(backward_packet)(self.backward_flops)
        self.calls = dict[str, Callable](self.overloads)
        self.backward_calls = dict[str, Callable](self.backward_overloads)
        self._implement_backward("reference", self.reference_backward)

    # --------------------------------------------------------------------- registration of backends

    def add_torch(self, composition: Callable, refuses: tuple[Refusal, ...] = ()) -> None:
        """The best composition of stock operators, differentiated by torch."""
        self.compositions["torch"] = composition
        self.backends["torch"] = Backend("torch", refuses, has_backward=True)

    def add_native(
        self,
        backend: str,
        refuses: tuple[Refusal, ...] = (),
        refuses_backward: tuple[Refusal, ...] = (),
        *,
        forward: Callable | None = None,
        backward: Callable | None = None,
    ) -> None:
        """A backend of the native library.

        Its C++ registers the overloads itself; ``forward`` and ``backward`` are given only where
        the schema has a SymInt, which the stable ABI lacks: Python then calls the raw native op
        with the integer. A native library that lacks the kernel makes the backend unavailable,
        with the reason.
        """
        reason = _native.unavailable_reason(backend)
        native = {
            suffix: self._native_kernel(f"{self.name}{suffix}", backend, wrapper)
            for suffix, wrapper in (("", forward), ("_backward", backward))
        }
        if reason is None and not native[""]:
            reason = f"the native library was built without a {backend} kernel of {self.name}"
        self.backends[backend] = Backend(
            backend, refuses, refuses_backward, reason, reason is None and native["_backward"]
        )
        self._shorten(backend, None)
        self._shorten_backward(backend, None)

    def _native_kernel(self, operator: str, backend: str, wrapper: Callable | None) -> bool:
        """Whether the library has the kernel; a wrapped one is registered on the way."""
        name = (
            f"{NAMESPACE}_native::{operator}" if wrapper else f"{NAMESPACE}::{operator}.{backend}"
        )
        key = NATIVE_KEYS[backend]
        found = torch._C._dispatch_has_kernel(name)
        found = found and torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
        if found and wrapper is not None:
            _library.impl(f"{operator}.{backend}", wrapper, key)
        return found

    def add_kernels(
        self,
        backend: str,
        forward: str,
        backward: str | None = None,
        refuses: tuple[Refusal, ...] = (),
        refuses_backward: tuple[Refusal, ...] = (),
        unavailable: str | None = None,
    ) -> None:
        """A backend in Python: launchers named ``"module:function"``, imported when called."""
        self._implement(backend, lazily(forward))
        if backward is not None:
            self._implement_backward(backend, lazily(backward))
        self.backends[backend] = Backend(
            backend,
            refuses,
            refuses_backward,
            unavailable,
            backward is not None and unavailable is None,
        )

    def _define(self, backend: str) -> None:
        _library.define(f"{self.name}.{backend}{self.schema}")
        qualified = f"{NAMESPACE}::{self.name}.{backend}"
        torch.library.register_fake(qualified, self.fake, lib=_library)
        torch.library.register_autograd(
            qualified, self.backward, setup_context=self._saver(backend), lib=_library
        )

    def _saver(self, backend: str) -> Callable:
        def save(ctx: Any, inputs: tuple, output: Any) -> None:
            ctx.set_materialize_grads(False)
            ctx.backend = backend
            self.save(ctx, inputs, output)

        return save

    def _define_backward(self, backend: str) -> None:
        _library.define(f"{self.name}_backward.{backend}{self.backward_schema}")
        qualified = f"{NAMESPACE}::{self.name}_backward.{backend}"
        torch.library.register_fake(qualified, self.backward_fake, lib=_library)

        # Without this, torch would take a backward for a constant, with no more than a warning.
        def refuse(ctx: Any, *grads: Any) -> None:
            raise RuntimeError(
                f"{self.name}: expected gradients of first order only from its kernels; got a "
                "second derivative. Pass backend='torch' or 'reference', whose operators have one"
            )

        torch.library.register_autograd(qualified, refuse, lib=_library)

    def _implement(self, backend: str, implementation: Callable) -> None:
        call = f"{self.name}.{backend}"
        kernel = counted(call, implementation)
        _library.impl(call, kernel, "CompositeExplicitAutograd")
        self._shorten(backend, kernel)

    def _implement_backward(self, backend: str, implementation: Callable) -> None:
        call = f"{self.name}_backward.{backend}"
        kernel = counted(call, implementation)
        _library.impl(call, kernel, "CompositeExplicitAutograd")
        self._shorten_backward(backend, kernel)

    def _shorten(self, backend: str, kernel: Callable | None) -> None:
        overload = self.overloads[backend]
        formula = eager.formula(overload, kernel, self._saver(backend), self.backward)
        self.calls[backend] = eager.short_cut(overload, kernel, formula)

    def _shorten_backward(self, backend: str, kernel: Callable | None) -> None:
        overload = self.backward_overloads[backend]
        self.backward_calls[backend] = eager.short_cut(overload, kernel)

    # -------------------------------------------------------------------------------------- running

    def __call__(self, args: Any, backend: str | None = None) -> Any:
        """Run the op on its NamedTuple of arguments, by the backend named or the fastest that
        accepts.
        """
        return self.run(args, dispatch.choose(self, args, backend))

    def run(self, args: Any, name: str) -> Any:
        """Run the op by a backend that is known to accept these arguments."""
        if name in self.compositions:
            if not torch.compiler.is_compiling():
                dispatch.count(f"{self.name}.{name}")
            if autocasts(args[0]):
                with torch.autocast(args[0].device.type, enabled=False):
                    return self.compositions[name](*args)
            return self.compositions[name](*args)
        calls = self.overloads if torch.compiler.is_compiling() else self.calls
        return calls[name](*args[: self.arity])

    def takes_cpu_kernel(self, x: Any) -> bool:
        """Whether a usual call on x, without a backend named, ends in the CPU kernel: nothing to
        cast, and no gradients, for which another might be preferred.

        Known without walking the order of backends, which takes longer than a small kernel. What
        the kernel refuses of other arguments is not looked at.
        """
        return (
            isinstance(x, Tensor)
            and x.is_cpu
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
            and x.dtype != torch.float64
            and self.backends["cpu"].unavailable is None
        )

    def _backward_order(self, first: str, arguments: Any) -> Iterator[str]:
        """The forward's own backend, then the others; the table is asked only if it comes to that,
        for a table's threshold would be one more guard of a compiled graph.
        """
        yield first
        yield from dispatch.order(self, arguments)

    def run_backward(self, ctx: Any, *args: Any) -> Any:
        """The backward of ``ctx.backend``'s forward: its own where it has one, else the next that
        accepts.
        """
        arguments = self.backward_arguments(*args)
        for name in self._backward_order(ctx.backend, arguments):
            backend = self.backends[name]
            runs = name in self.backward_overloads and backend.has_backward
            if runs and backend.refusal(arguments, backward=True) is None:
                calls = self.backward_calls
                if torch.compiler.is_compiling():
                    calls = self.backward_overloads
                return calls[name](*args)
        raise AssertionError("unreachable: the reference's backward refuses nothing")
