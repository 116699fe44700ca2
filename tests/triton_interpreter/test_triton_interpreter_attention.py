"""Attention forward and backward in the interpreter, against float64."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
from checks import assert_parity
from interpreter import guarded

from patchgen_fast import reference
from patchgen_fast.triton import attention as forward
from patchgen_fast.triton import attention_backward as backward
from patchgen_fast.triton.attention_configs import ShortConfig
from patchgen_fast.triton.configs import answering

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Case:
    """One call: sizes, dtype, how the inputs lie, and what a query may see."""

    name: str
    batch: int = 1
    heads: int = 2
    kv_heads: int = 0
    nq: int = 50
    nk: int = 0
    d: int = 64
    dtype: torch.dtype = BF16
    layout: str = "packed"
    mask: str = ""
    mask_shape: tuple[int, int, int, int] = (1, 1, 1, 1)
    causal: bool = False
    offset: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()
    scale: float = 0.125
    stream: bool = False
    one_pass: bool | None = None

    def __str__(self) -> str:
        return self.name


def rows(batch: int, heads: int, n: int, d: int, layout: str, dtype: torch.dtype) -> torch.Tensor:
    """[B, H, N, D] laid out as asked, quantised to the dtype, in a guarded buffer."""
    if layout == "packed":
        return guarded(torch.randn(batch, n, 3, heads, d).to(dtype))[:, :, 1].transpose(1, 2)
    if layout == "unaligned":
        return guarded(torch.randn(batch, n, heads, d + 3).to(dtype))[..., 1 : d + 1].transpose(
            1, 2
        )
    return guarded(torch.randn(batch, heads, n, d).to(dtype))


def make(case: Case) -> dict:
    torch.manual_seed(0)
    nk, kv_heads = case.nk or case.nq, case.kv_heads or case.heads
    query = rows(case.batch, case.heads, case.nq, case.d, case.layout, case.dtype)
    key, value = (rows(case.batch, kv_heads, nk, case.d, case.layout, case.dtype) for _ in range(2))
    full = (case.batch, case.heads, case.nq, nk)
    shape = [n if wanted else 1 for n, wanted in zip(full, case.mask_shape, strict=True)]
    mask = None
    if case.mask == "bool":
        mask = torch.rand(shape) > 0.4
        mask[..., : max(1, shape[2] // 3), :] &= torch.rand(shape[3]) > 2  # rows that see nothing
    elif case.mask:
        mask = torch.randn(shape).to(F32 if case.mask == "float32" else case.dtype)
        mask.view(-1)[::5] = float("-inf")
        mask[..., -1, :] = torch.finfo(mask.dtype).min if case.mask == "min" else float("-inf")
    return {
        "query": query,
        "key": key,
        "value": value,
        "attn_mask": None if mask is None else guarded(mask),
        "kv_lengths": torch.tensor(case.lengths, dtype=torch.int32) if case.lengths else None,
        "query_offset": torch.tensor(case.offset, dtype=torch.int32) if case.offset else None,
        "is_causal": case.causal,
        "scale": case.scale,
    }


CASES = [
    Case("vit_n197", nq=197, heads=1),
    Case("vit_n197_chunk_by_chunk", nq=197, heads=1, one_pass=False),
    Case("vit_n197_stream", nq=197, heads=1, stream=True),
    Case("mae_n50_fp16", nq=50, dtype=F16),
    Case("dit_n256_d72", nq=256, d=72, heads=1),
    Case("siglip_n300_d72", nq=300, d=72, heads=1),
    Case("d104", nq=70, d=104, heads=1, dtype=F16),
    Case("gqa_stream", nq=60, heads=4, kv_heads=1, stream=True),
    Case(
        "causal_offsets_stream", nq=70, nk=140, causal=True, batch=2, offset=(70, -30), stream=True
    ),
    Case("decode", nq=1, nk=200, batch=2, lengths=(200, 70)),
    Case("decode_one_share", nq=1, nk=70, batch=2, d=80, lengths=(0, 70)),
    Case("decode_gqa_causal", nq=3, nk=150, heads=4, kv_heads=1, causal=True, offset=(147,)),
    Case("decode_additive", nq=2, nk=300, mask="dtype", mask_shape=(0, 1, 1, 1), d=72),
    Case("decode_finfo_min", nq=2, nk=300, mask="min", mask_shape=(0, 1, 1, 1), dtype=F32),
    Case(
        "everything",
        nq=40,
        nk=90,
        heads=4,
        kv_heads=2,
        batch=2,
        mask="float32",
        d=72,
        mask_shape=(1, 1, 1, 1),
        causal=True,
        offset=(50, 10),
        lengths=(90, 30),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(case, monkeypatch):
    if case.stream:
        monkeypatch.setattr(forward, "SHORT_KEYS", 0)
    chosen = nullcontext()
    if case.one_pass is not None:
        config = ShortConfig(64, 4, 1, case.one_pass)
        chosen = answering(forward.SHORT, config)
    inputs = make(case)
    with chosen:
        out, lse = forward.attention(**inputs)
    doubled = {
        name: x.double() if torch.is_tensor(x) and x.is_floating_point() else x
        for name, x in inputs.items()
    }
    truth, truth_lse = reference.attention(**doubled)
    eager, eager_lse = reference.attention(**inputs, arithmetic=case.dtype)
    assert_parity("out", out, eager, truth)
    assert out.transpose(1, 2).is_contiguous()
    empty = truth_lse == float("-inf")
    assert torch.equal(lse == float("-inf"), empty)
    assert bool((out[empty] == 0).all())
    close = (lse.double() - truth_lse)[~empty].abs()
    assert close.numel() == 0 or close.max() <= 1e-5 * truth_lse[~empty].abs().max() + 1e-5


def gradients(inputs: dict, grad_out, grad_lse, dtype: torch.dtype):
    """Gradients by autograd through the eager formula, everything in `dtype`."""
    leaves = {}
    for name in ("query", "key", "value", "attn_mask"):
        x = inputs[name]
        if x is not None and x.is_floating_point():
            keep = dtype if name != "attn_mask" or dtype is torch.float64 else x.dtype
            leaves[name] = x.detach().to(keep).requires_grad_()
    out, lse = reference.attention(**{**inputs, **leaves}, arithmetic=dtype)
    seen = lse != float("-inf")
    loss = (out * grad_out.to(out.dtype)).sum() + (lse[seen] * grad_lse.to(lse.dtype)[seen]).sum()
    loss.backward()
    return {name: leaf.grad for name, leaf in leaves.items()}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward(case, monkeypatch):
    if case.stream:
        monkeypatch.setattr(backward, "SHORT_ROWS", 0)
    inputs = make(case)
    with torch.no_grad():
        out, lse = reference.attention(**inputs)
    grad_out = rows(case.batch, case.heads, case.nq, case.d, case.layout, case.dtype)
    grad_lse = torch.randn(lse.shape)
    if case.mask == "min":
        grad_lse[..., -1] = 0.0  # torch's own logsumexp gradient is lost in rounding there
    additive = inputs["attn_mask"] is not None and inputs["attn_mask"].is_floating_point()
    grads = backward.attention_backward(
        grad_out,
        grad_lse,
        inputs["query"],
        inputs["key"],
        inputs["value"],
        out,
        lse,
        inputs["attn_mask"],
        inputs["kv_lengths"],
        inputs["query_offset"],
        case.causal,
        case.scale,
        additive,
    )
    truth = gradients(inputs, grad_out, grad_lse, torch.float64)
    eager = gradients(inputs, grad_out, grad_lse, case.dtype)
    for name, got in zip(("query", "key", "value", "attn_mask"), grads, strict=True):
        if name in truth:
            assert_parity(f"grad_{name}", got, eager[name], truth[name])
    assert additive or grads[3].numel() == 0
