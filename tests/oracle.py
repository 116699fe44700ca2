"""The oracle of every op's tests: float64 truth, eager's yardstick, the parity rule, and runs that
prove which backend did the work.

Used alike by the tests of every backend and by the process that runs Triton's interpreter: a
``Target`` says which backend runs on which device, a ``check`` of ``cases`` does the rest.
"""

from __future__ import annotations

import functools
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from patchgen_fast import dispatch
from patchgen_fast.registry import OPS
from patchgen_fast.triton import interpreting

# What a backend may refuse without the suite being red, since DESIGN says so: all else runs.
DOCUMENTED_LIMITS = {"unavailable", "float64", "dropout", "device"}
# The CUDA C++ kernels are for short sequences in half precision: patchgen_fast/ops/_cuda_limits.py.
CUDA_LIMITS = {"dtype", "head_dim", "length", "shared_memory", "training", "size"}

DTYPE_NAMES = {
    torch.float32: "f32",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.float64: "f64",
}


# Stock operators have the numerics that torch gave them (SDPA's exponential on the CPU is good to
# 20 units in the last place): their compositions are tested for meaning, which a mistake misses by
# far more than this multiple of eager's error.
STOCK_FACTOR = 8.0


class Target(NamedTuple):
    """A backend, and the device that it is tried on."""

    backend: str
    device: str

    @property
    def factor(self) -> float:
        """How many times eager's error is allowed: the parity rule's 2 for all that is ours."""
        return STOCK_FACTOR if self.backend == "torch" else 2.0

    def __str__(self) -> str:
        usual = "cuda" if self.backend in ("triton", "cuda") else "cpu"
        return self.backend if self.device == usual else f"{self.backend}-{self.device}"


# ---------------------------------------------------------------------------------- the parity rule


def assert_parity(
    got: Tensor,
    eager: Tensor,
    truth: Tensor,
    what: str = "result",
    terms: Tensor | None = None,
    factor: float = 2,
) -> None:
    """DESIGN's one rule: finite; the largest error at most 2 x eager's + 2 eps max|truth|; the mean
    error at most 2 x eager's + eps mean|truth|; eps that of the result's dtype.

    ``terms``, not below ``|truth|``, stands for it where the truth is a difference of equal terms
    and so has no scale of its own. ``factor`` times eager's error is 2 for all that is ours.
    """
    assert got.shape == truth.shape, f"{what}: shape {list(got.shape)}, not {list(truth.shape)}"
    if got.numel() == 0:
        return
    eps = torch.finfo(got.dtype).eps
    scale = truth if terms is None else terms
    got, eager, truth, scale = (
        x.detach().to("cpu", torch.float64) for x in (got, eager, truth, scale)
    )
    for name, x in (("truth", truth), ("yardstick", eager)):
        assert x.isfinite().all(), f"{what}: the {name} isn't finite, so the case measures nothing"
    wrong = ~got.isfinite()
    assert not wrong.any(), (
        f"{what}: {int(wrong.sum())} of {got.numel()} elements aren't finite, "
        f"the first at {_first(wrong)}: {got[wrong][0]}"
    )
    error, yard = (got - truth).abs(), (eager - truth).abs()
    worst = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
    where = f"worst at {list(worst)}: got {got[worst]:.9g}, truth {truth[worst]:.9g}"
    limit = factor * yard.max() + 2 * eps * scale.abs().max()
    assert error.max() <= limit, (
        f"{what}: largest error {error.max():.3e} is above {factor} x eager's {yard.max():.3e} "
        f"+ 2 eps max|truth| = {limit:.3e}; {where}"
    )
    limit = factor * yard.mean() + eps * scale.abs().mean()
    assert error.mean() <= limit, (
        f"{what}: mean error {error.mean():.3e} is above {factor} x eager's {yard.mean():.3e} "
        f"+ eps mean|truth| = {limit:.3e}; {where}"
    )


def _first(flags: Tensor) -> list[int]:
    return flags.nonzero()[0].tolist()


# ------------------------------------------------------------------------------------------- inputs


def rng(*parts: Any) -> torch.Generator:
    """A generator seeded by what a case is, so that a case alone is what it was in the suite."""
    return torch.Generator().manual_seed(zlib.crc32(repr(parts).encode()))


