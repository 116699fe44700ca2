"""Every barrier, wait and descriptor is needed: a kernel that does without is seen to be wrong.

This shows that the emulator would notice a missing one, so that the other tests mean something. One
is beyond it: blocks run one after another here, so the barrier before the decode kernel takes its
ticket, which orders what other blocks see, is not missed.
"""

from __future__ import annotations

import pytest
import torch
from harness import EmulatorError, Host

SEEDS = range(6)


def seen_to_be_wrong(host: Host, run) -> bool:
    """Whether some order of warps, or of copies, gives another result than the whole kernel, or
    stops."""
    wanted = run(Host(host.library))
    for host.seed in SEEDS:
        for host.late_copies in (True, False):
            try:
                got = run(host)
            except EmulatorError:
                return True
            if not all(a.equal(b) for a, b in zip(got, wanted, strict=True)):
                return True
    return False


def forward(host: Host):
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 1, 150, 64).bfloat16() for _ in range(3))
    return host.attention(query, key, value, scale=0.125)


def backward(host: Host):
    torch.manual_seed(0)
    query, key, value, grad_out = (torch.randn(1, 2, 150, 32).bfloat16() for _ in range(4))
    key, value = key[:, :1], value[:, :1]  # two query heads share them
    out, lse = Host(host.library).attention(query, key, value, scale=0.125)
    return host.attention_backward(grad_out, None, query, key, value, out, lse, scale=0.125)


@pytest.mark.parametrize(
    "left_out, index",
    [
        ("copy wait", 0),  # keys and values
        ("block barrier", 0),
        ("copy wait", 1),  # a tile of queries
        ("warp barrier", 1),
        ("block barrier", 1),  # the rows are done
        ("block barrier", 2),  # queries and grad_out
        ("block barrier", 3),  # of the second head
        ("block barrier", 4),
    ],
)
def test_backward(library, left_out, index):
    host = Host(library, left_out=left_out, left_out_index=index)
    assert seen_to_be_wrong(host, backward)


@pytest.mark.parametrize(
    "left_out, index",
    [
        ("copy wait", 0),  # queries and keys
        ("block barrier", 0),
        ("copy wait", 1),  # values
        ("block barrier", 1),
        ("copy wait", 2),  # the queries of the next tile
        ("warp barrier", 1),  # the result, staged
    ],
)
def test_forward(library, left_out, index):
    host = Host(library, left_out=left_out, left_out_index=index)
    assert seen_to_be_wrong(host, forward)


def forward_sm90(host: Host):
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 200, 64).bfloat16() for _ in range(3))
    function = "host_attention_forward_sm90"
    return host.attention(query, key, value, scale=0.125, function=function)


@pytest.mark.parametrize(
    "left_out, index",
    [
        ("block barrier", 0),  # the barriers are initialised
        ("memory barrier", 0),  # keys
        ("memory barrier", 1),  # queries
        ("copy wait", 0),  # the scores
        ("memory barrier", 2),  # values
        ("copy wait", 1),  # the sum
        ("block barrier", 1),  # the stage is read out
        ("memory barrier", 3),  # the next queries
    ],
)
def test_forward_sm90(library, left_out, index):
    host = Host(library, left_out=left_out, left_out_index=index)
    assert seen_to_be_wrong(host, forward_sm90)


@pytest.mark.parametrize("index", [0, 1, 4, 12, 20, 27])  # of scores, then of the sum
def test_descriptors_sm90(library, index):
    host = Host(library, left_out="descriptor step", left_out_index=index)
    assert seen_to_be_wrong(host, forward_sm90)


def backward_sm90(host: Host, head_dim: int = 64):
    torch.manual_seed(0)
    query, key, value, grad_out = (torch.randn(1, 2, 150, head_dim).bfloat16() for _ in range(4))
    key, value = key[:, :1], value[:, :1]  # two query heads share them
    out, lse = Host(host.library).attention(query, key, value, scale=0.125)
    function = "host_attention_backward_sm90"
    tensors = (query, key, value, out, lse)
    return host.attention_backward(grad_out, None, *tensors, scale=0.125, function=function)


def wide_backward_sm90(host: Host):
    return backward_sm90(host, 128)


@pytest.mark.parametrize(
    "left_out, index",
    [
        ("block barrier", 0),  # the barriers are initialised
        ("memory barrier", 0),  # a tile of queries
        ("memory barrier", 1),  # keys
        ("memory barrier", 2),  # values
        ("warp barrier", 0),  # what is known of the queries
        ("warp barrier", 1),  # the result, staged
        ("block barrier", 1),  # the stage is read out
        ("memory barrier", 3),  # the next queries
        ("block barrier", 6),  # the rows are done
        ("memory barrier", 8),  # a tile of keys
        ("memory barrier", 9),  # queries
        ("memory barrier", 10),  # grad_out
        ("memory barrier", 11),  # the second head
        ("memory barrier", 12),
        ("block barrier", 8),  # the stage is read out
        ("copy wait", 0),  # rows: scores
        ("copy wait", 1),  # products
        ("copy wait", 10),  # the sum
        ("copy wait", 66),  # columns: scores
        ("copy wait", 67),  # products
        ("copy wait", 98),  # the sums of the last tile
    ],
)
def test_backward_sm90(library, left_out, index):
    host = Host(library, left_out=left_out, left_out_index=index)
    assert seen_to_be_wrong(host, backward_sm90)


