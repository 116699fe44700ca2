"""Linear with its epilogue, residual plus LayerNorm, and q/k norm with rotary embedding."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from patchgen_fast.bench.cases import Case
from patchgen_fast.bench.limits import ITEMSIZE, gemm_cost, phase_total
from patchgen_fast.bench.problems.base import (
    COMPILES,
    Contender,
    Outputs,
    Problem,
    Runnable,
    compiled,
    normal,
    on_leaves,
)
from patchgen_fast.bench.problems.base import generator as random_of
from patchgen_fast.bench.schema import Cost

Maybe = torch.Tensor | None


def eager_linear(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: Maybe = None,
    *,
    activation: str | None,
) -> torch.Tensor:
    """Product, activation and residual, a stock op each."""
    out = F.linear(input, weight, bias)
    if activation == "gelu":
        out = F.gelu(out)
    return out if residual is None else out + residual


def linear(case: Case) -> Problem:
    """A layer's projections: [B,N,K] to [B,N,M], with the epilogue that the layer has there."""
    batch, tokens, inner, width = (case.dims[name] for name in ("B", "N", "K", "M"))
    activation = case.options.get("activation")
    random = random_of(case)
    tensors: dict[str, Maybe] = {
        "input": normal(case, random, batch, tokens, inner),
        "weight": normal(case, random, width, inner, scale=inner**-0.5),
        "bias": normal(case, random, width),
        "residual": normal(case, random, batch, tokens, width)
        if case.options.get("residual")
        else None,
    }
    eager = partial(eager_linear, activation=activation)

    def ours() -> Runnable:
        from patchgen_fast import linear as fast

        return on_leaves(partial(fast, activation=activation, backend=case.backend), tensors)

    rows = batch * tokens
    extra = rows * width * ITEMSIZE[case.dtype] if case.options.get("residual") else 0.0
    return Problem(
        [
            Contender("eager", "eager", lambda: on_leaves(eager, tensors)),
            Contender(
                "torch.compile", "peer", lambda: compiled(eager, tensors), not_quick=COMPILES
            ),
            Contender("ours", "ours", ours),
        ],
        lambda: on_leaves(eager, tensors, torch.float64),
        gemm_cost(rows, inner, width, case.dtype, case.phase, extra_bytes=extra),
    )