def normal(generator: torch.Generator, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Normal numbers, quantised to the dtype."""
    return torch.randn(tuple(shape), generator=generator).to(dtype)


def carve(x: Tensor, layout: str = "contiguous", device: str = "cpu") -> Tensor:
    """``x`` in another memory layout, with NaN (255 in bytes) all around it in memory.

    contiguous: its last stride 1, aligned. sliced: out of a buffer larger in every dimension.
    strided: every second element of its last dimension. permuted: dimensions 1 and -2 swapped in
    memory. batch_last: memory order of all dimensions reversed.
    """
    poison = float("nan") if x.is_floating_point() else 255 if x.dtype == torch.uint8 else -1
    if layout == "contiguous":
        buffer = torch.full((x.numel() + 128,), poison, dtype=x.dtype, device=device)
        view = buffer[64 : 64 + x.numel()].view(x.shape)
    elif layout == "sliced":
        buffer = torch.full([n + 3 for n in x.shape], poison, dtype=x.dtype, device=device)
        view = buffer[tuple(slice(1, 1 + n) for n in x.shape)]
    elif layout == "strided":
        shape = [*x.shape[:-1], 2 * x.shape[-1]]
        view = torch.full(shape, poison, dtype=x.dtype, device=device)[..., ::2]
    elif layout == "permuted":
        return carve(x.transpose(1, -2), "contiguous", device).transpose(1, -2)
    elif layout == "batch_last":
        order = list(range(x.dim()))[::-1]
        return carve(x.permute(order), "contiguous", device).permute(order)
    else:
        raise ValueError(layout)
    view.copy_(x)
    return view


def widened(x: Any) -> Any:
    """A float64 copy of a float tensor, dense; anything else as it is."""
    if isinstance(x, Tensor) and x.is_floating_point():
        return x.detach().to(torch.float64).contiguous()
    return x


# ------------------------------------------------------------------------------------------ running


@dataclass
class Evaluation:
    """An op's results and gradients by name."""

    results: dict[str, Tensor]
    grads: dict[str, Tensor] = field(default_factory=dict)


def evaluate(
    function: Callable[..., dict[str, Tensor]],
    inputs: dict[str, Any],
    differentiable: Sequence[str] = (),
    cotangents: dict[str, Tensor] | None = None,
) -> Evaluation:
    """``function(**inputs)`` and the gradients of the inputs named, by the results' cotangents."""
    leaves = {
        name: x.detach().requires_grad_(name in differentiable) if isinstance(x, Tensor) else x
        for name, x in inputs.items()
    }
    results = function(**leaves)
    if not differentiable:
        return Evaluation(results)
    assert cotangents is not None
    used = [name for name in results if name in cotangents]
    grads = torch.autograd.grad(
        [results[name] for name in used],
        [leaves[name] for name in differentiable],
        [cotangents[name].to(results[name].dtype) for name in used],
    )
    return Evaluation(
        {name: x.detach() for name, x in results.items()},
        dict(zip(differentiable, grads, strict=True)),
    )


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill what ``torch.empty`` gives with NaN, so that an element never written is seen."""
    mode = torch.get_deterministic_debug_mode()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.set_deterministic_debug_mode("warn")
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def skip_backend(backend: str, reason: str) -> None:
    """Skip what a backend can't run here at all, visibly.

    ``PATCHGEN_FAST_TEST_REQUIRE=cpu`` (a comma list) makes it a failure for the backends named, on
    machines that are meant to have them.
    """
    required = os.environ.get("PATCHGEN_FAST_TEST_REQUIRE", "").split(",")
    if backend in required:
        pytest.fail(f"PATCHGEN_FAST_TEST_REQUIRE names {backend}, but: {reason}")
    pytest.skip(f"{backend}: {reason}")


def require(op: str, target: Target) -> None:
    """Skip, with the backend's own reason, where it has no kernel of this op here."""
    reason = OPS[op].backends[target.backend].unavailable
    if reason is not None:
        skip_backend(target.backend, reason)


@contextmanager
def documented_refusals(also: frozenset[str] | set[str] = frozenset()) -> Iterator[None]:
    """Turn a refusal that DESIGN documents into a visible skip; any other is a failure."""
    try:
        yield
    except dispatch.BackendRefused as error:
        refusal = error.refusal
        limits = DOCUMENTED_LIMITS | also | (CUDA_LIMITS if error.backend == "cuda" else set())
        if refusal is None or refusal.code not in limits:
            raise
        pytest.skip(f"{error.backend}: {refusal.reason}")


@contextmanager
def proving(op: str, target: Target, *, backward: bool = False, calls: int = 1) -> Iterator[None]:
    """What runs inside must be ``target``'s own forward, and backward where it has one."""
    with dispatch.counting() as ran:
        yield
    forwards = {call: n for call, n in ran.items() if call.startswith(f"{op}.")}
    expected = {f"{op}.{target.backend}": calls}
    assert forwards == expected, f"expected {expected} to run, not {forwards}"
    if not backward:
        return
    backwards = {call: n for call, n in ran.items() if call.startswith(f"{op}_backward.")}
    if target.backend in OPS[op].compositions:
        expected = {}
    elif OPS[op].backends[target.backend].has_backward:
        expected = {f"{op}_backward.{target.backend}": calls}
    else:
        assert sum(backwards.values()) == calls, f"expected {calls} backward calls, not {backwards}"
        return
    assert backwards == expected, f"expected {expected} to run, not {backwards}"


@dataclass
class Problem:
    """One case of an op: its inputs, and what is to come out of them.

    ``reference(arithmetic, **inputs)`` is the eager formula, results by name. Truth and yardstick
    are made once for all the backends of a process.
    """

    op: str
    dtype: torch.dtype
    inputs: dict[str, Any]
    cotangents: dict[str, Tensor]
    differentiable: list[str]
    reference: Callable[..., dict[str, Tensor]]

    @functools.cached_property
    def eager(self) -> Evaluation:
        """The reference in the dtype's own arithmetic, differentiated by torch."""
        dense = {
            name: x.detach().contiguous() if isinstance(x, Tensor) else x
            for name, x in self.inputs.items()
        }
        function = functools.partial(self.reference, self.dtype)
        return evaluate(function, dense, self.differentiable, self.cotangents)

    @functools.cached_property
    def truth(self) -> Evaluation:
        """The reference in float64 on float64 copies."""
        function = functools.partial(self.reference, torch.float64)
        inputs = {name: widened(x) for name, x in self.inputs.items()}
        cotangents = {name: widened(x) for name, x in self.cotangents.items()}
        return evaluate(function, inputs, self.differentiable, cotangents)

    def run(self, target: Target, function: Callable[..., dict[str, Tensor]]) -> Evaluation:
        """``function(**inputs)`` and its gradients, proved to be the work of ``target``."""
        require(self.op, target)
        backward = bool(self.differentiable)
        with (
            documented_refusals(),
            poisoned_memory(),
            proving(self.op, target, backward=backward),
        ):
            return evaluate(function, self.inputs, self.differentiable, self.cotangents)

    def compare(self, got: Evaluation, factor: float = 2, leave_out: Sequence[str] = ()) -> None:
        """Every result and every gradient by the parity rule; dtypes as the contract says."""
        eager, truth = self.eager, self.truth
        for name, x in got.results.items():
            if name not in leave_out:
                assert_parity(x, eager.results[name], truth.results[name], name, factor=factor)
        for name, grad in got.grads.items():
            like = self.inputs[name]
            assert grad.dtype == like.dtype, f"gradient of {name} in {grad.dtype}"
            assert grad.device == like.device, f"gradient of {name} on {grad.device}"
            if name not in leave_out:
                what = f"gradient of {name}"
                assert_parity(grad, eager.grads[name], truth.grads[name], what, factor=factor)


# ----------------------------------------------------------------------- backwards across backends


class _Context:
    """What torch hands to an op's ``save`` and ``backward``, without torch between them."""

    def __init__(self, backend: str, needs_input_grad: tuple[bool, ...]) -> None:
        self.backend = backend
        self.needs_input_grad = needs_input_grad
        self.saved_tensors: tuple[Any, ...] = ()

    def save_for_backward(self, *tensors: Any) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors: Any) -> None:
        pass


