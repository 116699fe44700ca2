"""Attention: cases over sizes, dtypes, masks, layouts and gradients, and how one is checked."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from oracle import DTYPE_NAMES, Evaluation, Problem, Target, assert_parity, carve, normal, rng
from pairwise import pairwise
from torch import Tensor

from patchgen_fast import attention, reference

TOKENS = (1, 50, 63, 64, 65, 196, 197, 257, 577)
HEAD_DIMS = (8, 32, 40, 64, 72, 80, 88, 96, 104, 128, 256, 1, 7, 33)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Mask shapes by their broadcast dimensions: a letter is the full size, 1 is 1; two or three
# letters make a mask of two or three dimensions.
MASK_SHAPES = ("bhqk", "b1qk", "1hqk", "11qk", "b11k", "111k", "bhq1", "11q1", "hqk", "1q1", "qk")


@dataclass(frozen=True)
class Case:
    """One call.

    mask: None or ``kind:values:shape``; kind ``bool``, ``same`` (the query's dtype) or ``float32``;
    values ``plain``, ``blocks`` (bool: the first two thirds of the keys unseen), ``large`` (of
    either sign), ``min_rows`` and ``inf_rows`` (rows of nothing but finfo.min, or -inf and False).
    causal: ``none``, ``plain``, ``bottom_right``, ``tensor`` (offsets of either sign).
    layout: ``packed`` (views of one projection), ``dense``, ``sliced``, ``strided`` (last stride
    2), ``batch_last``, ``expanded`` (key and value shared by the batch, stride 0).
    grad: layout of the output's gradient, or ``stride0``.
    values: of query, key and value: ``normal``, ``huge``, ``far``, ``alike``.
    """

    nq: int = 64
    nk: int | None = None
    dim: int = 32
    dtype: torch.dtype = torch.float32
    batch: int = 2
    heads: tuple[int, int] = (2, 2)
    mask: str | None = None
    causal: str = "none"
    lengths: bool = False
    layout: str = "packed"
    grad: str = "contiguous"
    lse: bool = True
    scale: float | None = None
    values: str = "normal"
    gradients: bool = True

    @property
    def keys(self) -> int:
        return self.nq if self.nk is None else self.nk

    def __str__(self) -> str:
        parts = [f"B{self.batch}", f"H{self.heads[0]}", f"N{self.nq}", f"D{self.dim}"]
        if self.heads[0] != self.heads[1]:
            parts[1] += f"of{self.heads[1]}"
        if self.nk is not None:
            parts[2] += f"x{self.nk}"
        parts += [DTYPE_NAMES[self.dtype], self.layout]
        parts += [self.mask] if self.mask else []
        parts += [] if self.causal == "none" else [f"causal.{self.causal}"]
        parts += ["lengths"] if self.lengths else []
        parts += [] if self.grad == "contiguous" else [f"grad.{self.grad}"]
        parts += [] if self.lse else ["nolse"]
        parts += [] if self.scale is None else [f"scale{self.scale}"]
        parts += [] if self.values == "normal" else [self.values]
        return "-".join(parts)


# ------------------------------------------------------------------------------------------- inputs


def make_mask(case: Case, generator: torch.Generator) -> Tensor | None:
    if case.mask is None:
        return None
    kind, values, letters = case.mask.split(":")
    full = {"b": case.batch, "h": case.heads[0], "q": case.nq, "k": case.keys, "1": 1}
    shape = [full[letter] for letter in letters]
    rows = torch.rand([*shape[:-1], 1], generator=generator) < 0.3
    if kind == "bool":
        mask = torch.rand(shape, generator=generator) < 0.7
        if values == "blocks":
            mask[..., : shape[-1] * 2 // 3] = False
        return mask & ~rows if values == "inf_rows" else mask
    dtype = torch.float32 if kind == "float32" else case.dtype
    mask = torch.randn(shape, generator=generator)
    if values == "large":
        signs = torch.rand(shape, generator=generator).sub(0.5).sign()
        mask = mask + signs * (1e3 if case.dtype == torch.float16 else 1e4)
    if values == "inf_rows":
        mask = mask.masked_fill(torch.rand(shape, generator=generator) < 0.3, -torch.inf)
    mask = mask.to(dtype)
    if values in ("min_rows", "inf_rows"):
        mask = mask.masked_fill(
            rows, -torch.inf if values == "inf_rows" else torch.finfo(dtype).min
        )
    return mask


def make_qkv(case: Case, generator: torch.Generator, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value in the case's layout, NaN around them."""
    batch, (heads, kv_heads) = case.batch, case.heads
    # [B, N, H, D], as a projection leaves them; the views are [B, H, N, D].
    q = normal(generator, (batch, case.nq, heads, case.dim), case.dtype)
    shared = 1 if case.layout == "expanded" else batch
    kv = normal(generator, (shared, case.keys, 2, kv_heads, case.dim), case.dtype)
    if case.values == "huge":
        # Scores of some thousands: an exponential of anything but a difference overflows.
        q, kv = q * 30, kv * 30
    if case.values == "far":
        # Values at the far end of the dtype's range; their weighted means still fit.
        kv = torch.cat(
            (kv[:, :, :1], kv[:, :, 1:] * (1e3 if case.dtype == torch.float16 else 1e30)), 2
        )
    if case.values == "alike":
        # Values with much in common: long sums of one sign, and gradients that cancel.
        kv = torch.cat((kv[:, :, :1], kv[:, :, 1:] * 0.1 + 1), 2)
    if case.layout == "packed" and case.nq == case.keys and heads == kv_heads:
        qkv = carve(torch.cat((q.unsqueeze(2), kv), dim=2), "contiguous", device)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return query, key, value
    k, v = kv.unbind(2)
    if case.layout == "packed":
        query = carve(q, "contiguous", device).transpose(1, 2)
        key, value = carve(kv, "contiguous", device).permute(2, 0, 3, 1, 4).unbind(0)
        return query, key, value
    layout = "contiguous" if case.layout in ("dense", "expanded") else case.layout
    query, key, value = (carve(x.transpose(1, 2), layout, device) for x in (q, k, v))
    if case.layout == "expanded":
        key, value = (x.expand(batch, -1, -1, -1) for x in (key, value))
    return query, key, value


def make_inputs(case: Case, device: str = "cpu") -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The public function's arguments, and the cotangents of its results."""
    generator = rng("attention", case)
    query, key, value = make_qkv(case, generator, device)
    inputs: dict[str, Any] = {"query": query, "key": key, "value": value}
    mask = make_mask(case, generator)
    mask_layout = "sliced" if case.layout in ("sliced", "strided") else "contiguous"
    inputs["attn_mask"] = None if mask is None else carve(mask, mask_layout, device)
    inputs["kv_lengths"] = None
    if case.lengths:
        lengths = torch.randint(0, case.keys + 1, (case.batch,), generator=generator)
        if case.batch:
            lengths[0] = max(case.keys - 1, 0)
        inputs["kv_lengths"] = lengths.to(device, torch.int32 if case.dim % 2 else torch.int64)
    inputs["query_offset"] = 0
    if case.causal == "bottom_right":
        inputs["query_offset"] = case.keys - case.nq
    if case.causal == "tensor":
        offsets = torch.randint(-3, case.keys + 1, (case.batch,), generator=generator)
        inputs["query_offset"] = offsets.to(device, torch.int32 if case.dim % 2 else torch.int64)
    out_shape = (case.batch, case.heads[0], case.nq, case.dim)
    if case.grad == "stride0":
        one = torch.ones((), dtype=case.dtype, device=device)
        grad_out = (one if case.nq % 2 else one * 0.5).expand(out_shape)
    else:
        grad_out = carve(normal(generator, out_shape, case.dtype), case.grad, device)
    cotangents = {"out": grad_out}
    if case.lse:
        lse = normal(generator, out_shape[:3], case.dtype).float()
        cotangents["lse"] = carve(lse, "contiguous", device)
    return inputs, cotangents


# ------------------------------------------------------------------------------------------- checks


def normalised(case: Case, inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The arguments as the reference takes them, made without the op's own code."""
    args = dict(inputs)
    mask = args["attn_mask"]
    if mask is not None:
        if mask.is_floating_point() and torch.finfo(mask.dtype).min < torch.finfo(dtype).min:
            # What a user's eager model does to a float32 mask in half precision; -inf stays.
            lowest = torch.finfo(dtype).min
            mask = torch.where(mask == -torch.inf, mask, mask.clamp_min(lowest))
        while mask.dim() < 4:
            mask = mask.unsqueeze(0)
    args["attn_mask"] = mask
    offset = args["query_offset"]
    if isinstance(offset, int):
        args["query_offset"] = torch.full((case.batch,), offset, device=args["query"].device)
    args["is_causal"] = case.causal != "none"
    args["scale"] = 1 / math.sqrt(case.dim) if case.scale is None else case.scale
    return args


def reference_results(case: Case, arithmetic: torch.dtype, **inputs: Any) -> dict[str, Tensor]:
    args = normalised(case, inputs, arithmetic)
    out, lse = reference.attention(**args, return_lse=case.lse, arithmetic=arithmetic)
    return {"out": out} if lse is None else {"out": out, "lse": lse}


def call(case: Case, backend: str | None, **inputs: Any) -> dict[str, Tensor]:
    """The public function, results by name."""
    found = attention(
        **inputs,
        is_causal=case.causal != "none",
        scale=case.scale,
        enable_gqa=case.heads[0] != case.heads[1],
        return_lse=case.lse,
        backend=backend,
    )
    return {"out": found[0], "lse": found[1]} if case.lse else {"out": found}


def differentiable(case: Case, inputs: dict[str, Any]) -> list[str]:
    if not case.gradients:
        return []
    mask = inputs["attn_mask"]
    additive = mask is not None and mask.is_floating_point()
    return ["query", "key", "value", *(["attn_mask"] if additive else [])]


@functools.lru_cache(maxsize=64)
def problem(case: Case, device: str) -> Problem:
    inputs, cotangents = make_inputs(case, device)
    return Problem(
        "attention",
        case.dtype,
        inputs,
        cotangents,
        differentiable(case, inputs),
        functools.partial(reference_results, case),
    )


def check(case: Case, target: Target) -> None:
    """Results, their layout and dtypes, empty rows, and every gradient, on ``target``."""
    stated = problem(case, target.device)
    got = stated.run(target, functools.partial(call, case, target.backend))
    out = got.results["out"]
    assert out.dtype == case.dtype
    assert out.transpose(1, 2).is_contiguous(), f"out has strides {out.stride()}"
    check_empty_rows(case, stated, got)
    compare(case, stated, got, target.factor)


def compare(case: Case, stated: Problem, got: Evaluation, factor: float = 2) -> None:
    """Everything by the parity rule, log-sum-exps and cancelling gradients in their own way."""
    if case.lse and "lse" in got.results:
        compare_lse(stated, got)
    apart = compare_cancelling_gradients(case, stated, got, factor) if got.grads else []
    stated.compare(got, factor, leave_out=["lse", *apart])


def seen_keys(case: Case, inputs: dict[str, Any]) -> Tensor:
    """Which key each query sees, ``[B, H, Nq, Nk]``."""
    args = normalised(case, inputs, case.dtype)
    names = ("query", "key", "attn_mask", "kv_lengths", "query_offset", "is_causal")
    seen = reference.attendable(*(args[name] for name in names))
    if seen is None:
        seen = torch.ones((), dtype=torch.bool, device=inputs["query"].device)
    return seen.expand(case.batch, case.heads[0], case.nq, case.keys)


def check_empty_rows(case: Case, stated: Problem, got: Evaluation) -> None:
    """A row that sees nothing gives 0, log-sum-exp -inf and no gradient."""
    empty = ~seen_keys(case, stated.inputs).any(-1)
    assert (got.results["out"][empty] == 0).all(), "a row that sees nothing isn't 0"
    if got.grads:
        assert (got.grads["query"][empty] == 0).all(), "a row that sees nothing has a gradient"
    if case.lse:
        lse = got.results["lse"]
        assert lse.dtype == (torch.float64 if case.dtype == torch.float64 else torch.float32)
        assert lse.is_contiguous()
        assert ((lse == -torch.inf) == empty).all(), "lse is -inf for just the rows that see none"


def compare_lse(stated: Problem, got: Evaluation) -> None:
    """Log-sum-exps by the rule; rows under finfo.min, which would set everyone's scale, apart."""
    lses = [e.results["lse"] for e in (got, stated.eager, stated.truth)]
    low = lses[2] < -3e4
    for rows in (~low, low & lses[2].isfinite()):
        assert_parity(*(lse[rows] for lse in lses), "lse")


def compare_cancelling_gradients(
    case: Case, stated: Problem, got: Evaluation, factor: float
) -> list[str]:
    """Gradients that are differences of equal numbers, by the rule at the scale of those numbers.

    Where a query sees one key, softmax is 1 whatever the score, and the gradient of the score is
    ``grad @ value - grad @ out`` with out = value; likewise, a mask with one value for all keys
    shifts a row's scores together and changes nothing. Eager's order of sums happens to give just
    zero there, which no backward that saves out and lse can promise, torch's own included.
    Returned: the names of those compared.
    """
    seen = seen_keys(case, stated.inputs)
    alone = seen.sum(-1) == 1
    mask = stated.inputs["attn_mask"]
    flat_mask = "attn_mask" in got.grads and mask.shape[-1] == 1
    if not alone.any() and not flat_mask:
        return []
    grad, query, key, value = (
        x.detach().double().abs()
        for x in (stated.cotangents["out"], *(stated.inputs[n] for n in ("query", "key", "value")))
    )
    groups = case.heads[0] // case.heads[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scale = abs(normalised(case, stated.inputs, case.dtype)["scale"])
    terms = grad @ value.mT * seen
    grads = {n: [e.grads[n] for e in (got, stated.eager, stated.truth)] for n in got.grads}
    assert_parity(*(g[~alone] for g in grads["query"]), "gradient of query", factor=factor)
    sizes = {"query": (scale * terms @ key)[alone]}
    own = terms * alone.unsqueeze(-1)
    sizes["key"] = scale * (own.mT @ query).unflatten(1, (case.heads[1], groups)).sum(2)
    if "attn_mask" in grads:
        sizes["attn_mask"] = (terms if flat_mask else own).sum_to_size(mask.shape)
    for name, size in sizes.items():
        rows = [g[alone] for g in grads[name]] if name == "query" else grads[name]
        what = f"cancelling gradient of {name}"
        assert_parity(*rows, what, terms=rows[2].abs() + size, factor=factor)
    return list(sizes)


# -------------------------------------------------------------------------------------------- cases


def _swept() -> list[Case]:
    """Every pair of choices of two factors, somewhere."""
    masks = [f"bool:{values}:{shape}" for values, shape in zip(
        ("plain", "blocks", "inf_rows") * 4, MASK_SHAPES, strict=False)]  # fmt: skip
    for kind in ("same", "float32"):
        offset = len(masks)
        masks += [
            f"{kind}:{('plain', 'large', 'min_rows', 'inf_rows')[(i + offset) % 4]}:{shape}"
            for i, shape in enumerate(MASK_SHAPES)
        ]
    factors = {
        "nq": TOKENS,
        "dim": HEAD_DIMS,
        "dtype": DTYPES,
        "mask": [None] * 4 + masks[::3] + masks[1::3] + masks[2::3],
        "nk": (None, None, None, 50, 77, 197),
        "batch": (1, 2),
        "heads": ((2, 2), (3, 3), (4, 2), (3, 1)),
        "causal": ("none", "none", "plain", "bottom_right", "tensor"),
        "lengths": (False, False, True),
        "layout": ("packed", "packed", "dense", "sliced", "strided", "batch_last", "expanded"),
        "grad": ("contiguous", "permuted", "stride0", "sliced", "strided"),
        "lse": (True, False),
    }
    light = {name: values for name, values in factors.items() if name not in ("mask",)}
    # The pairs of sizes and the pairs of the rest, in one list each: a mask is put to every case.
    cases = []
    for i, choice in enumerate(pairwise(light)):
        case = Case(**choice, mask=factors["mask"][i % len(factors["mask"])])
        if case.dim < 8:
            # A head of a few numbers is a poor sample of eager's error: more heads.
            case = replace(case, heads=(case.heads[0] * 4, case.heads[1] * 4))
        if case.nq * case.keys * case.dim > 4_000_000:
            case = replace(
                case, batch=1, heads=(2, 2) if case.heads[0] == case.heads[1] else (2, 1)
            )
        cases.append(case)
    return cases


SWEPT = _swept()

# What a sweep would rarely put together.
NAMED = {
    "empty batch": Case(batch=0, nq=50, lengths=True, causal="tensor"),
    "no queries": Case(nq=0, nk=50, dim=40),
    "no keys": Case(nq=50, nk=0, dim=40),
    "no keys, masked and causal": Case(nq=50, nk=0, mask="bool:plain:bhqk", causal="plain"),
    "one by one": Case(batch=1, heads=(1, 1), nq=1, dim=1),
    "one query, many keys": Case(nq=1, nk=577, dim=64, causal="bottom_right", dtype=torch.bfloat16),
    "many queries, one key": Case(nq=577, nk=1, dim=64, dtype=torch.float16),
    "no row sees anything": Case(nq=65, causal="none", mask="bool:none:11q1"),
    "huge scores": Case(nq=197, dim=64, values="huge"),
    "huge scores, bf16": Case(nq=197, dim=64, values="huge", dtype=torch.bfloat16),
    "huge scores, f16": Case(nq=197, dim=64, values="huge", dtype=torch.float16),
    "far values": Case(nq=197, dim=64, values="far"),
    "far values, bf16": Case(nq=197, dim=64, values="far", dtype=torch.bfloat16),
    "far values, f16": Case(nq=197, dim=64, values="far", dtype=torch.float16),
    "values alike": Case(nq=512, dim=32, values="alike", heads=(4, 4)),
    "values alike, 197": Case(nq=197, dim=64, values="alike", heads=(4, 4)),
    "values alike, panels": Case(batch=1, nq=130, nk=4096, dim=64, values="alike"),
    "values alike, few queries": Case(batch=1, nq=4, nk=1024, dim=64, values="alike"),
    "scale 0": Case(nq=65, dim=40, scale=0.0),
    "negative scale": Case(nq=65, dim=40, scale=-0.3),
    "everything joined": Case(
        batch=3,
        nq=65,
        nk=197,
        heads=(4, 2),
        dim=72,
        mask="float32:inf_rows:b1qk",
        causal="tensor",
        lengths=True,
        layout="sliced",
        grad="stride0",
    ),
    "everything joined, bf16": Case(
        batch=3,
        nq=65,
        nk=197,
        heads=(4, 2),
        dim=72,
        mask="same:inf_rows:bhqk",
        causal="tensor",
        lengths=True,
        layout="packed",
        dtype=torch.bfloat16,
    ),
    "many heads and batches": Case(batch=17, heads=(12, 12), nq=17, dim=16, lengths=True),
    "many of a cache's steps": Case(batch=5, heads=(8, 2), nq=3, nk=130, causal="tensor", dim=64),
}
for _shape in MASK_SHAPES:
    for _i, _kind in enumerate(("bool", "same", "float32")):
        _values = ("plain", "min_rows", "inf_rows")[(_i + len(NAMED)) % 3]
        _dtype = DTYPES[(len(NAMED) // 3) % 3]
        NAMED[f"mask {_kind} {_values} {_shape}"] = Case(
            nq=50, nk=65, dim=40, mask=f"{_kind}:{_values}:{_shape}", dtype=_dtype, batch=3
        )

# Few queries, which a kernel may stream keys and values for: up to and beyond what it takes. No
# gradients: a cache is decoded for inference.
DECODING = [
    Case(nq=1, nk=1024, dim=64, heads=(12, 12), lengths=True),
    Case(nq=1, nk=1030, dim=64, heads=(12, 3), lengths=True, mask="bool:blocks:b11k"),
    Case(nq=2, nk=577, dim=72, heads=(6, 3), causal="bottom_right", layout="sliced"),
    Case(nq=3, nk=300, dim=80, heads=(4, 4), mask="float32:inf_rows:bhqk"),
    Case(nq=4, nk=257, dim=128, heads=(8, 2), causal="tensor", lengths=True, layout="dense"),
    Case(nq=5, nk=65, dim=33, heads=(3, 1), mask="same:large:b1qk", causal="bottom_right"),
    Case(nq=7, nk=130, dim=256, heads=(2, 1), layout="batch_last", scale=-0.2),
    Case(nq=8, nk=2100, dim=40, heads=(2, 2), causal="bottom_right", values="huge"),
    Case(nq=9, nk=100, dim=64, heads=(6, 3)),
]

# What every instruction set runs.
REPRESENTATIVE = [
    Case(nq=nq, dim=dim, dtype=dtype, **extra)
    for dtype in DTYPES
    for nq, dim, extra in (
        (197, 64, {}),
        (65, 72, {"mask": "float32:inf_rows:b1qk", "lengths": True}),
        (50, 33, {"causal": "tensor", "nk": 77, "layout": "sliced", "heads": (4, 2)}),
        (1, 128, {"nk": 257, "causal": "bottom_right"}),
        (3, 72, {"nk": 200, "causal": "bottom_right", "heads": (4, 2), "lengths": True}),
        (64, 256, {"mask": "bool:inf_rows:bhqk", "layout": "strided"}),
    )
]
