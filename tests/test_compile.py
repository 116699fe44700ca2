"""Every op traced: opcheck on the raw overloads, torch.compile without graph breaks or one graph a
size, torch.export with the backend kept, and FLOPs as torch counts them.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from cases.every_op import SAMPLES, Sample, leaves_of
from oracle import Evaluation, Problem, Target, documented_refusals, require
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import patchgen_fast
from patchgen_fast import dispatch
from patchgen_fast.registry import KERNEL_BACKENDS, OPS

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

each_sample = pytest.mark.parametrize("sample", SAMPLES, ids=str)


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def kernel_of(sample: Sample, target: Target) -> Any:
    """The overload of a kernel backend; a composition of stock operators has none."""
    if target.backend not in KERNEL_BACKENDS:
        pytest.skip(f"{target.backend} is a composition of stock operators, not an overload")
    require(sample.name, target)
    return sample.op.overloads[target.backend]


# ------------------------------------------------------------------------------------------ opcheck


@each_sample
def test_opcheck_of_forwards(sample: Sample, target: Target) -> None:
    overload = kernel_of(sample, target)
    args = sample.arguments(target.device)
    found = torch.library.opcheck(overload, tuple(args))
    assert set(found.values()) == {"SUCCESS"}, found


def backward_arguments(sample: Sample, device: str) -> tuple[Any, ...]:
    """What an op's backward is called with, caught on the way."""
    caught: list[tuple[Any, ...]] = []
    op, stated = sample.op, sample.problem(device)
    args = sample.arguments(device)
    outputs = op.reference(*[x.detach() if isinstance(x, Tensor) else x for x in args])
    names = [argument.name for argument in op.overloads["cpu"]._schema.arguments]

    class Context:
        backend = "reference"
        needs_input_grad = tuple(name in stated.differentiable for name in names)

        def save_for_backward(self, *tensors: Any) -> None:
            self.saved_tensors = tensors

        def mark_non_differentiable(self, *tensors: Any) -> None:
            pass

    def catch(context: Any, *found: Any) -> Any:
        caught.append(found)
        return run(context, *found)

    run, context = op.run_backward, Context()
    op.save(context, tuple(args), outputs)
    cotangents = [stated.cotangents.get(name) for name in stated.truth.results]
    cotangents += [None] * ((len(outputs) if isinstance(outputs, tuple) else 1) - len(cotangents))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op, "run_backward", catch)
        op.backward(context, *cotangents)
    return tuple(x.detach() if isinstance(x, Tensor) else x for x in caught[0])


@each_sample
def test_opcheck_of_backwards(sample: Sample, target: Target) -> None:
    if target.backend == "torch":
        pytest.skip("torch is a composition of stock operators, not an overload")
    require(sample.name, target)
    if not sample.op.backends[target.backend].has_backward:
        pytest.skip(f"{sample.name} has no {target.backend} backward")
    args = backward_arguments(sample.of(dtype=torch.bfloat16), target.device)
    overload = sample.op.backward_overloads[target.backend]
    found = torch.library.opcheck(overload, args)
    assert set(found.values()) == {"SUCCESS"}, found


@each_sample
def test_a_second_derivative_is_refused_not_wrong(sample: Sample, target: Target) -> None:
    kernel_of(sample, target)
    stated = sample.problem(target.device)
    leaves = leaves_of(stated)
    results = sample.call(target.backend, **leaves)
    wanted = [leaves[name] for name in stated.differentiable]
    first = torch.autograd.grad(
        [results[name] for name in stated.cotangents],
        wanted,
        [g.clone().requires_grad_() for g in stated.cotangents.values()],
        create_graph=True,
    )
    with pytest.raises(RuntimeError, match="got a second derivative. Pass backend='torch'"):
        torch.autograd.grad(sum(g.float().square().sum() for g in first), wanted)


# ---------------------------------------------------------------------------------- compile, export


def dense_leaves(stated: Problem) -> dict[str, Any]:
    """Inputs without the storage offsets of other tests, which torch.compile takes for sizes."""
    leaves = leaves_of(stated)
    for name, x in leaves.items():
        if isinstance(x, Tensor):
            leaves[name] = x.detach().contiguous().clone().requires_grad_(x.requires_grad)
    return leaves


@each_sample
def test_one_graph_for_all_sizes(sample: Sample, target: Target) -> None:
    """fullgraph, dynamic: one graph, whatever the size; kernels with their gradients."""
    if target.backend == "reference":
        pytest.skip("torch.export covers the reference; torch.compile of it takes long")
    require(sample.name, target)
    if (sample.name, target.backend) == ("varlen_attention", "torch"):
        pytest.skip("torch: it reads the offsets, which have no values while tracing")
    kernel = target.backend in KERNEL_BACKENDS
    counter = CompileCounterWithBackend("aot_eager" if kernel else "eager")

    def function(leaves: dict[str, Any], grid: Any) -> dict[str, Tensor]:
        if sample.name == "patch_unembed":
            images = patchgen_fast.patch_unembed(**leaves, grid_size=grid, backend=target.backend)
            return {"images": images}
        return first.call(target.backend, **leaves)

    sizes = [sample.of_size(n) for n in (52, 64, 20)]
    first = sizes[0]
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for sized in sizes:
        stated = sized.problem(target.device)
        leaves = dense_leaves(stated)
        with dispatch.counting() as ran:
            got = Evaluation(compiled(leaves, getattr(sized.case, "grid", None)))
            if kernel:
                grads = torch.autograd.grad(
                    [got.results[name] for name in stated.cotangents],
                    [leaves[name] for name in stated.differentiable],
                    list(stated.cotangents.values()),
                )
                got.grads = dict(zip(stated.differentiable, grads, strict=True))
        if kernel:
            assert ran.get(f"{sample.name}.{target.backend}") == 1, ran
        sized.compare(got, target)
    graphs = [
        g for g in counter.graphs if any(node.op == "call_function" for node in g.graph.nodes)
    ]
    assert len(graphs) == 1, f"{len(graphs)} graphs for {len(sizes)} sizes"


