"""The short way of an eager call: who watches gets every call through the dispatcher, and who does
not can't tell the ways apart.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from cases.every_op import SAMPLES, Sample
from oracle import Target, require
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import patchgen_fast
from patchgen_fast import eager
from patchgen_fast.registry import KERNEL_BACKENDS, OPS

each_sample = pytest.mark.parametrize("sample", SAMPLES, ids=str)

# ------------------------------------------------------------------------------- which way is taken


class Watched:
    """Attention, its ways noted instead of gone: "short" in Python, "native", or "dispatcher"."""

    def __init__(self, native: bool) -> None:
        patchgen_fast.attention  # noqa: B018  (imports the op, which registers it)
        self.ways: list[str] = []
        overload = OPS["attention"].overloads["cpu"]
        self._schema, self._opname, self._overloadname = overload._schema, "attention", "noted"
        kernel = None if native else self.kernel
        formula = eager.formula(self, kernel, lambda *_: None, lambda *_: None)
        self.call = eager.short_cut(self, kernel, formula)

    def results(self, query: Any, *rest: Any) -> tuple[Tensor, Tensor]:
        return torch.zeros(2), torch.zeros(2)

    def kernel(self, *args: Any) -> tuple[Tensor, Tensor]:
        self.ways.append("short")
        return self.results(*args)

    def __call__(self, *args: Any) -> tuple[Tensor, Tensor]:
        below = torch._C._dispatch_tls_local_exclude_set().raw_repr() & eager._AUTOGRAD
        self.ways.append("native" if below else "dispatcher")
        return self.results(*args)


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class FunctionMode(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Subclass(Tensor):
    """Has torch's own ``__torch_function__``."""


def plain(*, grad: bool = False) -> Tensor:
    return torch.zeros(1, 2, 3, 4, requires_grad=grad)


def arguments(query: Tensor, /, **changes: Any) -> tuple[Any, ...]:
    args = {"query": query, "key": query, "value": query, "mask": None, "lengths": None,
            "offset": None, "is_causal": False, "scale": 0.5}  # fmt: skip
    return tuple((args | changes).values())


@contextmanager
def below_autograd() -> Iterator[None]:
    with torch._C._AutoDispatchBelowAutograd():
        yield


both = pytest.mark.parametrize("native", [False, True], ids=["python", "native"])


@both
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("grad", [False, True])
def test_an_ordinary_call_goes_the_short_way(native: bool, mode: Any, grad: bool) -> None:
    watched = Watched(native)
    query = plain(grad=grad)
    with mode():
        out, _ = watched.call(*arguments(query, lengths=torch.zeros(1, dtype=torch.int32)))
    assert watched.ways == ["native" if native else "short"]
    assert out.requires_grad is (grad and mode is torch.enable_grad)
    assert out.is_inference() is (mode is torch.inference_mode)


@both
def test_a_parameter_is_a_tensor(native: bool) -> None:
    watched = Watched(native)
    watched.call(*arguments(torch.nn.Parameter(plain())))
    assert watched.ways == ["native" if native else "short"]


@both
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    "context",
    [
        Mode,
        FunctionMode,
        lambda: FlopCounterMode(display=False),
        lambda: torch.device("cpu"),
        lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
        lambda: torch.autograd.profiler_legacy.profile(),
    ],
    ids=["dispatch mode", "function mode", "flops", "device", "profiler", "old profiler"],
)
def test_who_watches_all_calls_sees_this_one(
    native: bool, grad: bool, context: Callable[[], Any]
) -> None:
    watched = Watched(native)
    with context():
        watched.call(*arguments(plain(grad=grad)))
    watched.call(*arguments(plain()))
    assert watched.ways == ["dispatcher", "native" if native else "short"]


def transformed(transform: Callable) -> Callable[[Watched], None]:
    def run(watched: Watched) -> None:
        def function(x: Tensor) -> Tensor:
            watched.call(*arguments(x))
            return x.sum()

        transform(function)

    return run


