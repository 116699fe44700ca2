"""What swap refuses, what it reports, and what an error in a swapped layer says."""

import json

import pytest
import torch
from swap_fixtures import digits, small
from torch import nn

from patchgen_fast import models
from patchgen_fast.modules.state import state_of
from patchgen_fast.swapping import SwapError, swap
from patchgen_fast.swapping.patchgen import FastAttention


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# --------------------------------------------------------------------------- refusals and reports


class OwnAttention(models.Attention):
    """A user's subclass, whose forward nobody else knows."""

    def forward(self, x, attn_mask=None, is_causal=False, *, cache=None):
        return x


class TalkingAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(4, 4)


def refusal(module):
    report = swap(nn.Sequential(module), dry_run=True)
    assert len(report.rows) == 1
    return report.rows[0]


def test_a_subclass_is_refused():
    row = refusal(OwnAttention(32, 4))
    assert (row.action, row.reason) == ("refused", "subclass")
    assert "patchgen_fast.models.layers.Attention" in row.detail


def test_a_class_that_only_has_the_name_is_reported_and_left():
    row = refusal(TalkingAttention())
    assert (row.action, row.reason) == ("unsupported", "unknown_class")


def test_a_parametrised_layer_is_refused():
    layer = models.Attention(32, 4)
    layer.temperature = nn.Parameter(torch.ones(1))
    nn.utils.parametrize.register_parametrization(layer, "temperature", nn.Softplus())
    row = refusal(layer)
    assert (row.action, row.reason) == ("refused", "parametrised")


def test_a_rebound_forward_is_refused():
    layer = models.Attention(32, 4)
    layer.forward = lambda x: x
    assert refusal(layer).reason == "rebound_forward"


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_a_quantised_layer_is_refused():
    quantised = pytest.importorskip("torch.ao.nn.quantized.dynamic")
    layer = models.FeedForward(32, 64)
    layer.fc1 = quantised.Linear(32, 64)
    row = refusal(layer)
    assert (row.action, row.reason) == ("refused", "quantised")
    assert "torch" not in row.detail and "Linear" in row.detail


class Wrapped(torch.Tensor):
    """A tensor subclass as quantisers make them: a wrapper of other tensors."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        assert func is torch.ops.aten.detach.default
        return cls(args[0].inner)


def test_a_layer_with_wrapped_weights_is_refused():
    layer = models.FeedForward(32, 64)
    layer.fc1.weight = nn.Parameter(Wrapped(torch.randn(64, 32)), requires_grad=False)
    row = refusal(layer)
    assert (row.action, row.reason) == ("refused", "quantised")
    assert "Wrapped" in row.detail


def test_strict_raises_before_anything_is_changed():
    model = nn.ModuleList([models.Attention(32, 4), OwnAttention(32, 4)])
    with pytest.raises(SwapError, match=r"1 \(.*OwnAttention\): subclass.*\n.*filter_fn"):
        swap(model, strict=True)
    assert type(model[0]) is models.Attention
    report = swap(model, strict=True, filter_fn=lambda module, name: name == "0")
    assert type(model[0]) is FastAttention
    assert [row.action for row in report.rows] == ["swapped", "skipped"]


def test_nothing_to_swap_is_said():
    report = swap(nn.Linear(2, 2))
    assert report.rows == []
    assert "nothing to swap in torch.nn.modules.linear.Linear" in str(report)
    with pytest.raises(SwapError, match="nothing to swap"):
        swap(nn.Linear(2, 2), strict=True)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: swap("vit"), TypeError, "expected a torch.nn.Module to swap, got str"),
        (lambda: swap(nn.Linear(2, 2), backend="gpu"), ValueError, "got 'gpu'"),
    ],
)
def test_wrong_input_says_expected_got_and_remedy(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_the_report_collapses_equal_rows():
    model = small()
    report = swap(model)
    model(digits())
    text = str(report)
    line = next(line for line in text.splitlines() if "encoder.layers.0-3.attn " in line)
    assert line.split() == ["encoder.layers.0-3.attn", "Attention", "swapped", "auto", "1"]
    assert "12 attention, 3 patch embed, 8 feed-forward, 8 around them" in text
    assert len(text.splitlines()) == 2 + 10


def test_counters_tell_calls_and_fallbacks_per_layer():
    model = small(attention_dropout=0.1).train()
    report = swap(model)
    model(digits())
    model.encode(digits())
    counters = report.counters()
    assert counters["encoder.layers.0.attn"] == {"calls": 2, "fell_back": {"dropout": 2}}
    assert counters["decoder.layers.0.attn"] == {"calls": 1, "fell_back": {"dropout": 1}}
    assert "2 x dropout" in str(report)
    entry = next(
        row for row in json.loads(report.to_json())["rows"] if row["name"] == "encoder.patch_embed"
    )
    assert entry["calls"] == 2
    assert entry["class"] == "patchgen_fast.models.layers.PatchEmbed"


def test_json_has_a_version_and_every_row():
    report = swap(small(), dry_run=True)
    data = json.loads(report.to_json())
    assert data["schema_version"] == 1
    assert data["dry_run"] is True
    assert len(data["rows"]) == len(report.rows)
    assert data["rows"][0]["reason"] is None


def test_a_state_is_only_where_a_swap_put_it():
    model = small()
    assert all(state_of(module) is None for module in model.modules())
    swap(model)
    assert state_of(model.encoder.layers[0].attn).original is models.Attention
    assert state_of(model.encoder) is None


# --------------------------------------------------------------------------------------- failures


def text_of(error):
    return "\n".join((str(error), *getattr(error, "__notes__", ())))


def test_a_failure_inside_a_swapped_layer_names_it_and_the_remedy():
    model = nn.Sequential(nn.Identity(), models.Attention(32, 4))
    swap(model)
    with pytest.raises(ValueError) as caught:
        model(torch.randn(2, 5, 31))
    text = text_of(caught.value)
    assert "layer '1'" in text
    assert "filter_fn=lambda module, name: not name.startswith('1')" in text
    assert text.count("patchgen_fast.swap replaced") == 1


def test_a_failure_of_a_child_names_the_innermost_swapped_layer_once():
    model = small()
    swap(model)
    broken = model.encoder.layers[1].attn.proj

    def fail(*_):
        raise RuntimeError("broken")

    broken.register_forward_hook(fail)
    with pytest.raises(RuntimeError) as caught:
        model(digits())
    text = text_of(caught.value)
    assert "encoder.layers.1" in text
    assert text.count("patchgen_fast.swap replaced") == 1
