"""Patch, packed, normalisation and rotation kernels in the interpreter, against float64."""

from __future__ import annotations

import pytest
import torch
from checks import assert_parity
from interpreter import guarded

from patchgen_fast import reference
from patchgen_fast.triton import (
    add_layer_norm,
    patch_embed,
    patch_unembed,
    qk_norm_rope,
    varlen_attention,
)

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def quantised(*shape: int, dtype: torch.dtype = BF16, size: float = 1.0) -> torch.Tensor:
    return guarded((torch.randn(shape) * size).to(dtype))


def compare(names, got, function, inputs, dtype, grads=()):
    """Outputs of eager `function` in float64 and in `dtype`, and `got`, by the parity rule."""
    truth, eager = (function(**inputs, arithmetic=kind) for kind in (torch.float64, dtype))
    for name, mine, yardstick, exact in zip(names, got, eager, truth, strict=True):
        assert_parity(name, mine, yardstick, exact)


def eager_gradients(function, inputs, wanted, grad_outs, dtype):
    """Gradients by autograd through the eager forward, its arithmetic in `dtype`."""
    leaves = {
        name: inputs[name]
        .detach()
        .to(torch.float64 if dtype is torch.float64 else inputs[name].dtype)
        .requires_grad_()
        for name in wanted
        if inputs[name] is not None
    }
    full = {**inputs, **leaves}
    if dtype is torch.float64:
        full = {
            k: v.double() if torch.is_tensor(v) and v.is_floating_point() and k not in leaves else v
            for k, v in full.items()
        }
    outs = function(**full, arithmetic=dtype)
    outs = outs if isinstance(outs, tuple) else (outs,)
    loss = sum(
        (out * grad.to(out.dtype)).sum()
        for out, grad in zip(outs, grad_outs, strict=False)
        if grad is not None
    )
    loss.backward()
    return {name: leaf.grad for name, leaf in leaves.items()}


EMBED = {
    "p16_uint8": dict(shape=(2, 3, 32, 48), patch=(16, 16), images="uint8", normalise=True),
    "p16_bf16_prefix": dict(shape=(2, 3, 32, 32), patch=(16, 16), prefix=3),
    "p14_margin": dict(shape=(1, 3, 45, 30), patch=(14, 14), images="float32", normalise=True),
    "p2_latents_fp32": dict(shape=(2, 4, 8, 6), patch=(2, 2), dtype=F32, embed=40),
    "p3_odd_fp16": dict(shape=(3, 2, 9, 7), patch=(3, 2), dtype=F16, embed=24, prefix=1),
    "video": dict(shape=(1, 3, 4, 16, 24), patch=(2, 8, 8), embed=33),
    "channels_last": dict(shape=(2, 3, 16, 16), patch=(8, 8), channels_last=True, images="uint8"),
}


def embed_inputs(
    shape, patch, dtype=BF16, images="", embed=72, prefix=0, normalise=False, channels_last=False
):
    torch.manual_seed(0)
    pixels = torch.randn(shape)
    if images == "uint8":
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8)
    else:
        pixels = pixels.to(F32 if images == "float32" else dtype)
    if channels_last:
        pixels = pixels.contiguous(memory_format=torch.channels_last)
    tokens = 1
    for n, p in zip(shape[2:], patch, strict=True):
        tokens *= n // p
    return {
        "images": guarded(pixels),
        "weight": quantised(embed, shape[1], *patch, dtype=dtype, size=0.1),
        "bias": quantised(embed, dtype=dtype),
        "pos_embed": quantised(tokens, embed, dtype=dtype),
        "prefix": quantised(prefix, embed, dtype=dtype) if prefix else None,
        "mean": torch.rand(shape[1]) if normalise else None,
        "std": torch.rand(shape[1]) + 0.5 if normalise else None,
    }


@pytest.mark.parametrize("case", EMBED)
def test_patch_embed(case):
    inputs = embed_inputs(**EMBED[case])
    dtype = inputs["weight"].dtype
    out = patch_embed.patch_embed(**inputs)
    compare(["out"], [out], lambda **k: (reference.patch_embed(**k),), inputs, dtype)

    floats = inputs["images"].is_floating_point()
    grad = quantised(*out.shape, dtype=dtype)
    wanted = ["weight", *(["images"] if floats else [])]
    grads = patch_embed.patch_embed_backward(
        grad, inputs["images"], inputs["weight"], inputs["mean"], inputs["std"], floats, True
    )
    truth = eager_gradients(reference.patch_embed, inputs, wanted, [grad], torch.float64)
    eager = eager_gradients(reference.patch_embed, inputs, wanted, [grad], dtype)
    assert_parity("grad_weight", grads[1], eager["weight"], truth["weight"])
    if floats:
        assert_parity("grad_images", grads[0], eager["images"], truth["images"])
    assert grads[2].dtype is F32
    assert_parity("grad_tokens_sum", grads[2], grad.float().sum(0), grad.double().sum(0))


