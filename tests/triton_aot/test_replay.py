"""The host's share of a call: from the third of alike calls on only allocations and launches, with
the arguments that the launcher itself would have given. Counted, never timed, and without a GPU: a
stand-in takes what Triton would start.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs a process of its own, without TRITON_INTERPRET", allow_module_level=True)
pytest.importorskip("triton")

import torch
from launches import tf32
from torch import Tensor
from triton import knobs
from triton.runtime.jit import JITFunction

from patchgen_fast.triton import (
    add_layer_norm,
    attention,
    attention_backward,
    launch,
    patch_embed,
    patch_unembed,
    qk_norm_rope,
    replay,
    varlen_attention,
)
from patchgen_fast.triton.attention_configs import StreamConfig
from patchgen_fast.triton.configs import answering

BF16, F32, INT32 = torch.bfloat16, torch.float32, torch.int32


STREAM, FUNCTION, PACKED = 7, 11, (4, 1)


class Compiled:
    """A compiled kernel that notes what it is started with, by either way to start one."""

    function, packed_metadata = FUNCTION, PACKED

    def __init__(self, kernel: JITFunction, host: Host) -> None:
        self.kernel, self.host = kernel, host

    def __getitem__(self, grid):
        def start(*args, stream=None):
            assert stream in (None, STREAM)
            self.host.by_triton += 1
            self.host.starts.append((self.kernel, grid, args))

        return start

    def run(self, x, y, z, stream, function, packed, metadata, enter, leave, *args):
        assert (stream, function, packed) == (STREAM, FUNCTION, PACKED)
        assert metadata is enter is leave is None
        self.host.starts.append((self.kernel, (x, y, z), args))


class Host:
    """What the host did: kernels started, launchers' own starts, allocations."""

    def __init__(self) -> None:
        self.starts: list[tuple] = []
        self.by_triton = 0  # how many of them Triton's own way
        self.asked = 0  # how often Triton was asked for a binary


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    host = Host()

    def run(self, *args, grid, warmup, **options):
        host.asked += 1
        compiled = Compiled(self, host)
        names = self.arg_names[len(args) :]
        compiled[(*grid, 1, 1)[:3]](*args, *(options[name] for name in names))
        return compiled

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(replay, "current_stream", lambda device: STREAM)
    return host


def address(value):
    return value.data_ptr() if isinstance(value, Tensor) else value


def heads(n: int, d: int = 64, dtype: torch.dtype = BF16) -> Tensor:
    return torch.zeros(2, n, 3, 4, d, dtype=dtype)[:, :, 1].transpose(1, 2)


def lse(n: int) -> Tensor:
    return torch.zeros(2, 4, n)


def attend(n: int, nk: int, mask: Tensor | None = None, d: int = 64) -> tuple:
    return heads(n, d), heads(nk, d), heads(nk, d), mask, None, None, False, 0.125


def attend_back(n: int, mask: Tensor | None = None, d: int = 64) -> tuple:
    query, key, value, *rest = attend(n, n, mask, d)
    out = torch.zeros(2, n, 4, d, dtype=BF16).transpose(1, 2)
    grad = out.clone()
    return grad, None, query, key, value, out, lse(n), *rest, mask is not None


def packed(back: bool) -> tuple:
    q, k, v, out, grad = (torch.zeros(300, 4, 64, dtype=BF16) for _ in range(5))
    offsets = (torch.zeros(3, dtype=INT32), torch.zeros(3, dtype=INT32), 200, 200, True, 0.125)
    return (
        (grad, None, q, k, v, out, torch.zeros(4, 300), *offsets) if back else (q, k, v, *offsets)
    )


def images(dtype: torch.dtype) -> Tensor:
    return torch.zeros(2, 3, 32, 32, dtype=dtype)


def bf16(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=BF16)


def rope(back: bool) -> tuple:
    vectors = [torch.zeros(64) for _ in range(4)]
    tables = [torch.zeros(1, 1, 50, 64) for _ in range(2)]
    rest = (*vectors, *tables, "layer", 1e-6, False, 0)
    if back:
        return heads(50), heads(50), heads(50), heads(50), *rest, False
    return heads(50), heads(50), *rest


def statistics() -> tuple[Tensor, Tensor]:
    return torch.zeros(3), torch.zeros(3)