@pytest.mark.parametrize(
    "index",
    [
        1,  # the stages are read out
        3,  # the rows are done
        4,  # the first head is read out, by both warpgroups: one alone waits for all its warps
        5,  # the stages
    ],
)
def test_wide_backward_sm90(library, index):
    host = Host(library, left_out="block barrier", left_out_index=index)
    assert seen_to_be_wrong(host, wide_backward_sm90)


# Of a chunk: 4 of the scores, 4 of the products, 2 of the sum; in columns 2 of either sum.
@pytest.mark.parametrize("index", [0, 1, 4, 5, 8, 9, 300, 301, 304, 308, 309, 310, 311])
def test_backward_descriptors_sm90(library, index):
    host = Host(library, left_out="descriptor step", left_out_index=index)
    assert seen_to_be_wrong(host, backward_sm90)


@pytest.mark.parametrize("index", [0, 1, 2, 3, 8, 9, 16, 17, 31, 32, 33, 34, 35])
def test_wide_backward_descriptors_sm90(library, index):
    """Left operands are described too."""
    host = Host(library, left_out="descriptor step", left_out_index=index)
    assert seen_to_be_wrong(host, wide_backward_sm90)


def decode(host: Host):
    torch.manual_seed(0)
    query = torch.randn(1, 2, 3, 64).bfloat16()  # both heads share a tile
    key, value = (torch.randn(1, 1, 700, 64).bfloat16() for _ in range(2))
    host.multiprocessors = 132  # several splits
    return host.attention(query, key, value, scale=0.125, function="host_attention_decode")


@pytest.mark.parametrize(
    "left_out, index",
    [
        ("copy wait", 0),  # queries
        ("block barrier", 0),
        ("copy wait", 1),  # a tile of keys and values
        ("warp barrier", 0),
        ("block barrier", 1),  # the stages are read out
        ("block barrier", 2),  # the warps' parts are written
        ("block barrier", 4),  # the ticket
    ],
)
def test_decode(library, left_out, index):
    host = Host(library, left_out=left_out, left_out_index=index)
    assert seen_to_be_wrong(host, decode)


def embed(host: Host):
    torch.manual_seed(0)
    images = torch.randn(2, 3, 48, 48)
    return (host.patch_embed(images, torch.randn(72, 3, 16, 16).bfloat16()),)


@pytest.mark.parametrize(
    "left_out, index",
    [
        ("block barrier", 0),  # the table of pixels
        ("copy wait", 0),  # the first stage of weights
        ("copy wait", 11),  # the last
        ("block barrier", 1),  # a stage
        ("block barrier", 13),  # the result takes the stages' place
        ("warp barrier", 0),  # the result, staged
    ],
)
def test_patch_embed(library, left_out, index):
    host = Host(library, left_out=left_out, left_out_index=index)
    assert seen_to_be_wrong(host, embed)


def weight_gradient(host: Host):
    torch.manual_seed(0)
    images = torch.randint(0, 256, (40, 3, 48, 48), dtype=torch.uint8)
    weight, grad_out = torch.randn(24, 3, 16, 16).bfloat16(), torch.randn(40, 9, 24).bfloat16()
    return host.patch_embed_backward(grad_out, images, weight, images_grad=False)[1:]


def images_gradient(host: Host):
    torch.manual_seed(0)
    images, weight = torch.randn(4, 3, 48, 48), torch.randn(72, 3, 16, 16).bfloat16()
    grad_out = torch.randn(4, 9, 72).bfloat16()
    return host.patch_embed_backward(grad_out, images, weight)[:1]


@pytest.mark.parametrize("run", [weight_gradient, images_gradient])
@pytest.mark.parametrize("left_out", ["copy wait", "block barrier"])
@pytest.mark.parametrize("index", [0, 1])
def test_patch_embed_backward(library, run, left_out, index):
    host = Host(library, left_out=left_out, left_out_index=index)
    assert seen_to_be_wrong(host, run)


RUNS = [
    *(forward, backward, forward_sm90, backward_sm90, wide_backward_sm90, decode),
    *(embed, weight_gradient, images_gradient),
]


@pytest.mark.parametrize("run", RUNS)
def test_the_whole_kernel_gives_one_result(library, run):
    assert not seen_to_be_wrong(Host(library), run)
