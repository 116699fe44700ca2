"""What the CUDA C++ kernels refuse: their sizes, and the shared memory that a block needs.

The kernels for short sequences keep a head's keys and values in shared memory, so that what they
can do depends on the GPU. The arithmetic is that of ``csrc/cuda`` (``forward_shared_bytes``,
``backward_shared_bytes``, ``plan_patch_embed``), written again because a choice of backend must be
traceable by ``torch.compile``; ``tests/cuda_host`` holds the two against each other.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ..dispatch import Refusal
from ._refusals import NOT_ON_CUDA

SHORT_SEQUENCE = 272  # keys whose scores a row holds in registers
FEW_QUERIES = 8  # a step of generation: any number of keys, by the decode kernel
WIDTHS = (32, 64, 72, 80, 96, 128)  # of rows in shared memory; a head dimension takes the next
TILE = 16
WARPS = 4


@torch.compiler.assume_constant_result
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one block can have on that GPU."""
    properties = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)  # type: ignore[attr-defined]


def _rows_bytes(head_dim: int, rows: int) -> int:
    chunks = next(width for width in WIDTHS if head_dim <= width) // 8
    return rows * 16 * (chunks if chunks in (4, 8) else chunks | 1)


def _round_up(rows: int) -> int:
    return (rows + TILE - 1) // TILE * TILE


def forward_bytes(head_dim: int, keys: int) -> int:
    """Shared memory of a block of the short-sequence forward kernel."""
    return _rows_bytes(head_dim, 2 * _round_up(keys) + WARPS * 2 * TILE)


def backward_bytes(head_dim: int, queries: int, keys: int, group: int) -> int:
    """Shared memory of a block of the backward kernel; ``group`` query heads share a key head."""
    longest = _round_up(max(queries, keys))
    rows = _rows_bytes(head_dim, 2 * longest + WARPS * 2 * TILE)
    return rows + group * _round_up(queries) * 16


def patch_embed_bytes(values: int, channels: int) -> int:
    """The most shared memory of a block of the patch embedding kernels: the weights' gradient, with
    pixels loaded one by one. ``values``: of a patch.
    """
    stage = 64 * 17 * 16  # rows of 128 values and a chunk of padding
    return 2 * 2 * stage + 8 * (128 + values + channels)


def _is_packed(a: Any) -> bool:
    return hasattr(a, "max_seqlen_q")


def _lengths(a: Any) -> tuple[int, int]:
    """Queries and keys, of the longest sequence where they are packed."""
    if _is_packed(a):
        return a.max_seqlen_q, a.max_seqlen_k
    return a.query.shape[2], a.key.shape[2]


def _is_step(a: Any) -> bool:
    """Whether the decode kernel takes it, which streams keys and values."""
    return not _is_packed(a) and a.query.shape[2] <= FEW_QUERIES


def _long(a: Any) -> bool:
    return not _is_step(a) and _lengths(a)[1] > SHORT_SEQUENCE


def _forward_does_not_fit(a: Any) -> bool:
    if _is_step(a) or _long(a) or a.query.shape[-1] > WIDTHS[-1]:
        return False  # streamed, or refused already
    return forward_bytes(a.query.shape[-1], _lengths(a)[1]) > shared_memory(a.query.device)


def _long_for_backward(a: Any) -> bool:
    return max(_lengths(a)) > SHORT_SEQUENCE


def _backward_does_not_fit(a: Any) -> bool:
    heads, kv_heads, head_dim = a.query.shape[1], a.key.shape[1], a.query.shape[-1]
    if head_dim > WIDTHS[-1] or _long_for_backward(a) or kv_heads == 0:
        return False
    needed = backward_bytes(head_dim, *_lengths(a), heads // kv_heads)
    return needed > shared_memory(a.query.device)


def _trains_beyond_the_backward(a: Any) -> bool:
    """Whether gradients will be asked for that the CUDA backward would have to leave to others."""
    mask = getattr(a, "attn_mask", None)
    mask_grad = mask is not None and mask.requires_grad
    if not torch.is_grad_enabled():
        return False
    if not (mask_grad or any(x.requires_grad for x in (a.query, a.key, a.value))):
        return False
    return mask_grad or _long_for_backward(a) or _backward_does_not_fit(a)


def _half_of(argument: str) -> Refusal:
    return Refusal(
        "dtype",
        "the CUDA kernels compute in bfloat16 and float16 only",
        lambda a: getattr(a, argument).dtype not in (torch.bfloat16, torch.float16),
    )


HALF = _half_of("query")
HEAD_DIM = Refusal(
    "head_dim",
    f"the CUDA kernels take head dimensions that are multiples of 8 up to {WIDTHS[-1]}",
    lambda a: a.query.shape[-1] % 8 != 0 or a.query.shape[-1] > WIDTHS[-1],
)
KEYS = Refusal(
    "length",
    f"with more than {FEW_QUERIES} queries the CUDA kernels take at most {SHORT_SEQUENCE} keys",
    _long,
)
FORWARD_MEMORY = Refusal(
    "shared_memory", "a head's keys and values don't fit in this GPU's", _forward_does_not_fit
)
TRAINING = Refusal(
    "training",
    f"the backward CUDA kernel takes at most {SHORT_SEQUENCE} queries and keys, as many as fit in "
    "shared memory, and gives no gradient of attn_mask",
    _trains_beyond_the_backward,
)
BACKWARD_LENGTH = Refusal(
    "length",
    f"the backward CUDA kernel takes at most {SHORT_SEQUENCE} queries and keys",
    _long_for_backward,
)
BACKWARD_MEMORY = Refusal(
    "shared_memory", "a head doesn't fit in this GPU's", _backward_does_not_fit
)
MASK_GRADIENT = Refusal(
    "mask_gradient",
    "the backward CUDA kernel gives no gradient of attn_mask",
    lambda a: a.mask_grad,
)
PACKED_KEYS = Refusal(
    "length",
    f"the CUDA kernels take packed sequences of at most {SHORT_SEQUENCE} keys",
    _long,
)
ATTENTION = (NOT_ON_CUDA, HALF, HEAD_DIM, KEYS, FORWARD_MEMORY, TRAINING)
ATTENTION_BACKWARD = (
    NOT_ON_CUDA,
    HALF,
    HEAD_DIM,
    BACKWARD_LENGTH,
    BACKWARD_MEMORY,
    MASK_GRADIENT,
)
VARLEN_ATTENTION = (NOT_ON_CUDA, HALF, HEAD_DIM, PACKED_KEYS, FORWARD_MEMORY, TRAINING)
VARLEN_ATTENTION_BACKWARD = (NOT_ON_CUDA, HALF, HEAD_DIM, BACKWARD_LENGTH, BACKWARD_MEMORY)


def _patches(a: Any) -> int:
    grid = [n // p for n, p in zip(a.images.shape[2:], a.weight.shape[2:], strict=True)]
    return a.images.shape[0] * math.prod(grid)


def _patch_does_not_fit(a: Any) -> bool:
    needed = patch_embed_bytes(math.prod(a.weight.shape[1:]), a.weight.shape[1])
    return needed > shared_memory(a.weight.device)


PATCH_EMBED = (
    NOT_ON_CUDA,
    _half_of("weight"),
    Refusal(
        "size",
        "the CUDA kernels count the batch's patches in 31 bits",
        lambda a: _patches(a) >= 2**31,
    ),
    Refusal(
        "shared_memory",
        "the table of a patch's pixels doesn't fit in this GPU's",
        _patch_does_not_fit,
    ),
)
