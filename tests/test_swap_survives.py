"""What people do with a model after the swap, or did before: it goes on working.

State dicts, pickle, hooks, compile, export and conversions are in `test_swap.py`; here are LoRA,
parametrisations, autocast, and the distributed wrappers, by two processes.
"""

import copy
import os
import socket
import traceback

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import parametrizations

from patchgen_fast import dispatch, models
from patchgen_fast.swapping import parity, swap


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def block(dtype=torch.float64):
    return models.EncoderLayer(32, 4, qkv_bias=True).to(dtype).eval()


def tokens(dtype=torch.float64, batch=2):
    return torch.randn(batch, 9, 32).to(dtype)


# ------------------------------------------------------------------------------- LoRA, parametrised


def with_lora(model):
    peft = pytest.importorskip("peft", exc_type=ImportError)
    config = peft.LoraConfig(r=4, target_modules=["qkv", "fc1"], init_lora_weights=False)
    torch.manual_seed(1)
    return peft.inject_adapter_in_model(config, model)


@pytest.mark.parametrize("when", ["before", "after"])
def test_lora(when):
    model, x = block(), tokens()
    eager = with_lora(copy.deepcopy(model))
    if when == "before":
        model = with_lora(model)
        swap(model)
    else:
        swap(model)
        model = with_lora(model)
    assert not torch.allclose(eager(x), block()(x))
    torch.testing.assert_close(model(x), eager(x), rtol=1e-9, atol=1e-9)
    eager(x).square().sum().backward()
    model(x).square().sum().backward()
    adapted = 0
    for (name, got), (_, expected) in zip(
        model.named_parameters(), eager.named_parameters(), strict=True
    ):
        if "lora" in name:
            adapted += 1
            torch.testing.assert_close(got.grad, expected.grad, msg=name)
    assert adapted == 4


@pytest.mark.parametrize("when", ["before", "after"])
def test_parametrised_children_are_called(when):
    model, x = block(), tokens()

    def change(model):
        parametrizations.weight_norm(model.attn.qkv)
        with torch.no_grad():
            model.attn.qkv.parametrizations.weight.original0.mul_(1.5)
        return model

    eager = change(copy.deepcopy(model))
    if when == "before":
        model = change(model)
        swap(model)
    else:
        swap(model)
        model = change(model)
    torch.testing.assert_close(model(x), eager(x), rtol=1e-9, atol=1e-9)


# ----------------------------------------------------------------------------------------- autocast


def test_autocast_within_the_parity_rule():
    model, x = block(torch.float32), tokens(torch.float32)
    truth = copy.deepcopy(model).double()(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        eager = model(x)
    swap(model)
    with torch.autocast("cpu", torch.bfloat16), dispatch.counting() as ran:
        got = model(x)
    assert got.dtype == eager.dtype
    assert any(call.startswith("attention.") for call in ran)
    found = parity("out", got.bfloat16(), eager.bfloat16(), truth)
    assert found.ok, found


# --------------------------------------------------------------------------------- two processes


def run_in_two_processes(function):
    """`function(rank)` on two processes of a gloo group; their errors are raised here."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch.distributed lacks gloo here")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_member, (function, port), nprocs=2)


def _member(rank, function, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.manual_seed(0)  # the same weights and tokens in both
    try:
        function(rank)
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        dist.destroy_process_group()


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
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
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
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    mesh = init_device_mesh("cpu", (2,))
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


def distributed_heads_and_images(rank):
    """Attention on DTensors, and its gradients, by heads and by images; no other op between."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from patchgen_fast import attention
    from patchgen_fast.swapping import tensor_parallel

    tensor_parallel.register()
    mesh = init_device_mesh("cpu", (2,))
    whole = [torch.randn(2, heads, 7, 8, requires_grad=True) for heads in (4, 2, 2)]
    bias = torch.randn(1, 4, 7, 7)
    expected = attention(*whole, bias, enable_gqa=True)
    expected.square().sum().backward()
    for dim in (0, 1):
        parts = [distribute_tensor(x.detach(), mesh, [Shard(dim)]).requires_grad_() for x in whole]
        with dispatch.counting() as ran:
            out = attention(*parts, distribute_tensor(bias, mesh, [Shard(1)]), enable_gqa=True)
        assert out.placements == (Shard(dim),)
        assert any(call.startswith("attention.") for call in ran)
        torch.testing.assert_close(out.full_tensor(), expected)
        out.square().sum().backward()
        for part, x in zip(parts, whole, strict=True):
            torch.testing.assert_close(part.grad.full_tensor(), x.grad)


@pytest.mark.parametrize(
    "function", [data_parallel, fully_sharded, tensor_parallel, distributed_heads_and_images]
)
def test_two_processes(function):
    run_in_two_processes(function)