def test_patch_embed_takes_an_expanded_gradient():
    inputs = embed_inputs(**EMBED["p3_odd_fp16"])
    out = patch_embed.patch_embed(**inputs)
    ones = torch.ones((), dtype=out.dtype)
    arguments = (inputs["images"], inputs["weight"], None, None, True, True)
    got = patch_embed.patch_embed_backward(ones.expand(out.shape), *arguments)
    want = patch_embed.patch_embed_backward(torch.ones_like(out), *arguments)
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("batch", "grid", "patch", "embed", "dtype"),
    [(2, (3, 4), (8, 8), 64, BF16), (1, (2, 5), (7, 2), 40, F32), (2, (4, 4), (2, 2), 24, F16)],
)
def test_patch_unembed(batch, grid, patch, embed, dtype):
    torch.manual_seed(0)
    inputs = {
        "tokens": quantised(batch, grid[0] * grid[1], embed, dtype=dtype),
        "weight": quantised(embed, 3, *patch, dtype=dtype, size=0.2),
        "bias": quantised(3, dtype=dtype),
        "grid_h": grid[0],
        "grid_w": grid[1],
    }
    out = patch_unembed.patch_unembed(**inputs)
    compare(["out"], [out], lambda **k: (reference.patch_unembed(**k),), inputs, dtype)
    grad = quantised(*out.shape, dtype=dtype)
    grads = patch_unembed.patch_unembed_backward(grad, inputs["tokens"], inputs["weight"], True)
    wanted = ["tokens", "weight", "bias"]
    truth = eager_gradients(reference.patch_unembed, inputs, wanted, [grad], torch.float64)
    eager = eager_gradients(reference.patch_unembed, inputs, wanted, [grad], dtype)
    for name, got in zip(wanted, grads, strict=True):
        assert_parity(f"grad_{name}", got, eager[name], truth[name])


PACKED = {
    "mixed": dict(lengths=[50, 1, 0, 17, 70], causal=False, dtype=BF16),
    "causal_cross": dict(lengths=[20, 3, 9], key_lengths=[33, 1, 9], causal=True, dtype=F16),
    "gqa_d72_tail": dict(lengths=[30, 41], causal=False, dtype=BF16, d=72, kv_heads=1, tail=5),
    "float32": dict(lengths=[12, 25], causal=True, dtype=F32, d=32),
}


def offsets(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


@pytest.mark.parametrize("case", PACKED)
def test_varlen_attention(case):
    options = {"d": 64, "kv_heads": 2, "tail": 0, **PACKED[case]}
    lengths, dtype = options["lengths"], options["dtype"]
    key_lengths = options.get("key_lengths", lengths)
    torch.manual_seed(0)
    rows, keys = sum(lengths) + options["tail"], sum(key_lengths) + options["tail"]
    inputs = {
        "query": quantised(rows, 3, 2, options["d"], dtype=dtype)[:, 1],
        "key": quantised(keys, options["kv_heads"], options["d"], dtype=dtype),
        "value": quantised(keys, options["kv_heads"], options["d"], dtype=dtype),
        "cu_seqlens_q": offsets(lengths),
        "cu_seqlens_k": offsets(key_lengths),
        "max_seqlen_q": max(lengths),
        "max_seqlen_k": max(key_lengths),
        "is_causal": options["causal"],
        "scale": 0.125,
    }
    out, lse = varlen_attention.varlen_attention(**inputs)
    with torch.no_grad():
        _, exact = reference.varlen_attention(**inputs, arithmetic=torch.float64)
    compare(["out"], [out], lambda **k: reference.varlen_attention(**k)[:1], inputs, dtype)
    blind = exact == float("-inf")
    assert torch.equal(lse == float("-inf"), blind)
    assert torch.allclose(lse[~blind].double(), exact[~blind].double(), atol=2e-5, rtol=1e-5)

    grad, grad_lse = quantised(*out.shape, dtype=dtype), torch.randn(lse.shape)
    grad_lse[blind] = 0.0
    names = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "is_causal", "scale"]
    grads = varlen_attention.varlen_attention_backward(
        grad, grad_lse, inputs["query"], inputs["key"], inputs["value"], out, lse,
        *(inputs[name] for name in names),
    )  # fmt: skip

    def function(**k):
        result, sums = reference.varlen_attention(**k)
        return result, sums.masked_fill(blind, 0.0)

    wanted = ["query", "key", "value"]
    truth = eager_gradients(function, inputs, wanted, [grad, grad_lse], torch.float64)
    eager = eager_gradients(function, inputs, wanted, [grad, grad_lse], dtype)
    for name, got in zip(wanted, grads, strict=True):
        assert_parity(f"grad_{name}", got, eager[name], truth[name])


