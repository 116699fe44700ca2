"""Swapped models and the ops behind them in two processes: DDP, FSDP2, DTensors."""

import copy
import os
import socket
import sys
import traceback

import pytest
import torch
import torch.distributed as dist
from torch import nn

from patchgen_fast import (
    add_layer_norm,
    attention,
    dispatch,
    layer_norm,
    linear,
    models,
    patch_embed,
    patch_unembed,
    qk_norm_rope,
    varlen_attention,
)
from patchgen_fast.registry import OPS
from patchgen_fast.swapping import swap


def block():
    return models.EncoderLayer(32, 4, qkv_bias=True).double().eval()


def tokens(batch=2):
    return torch.randn(batch, 9, 32).double()


def run_in_two_processes(function, *args):
    """`function(rank, *args)` on two processes of a gloo group; their errors are raised here."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch.distributed lacks gloo here")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_member, (function, port, args), nprocs=2)


def _member(rank, function, port, args):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.manual_seed(0)  # the same weights and tokens in both
    try:
        function(rank, *args)
    except BaseException:
        traceback.print_exc()
        raise
    dist.barrier()  # nobody leaves while the other still waits for a message
    # The mesh keeps gloo's threads alive, and one may still be freeing a collective's tensors: if
    # the interpreter ends meanwhile, the thread is unwound in a destructor and the process aborts
    # (torch 2.13). So it doesn't end.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def mesh_of_two():
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (2,))


# ---------------------------------------------------------------------------------------- wrappers


def eager_gradients(model, x):
    model = copy.deepcopy(model)
    model(x).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def data_parallel(rank):
    model, x = block(), tokens(batch=4)
    expected = eager_gradients(model, x)
    swap(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    wrapped(x.chunk(2)[rank]).square().mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=name)


def fully_sharded(rank):
    from torch.distributed.fsdp import fully_shard

    mesh = mesh_of_two()
    model, x = block(), tokens(batch=4)
    late = copy.deepcopy(model)
    expected = eager_gradients(model, x)
    swap(model)
    fully_shard(model, mesh=mesh)
    with dispatch.counting() as ran:
        model(x.chunk(2)[rank]).square().mean().backward()
    assert any(call.startswith("attention.") for call in ran)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad.full_tensor(), expected[name], msg=name)
    fully_shard(late, mesh=mesh)
    report = swap(late)
    assert {row.action for row in report.rows} == {"refused"}, str(report)
    assert {row.reason for row in report.rows} == {"fsdp"}


def tensor_parallel(rank):
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    mesh = mesh_of_two()
    model, x = block(), tokens()
    late, expected = copy.deepcopy(model), model(x)
    plan = {"mlp.fc1": ColwiseParallel(), "mlp.fc2": RowwiseParallel()}
    swap(model)
    parallelize_module(model, mesh, plan)
    torch.testing.assert_close(model(x), expected)
    parallelize_module(late, mesh, plan)
    rows = {row.name: row for row in swap(late).rows}
    assert (rows["mlp"].action, rows["mlp"].reason) == ("refused", "sharded")
    assert rows["attn"].action == "swapped"
    torch.testing.assert_close(late(x), expected)


@pytest.mark.parametrize("wrapper", [data_parallel, fully_sharded, tensor_parallel])
def test_wrappers(wrapper):
    run_in_two_processes(wrapper)


# ---------------------------------------------------------------------------------------- DTensors


def shapes(*sizes):
    return [torch.randn(*size, requires_grad=True) for size in sizes]


OFFSETS = torch.tensor([0, 5, 12], dtype=torch.int32)

# op: (arguments that have gradients, the call, and how to split them: the placement of the first
# result that is expected, and the dimension that each argument is split along, None for whole)
CASES = {
    "attention": (
        lambda: shapes((2, 4, 7, 8), (2, 2, 7, 8), (2, 2, 7, 8)),
        lambda q, k, v, **o: attention(q, k, v, enable_gqa=True, **o),
        [(0, (0, 0, 0)), (1, (1, 1, 1))],
    ),
    "varlen_attention": (
        lambda: shapes((12, 4, 8), (12, 4, 8), (12, 4, 8)),
        lambda q, k, v, **o: varlen_attention(
            q, k, v, whole(OFFSETS, q), whole(OFFSETS, q), 7, 7, **o
        ),
        [(1, (1, 1, 1))],
    ),
    "qk_norm_rope": (
        lambda: shapes((2, 4, 7, 8), (2, 4, 7, 8), (8,), (8,), (1, 4, 6, 8), (1, 1, 6, 8)),
        lambda q, k, qw, kw, cos, sin, **o: qk_norm_rope(
            q, k, norm="rms", q_weight=qw, k_weight=kw, cos_sin=(cos, sin), num_prefix_tokens=1, **o
        ),
        [(0, (0, 0, None, None, None, None)), (1, (1, 1, None, None, 1, None))],
    ),
    "linear": (
        lambda: shapes((2, 70, 16), (12, 16), (12,), (2, 70, 12)),
        lambda x, w, b, r, **o: linear(x, w, b, activation="gelu", residual=r, **o),
        [(0, (0, None, None, 0)), (2, (None, 0, 0, 2))],
    ),
    "linear_without_bias": (
        lambda: shapes((2, 70, 16), (12, 16)),
        lambda x, w, **o: linear(x, w, **o),
        [(0, (0, None)), (2, (None, 0)), ("sum", (2, 1))],
    ),
    "layer_norm": (
        lambda: shapes((2, 7, 16), (16,), (16,)),
        layer_norm,
        [(0, (0, None, None))],
    ),
    "add_layer_norm": (
        lambda: shapes((2, 7, 16), (2, 7, 16), (16,), (16,)),
        add_layer_norm,
        [(0, (0, 0, None, None))],
    ),
    "patch_embed": (
        lambda: shapes((2, 3, 8, 8), (6, 3, 4, 4), (6,), (4, 6), (1, 6)),
        lambda x, w, b, pos, prefix, **o: patch_embed(x, w, b, pos_embed=pos, prefix=prefix, **o),
        [(0, (0, None, None, None, None)), (2, (None, 0, 0, 1, 1))],
    ),
    "patch_unembed": (
        lambda: shapes((2, 4, 6), (6, 3, 4, 4), (3,)),
        lambda x, w, b, **o: patch_unembed(x, w, b, grid_size=(2, 2), **o),
        [(0, (0, None, None))],
    ),
    "patch_unembed_without_bias": (
        lambda: shapes((2, 4, 6), (6, 3, 4, 4)),
        lambda x, w, **o: patch_unembed(x, w, grid_size=(2, 2), **o),
        [(0, (0, None)), ("sum", (2, 0))],
    ),
}  # fmt: skip


def whole(tensor, like):
    """On all processes, where the others are DTensors."""
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, [Replicate()])


def first_of(result):
    return result[0] if isinstance(result, tuple) else result


def on_dtensors(rank, name, backend):
    """An op and its gradients, for each way to split its arguments."""
    from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

    from patchgen_fast.swapping.tensor_parallel import register

    register()
    mesh = mesh_of_two()
    make, call, splits = CASES[name]
    arguments = make()
    expected = first_of(call(*arguments))
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    for placed, dims in splits:
        parts = [
            distribute_tensor(
                x.detach(), mesh, [Replicate() if dim is None else Shard(dim)]
            ).requires_grad_()
            for x, dim in zip(arguments, dims, strict=True)
        ]
        with dispatch.counting() as ran:
            out = first_of(call(*parts, backend=backend))
        op = name.removesuffix("_without_bias")
        assert ran == {f"{op}.{backend}": 1}, ran
        assert out.placements == (Partial() if placed == "sum" else Shard(placed),), out.placements
        torch.testing.assert_close(out.full_tensor(), expected)
        (out * whole(weights, out)).sum().backward()
        for i, (part, x) in enumerate(zip(parts, arguments, strict=True)):
            got = part.grad.full_tensor()
            torch.testing.assert_close(got, x.grad, msg=f"{name}, {dims}, argument {i}")


def all_on_dtensors(rank):
    for name in CASES:
        on_dtensors(rank, name, "cpu")


def test_ops_on_dtensors():
    if OPS["attention"].backends["cpu"].unavailable:
        pytest.skip("no CPU kernels in this build")
    run_in_two_processes(all_on_dtensors)


def test_every_op_has_a_case():
    from patchgen_fast.swapping.tensor_parallel import STRATEGIES

    assert STRATEGIES.keys() == OPS.keys()
    assert {name.removesuffix("_without_bias") for name in CASES} == OPS.keys()


def masked_heads(rank):
    """A mask of each head goes with its heads."""
    from torch.distributed.tensor import Shard, distribute_tensor

    from patchgen_fast.swapping.tensor_parallel import register

    register()
    mesh = mesh_of_two()
    heads = shapes((2, 4, 7, 8), (2, 4, 7, 8), (2, 4, 7, 8))
    bias = torch.randn(1, 4, 7, 7)
    expected = attention(*heads, bias)
    parts = [distribute_tensor(x.detach(), mesh, [Shard(1)]) for x in heads]
    out = attention(*parts, distribute_tensor(bias, mesh, [Shard(1)]))
    assert out.placements == (Shard(1),)
    torch.testing.assert_close(out.full_tensor(), expected)


def test_a_mask_of_each_head():
    run_in_two_processes(masked_heads)