def eager_layer_norm(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Outputs:
    """The stock op."""
    return F.layer_norm(input, (input.shape[-1],), weight, bias, 1e-5)


def layer_norm(case: Case) -> Problem:
    """A LayerNorm alone, as before a layer's first part."""
    batch, tokens, width = (case.dims[name] for name in ("B", "N", "E"))
    random = random_of(case)
    tensors = {
        "input": normal(case, random, batch, tokens, width),
        "weight": normal(case, random, width),
        "bias": normal(case, random, width),
    }

    def ours() -> Runnable:
        from patchgen_fast import layer_norm as fast

        return on_leaves(partial(fast, eps=1e-5, backend=case.backend), tensors)

    passes = phase_total(2.0, 3.0, case.phase)  # forward 1 in, 1 out; backward 2 in, 1 out
    return Problem(
        [
            Contender("eager", "eager", lambda: on_leaves(eager_layer_norm, tensors)),
            Contender(
                "torch.compile",
                "peer",
                lambda: compiled(eager_layer_norm, tensors),
                not_quick=COMPILES,
            ),
            Contender("ours", "ours", ours),
        ],
        lambda: on_leaves(eager_layer_norm, tensors, torch.float64),
        Cost(flops=0.0, bytes=passes * batch * tokens * width * ITEMSIZE[case.dtype]),
    )


def eager_add_layer_norm(
    input: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> Outputs:
    """Sum and normalisation, a stock op each."""
    total = input + residual
    return F.layer_norm(total, (total.shape[-1],), weight, bias, 1e-5), total


def add_layer_norm(case: Case) -> Problem:
    """The seam between two sub-layers: residual sum, and its LayerNorm."""
    batch, tokens, width = (case.dims[name] for name in ("B", "N", "E"))
    random = random_of(case)
    tensors = {
        "input": normal(case, random, batch, tokens, width),
        "residual": normal(case, random, batch, tokens, width),
        "weight": normal(case, random, width),
        "bias": normal(case, random, width),
    }

    def ours() -> Runnable:
        from patchgen_fast import add_layer_norm as fast

        return on_leaves(partial(fast, eps=1e-5, backend=case.backend), tensors)

    passes = phase_total(4.0, 5.0, case.phase)  # forward 2 in, 2 out; backward 3 in, 2 out
    return Problem(
        [
            Contender("eager", "eager", lambda: on_leaves(eager_add_layer_norm, tensors)),
            Contender(
                "torch.compile",
                "peer",
                lambda: compiled(eager_add_layer_norm, tensors),
                not_quick=COMPILES,
            ),
            Contender("ours", "ours", ours),
        ],
        lambda: on_leaves(eager_add_layer_norm, tensors, torch.float64),
        Cost(flops=0.0, bytes=passes * batch * tokens * width * ITEMSIZE[case.dtype]),
    )


def on_packed(core: Callable[..., Outputs], packed: torch.Tensor, **others: Maybe) -> Outputs:
    """`core` on query and key as views of packed qkv [B,N,3,H,D], as a layer has them."""
    query, key, _ = packed.permute(2, 0, 3, 1, 4).unbind(0)
    return core(query, key, **others)


def eager_norm_rope(
    query: torch.Tensor,
    key: torch.Tensor,
    q_weight: Maybe = None,
    k_weight: Maybe = None,
    *,
    cos: torch.Tensor,
    sin: torch.Tensor,
    prefix: int,
) -> Outputs:
    """RMS normalisation over D where weights are given, then rotation of halves."""

    def one(x: torch.Tensor, weight: Maybe) -> torch.Tensor:
        if weight is not None:
            x = F.rms_norm(x, (x.shape[-1],), weight, 1e-6)
        head, tail = x[:, :, :prefix], x[:, :, prefix:]
        first, second = tail.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
        rotated = tail * cos.to(x.dtype) + turned * sin.to(x.dtype)
        return torch.cat([head, rotated], dim=2) if prefix else rotated

    return one(query, q_weight), one(key, k_weight)


def qk_norm_rope(case: Case) -> Problem:
    """Query and key [B,H,N,D] as views of packed qkv, normalised and rotated."""
    batch, heads, tokens, width = (case.dims[name] for name in ("B", "H", "N", "D"))
    prefix, norm = case.options["prefix"], case.options["norm"]
    random = random_of(case)
    packed = normal(case, random, batch, tokens, 3, heads, width)
    angles = torch.randn(tokens - prefix, width // 2, generator=random).repeat(1, 2)
    cos, sin = (part.view(1, 1, -1, width).to(case.device) for part in (angles.cos(), angles.sin()))
    tensors: dict[str, Maybe] = {"packed": packed}
    if norm:
        tensors["q_weight"] = normal(case, random, width)
        tensors["k_weight"] = normal(case, random, width)
    eager = partial(on_packed, partial(eager_norm_rope, cos=cos, sin=sin, prefix=prefix))
    exact = partial(eager_norm_rope, cos=cos.double(), sin=sin.double(), prefix=prefix)

    def ours() -> Runnable:
        from patchgen_fast import qk_norm_rope as fast

        core = partial(
            fast, norm=norm, cos_sin=(cos, sin), num_prefix_tokens=prefix, backend=case.backend
        )
        return on_leaves(partial(on_packed, core), tensors)

    size = 2.0 * batch * heads * tokens * width * ITEMSIZE[case.dtype]
    passes = phase_total(2.0, 3.0, case.phase)
    return Problem(
        [
            Contender("eager", "eager", lambda: on_leaves(eager, tensors)),
            Contender(
                "torch.compile", "peer", lambda: compiled(eager, tensors), not_quick=COMPILES
            ),
            Contender("ours", "ours", ours),
        ],
        lambda: on_leaves(partial(on_packed, exact), tensors, torch.float64),
        Cost(flops=0.0, bytes=passes * size),
    )
