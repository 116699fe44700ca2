"""The Triton kernels on a GPU: what neither the interpreter nor a compiled binary can show. Skipped
where there is none.
"""

from __future__ import annotations

import statistics
import time

import pytest
import torch
from cases import attention
from cases.every_op import SAMPLES, Sample
from oracle import Target

import patchgen_fast
from patchgen_fast import triton as ours

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)
if reason := ours.unavailable_reason():
    pytest.skip(reason, allow_module_level=True)

from patchgen_fast.triton.attention import _attention_fwd_kernel, _attention_short_fwd_kernel

GPU = Target("triton", "cuda")
BF16 = torch.bfloat16
each_op = pytest.mark.parametrize(
    "sample", [sample for sample in SAMPLES if sample.name != "linear"], ids=str
)


# ----------------------------------------------------------------------------------------- results


# The ops' own suites run every case for this backend too; these are the first to look at.
@pytest.mark.parametrize(
    "case", [case for case in attention.REPRESENTATIVE if case.dtype is BF16], ids=str
)
def test_attention(case: attention.Case) -> None:
    attention.check(case, GPU)


@each_op
def test_an_ordinary_call(sample: Sample) -> None:
    sample.check(GPU)


@each_op
def test_runs_agree_to_the_bit(sample: Sample) -> None:
    first, second = (sample.run("triton", "cuda") for _ in range(2))
    for name, x in {**first.results, **first.grads}.items():
        assert torch.equal(x, {**second.results, **second.grads}[name]), name


# -------------------------------------------------------------------------------------- host's side


def heads(batch: int, tokens: int, d: int = 64) -> tuple[torch.Tensor, ...]:
    qkv = torch.randn(batch, tokens, 3, 12, d, dtype=BF16, device="cuda")
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)


def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return patchgen_fast.attention(query, key, value, backend="triton")


@each_op
def test_a_cuda_graph_replays_on_new_numbers(sample: Sample) -> None:
    """Forward and backward, captured once; then other numbers in the same memory."""
    stated = sample.problem("cuda")
    sample.run("triton", "cuda")  # compiles, which a capture may not
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = sample.run("triton", "cuda")
    changed = next(
        x for x in stated.inputs.values() if torch.is_tensor(x) and x.is_floating_point()
    )
    before = changed.clone()
    try:
        with torch.no_grad():
            changed.mul_(0.5)
        graph.replay()
        expected = sample.run("triton", "cuda")
        for name, x in expected.results.items():
            assert torch.equal(captured.results[name], x), name
    finally:
        with torch.no_grad():
            changed.copy_(before)


def test_batches_and_lengths_compile_nothing_new() -> None:
    for tokens in (197, 600):
        run(*heads(2, tokens))
    device = torch.cuda.current_device()
    caches = [
        kernel.device_caches[device][0]
        for kernel in (_attention_short_fwd_kernel, _attention_fwd_kernel)
    ]
    before = [len(cache) for cache in caches]
    for batch in (1, 3, 8, 33):
        for tokens in (193, 197, 208, 577, 601, 729):
            run(*heads(batch, tokens))
    assert [len(cache) for cache in caches] == before


def test_a_call_costs_the_host_25_microseconds() -> None:
    """Median, launch included, without gradients."""
    query, key, value = heads(2, 50)
    with torch.inference_mode():
        for _ in range(20):
            run(query, key, value)
        times = []
        for _ in range(500):
            torch.cuda.synchronize()
            start = time.perf_counter()
            run(query, key, value)
            times.append(time.perf_counter() - start)
    assert statistics.median(times) * 1e6 <= 25


def test_no_graph_break() -> None:
    query, key, value = heads(2, 197)
    compiled = torch.compile(run, fullgraph=True)
    torch.testing.assert_close(compiled(query, key, value), run(query, key, value), atol=0, rtol=0)
