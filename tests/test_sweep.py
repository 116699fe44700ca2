"""benchmarks/sweep.py: its counting, its verdicts, and what an interruption loses."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "sweep.py"


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("sweep", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "sweep", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    return module


def test_counts_attentions_and_patch_convolutions_alone(sweep):
    images = torch.randn(1, 3, 8, 8)
    heads = torch.randn(1, 2, 4, 8)
    with sweep.Counting() as count:
        F.scaled_dot_product_attention(heads, heads, heads)
        (heads @ heads.transpose(-1, -2)).softmax(-1)
        nn.Conv2d(3, 4, 4, 4)(images)
        nn.Conv2d(3, 4, 3, 1, padding=1)(images)
    assert (count.attentions, count.patch_convolutions) == (2, 1)


def test_a_model_of_timm(sweep):
    pytest.importorskip("timm", exc_type=ImportError)
    entry = sweep.examine_timm("deit_tiny_patch16_224")
    assert (entry.status, entry.parity, entry.note) == ("fully", "pass", "")
    assert (entry.eager, entry.remaining) == ((1, 1), (0, 0))
    partly = sweep.examine_timm("cait_xxs24_224")
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
    assert "4 models with attention: 3 fully, 0 partly, 0 refused, 1 error" in text
    assert "RuntimeError: boom" in text
