"""Peers from other projects: who else computes this, in a file each.

A peer that is not installed raises Absent, one that declines a case raises Refused; both end as a
visible cell with the reason. Importing this package imports none of them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from patchgen_fast.bench.cases import Case
from patchgen_fast.bench.problems.base import Contender

Tensors = Mapping[str, torch.Tensor | None]


def attention_peers(case: Case, tensors: Tensors) -> list[Contender]:
    """Peers of attention on this case's device."""
    from patchgen_fast.bench.peers import onnx_runtime, open_vino, pytorch

    found = pytorch.attention_peers(case, tensors)
    if case.device == "cpu":
        found += [
            Contender(
                "onnxruntime",
                "peer",
                lambda: onnx_runtime.attention(case, tensors),
                forward_only=True,
                own_memory=True,
            ),
            Contender(
                "openvino",
                "peer",
                lambda: open_vino.attention(case, tensors),
                forward_only=True,
                own_memory=True,
            ),
        ]
    return found


def varlen_peers(
    case: Case, tensors: Tensors, offsets: torch.Tensor, longest: int
) -> list[Contender]:
    """Peers of attention over packed sequences."""
    from patchgen_fast.bench.peers import pytorch

    return [] if case.device == "cpu" else pytorch.varlen_peers(case, tensors, offsets, longest)


def patch_embed_peers(case: Case, tensors: Tensors) -> list[Contender]:
    """Peers of the patch embedding."""
    from patchgen_fast.bench.peers import onnx_runtime, open_vino

    if case.device != "cpu":
        return []
    return [
        Contender(
            "onnxruntime",
            "peer",
            lambda: onnx_runtime.patch_embed(case, tensors),
            forward_only=True,
            own_memory=True,
        ),
        Contender(
            "openvino",
            "peer",
            lambda: open_vino.patch_embed(case, tensors),
            forward_only=True,
            own_memory=True,
        ),
    ]