WEIGHT, UNEMBED = (96, 3, 16, 16), (96, 3, 8, 8)
CALLS: dict[str, tuple[Callable, Callable[[], tuple], int]] = {
    "short": (attention.attention, lambda: attend(197, 197), 1),
    "stream d72 bias": (attention.attention, lambda: attend(300, 300, bf16(1, 4, 300, 300), 72), 1),
    "decode": (attention.attention, lambda: attend(1, 1024), 2),
    "short backward": (attention_backward.attention_backward, lambda: attend_back(197), 1),
    "backward": (attention_backward.attention_backward, lambda: attend_back(300), 3),
    "backward bias": (
        attention_backward.attention_backward,
        lambda: attend_back(300, bf16(1, 4, 300, 300)),
        5,
    ),
    "packed": (varlen_attention.varlen_attention, lambda: packed(False), 1),
    "packed backward": (varlen_attention.varlen_attention_backward, lambda: packed(True), 3),
    "embed": (
        patch_embed.patch_embed,
        lambda: (images(torch.uint8), bf16(*WEIGHT), bf16(96), bf16(4, 96), bf16(1, 96),
                 *statistics()),
        1,
    ),
    "embed backward": (
        patch_embed.patch_embed_backward,
        lambda: (bf16(2, 5, 96), images(F32), bf16(*WEIGHT), *statistics(), True, True),
        3,
    ),
    "unembed": (
        patch_unembed.patch_unembed,
        lambda: (bf16(2, 16, 96), bf16(*UNEMBED), bf16(3), 4, 4),
        1,
    ),
    "unembed backward": (
        patch_unembed.patch_unembed_backward,
        lambda: (images(BF16), bf16(2, 16, 96), bf16(*UNEMBED), True),
        4,
    ),
    "rope": (qk_norm_rope.qk_norm_rope, lambda: rope(False), 1),
    "rope backward": (qk_norm_rope.qk_norm_rope_backward, lambda: rope(True), 6),
    "layer norm": (
        add_layer_norm.add_layer_norm,
        lambda: (bf16(2, 50, 96), bf16(2, 50, 96), bf16(96), bf16(96), 1e-5),
        1,
    ),
    "layer norm backward": (
        add_layer_norm.add_layer_norm_backward,
        lambda: (bf16(2, 50, 96), None, bf16(2, 50, 96), bf16(96), torch.zeros(100),
                 torch.zeros(100)),
        3,
    ),
}  # fmt: skip


def tensors_of(results) -> list[Tensor]:
    return list(results) if isinstance(results, tuple) else [results]


@pytest.mark.parametrize("name", CALLS)
def test_the_third_call_starts_what_the_launcher_would(name: str, host: Host, monkeypatch) -> None:
    launcher, arguments, kernels = CALLS[name]
    for _ in range(2):
        launcher(*arguments())
    made: list[Tensor] = []

    def empty(shape, **options):
        made.append(torch.empty(shape, **options))
        return made[-1]

    args = arguments()
    host.starts.clear()
    with monkeypatch.context() as patch:
        patch.setattr(launch, "_allocate", empty)
        wanted = tensors_of(launcher.__wrapped__(*args))
    plain = list(host.starts)
    host.starts.clear()
    host.asked = 0
    got = tensors_of(launcher(*args))
    assert host.asked == 0, "Triton was asked for a binary again"
    assert len(host.starts) == len(plain) == kernels
    # Every address is an argument's, or that of one allocation in both.
    pairs = {}
    for (kernel, grid, mine), (again, other_grid, theirs) in zip(plain, host.starts, strict=True):
        assert (kernel, grid) == (again, other_grid)
        for value, replayed in zip(mine, theirs, strict=True):
            if isinstance(value, Tensor):
                assert isinstance(replayed, int)
                assert pairs.setdefault(value.data_ptr(), replayed) == replayed
            else:
                assert value == replayed
    assert len(set(pairs.values())) == len(pairs)
    inputs = {x.data_ptr() for x in args if isinstance(x, Tensor)}
    assert all(pairs[x] == x for x in inputs & set(pairs))
    fresh = {x.data_ptr() for x in made if x.numel()}
    assert set(pairs) <= inputs | fresh | {x for x in pairs if x not in fresh and inside(x, args)}
    for mine, theirs in zip(wanted, got, strict=True):
        assert (mine.shape, mine.stride(), mine.dtype) == (
            theirs.shape,
            theirs.stride(),
            theirs.dtype,
        )
        if mine.numel():
            assert pairs[mine.data_ptr()] == theirs.data_ptr()


def inside(pointer: int, args: tuple) -> bool:
    """Whether an address lies within an argument: a view of it was given to a kernel."""
    return any(
        x.untyped_storage().data_ptr()
        <= pointer
        < x.untyped_storage().data_ptr() + x.untyped_storage().nbytes()
        for x in args
        if isinstance(x, Tensor)
    )


def test_what_packed_rows_hold_beyond_the_last_offset_is_written_each_time() -> None:
    args = packed(False)
    for _ in range(4):
        out, lse = varlen_attention.varlen_attention(*args)
        assert bool((out == 0).all() and (lse == float("-inf")).all())
        out.fill_(1.0), lse.fill_(1.0)


def started(host: Host, index: int = -1) -> tuple:
    kernel, _, args = host.starts[index]
    return dict(zip(kernel.arg_names, map(address, args), strict=True))