def normalised_arguments(op: str, function: Callable[[], Any]) -> Any:
    """The arguments that the public function, called inside, hands to the op."""
    seen: list[Any] = []
    choose = dispatch.choose

    def recording(chosen: Any, args: Any, backend: str | None = None) -> str:
        if chosen is OPS[op]:
            seen.append(args)
        return choose(chosen, args, backend)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "choose", recording)
        function()
    return seen[-1]


def explicit_gradients(
    stated: Problem,
    public: Callable[..., dict[str, Tensor]],
    forward: str,
    backward: str,
) -> Evaluation:
    """The gradients that ``backward``'s explicit backward makes of what ``forward``'s saved.

    ``public(**inputs)`` is the public function by the backend "reference".
    """
    op = OPS[stated.op]
    returned = list(stated.truth.results)
    leaves = {
        name: x.detach().requires_grad_(name in stated.differentiable)
        if isinstance(x, Tensor)
        else x
        for name, x in stated.inputs.items()
    }
    args = normalised_arguments(stated.op, lambda: public(**leaves))
    inputs = [x.detach() if isinstance(x, Tensor) else x for x in args[: op.arity]]
    names = [argument.name for argument in op.overloads["cpu"]._schema.arguments]
    with poisoned_memory(), torch.no_grad():
        function = op.reference if forward == "reference" else op.overloads[forward]
        output = function(*inputs)
        context = _Context(backward, tuple(name in stated.differentiable for name in names))
        op.save(context, tuple(inputs), output)
        results = output if isinstance(output, tuple) else (output,)
        # The public function returns the first results of the op, in its order.
        cotangents = [stated.cotangents.get(name) for name in returned]
        cotangents += [None] * (len(results) - len(cotangents))
        with dispatch.counting() as ran:
            found = op.backward(context, *cotangents)
    assert ran == {f"{stated.op}_backward.{backward}": 1}, f"{backward} was to run, not {ran}"
    grads = {}
    for name, grad in zip(names, found, strict=True):
        if name in stated.differentiable:
            # The public function had expanded some arguments before.
            shape = stated.inputs[name].shape
            grads[name] = (
                grad.view(shape) if grad.numel() == shape.numel() else grad.sum_to_size(shape)
            )
    return Evaluation({}, grads)


def explicit_pairs(op: str) -> list[tuple[str, str]]:
    """Forward and explicit backward of every two backends that have them here, on the CPU."""
    elsewhere = {"cuda"} if interpreting() else {"cuda", "triton"}
    left_out = elsewhere | set(OPS[op].compositions)
    backends = [b for b in OPS[op].backends.values() if b.name not in left_out]
    forwards = ["reference", *[b.name for b in backends if b.unavailable is None]]
    backwards = ["reference", *[b.name for b in backends if b.has_backward]]
    return [(f, b) for f in forwards for b in backwards]
