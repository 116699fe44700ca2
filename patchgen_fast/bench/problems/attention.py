"""Attention from the packed projection's output to [B, N, C], as a layer meets it."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from patchgen_fast.bench import peers
from patchgen_fast.bench.cases import Case
from patchgen_fast.bench.limits import attention_cost
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


def split_packed(qkv: torch.Tensor, heads: int) -> tuple[torch.Tensor, ...]:
    """[B,N,3C] -> query, key, value as views [B,H,N,D]."""
    batch, tokens, width = qkv.shape
    packed = qkv.view(batch, tokens, 3, heads, width // (3 * heads))
    return packed.permute(2, 0, 3, 1, 4).unbind(0)


def merge_heads(out: torch.Tensor) -> torch.Tensor:
    """[B,H,N,D] -> [B,N,C]."""
    return out.transpose(1, 2).flatten(2)


def eager_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention as models wrote it before fused kernels: two products and a softmax."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    return scores.softmax(dim=-1) @ value


def exact_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The float64 truth by plain einsum."""
    scores = torch.einsum("bhid,bhjd->bhij", query, key) * query.shape[-1] ** -0.5
    return torch.einsum("bhij,bhjd->bhid", scores.softmax(dim=-1), value)


def packed(core: object, heads: int, qkv: torch.Tensor) -> torch.Tensor:
    """`core` between the packed projection's output and the next projection's input."""
    return merge_heads(core(*split_packed(qkv, heads)))  # type: ignore[operator]


def separate(
    core: object, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    """`core` on query, key and value that come from elsewhere, to [B,N,C]."""
    return merge_heads(core(query, key, value))  # type: ignore[operator]


def attention(case: Case) -> Problem:
    """Self-attention from packed qkv [B,N,3C], or cross-attention and decoding from q, k, v."""
    dims = case.dims
    batch, heads, width = dims["B"], dims["H"], dims["D"]
    nq, nk = dims.get("Nq", dims.get("N", 0)), dims.get("Nk", dims.get("N", 0))
    random = random_of(case)
    if case.options.get("packed"):
        tensors = {"qkv": normal(case, random, batch, nq, 3 * heads * width)}

        def around(core: object) -> partial[torch.Tensor]:
            return partial(packed, core, heads)
    else:
        # Projections leave [B,N,H,D]; a cache holds [B,H,N,D].
        rows = normal(case, random, batch, nq, heads, width).transpose(1, 2)
        shape = (batch, heads, nk, width)
        tensors = {
            "query": rows,
            "key": normal(case, random, *shape),
            "value": normal(case, random, *shape),
        }

        def around(core: object) -> partial[torch.Tensor]:
            return partial(separate, core)

    from patchgen_fast import attention as fast_attention

    contenders = [
        Contender("eager", "eager", lambda: on_leaves(around(eager_attention), tensors)),
        Contender(
            "sdpa", "peer", lambda: on_leaves(around(F.scaled_dot_product_attention), tensors)
        ),
        Contender(
            "torch.compile",
            "peer",
            lambda: compiled(around(eager_attention), tensors),
            not_quick=COMPILES,
        ),
        *peers.attention_peers(case, tensors),
        Contender(
            "ours",
            "ours",
            lambda: on_leaves(around(partial(fast_attention, backend=case.backend)), tensors),
        ),
    ]
    return Problem(
        contenders,
        lambda: on_leaves(around(exact_attention), tensors, torch.float64),
        attention_cost(batch, heads, nq, nk, width, case.dtype, case.phase),
    )


def varlen_attention(case: Case) -> Problem:
    """Packed sequences [T,H,D] of the lengths given; eager pads nothing and loops over them."""
    lengths = case.options["lengths"]
    total, heads, width = case.dims["T"], case.dims["H"], case.dims["D"]
    random = random_of(case)
    tensors = {
        name: normal(case, random, total, heads, width) for name in ("query", "key", "value")
    }
    offsets = torch.tensor([0, *lengths], device=case.device).cumsum(0).to(torch.int32)

    def looped(
        core: object, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> Outputs:
        heads_first = [tensor.transpose(0, 1).unsqueeze(0) for tensor in (query, key, value)]
        pieces = zip(*(tensor.split(lengths, dim=2) for tensor in heads_first), strict=True)
        outs = [core(*piece) for piece in pieces]  # type: ignore[operator]
        return torch.cat(outs, dim=2).squeeze(0).transpose(0, 1)

    def ours() -> Runnable:
        from patchgen_fast import varlen_attention as fast

        longest = max(lengths)
        return on_leaves(
            lambda query, key, value: fast(
                query, key, value, offsets, offsets, longest, longest, backend=case.backend
            ),
            tensors,
        )

    cost = Cost(flops=0.0, bytes=0.0)
    for n in lengths:
        one = attention_cost(1, heads, n, n, width, case.dtype, case.phase)
        cost.flops, cost.bytes = cost.flops + one.flops, cost.bytes + one.bytes
        cost.exps += one.exps
    return Problem(
        [
            Contender(
                "eager", "eager", lambda: on_leaves(partial(looped, eager_attention), tensors)
            ),
            Contender(
                "sdpa per sequence",
                "peer",
                lambda: on_leaves(partial(looped, F.scaled_dot_product_attention), tensors),
            ),
            *peers.varlen_peers(case, tensors, offsets, max(lengths)),
            Contender("ours", "ours", ours),
        ],
        lambda: on_leaves(partial(looped, exact_attention), tensors, torch.float64),
        cost,
    )
