"""What the CUDA C++ kernels are asked to do, decided without a GPU: on fake CUDA tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from patchgen_fast import attention, dispatch, patch_embed, varlen_attention
from patchgen_fast.ops import _cuda_limits
from patchgen_fast.registry import OPS

HOPPER, ADA = 227 * 1024, 99 * 1024
HALF = torch.bfloat16


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """As on a Hopper GPU with the CUDA kernels built; ``gpu(bytes)`` changes its shared memory."""

    def has(shared_bytes: int) -> None:
        monkeypatch.setattr(_cuda_limits, "shared_memory", lambda device: shared_bytes)

    for name in ("attention", "varlen_attention", "patch_embed"):
        monkeypatch.setattr(OPS[name].backends["cuda"], "unavailable", None)
        monkeypatch.setattr(OPS[name], "prefer", lambda args: "cuda")
    has(HOPPER)
    with FakeTensorMode():
        yield has


def chosen(monkeypatch: pytest.MonkeyPatch, call: Callable[[], object]) -> tuple[str, list[str]]:
    """The backend that ``call`` would run by, and what the CUDA kernels refuse of it."""
    seen = []

    def record(op, args, backend=None):
        refused = op.backends["cuda"].refusals_of(args)
        seen.append((choose(op, args, backend), [refusal.code for refusal in refused]))
        raise InterruptedError

    choose = dispatch.choose
    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(dispatch, "choose", record)
        call()
    return seen[0]


def tensors(queries=197, keys=197, head_dim=64, *, dtype=HALF, batch=2, heads=3, device="cuda"):
    return [
        torch.empty(batch, heads, n, head_dim, dtype=dtype, device=device)
        for n in (queries, keys, keys)
    ]


SERVED = {
    "ViT-B": (197, 197, 64),
    "the longest": (272, 272, 128),
    "many queries, few keys": (5000, 77, 64),
    "one query, many keys": (1, 4096, 64),
    "a few queries, many keys": (8, 4096, 128),
    "D 72": (256, 256, 72),
    "a narrow head": (16, 16, 8),
}
REFUSED = {
    "long": ((273, 273, 64), "length"),
    "nine queries, many keys": ((9, 4096, 64), "length"),
    "an odd head": ((197, 197, 36), "head_dim"),
    "a wide head": ((197, 197, 136), "head_dim"),
}


@pytest.mark.parametrize("name", SERVED)
def test_attention_is_served(name, monkeypatch):
    assert chosen(monkeypatch, lambda: attention(*tensors(*SERVED[name]))) == ("cuda", [])


@pytest.mark.parametrize("name", REFUSED)
def test_attention_is_refused(name, monkeypatch):
    sizes, code = REFUSED[name]
    backend, codes = chosen(monkeypatch, lambda: attention(*tensors(*sizes)))
    assert backend != "cuda" and codes == [code]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_only_half_precision(dtype, monkeypatch):
    backend, codes = chosen(monkeypatch, lambda: attention(*tensors(dtype=dtype)))
    assert backend != "cuda" and codes == ["dtype"]


def test_shared_memory_bounds_the_keys_on_a_smaller_gpu(gpu, monkeypatch):
    gpu(ADA)
    assert chosen(monkeypatch, lambda: attention(*tensors(197, 197, 64)))[0] == "cuda"
    backend, codes = chosen(monkeypatch, lambda: attention(*tensors(272, 272, 128)))
    assert backend != "cuda" and codes == ["shared_memory"]


def trained(queries, keys, head_dim=64, mask=None):
    query, key, value = tensors(queries, keys, head_dim)
    return lambda: attention(query.requires_grad_(), key, value, attn_mask=mask)


def test_training_asks_for_what_the_backward_can_do(gpu, monkeypatch):
    assert chosen(monkeypatch, trained(197, 197)) == ("cuda", [])
    assert chosen(monkeypatch, trained(300, 77))[1] == ["training"]  # more queries than it holds
    assert chosen(monkeypatch, trained(1, 4096))[1] == ["training"]  # the decode kernel has none
    bias = torch.empty(2, 3, 197, 197, dtype=HALF, device="cuda")
    assert chosen(monkeypatch, trained(197, 197, mask=bias)) == ("cuda", [])
    assert chosen(monkeypatch, trained(197, 197, mask=bias.requires_grad_()))[1] == ["training"]
    with torch.no_grad():
        assert chosen(monkeypatch, trained(300, 77)) == ("cuda", [])
    gpu(64 * 1024)
    assert chosen(monkeypatch, trained(256, 256))[1] == ["shared_memory", "training"]


@pytest.mark.parametrize(
    ("side", "weight_dtype", "shared_bytes", "codes"),
    [
        (16, HALF, ADA, []),
        (14, torch.float16, ADA, []),
        (32, HALF, HOPPER, []),
        (16, torch.float32, HOPPER, ["dtype"]),
        (96, HALF, HOPPER, ["shared_memory"]),
    ],
)
def test_patch_embed(side, weight_dtype, shared_bytes, codes, gpu, monkeypatch):
    gpu(shared_bytes)
    images = torch.empty(4, 3, 224, 224, dtype=torch.uint8, device="cuda")
    weight = torch.empty(768, 3, side, side, dtype=weight_dtype, device="cuda")
    backend, refused = chosen(monkeypatch, lambda: patch_embed(images, weight))
    assert refused == codes and (backend == "cuda") == (not codes)


@pytest.mark.parametrize(
    ("longest", "head_dim", "shared_bytes", "codes", "of_training"),
    [
        ((197, 197), 64, HOPPER, [], []),
        ((5000, 77), 64, HOPPER, [], ["training"]),
        ((4, 273), 64, HOPPER, ["length"], ["training"]),  # the decode kernel takes none
        ((197, 197), 36, HOPPER, ["head_dim"], []),
        ((272, 272), 128, ADA, ["shared_memory"], ["training"]),
    ],
)
def test_packed_sequences(longest, head_dim, shared_bytes, codes, of_training, gpu, monkeypatch):
    gpu(shared_bytes)
    query = torch.empty(6000, 3, head_dim, dtype=HALF, device="cuda")
    offsets = torch.empty(9, dtype=torch.int32, device="cuda")

    def call():
        return varlen_attention(query, query, query, offsets, offsets, *longest)

    backend, refused = chosen(monkeypatch, call)
    assert refused == codes and (backend == "cuda") == (not codes)
    query.requires_grad_()
    assert chosen(monkeypatch, call)[1] == codes + of_training


def test_tensors_elsewhere_are_refused(monkeypatch):
    backend, codes = chosen(monkeypatch, lambda: attention(*tensors(device="cpu")))
    assert backend != "cuda" and codes == ["device"]
