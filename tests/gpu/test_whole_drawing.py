"""A decode step captured as a CUDA graph, on a GPU. Skipped where there is none."""

from __future__ import annotations

import warnings

import pytest
import torch
from generator_fakes import model

import patchgen_fast
from patchgen_fast.generator.heads import SamplingOptions
from patchgen_fast.generator.model import Task
from patchgen_fast.generator.sampling import noise_for, sample
from patchgen_fast.models.graph import GraphedStep

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)


@pytest.mark.parametrize("fast", [False, True], ids=["eager", "swapped"])
@pytest.mark.parametrize("head", ["flow", "mse"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_graph_draws_what_single_kernels_draw(fast, head, guidance, monkeypatch):
    made = model(heads=(head,)).cuda()
    if fast:
        patchgen_fast.swap(made)
    captured, capture = [], GraphedStep._capture
    monkeypatch.setattr(
        GraphedStep, "_capture", lambda self: captured.append(self) or capture(self)
    )
    order = torch.arange(16)
    task = Task(order, seen=order[:5], given=5)
    arguments = (made, torch.arange(4), task, noise_for(made, 4, 0), torch.rand(4, 1, 8, 8))
    options = SamplingOptions(guidance=guidance)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a step that could not be captured
        graphed = sample(*arguments, options=options)
    assert len(captured) == 1
    plain = sample(*arguments, options=options, use_graph=False)
    torch.testing.assert_close(graphed, plain, rtol=1e-3, atol=1e-3)