def test_a_refusal_under_torch_compile_keeps_its_reason() -> None:
    sample = next(sample for sample in SAMPLES if sample.name == "varlen_attention")
    leaves = dense_leaves(sample.problem())
    compiled = torch.compile(
        lambda leaves: sample.call("torch", **leaves), fullgraph=True, backend="eager"
    )
    with pytest.raises(Exception, match="needs the offsets' values"):
        compiled(leaves)


@each_sample
def test_export_keeps_the_backend(sample: Sample, target: Target) -> None:
    require(sample.name, target)
    stated = sample.problem(target.device)
    tensors = {name: x.detach() for name, x in stated.inputs.items() if isinstance(x, Tensor)}
    fixed = {name: x for name, x in stated.inputs.items() if name not in tensors}

    class Layer(torch.nn.Module):
        def forward(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return sample.call(target.backend, **tensors, **fixed)

    with documented_refusals(also={"offsets"}):
        program = torch.export.export(Layer(), (tensors,), strict=False)
    ours = [node.target for node in program.graph.nodes if "patchgen_fast" in str(node.target)]
    kernel = target.backend in KERNEL_BACKENDS
    assert ours == ([sample.op.overloads[target.backend]] if kernel else [])
    with dispatch.counting() as ran:
        results = program.module()(tensors)
    assert ran == ({f"{sample.name}.{target.backend}": 1} if kernel else {})
    sample.compare(Evaluation(results), target)


def test_inductor_compiles_layers_of_ours_into_one_graph() -> None:
    """The usual compiler, ops by their default backends."""
    torch.manual_seed(0)
    images, filters = torch.rand(8, 3, 32, 32), torch.randn(48, 3, 8, 8) / 14
    qkv, out = torch.randn(144, 48) / 7, torch.randn(48, 48) / 7

    def model(images: Tensor) -> Tensor:
        x = patchgen_fast.patch_embed(images, filters)
        q, k, v = (
            patchgen_fast.linear(x, qkv).unflatten(2, (3, 4, 12)).permute(2, 0, 3, 1, 4).unbind(0)
        )
        mixed = patchgen_fast.attention(q, k, v).transpose(1, 2).flatten(2)
        return patchgen_fast.linear(mixed, out, activation="gelu_tanh", residual=x)

    eager = model(images)
    with dispatch.counting() as ran:
        compiled = torch.compile(model, fullgraph=True)(images)
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)
    for name in ("attention", "patch_embed", "linear"):
        if OPS[name].backends["cpu"].unavailable is None:
            assert ran.get(f"{name}.cpu", 0) >= 1, ran


# -------------------------------------------------------------------------------------------- FLOPs


def flops(function: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@each_sample
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_flops_of_a_forward_are_eagers(sample: Sample, backend: str) -> None:
    """On fake tensors, so that no kernel is needed: a forward counts as eager's products do."""
    args = sample.arguments()
    if sample.name == "varlen_attention":
        # Torch counts packed sequences as if all were as long as the longest.
        sequences, heads, dim = 3, sample.case.heads[0], sample.case.dim
        longest = max(sample.case.lengths), max(sample.case.lengths_k)
        shapes = [(sequences, heads, n, dim) for n in (longest[0], longest[1], longest[1])]
        eager = sdpa_flop_count(*shapes)
    else:
        detached = [x.detach() if isinstance(x, Tensor) else x for x in args]
        eager = flops(lambda: sample.op.reference(*detached))
    with FakeTensorMode() as fake, torch.no_grad():
        faked = [fake.from_tensor(x) if isinstance(x, Tensor) else x for x in args]
        ours = flops(lambda: sample.op.overloads[backend](*faked))
    assert ours == eager


@each_sample
def test_flops_of_a_backward(sample: Sample) -> None:
    """As eager's backward counts; attention's as torch's own fused backward, which recomputes."""
    args = backward_arguments(sample, "cpu")
    if sample.name == "attention":
        query, key, value = (tuple(x.shape) for x in args[2:5])
        key, value = ((shape[0], query[1], *shape[2:]) for shape in (key, value))
        eager = sdpa_backward_flop_count(tuple(args[0].shape), query, key, value)
    elif sample.name == "varlen_attention":
        heads, dim = sample.case.heads[0], sample.case.dim
        query, key = (
            (3, heads, max(lengths), dim)
            for lengths in (sample.case.lengths, sample.case.lengths_k)
        )
        eager = sdpa_backward_flop_count(query, query, key, key)
    else:
        stated = sample.problem("cpu")
        results = sample.call("reference", **(leaves := leaves_of(stated)))
        eager = flops(
            functools.partial(
                torch.autograd.grad,
                [results[name] for name in stated.cotangents],
                [leaves[name] for name in stated.differentiable],
                list(stated.cotangents.values()),
            )
        )
    with FakeTensorMode() as fake, torch.no_grad():
        faked = [fake.from_tensor(x) if isinstance(x, Tensor) else x for x in args]
        ours = flops(lambda: sample.op.backward_overloads["reference"](*faked))
    assert ours == eager