@both
@pytest.mark.parametrize(
    "run",
    [
        transformed(lambda f: torch.vmap(f)(plain()[None])),
        transformed(lambda f: torch.func.grad(f)(plain())),
        transformed(lambda f: torch.func.jvp(f, (plain(),), (plain(),))),
        transformed(lambda f: torch.func.functionalize(f)(plain())),
        transformed(lambda f: make_fx(f)(plain())),
        transformed(lambda f: make_fx(f, tracing_mode="fake")(plain())),
        transformed(lambda f: torch.jit.trace(f, (plain(),), check_trace=False)),
    ],
    ids=["vmap", "grad", "jvp", "functionalize", "make_fx", "make_fx fake", "jit.trace"],
)
@pytest.mark.filterwarnings("ignore")
def test_a_transform_sees_every_call(native: bool, run: Callable[[Watched], None]) -> None:
    watched = Watched(native)
    run(watched)
    assert set(watched.ways) == {"dispatcher"}


@both
@pytest.mark.parametrize("place", ["query", "value", "mask"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: plain().as_subclass(Subclass),
        lambda: TwoTensor(plain(), plain()),
        lambda: FakeTensorMode().from_tensor(plain()),
    ],
    ids=["function", "dispatch", "fake"],
)
def test_a_subclass_gets_its_call_whatever_argument_it_is(
    native: bool, place: str, make: Callable[[], Tensor]
) -> None:
    watched = Watched(native)
    watched.call(*arguments(plain(), **{place: make()}))
    assert watched.ways == ["dispatcher"]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch._neg_view(plain()),
        lambda: plain().to("meta"),
        lambda: plain().to_sparse(),
        lambda: torch.zeros(4, 4).to_mkldnn(),
    ],
    ids=["negated", "meta", "sparse", "mkldnn"],
)
def test_an_odd_tensor_goes_through_the_dispatcher(grad: bool, make: Callable[[], Tensor]) -> None:
    if make().is_mkldnn and not torch.backends.mkldnn.is_available():
        pytest.skip("no oneDNN in this torch")
    watched = Watched(native=False)
    watched.call(*arguments(plain(grad=grad), mask=make()))
    assert watched.ways == ["dispatcher"]


@both
@pytest.mark.parametrize(
    "changes",
    [{"is_causal": 1}, {"scale": 1}, {"scale": torch.tensor(1.0)}, {"query": None}, {"mask": 0.0}],
    ids=str,
)
def test_the_dispatcher_judges_what_is_not_of_the_schemas_type(native: bool, changes: Any) -> None:
    watched = Watched(native)
    watched.call(*arguments(plain(), **changes))
    watched.call(*arguments(plain()), "one too many")
    assert watched.ways == ["dispatcher"] * 2


@both
def test_below_autograd_nothing_is_recorded(native: bool) -> None:
    """As inside another operator's kernel."""
    watched = Watched(native)
    with below_autograd():
        out, _ = watched.call(*arguments(plain(grad=True)))
    assert not out.requires_grad and watched.ways == ["native"]


