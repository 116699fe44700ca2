"""Runs every kernel at awkward sizes in buffers of their exact size; test_sanitizers.py starts this
under the address sanitizer, which stops the process at the first access outside one.

    python sanitized.py LIBRARY [provoke]

With `provoke` it hands over a buffer that is too small: the sanitizer must stop it.
"""

from __future__ import annotations

import ctypes
import sys

import torch
from harness import AttentionForward, Host, Strides, pointer


def attention(host: Host) -> None:
    query = torch.randn(1, 2, 37, 72).bfloat16()
    key, value = (torch.randn(1, 1, 51, 72).bfloat16() for _ in range(2))
    for mask in (None, torch.randn(1, 2, 37, 51), torch.rand(1, 1, 1, 51) > 0.5):
        out, lse = host.attention(query, key, value, attn_mask=mask, is_causal=True)
        host.attention_backward(
            out, lse, query, key, value, out, lse, attn_mask=mask, is_causal=True
        )
        few = query[:, :, :3].contiguous()
        rows = None if mask is None else mask[:, :, :3].contiguous()
        host.attention(few, key, value, attn_mask=rows, function="host_attention_decode")


def narrow_attention(host: Host) -> None:
    """Narrower than the tiles, and in packed projections whose last row ends the buffer."""
    query, key, value = torch.randn(3, 1, 1, 17, 40).bfloat16().unbind(0)
    out, lse = host.attention(query, key, value)
    host.attention_backward(out, lse, query, key, value, out, lse)


def warpgroup_attention(host: Host) -> None:
    """The kernels for sm_90a, in packed memory whose last row ends the buffer."""
    for head_dim, causal in ((56, False), (64, True), (104, True), (128, False)):
        packed = torch.randn(1, 70, 3, 1, head_dim).bfloat16()
        query, key, value = packed.permute(2, 0, 3, 1, 4)
        out, lse = host.attention(
            query, key, value, is_causal=causal, function="host_attention_forward_sm90"
        )
        tensors = (out, lse, query, key, value, out, lse)
        host.attention_backward(*tensors, is_causal=causal, function="host_attention_backward_sm90")


def patch_embed(host: Host) -> None:
    for patch, pixel in ((14, torch.uint8), (3, torch.float32), (7, torch.uint8)):
        images = torch.rand(2, 3, 2 * patch + 1, patch).mul(255).to(pixel)
        weight = torch.randn(9, 3, patch, patch).bfloat16()
        prefix, bias = torch.randn(1, 9).bfloat16(), torch.randn(9).bfloat16()
        out = host.patch_embed(images, weight, bias, None, prefix)
        host.patch_embed_backward(out, images, weight, images_grad=pixel != torch.uint8)


def provoke(host: Host) -> None:
    """Keys that end eight elements early."""
    query = torch.randn(1, 1, 16, 72).bfloat16()
    memory = torch.randn(16 * 72 - 8).bfloat16()
    short = memory.as_strided((1, 1, 15, 72), (0, 0, 72, 1))
    inputs = host.attention_inputs(query, short, short, None, None, None, False, 1.0)
    inputs.keys = 16
    out, lse = torch.empty_like(query), torch.empty(16)
    host.call(
        "host_attention_forward",
        AttentionForward(inputs, pointer(out), Strides.of(out), pointer(lse)),
    )


if __name__ == "__main__":
    torch.manual_seed(0)
    library = ctypes.CDLL(sys.argv[1])
    if "provoke" in sys.argv:
        provoke(Host(library))
    for late_copies in (True, False):
        for gpu_size in (1, 132):
            host = Host(library, late_copies=late_copies, multiprocessors=gpu_size)
            for run in (attention, narrow_attention, warpgroup_attention, patch_embed):
                run(host)
    print("clean")
