"""benchmarks/sweep.py: its counting, its verdicts, and what an interruption loses."""

import importlib
import json
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from patchgen_fast.modules.state import state_of

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """The script, as it is run: its neighbours are found beside it."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    before = set(sys.modules)
    module = importlib.import_module("sweep")
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    yield module
    for name in set(sys.modules) - before:
        if name.startswith("sweep"):
            del sys.modules[name]


@pytest.fixture
def examining(sweep):
    return importlib.import_module("sweep_examine")


def test_counts_attentions_and_patch_convolutions_alone(examining):
    images = torch.randn(1, 3, 8, 8)
    heads = torch.randn(1, 2, 4, 8)
    with examining.Counting() as count:
        F.scaled_dot_product_attention(heads, heads, heads)
        (heads @ heads.transpose(-1, -2)).softmax(-1)
        nn.Conv2d(3, 4, 4, 4)(images)
        nn.Conv2d(3, 4, 3, 1, padding=1)(images)
    assert (count.attentions, count.patch_convolutions) == (2, 1)


def test_a_model_of_timm(sweep):
    pytest.importorskip("timm", exc_type=ImportError)
    entry = sweep.sweep_timm.examine_model("deit_tiny_patch16_224")
    assert (entry.status, entry.parity, entry.note) == ("fully", "pass", "")
    assert (entry.eager, entry.remaining) == ((1, 1), (0, 0))
    partly = sweep.sweep_timm.examine_model("cait_xxs24_224")
    assert (partly.status, partly.parity) == ("partly", "pass")
    assert partly.remaining == (1, 0)
    assert partly.left == {"timm.models.cait.TalkingHeadAttn": "talking_heads"}


def test_resumes_after_an_interruption_and_joins_shards(sweep, monkeypatch):
    seen = []

    def examine(name):
        seen.append(name)
        if name == "broken":
            raise RuntimeError("boom")
        return sweep.Entry(name, "fully", parity="pass")

    names = ["a", "b", "broken", "c"]
    monkeypatch.setitem(sweep.LIBRARIES, "timm", (lambda: names, examine))
    sweep.run("timm", (0, 2), "", quiet=True)
    assert seen == ["a", "broken"]
    path = sweep.RESULTS / "sweep-timm.jsonl"
    path.write_text(json.dumps({"name": "b"})[:7])  # cut off while it was written
    sweep.run("timm", (0, 1), "", quiet=True)
    assert seen == ["a", "broken", "b", "c"]
    text = sweep.table("timm")
    assert "4 models with attention: 3 fully, 0 partly, 0 refused, 0 not run, 1 error" in text
    assert "RuntimeError: boom" in text


def test_models_of_transformers_and_diffusers(sweep):
    pytest.importorskip("transformers", exc_type=ImportError)
    entry = sweep.sweep_transformers.examine_model("SiglipVisionConfig")
    assert (entry.status, entry.parity, entry.note) == ("fully", "pass", "")
    packed = sweep.sweep_transformers.examine_model("GlmImageVisionConfig")
    assert (packed.status, packed.parity) == ("fully", "pass"), packed
    pytest.importorskip("diffusers", exc_type=ImportError)
    entry = sweep.sweep_diffusers.examine_model("DiT")
    assert (entry.status, entry.parity, entry.sampled) == ("fully", "pass", "pass, pass")


def test_what_cannot_be_built_small_is_not_run_and_nothing_is_claimed(examining):
    def small(whole):
        return examining.first_that_runs([lambda: 1 / 0])

    entry = examining.examine("m", lambda: nn.MultiheadAttention(8, 2), small)
    assert (entry.status, entry.swapped) == ("not run", {"attention": 1})
    assert entry.note == "ZeroDivisionError: division by zero"
    assert entry.parity == ""


class Wrong(nn.Module):
    """The fast layer is a little off."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x):
        x, _ = self.attention(x, x, x, need_weights=False)
        return x * (1.01 if state_of(self.attention) else 1.0)


def test_undecided_is_only_what_eager_itself_gets_wrong(examining, monkeypatch):
    model, x = Wrong().eval(), torch.randn(2, 9, 32)
    notes: list[str] = []

    def verdict():
        return examining._verdict(model, (x,), {}, notes, gradients=False, runs=1)

    assert examining.eager_by_another_kernel(model, (x,), {}, gradients=True) == set()
    assert verdict() == "fail"
    assert "TOO FAR" in notes[0]
    monkeypatch.setattr(examining, "eager_by_another_kernel", lambda *_: {"output"})
    assert verdict() == "undecided"
    monkeypatch.setattr(examining, "eager_by_another_kernel", lambda *_: {"another"})
    assert verdict() == "fail"


def test_a_model_that_takes_too_long_is_not_run(sweep, monkeypatch):
    monkeypatch.setattr(sweep, "MOST_SECONDS", 1)
    entry = sweep._guarded(lambda name: time.sleep(10), "slow")
    assert (entry.status, entry.note) == ("not run", "it took longer than 1 s")