def test_a_torch_without_what_it_takes_goes_through_the_dispatcher(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(eager, "AVAILABLE", False)
    overload = torch.ops.aten.neg.default
    assert eager.short_cut(overload, torch.neg) is overload


def test_every_overload_has_its_short_cut() -> None:
    for sample in SAMPLES:
        op = sample.op
        for backend in KERNEL_BACKENDS:
            shortened = op.calls[backend] is not op.overloads[backend]
            assert shortened or op.backends[backend].unavailable is not None


# ------------------------------------------------------------------------------ no difference shows


def arguments_of(sample: Sample, target: Target) -> list[Any]:
    if target.backend not in KERNEL_BACKENDS:
        pytest.skip(f"{target.backend} is a composition of stock operators: it has one way only")
    require(sample.name, target)
    return sample.arguments(target.device)


def ways(sample: Sample, target: Target) -> tuple[Callable, Callable]:
    return sample.op.calls[target.backend], sample.op.overloads[target.backend]


def outputs(found: Any) -> list[Tensor]:
    return list(found) if isinstance(found, tuple) else [found]


def facts(x: Tensor) -> tuple[Any, ...]:
    """What a user can tell of a result, besides its numbers."""
    return (
        *(x.shape, x.stride(), x.dtype, x.requires_grad, x.is_leaf, x.is_inference()),
        *(x._is_view(), 0 if x.is_inference() else x._version, x.output_nr),
        None if x.grad_fn is None else (x.grad_fn.name(), len(x.grad_fn.next_functions)),
    )


@each_sample
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_results_are_alike(sample: Sample, target: Target, mode: Any) -> None:
    args = arguments_of(sample, target)
    with mode():
        short, long = (outputs(way(*args)) for way in ways(sample, target))
    for mine, theirs in zip(short, long, strict=True):
        assert facts(mine) == facts(theirs)
        assert torch.equal(mine, theirs)


@each_sample
def test_gradients_and_what_is_saved_for_them_are_alike(sample: Sample, target: Target) -> None:
    args = arguments_of(sample, target)
    leaves = [x for x in args if isinstance(x, Tensor) and x.requires_grad]
    found = []
    for way in ways(sample, target):
        saved: list[Tensor] = []

        def keep(x: Tensor, saved: list[Tensor] = saved) -> Tensor:
            saved.append(x.detach())
            return x

        with saved_tensors_hooks(keep, lambda x: x):
            results = outputs(way(*args))
        learning = [x for x in results if x.requires_grad]
        torch.manual_seed(0)
        cotangents = [torch.randn_like(x) for x in learning]
        grads = torch.autograd.grad(learning, leaves, cotangents, retain_graph=True)
        # One result alone: the others' gradients come as None.
        alone = torch.autograd.grad(learning[0], leaves, cotangents[0], allow_unused=True)
        found.append([*saved, *grads, *alone])
    for mine, theirs in zip(*found, strict=True):
        assert (mine is None) == (theirs is None)
        assert mine is None or torch.equal(mine, theirs)


@each_sample
def test_a_result_may_be_changed_in_place(sample: Sample, target: Target) -> None:
    """It is no view of anything, so that autograd follows the change."""
    args = arguments_of(sample, target)
    with torch.no_grad():
        first = outputs(ways(sample, target)[0](*args))[0]
    first.mul_(torch.ones(1, requires_grad=True)).sum().backward()
    second = outputs(ways(sample, target)[0](*args))[0]
    second.add_(1.0).sum()
    assert second.requires_grad


@each_sample
def test_a_second_derivative_is_refused_alike(sample: Sample, target: Target) -> None:
    args = arguments_of(sample, target)
    leaves = [x for x in args if isinstance(x, Tensor) and x.requires_grad]
    said = []
    for way in ways(sample, target):
        results = [x for x in outputs(way(*args)) if x.requires_grad]
        # Twice, since a sum's gradient is a constant to which nothing is linked.
        first = torch.autograd.grad(
            sum(x.float().square().sum() for x in results if bool(x.isfinite().all())),
            leaves, create_graph=True, allow_unused=True,
        )  # fmt: skip
        with pytest.raises(RuntimeError) as caught:
            total = sum(x.float().square().sum() for x in first if x is not None)
            torch.autograd.grad(total, leaves, allow_unused=True)
        said.append(str(caught.value))
    assert said[0] == said[1] and "got a second derivative" in said[0]


@each_sample
def test_checkpointing_runs_the_forward_again(sample: Sample, target: Target) -> None:
    args = arguments_of(sample, target)
    leaves = [x for x in args if isinstance(x, Tensor) and x.requires_grad]
    call, _ = ways(sample, target)

    def first(*args: Any) -> Tensor:
        return outputs(call(*args))[0]

    cotangent = torch.randn_like(first(*args))
    usual = torch.autograd.grad(first(*args), leaves, cotangent, allow_unused=True)
    kept = checkpoint(first, *args, use_reentrant=False)
    again = torch.autograd.grad(kept, leaves, cotangent, allow_unused=True)
    for mine, theirs in zip(again, usual, strict=True):
        assert mine is theirs or torch.equal(mine, theirs)


@each_sample
def test_what_torch_can_not_do_says_the_same(sample: Sample, target: Target) -> None:
    """vmap and torch.func.grad of our operators, as the dispatcher answers."""
    args = arguments_of(sample, target)
    tensors = [i for i, x in enumerate(args) if isinstance(x, Tensor) and x.requires_grad]

    def with_first(way: Callable, x: Tensor) -> Tensor:
        changed = [x.detach() if isinstance(x, Tensor) else x for x in args]
        changed[tensors[0]] = x
        return outputs(way(*changed))[0].float().sum()

    first = args[tensors[0]].detach()
    for transform in (
        lambda f: torch.vmap(f)(torch.stack([first, first])),
        lambda f: torch.func.grad(f)(first),
    ):
        said = []
        for way in ways(sample, target):
            try:
                said.append(transform(lambda x, way=way: with_first(way, x)))
            except Exception as error:
                said.append((type(error), str(error)))
        assert repr(said[0]) == repr(said[1])


# -------------------------------------------------------------------------- the public functions


def attended(x: Tensor) -> Tensor:
    return patchgen_fast.attention(x, x, x, backend="cpu")


@pytest.fixture
def query(target: Target) -> Tensor:
    if target.backend != "cpu":
        pytest.skip("once, by the CPU kernel")
    require("attention", target)
    return torch.randn(2, 3, 9, 16)


def test_flops_are_counted_in_eager(query: Tensor) -> None:
    query.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        attended(query).sum().backward()
    forward = 4 * 2 * 3 * 9 * 9 * 16
    assert counter.get_total_flops() == forward + forward * 5 // 2


def test_make_fx_traces_our_operator(query: Tensor) -> None:
    graph = make_fx(attended)(query).graph
    overload = OPS["attention"].overloads["cpu"]
    assert [node.target for node in graph.nodes if node.op == "call_function"][0] is overload


def test_a_profile_names_our_operator(query: Tensor) -> None:
    query.requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        attended(query).sum().backward()
    names = {event.key for event in profiled.key_averages()}
    assert {"patchgen_fast::attention", "patchgen_fast::attention_backward"} <= names


@pytest.mark.parametrize("grad", [False, True])
def test_under_autocast_the_kernel_runs_in_its_dtype(query: Tensor, grad: bool) -> None:
    query.requires_grad_(grad)
    with torch.autocast("cpu", torch.bfloat16):
        out = attended(query)
    assert out.dtype == torch.bfloat16
    if grad:
        out.sum().backward()
        assert query.grad.dtype == torch.float32


def test_hooks_of_the_node_and_of_results_run(query: Tensor) -> None:
    query.requires_grad_()
    out = attended(query)
    seen: list[str] = []
    out.register_hook(lambda grad: seen.append("result"))
    out.grad_fn.register_prehook(lambda grads: seen.append("before"))
    out.grad_fn.register_hook(lambda inner, outer: seen.append("after"))
    out.sum().backward()
    assert seen == ["result", "before", "after"]


def test_compiled_autograd_takes_the_backward(query: Tensor) -> None:
    usual, traced = (copy.deepcopy(query).requires_grad_() for _ in range(2))
    attended(usual).square().sum().backward()
    loss = attended(traced).square().sum()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        loss.backward()
    torch.testing.assert_close(traced.grad, usual.grad)


def test_modes_may_be_nested(query: Tensor) -> None:
    with ExitStack() as stack:
        for context in (torch.no_grad(), FunctionMode(), Mode(), nullcontext()):
            stack.enter_context(context)
        nested = attended(query)
    assert torch.equal(nested, attended(query))
