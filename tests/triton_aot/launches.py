"""What is compiled ahead of time: every kernel, by its launcher, for the sizes that models use."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs a process of its own, without TRITON_INTERPRET", allow_module_level=True)
pytest.importorskip("triton")

import torch
from torch import Tensor

from patchgen_fast.triton import (
    add_layer_norm,
    attention,
    attention_backward,
    patch_embed,
    patch_unembed,
    qk_norm_rope,
    varlen_attention,
)
from patchgen_fast.triton.launch import Launch, recording

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
CAPABILITIES = (80, 86, 89, 90, 100, 120)


def meta(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def heads(batch: int, heads: int, tokens: int, d: int, dtype: torch.dtype = BF16) -> Tensor:
    return meta(batch, tokens, 3, heads, d, dtype=dtype)[:, :, 1].transpose(1, 2)


def mask_of(kind: str, batch: int, h: int, nq: int, nk: int) -> Tensor | None:
    if kind == "padding":
        return meta(batch, 1, 1, nk, dtype=torch.bool)
    return meta(1, h, nq, nk) if kind == "bias" else None


def attend(d, nq, nk=None, *, batch=8, h=12, kv_heads=None, dtype=BF16, mask="", causal=False):
    """The arguments of a forward call."""
    nk = nk or nq
    key = heads(batch, kv_heads or h, nk, d, dtype)
    offsets = meta(batch, dtype=torch.int32) if causal else None
    return (
        heads(batch, h, nq, d, dtype), key, key, mask_of(mask, batch, h, nq, nk), offsets, offsets,
        causal, d**-0.5,
    )  # fmt: skip


def forward(*args, **options) -> None:
    attention.attention(*attend(*args, **options))


def backward(*args, **options) -> None:
    query, *rest = attend(*args, **options)
    lse = meta(*query.shape[:3], dtype=F32)
    attention_backward.attention_backward(
        query, None, query, *rest[:2], query, lse, *rest[2:], options.get("mask") == "bias"
    )


def packed(d: int, back: bool) -> None:
    query, offsets = meta(4096, 12, d), meta(9, dtype=torch.int32)
    lse = meta(12, 4096, dtype=F32)
    rest = (offsets, offsets, 800, 800, True, d**-0.5)
    if back:
        varlen_attention.varlen_attention_backward(
            query, None, query, query, query, query, lse, *rest
        )
    else:
        varlen_attention.varlen_attention(query, query, query, *rest)


def embed(images: Tensor, patch: tuple[int, ...], width: int, dtype: torch.dtype = BF16) -> None:
    weight = meta(width, images.shape[1], *patch, dtype=dtype)
    tokens = 1
    for n, p in zip(images.shape[2:], patch, strict=True):
        tokens *= n // p
    channel = meta(images.shape[1], dtype=F32)
    patch_embed.patch_embed(
        images, weight, meta(width, dtype=dtype), meta(tokens, width, dtype=dtype),
        meta(1, width, dtype=dtype), channel, channel,
    )  # fmt: skip
    grad = meta(images.shape[0], 1 + tokens, width, dtype=dtype)
    floats = images.is_floating_point()
    patch_embed.patch_embed_backward(grad, images, weight, channel, channel, floats, True)


def unembed() -> None:
    tokens, weight = meta(8, 256, 1152), meta(1152, 4, 2, 2)
    images = patch_unembed.patch_unembed(tokens, weight, meta(4), 16, 16)
    patch_unembed.patch_unembed_backward(images, tokens, weight, True)


def rope(norm: str, interleaved: bool) -> None:
    query, weight, table = (
        heads(8, 12, 197, 64),
        meta(64, dtype=F32),
        meta(1, 1, 196, 64, dtype=F32),
    )
    vectors = (weight, weight, None, None, table, table, norm, 1e-6, interleaved, 1)
    qk_norm_rope.qk_norm_rope(query, query, *vectors)
    qk_norm_rope.qk_norm_rope_backward(query, query, query, query, *vectors, True)


def layer_norm() -> None:
    x, weight, row = meta(8, 197, 768), meta(768), meta(8 * 197, dtype=F32)
    add_layer_norm.add_layer_norm(x, x, weight, weight, 1e-5)
    add_layer_norm.add_layer_norm_backward(x, x, x, weight, row, row)


def tf32(call: Callable[[], None]) -> Callable[[], None]:
    """`call` where the user allows TF32."""

    def allowed() -> None:
        matmul = torch.backends.cuda.matmul
        before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
        try:
            call()
        finally:
            matmul.fp32_precision = before

    return allowed


SOURCES = {
    "short n50": lambda: forward(64, 50),
    "short n197": lambda: forward(64, 197),
    "short n256": lambda: forward(64, 256),
    "short n197 d72": lambda: forward(72, 197),
    "short n128 d128": lambda: forward(128, 128),
    "stream cross n77": lambda: forward(64, 1024, 77),
    "stream n197 causal": lambda: forward(64, 197, causal=True),
    "stream d64": lambda: forward(64, 729),
    "stream d72": lambda: forward(72, 729),
    "stream d128 f16": lambda: forward(128, 729, dtype=F16),
    "stream d256": lambda: forward(256, 729),
    "stream d72 causal": lambda: forward(72, 729, causal=True),
    "stream d64 padding": lambda: forward(64, 729, mask="padding"),
    "stream d72 bias": lambda: forward(72, 576, mask="bias"),
    "stream d64 f32": lambda: forward(64, 729, dtype=F32),
    "stream d256 f32": lambda: forward(256, 729, dtype=F32),
    "stream d128 f32": lambda: forward(128, 729, dtype=F32),
    "stream d128 tf32": tf32(lambda: forward(128, 729, dtype=F32)),
    "stream d256 tf32": tf32(lambda: forward(256, 729, dtype=F32)),
    "decode d64 gqa": lambda: forward(64, 4, 1024, kv_heads=3, causal=True),
    "decode d256": lambda: forward(256, 1, 1024),
    "decode d128 f32": lambda: forward(128, 1, 1024, dtype=F32),
    "decode d256 f32": lambda: forward(256, 1, 1024, dtype=F32),
    "packed d72": lambda: packed(72, False),
    "backward short n197": lambda: backward(64, 197),
    "backward d64": lambda: backward(64, 729),
    "backward d72": lambda: backward(72, 729),
    "backward d128": lambda: backward(128, 729),
    "backward d256": lambda: backward(256, 729),
    "backward d64 causal": lambda: backward(64, 729, causal=True),
    "backward d64 bias": lambda: backward(64, 576, mask="bias"),
    "backward d64 f32": lambda: backward(64, 729, dtype=F32),
    "backward d128 f32": lambda: backward(128, 729, dtype=F32),
    "backward d256 f32": lambda: backward(256, 729, dtype=F32),
    "backward d128 tf32": tf32(lambda: backward(128, 729, dtype=F32)),
    "backward d256 tf32": tf32(lambda: backward(256, 729, dtype=F32)),
    "backward d64 bias f32": lambda: backward(64, 576, dtype=F32, mask="bias"),
    "backward d256 bias f32": lambda: backward(256, 576, dtype=F32, mask="bias"),
    "backward d256 bias": lambda: backward(256, 576, mask="bias"),
    "backward packed d64": lambda: packed(64, True),
    "embed p16 uint8": lambda: embed(meta(8, 3, 224, 224, dtype=torch.uint8), (16, 16), 768),
    "embed p14 float32": lambda: embed(meta(8, 3, 224, 224, dtype=F32), (14, 14), 1024),
    "embed video": lambda: embed(meta(8, 3, 8, 224, 224), (2, 16, 16), 768),
    "embed p2 f32": lambda: embed(meta(8, 4, 32, 32, dtype=F32), (2, 2), 1152, F32),
    "embed p16 tf32": tf32(lambda: embed(meta(8, 3, 224, 224, dtype=F32), (16, 16), 768, F32)),
    "unembed p2": unembed,
    "rope rms": lambda: rope("rms", False),
    "rope layer pairs": lambda: rope("layer", True),
    "layer norm": layer_norm,
}
# Alike in their rows to a source that takes these at their largest: for sm_90, and in the report.
ALIKE = (
    "short n50", "stream cross n77", "stream d64 padding", "stream d64 f32", "packed d72",
    "backward d64", "backward d64 f32", "backward d256 f32", "backward packed d64",
    "embed p14 float32",
)  # fmt: skip
# sm_86 and sm_89 share instructions with sm_80 and limits with sm_120: what is largest is enough.
LARGEST = (
    "short n197", "short n197 d72", "stream d72 causal", "stream d128 f16", "stream d256",
    "backward short n197", "backward d128", "embed p16 uint8",
)  # fmt: skip


def tabulated() -> list[tuple[str, int]]:
    """Sources and the chips that the code report has them for."""
    return [
        (source, capability)
        for capability in CAPABILITIES
        for source in SOURCES
        if capability not in (86, 89) or source in LARGEST
    ]


def matrix() -> list[tuple[str, int]]:
    """Sources and the chips that a test compiles them for."""
    return [
        (source, capability)
        for source, capability in tabulated()
        if capability == 90 or source not in ALIKE
    ]


def recorded(source: str, capability: int) -> list[Launch]:
    """The launches of a source, configured for a chip."""
    with recording(capability) as launches:
        SOURCES[source]()
    return launches