ROPE = {
    "rms_halves": dict(norm="rms", dtype=BF16),
    "layer_pairs_prefix": dict(norm="layer", dtype=F16, interleaved=True, prefix=2, bias=True),
    "rope_alone_per_head": dict(norm="none", dtype=F32, angles=(1, 1), weight=False, prefix=1),
    "per_batch_gqa": dict(norm="rms", dtype=BF16, kv_heads=1, angles=(1, 0), d=72),
    "norm_alone_odd_d": dict(norm="layer", dtype=BF16, angles=None, d=33, bias=True),
}


@pytest.mark.parametrize("case", ROPE)
def test_qk_norm_rope(case):
    options = {
        "d": 64, "kv_heads": 2, "prefix": 0, "interleaved": False, "angles": (0, 0),
        "weight": True, "bias": False, **ROPE[case],
    }  # fmt: skip
    torch.manual_seed(0)
    batch, heads, tokens, d, dtype = 2, 2, 19, options["d"], options["dtype"]
    shape = None
    if options["angles"] is not None:
        shape = (
            batch if options["angles"][0] else 1, heads if options["angles"][1] else 1,
            tokens - options["prefix"], d,
        )  # fmt: skip

    def vector(wanted):
        return quantised(d, dtype=F32) if wanted else None

    inputs = {
        "query": quantised(batch, tokens, 3, heads, d, dtype=dtype)[:, :, 1].transpose(1, 2),
        "key": quantised(batch, options["kv_heads"], tokens, d, dtype=dtype),
        "q_weight": vector(options["weight"]),
        "k_weight": vector(options["weight"]),
        "q_bias": vector(options["bias"]),
        "k_bias": vector(options["bias"]),
        "cos": None if shape is None else guarded(torch.randn(shape)),
        "sin": None if shape is None else guarded(torch.randn(shape)),
        "norm": options["norm"],
        "eps": 1e-6,
        "interleaved": options["interleaved"],
        "num_prefix_tokens": options["prefix"],
    }
    outs = qk_norm_rope.qk_norm_rope(**inputs)
    compare(["query", "key"], outs, reference.qk_norm_rope, inputs, dtype)
    assert outs[0].transpose(1, 2).is_contiguous()

    grad_outs = [quantised(*out.shape, dtype=dtype) for out in outs]
    grads = qk_norm_rope.qk_norm_rope_backward(*grad_outs, *inputs.values(), True)
    names = ["query", "key", "q_weight", "k_weight", "q_bias", "k_bias", "cos", "sin"]
    truth = eager_gradients(reference.qk_norm_rope, inputs, names, grad_outs, torch.float64)
    eager = eager_gradients(reference.qk_norm_rope, inputs, names, grad_outs, dtype)
    for name, got in zip(names, grads, strict=True):
        if name in truth:
            assert_parity(f"grad_{name}", got, eager[name], truth[name])
        else:
            assert got.numel() == 0


@pytest.mark.parametrize(
    ("rows", "features", "dtype", "affine"),
    [((2, 5), 72, BF16, True), ((7,), 128, F32, False), ((3,), 33, F16, True)],
)
def test_add_layer_norm(rows, features, dtype, affine):
    torch.manual_seed(0)
    inputs = {
        "input": quantised(*rows, features, dtype=dtype),
        "residual": quantised(*rows, features, dtype=dtype),
        "weight": quantised(features, dtype=dtype) if affine else None,
        "bias": quantised(features, dtype=dtype) if affine else None,
        "eps": 1e-5,
    }
    outs = add_layer_norm.add_layer_norm(**inputs)
    compare(["normalised", "sum", "mean", "rstd"], outs, reference.add_layer_norm, inputs, dtype)
    grad, grad_sum = (quantised(*rows, features, dtype=dtype) for _ in range(2))
    grads = add_layer_norm.add_layer_norm_backward(
        grad, grad_sum, outs[1], inputs["weight"], outs[2], outs[3]
    )
    wanted = ["input", "weight", "bias"]
    truth = eager_gradients(
        reference.add_layer_norm, inputs, wanted, [grad, grad_sum], torch.float64
    )
    eager = eager_gradients(reference.add_layer_norm, inputs, wanted, [grad, grad_sum], dtype)
    for name, got in zip(wanted, grads, strict=True):
        if name in truth:
            assert_parity(f"grad_{name}", got, eager[name], truth[name])
