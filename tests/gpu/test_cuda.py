"""The CUDA C++ kernels on a GPU: what the host run cannot show. Skipped where there is none.

compute-sanitizer --tool memcheck python -m pytest tests/gpu/test_cuda.py   (racecheck, synccheck,
initcheck likewise)
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "cuda_host"))

import truth  # noqa: E402

from patchgen_fast import _native  # noqa: E402

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)
if not _native.status().loaded or not _native.has_cuda():
    pytest.skip("the native operators were built without CUDA", allow_module_level=True)

OPS = torch.ops.patchgen_fast


def attention_inputs(*shape, keys=None):
    torch.manual_seed(0)
    batch, heads, queries, head_dim = shape
    query = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    shape = (batch, heads, keys or queries, head_dim)
    return (query, *(torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2)))


def forward(query, key, value, *, causal=False):
    scale = query.shape[-1] ** -0.5
    return OPS.attention.cuda(query, key, value, None, None, None, causal, scale)


def check_forward(query, key, value, **options):
    scale = query.shape[-1] ** -0.5
    out, _ = forward(query, key, value, **options)
    tensors = [t.cpu() for t in (query, key, value)]
    named = {"scale": scale, "is_causal": options.get("causal", False)}
    eager, _ = truth.attention(*tensors, **named)
    exact, _ = truth.attention(*[t.double() for t in tensors], **named)
    truth.assert_parity(out.cpu(), eager, exact)


@pytest.mark.parametrize("head_dim", [32, 64, 72, 80, 96, 128])
@pytest.mark.parametrize("tokens", [1, 16, 50, 197, 256, 272])
def test_attention(head_dim, tokens):
    limit = torch.cuda.get_device_properties(0).shared_memory_per_block_optin
    try:
        check_forward(*attention_inputs(2, 3, tokens, head_dim))
    except RuntimeError as error:
        assert limit < 200_000 and "Remedy" in str(error)


def test_attention_of_many_heads_and_causal():
    check_forward(*attention_inputs(64, 12, 197, 64), causal=True)


@pytest.mark.parametrize("batch", [1, 64])
def test_decode(batch):
    check_forward(*attention_inputs(batch, 12, 1, 64, keys=1000))


def test_gradients_are_bitwise_repeatable():
    query, key, value = attention_inputs(8, 12, 197, 64)
    out, lse = forward(query, key, value)
    arguments = (out, None, query, key, value, out, lse, None, None, None, False, 0.125, False)
    first = OPS.attention_backward.cuda(*arguments)
    tensors = [t.cpu() for t in (query, key, value, out)]
    eager = truth.attention_gradients(*tensors, None, scale=0.125)
    exact = truth.attention_gradients(*[t.double() for t in tensors], None, scale=0.125)
    for ours, theirs, true in zip(first[:3], eager, exact, strict=True):
        truth.assert_parity(ours.cpu(), theirs, true)
    for _ in range(5):
        again = OPS.attention_backward.cuda(*arguments)
        assert all(a.equal(b) for a, b in zip(again, first, strict=True))


@pytest.mark.parametrize("pixel", [torch.uint8, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("patch", [14, 16])
def test_patch_embed(pixel, patch):
    torch.manual_seed(0)
    images = torch.rand(4, 3, 224, 224).mul(255).to(pixel)
    weight = torch.randn(768, 3, patch, patch).mul(0.02).bfloat16()
    got = OPS.patch_embed.cuda(images.cuda(), weight.cuda(), None, None, None, None, None)
    exact = truth.patch_embed(images if pixel == torch.uint8 else images.double(), weight.double())
    truth.assert_parity(got.cpu(), truth.patch_embed(images, weight), exact)


def test_a_graph_captures_and_replays():
    query, key, value = attention_inputs(2, 3, 197, 64)
    wanted, _ = forward(query, key, value)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got, _ = forward(query, key, value)
    got.zero_()
    graph.replay()
    assert got.equal(wanted)


def test_the_current_stream_is_used():
    query, key, value = attention_inputs(2, 3, 197, 64)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        query.fill_(0)  # done only after the sleep, on this stream
        out, _ = forward(query, key, value)
    torch.cuda.synchronize()
    mean = value.float().mean(2, keepdim=True).expand(out.shape)
    torch.testing.assert_close(out.float(), mean, rtol=0.02, atol=0.01)


def test_errors_name_kernel_shape_and_remedy():
    with pytest.raises(RuntimeError, match="at most 272 keys.*queries=300.*\n.*Remedy"):
        forward(*attention_inputs(1, 1, 300, 64))
    with pytest.raises(RuntimeError, match="multiple of 8"):
        forward(*attention_inputs(1, 1, 17, 36))
