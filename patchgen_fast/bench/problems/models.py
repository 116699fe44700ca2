"""Layers, blocks and whole models: eager as users have them, ours by the swap they would call."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from patchgen_fast import model_source
from patchgen_fast.bench import data, parity
from patchgen_fast.bench.cases import Case
from patchgen_fast.bench.limits import ITEMSIZE, phase_total
from patchgen_fast.bench.problems.base import (
    AGAIN,
    COMPILES,
    DTYPE,
    Absent,
    Contender,
    Problem,
    Refused,
    Runnable,
    compiled_module,
    first_line,
    leaf,
    normal,
)
from patchgen_fast.bench.problems.base import generator as random_of
from patchgen_fast.bench.schema import Cost, Parity

Inputs = tuple[torch.Tensor, ...]


def build(case: Case) -> Problem:
    """A layer, block or model of this case with random weights, and its inputs."""
    if case.level == "model":
        make, inputs, note = _model(case)
    else:
        make, inputs, note = _layer(case)

    dtype = DTYPE[case.dtype]

    def fresh() -> nn.Module:
        torch.manual_seed(case.seed)
        return make().to(case.device, dtype).eval()

    def run(module: nn.Module, dtype: torch.dtype | None = None) -> Runnable:
        own = tuple(_as_input(tensor, dtype, case) for tensor in inputs)
        leaves = {f"input {i}": t for i, t in enumerate(own) if t.requires_grad}
        if case.phase != "forward":
            leaves |= {name: p for name, p in module.named_parameters() if p.requires_grad}
        return Runnable(lambda: module(*own), leaves)

    def truth() -> Runnable:
        exact = run(fresh().double(), torch.float64)  # of the weights as they are rounded
        return Runnable(lambda: _under(sdpa_kernel(SDPBackend.MATH), exact.forward), exact.leaves)

    def swapped(backend: str | None) -> Runnable:
        import patchgen_fast

        module = fresh()
        report = patchgen_fast.swap(module, backend=backend)
        if not _swapped_anything(report):
            raise Refused("swap replaced nothing")
        return run(module)

    def channels_last() -> Runnable:
        if not any(isinstance(layer, nn.Conv2d) for layer in make().modules()):
            raise Refused("no convolution in it")
        return run(fresh().to(memory_format=torch.channels_last))  # type: ignore[call-overload]

    def verify() -> tuple[list[Parity], list[Parity]]:
        import patchgen_fast

        found = patchgen_fast.verify(
            fresh(),
            *inputs,
            gradients=case.phase != "forward",
            backend=case.backend,
            runs=1 if case.phase == "forward" else 3,
        )
        return parity.from_verify(found)

    whole = case.level == "model"
    again = AGAIN if whole else ""
    # "stock operators" are the same layers made of the best of torch's own: SDPA, unfold + linear.
    return Problem(
        [
            Contender("eager", "eager", lambda: run(fresh())),
            Contender(
                "torch.compile", "peer", lambda: compiled_module(fresh(), run), not_quick=COMPILES
            ),
            Contender("stock operators", "peer", lambda: swapped("torch"), not_quick=again),
            *([Contender("channels_last", "peer", channels_last, not_quick=again)] * whole),
            Contender("ours", "ours", lambda: swapped(case.backend)),
        ],
        truth,
        _cost(case, make, inputs),
        items=case.dims["B"],
        note=note,
        verify=verify,
    )


def _as_input(tensor: torch.Tensor, dtype: torch.dtype | None, case: Case) -> torch.Tensor:
    """Tokens become leaves. Images get no gradient, and our own models cast them by themselves."""
    if tensor.dim() != 4:
        return leaf(tensor, dtype)
    return tensor if case.op == "patch_transformer" else tensor.to(dtype or tensor.dtype)


def _under(context: AbstractContextManager[Any], call: Callable[[], Any]) -> Any:
    with context:
        return call()


def _swapped_anything(report: Any) -> bool:
    return bool(report.with_action("swapped"))


def _cost(case: Case, make: Callable[[], nn.Module], inputs: Inputs) -> Cost:
    """FLOPs by torch's counter on the meta device (training is three forwards); least bytes are
    weights and inputs once."""
    with torch.device("meta"), torch.no_grad():
        module = make().eval()
        on_meta = [tensor.to("meta", torch.float32) for tensor in inputs]
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            module(*on_meta)
    forward = float(counter.get_total_flops())
    weights = sum(p.numel() for p in module.parameters()) + sum(t.numel() for t in inputs)
    size = float(weights * ITEMSIZE[case.dtype])
    return Cost(
        flops=phase_total(forward, 2.0 * forward, case.phase),
        bytes=phase_total(size, 2.0 * size, case.phase),
    )


def _layer(case: Case) -> tuple[Callable[[], nn.Module], Inputs, str]:
    from patchgen_fast import models

    batch, tokens, width = (case.dims[name] for name in ("B", "N", "E"))
    random = random_of(case)
    x = normal(case, random, batch, tokens, width)
    heads = case.dims.get("H", 1)
    if case.op == "attention_layer":
        return lambda: models.Attention(width, heads, qkv_bias=True), (x,), ""
    if case.op == "feed_forward":
        return lambda: models.FeedForward(width, 4 * width), (x,), ""
    if case.op == "encoder_block":
        return lambda: models.EncoderLayer(width, heads, qkv_bias=True), (x,), ""
    memory = normal(case, random, batch, tokens, width)
    return lambda: models.DecoderLayer(width, heads, qkv_bias=True), (x, memory), ""


def _model(case: Case) -> tuple[Callable[[], nn.Module], Inputs, str]:
    name = case.options["model"]
    try:
        source = model_source.find(name)
    except ValueError as error:
        raise Absent(first_line(error)) from error
    assert source.image_shape is not None
    channels, size, _ = source.image_shape
    batch, note = case.dims["B"], ""
    try:
        if case.options["data"] == "digits":
            images = data.digits(batch, size, channels=channels)
        else:
            images = data.photographs(batch, size, seed=case.seed).float() / 255
    except data.NoImages as missing:
        note = str(missing)
        images = torch.rand(batch, channels, size, size, generator=random_of(case))
    if not name.startswith("patchgen:"):  # these do not normalise, nor cast, by themselves
        images = images.to(DTYPE[case.dtype])
    return source.make, (images.to(case.device),), note