def test_one_tensor_given_thrice_and_then_three(host: Host) -> None:
    """Arguments are told apart by place, whatever they shared when the call was recorded."""
    x = heads(197)
    rest = (None, None, None, False, 0.25)
    for _ in range(3):
        attention.attention(x, x, x, *rest)
    query, key, value = heads(197), heads(197), heads(197)
    attention.attention(query, key, value, *rest)
    addresses = started(host)
    assert [addresses[n] for n in ("query", "key", "value")] == [
        x.data_ptr() for x in (query, key, value)
    ]
    assert host.asked == 2


def test_views_of_one_buffer_and_then_of_three(host: Host) -> None:
    """A view made by the launcher belongs to the argument that it was made of."""
    grad, image, weight = bf16(2, 5, 96), images(BF16), bf16(*WEIGHT)
    buffer = bf16(2 * 5 * 96 + 2 * 3 * 32 * 32)
    rest = (None, None, False, True)
    shared = buffer[:960].view(2, 5, 96), buffer[960:].view(2, 3, 32, 32)
    for _ in range(2):
        patch_embed.patch_embed_backward(shared[0], shared[1], weight, *rest)
    host.starts.clear()
    patch_embed.patch_embed_backward(grad, image, weight, *rest)
    addresses = started(host, 0)
    assert addresses["rows"] == grad[:, 1:].data_ptr() and addresses["images"] == image.data_ptr()


def asked_for(host: Host, calls: int, call: Callable[[], object]) -> int:
    before = host.asked
    for _ in range(calls):
        call()
    return host.asked - before


def test_a_call_asks_twice_and_sizes_are_calls_of_their_own(host: Host) -> None:
    assert asked_for(host, 9, lambda: attention.attention(*attend(40, 50))) == 2
    assert asked_for(host, 9, lambda: attention.attention(*attend(40, 51))) == 2
    assert asked_for(host, 9, lambda: attention.attention(*attend(40, 51)[:-1], 0.5)) == 2


def test_other_work_on_a_tensor_is_done_each_time(host: Host) -> None:
    assert asked_for(host, 5, lambda: attention.attention(*attend(41, 50)[:-1], -0.125)) == 5
    expanded = torch.zeros(1, dtype=BF16).expand(2, 4, 60, 64)
    _, *rest = attend_back(60)
    backward = attention_backward.attention_backward
    assert asked_for(host, 5, lambda: backward(expanded, *rest)) == 5


def test_an_odd_address_is_not_mistaken_for_an_aligned_one(host: Host) -> None:
    flat = bf16(2 * 4 * 42 * 64 + 1)
    odd, even = flat[1:].view(2, 4, 42, 64), flat[:-1].view(2, 4, 42, 64)
    rest = attend(42, 50)[1:]
    assert asked_for(host, 4, lambda: attention.attention(even, *rest)) == 2
    assert asked_for(host, 4, lambda: attention.attention(odd, *rest)) == 4


def test_a_table_that_answers_differently_is_asked(host: Host) -> None:
    args = attend(300, 310)
    config = StreamConfig(16, 16, 4, 1)
    for _ in range(3):
        attention.attention(*args)
    with answering(attention.STREAM, config):
        attention.attention(*args)
        assert started(host)["BLOCK_M"] == 16
    attention.attention(*args)
    assert started(host)["BLOCK_M"] == 64


def test_float32_products_follow_the_user(host: Host) -> None:
    args = (*(heads(300, dtype=F32) for _ in range(3)), None, None, None, False, 0.125)
    for _ in range(3):
        attention.attention(*args)
    assert started(host)["SPEC"].precision == "ieee"
    tf32(lambda: attention.attention(*args))()
    assert started(host)["SPEC"].precision == "tf32"


def test_hooks_of_triton_see_every_start(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's own way to start a kernel calls them: it is gone as soon as one is set."""
    args = attend(40, 50)
    for _ in range(3):
        attention.attention(*args)
    attention.attention(*args)
    usual = host.by_triton
    assert usual == 2
    for hooks in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        with monkeypatch.context() as patch:
            patch.setattr(hooks, "calls", [print])
            attention.attention(*args)
        attention.attention(*args)
    assert host.by_triton == usual + 2 and len(host.starts) == 8


def test_what_is_made_for_a_replay_is_what_a_launcher_makes(host: Host) -> None:
    """Tensors of inference in inference mode, ordinary ones elsewhere."""
    args = attend(43, 50)
    for context in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with context():
            made = [attention.attention(*args)[0] for _ in range(4)]
        assert len({(x.is_inference(), x.requires_grad) for x in made}) == 1


def test_memory_is_bounded(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "MOST", 4)
    for n in range(60, 80):
        attention.attention(*attend(40, n))
    assert asked_for(host, 5, lambda: attention.attention(*attend(40, 90))) == 2
