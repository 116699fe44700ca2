"""verify: passes what is right, fails what is wrong, and says what it compared."""

import copy
import json

import pytest
import torch
from torch import nn

from patchgen_fast.models import CONFIGS, Attention, PatchTransformer
from patchgen_fast.swapping import parity, swap, verification, verify
from patchgen_fast.swapping.patchgen import FastAttention


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def small(dtype=torch.float32):
    return PatchTransformer(CONFIGS["small"]).to(dtype), torch.rand(8, 1, 8, 8).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("before", [False, True])
def test_the_patch_transformer_passes(dtype, before):
    model, images = small(dtype)
    if before:
        swap(model)
    training, classes = model.training, [type(m) for m in model.modules()]
    report = verify(model, images)
    assert report.ok, str(report)
    assert report.verdict == "pass"
    assert [p.name for p in report.outputs] == ["output"]
    names = {p.name for p in report.gradients}
    assert names == {"grad input[0]"} | {f"grad {name}" for name, _ in model.named_parameters()}
    # the model is as it was
    assert model.training == training
    assert [type(m) for m in model.modules()] == classes
    assert all(p.grad is None for p in model.parameters())
    assert images.grad is None


class Wrong(FastAttention):
    """A fast layer that is a little wrong in a way that a loose tolerance would let pass."""

    def fused_forward(self, x, *args, **kwargs):
        return super().fused_forward(x, *args, **kwargs) * (1 + 3e-5)


class WrongGradient(FastAttention):
    """Right forward, wrong backward."""

    def fused_forward(self, x, *args, **kwargs):
        out = super().fused_forward(x, *args, **kwargs)
        if out.requires_grad:
            out.register_hook(lambda grad: grad * 1.001)
        return out


class NotFinite(FastAttention):
    def fused_forward(self, x, *args, **kwargs):
        out = super().fused_forward(x, *args, **kwargs).clone()
        out.view(-1)[0] = torch.nan
        return out


@pytest.mark.parametrize(
    ("cls", "named"),
    [(Wrong, "output"), (WrongGradient, "grad qkv.weight"), (NotFinite, "output")],
)
def test_a_wrong_layer_fails_and_is_named(cls, named):
    layer = Attention(32, 4)
    swap(layer)
    layer.__class__ = cls
    report = verify(layer, torch.randn(2, 33, 32))
    assert report.verdict == "fail"
    assert not report.ok
    assert named in {p.name for p in report.failures()}
    assert "TOO FAR" in str(report) or "not finite" in str(report)


def test_a_failure_is_confirmed_by_more_runs(monkeypatch):
    layer, x = Attention(32, 4), torch.randn(2, 33, 32)
    swap(layer)
    assert verify(layer, x, runs=2).runs == 2
    layer.__class__ = Wrong
    assert verify(layer, x, runs=2).runs == 2  # beyond doubt
    monkeypatch.setattr(verification, "BEYOND_DOUBT", float("inf"))
    report = verify(layer, x, runs=2)
    assert (report.runs, report.verdict) == (18, "fail")


@pytest.mark.parametrize(("unlucky", "verdict"), [(1, "pass"), (9, "fail")])
def test_runs_that_raise_a_suspicion_do_not_confirm_it(monkeypatch, unlucky, verdict):
    """An error just past the bound in the first run alone, and in all of them."""
    compare, compared = verification._compare, []

    def worse(*tensors):
        compared.append(compare(*tensors))
        if len(compared) > 2 * unlucky:  # outputs and gradients of a run
            return compared[-1]
        return {
            name: found._replace(max_error=1.5 * verification._judge(name, found).max_allowed)
            for name, found in compared[-1].items()
        }

    monkeypatch.setattr(verification, "_compare", worse)
    layer = Attention(32, 4)
    swap(layer)
    report = verify(layer, torch.randn(2, 33, 32), runs=1)
    assert report.verdict == verdict
    assert 1 < report.runs <= 9


def test_nothing_to_swap_is_no_pass():
    report = verify(nn.Linear(2, 2), torch.randn(3, 2))
    assert report.verdict == "nothing swapped"
    assert not report.ok
    assert "no layer of a known class" in str(report)


class Named(nn.Module):
    """Inputs by name and outputs in containers, some of them not floating."""

    def __init__(self):
        super().__init__()
        self.attention = Attention(32, 4)

    def forward(self, x, *, mask=None, scale):
        out = self.attention(x, mask)
        return {"out": out * scale, "more": (out.argmax(-1), out.mean(1))}


def test_keyword_arguments_and_containers():
    mask = torch.zeros(9, 9).masked_fill(torch.rand(9, 9) > 0.7, torch.finfo(torch.float32).min)
    report = verify(Named(), torch.randn(2, 9, 32), kwargs={"mask": mask, "scale": 2.0})
    assert report.ok, str(report)
    assert [p.name for p in report.outputs] == ["output['out']", "output['more'][1]"]
    assert "grad input['mask']" in {p.name for p in report.gradients}


def test_without_gradients_and_under_a_backend():
    model, images = small()
    report = verify(model, images, gradients=False, backend="torch")
    assert report.ok
    assert report.gradients == ()


def test_json():
    model, images = small()
    data = json.loads(verify(model, images, runs=1).to_json())
    assert (data["schema_version"], data["verdict"]) == (1, "pass")
    assert data["outputs"][0]["ok"] is True
    assert data["swapped_layers"] > 0


def test_it_is_the_same_every_time():
    model, images = small()
    assert verify(model, images) == verify(model, images)


def test_the_rule_by_hand():
    truth = torch.tensor([1.0, -2.0, 4.0], dtype=torch.float64)
    eager = truth.float() + torch.tensor([0.0, 1e-3, 0.0])
    eps = torch.finfo(torch.float32).eps
    found = parity("x", truth.float() + torch.tensor([0.0, 0.0, 1.9e-3]), eager, truth)
    assert found.max_error == pytest.approx(1.9e-3, rel=1e-3)
    assert found.max_allowed == pytest.approx(2e-3 + 8 * eps, rel=1e-3)
    assert found.ok
    assert not parity("x", truth.float() + torch.tensor([0.0, 0.0, 2.1e-3]), eager, truth).ok
    # the mean alone can fail
    assert not parity("x", truth.float() + 1.5e-3, eager, truth).ok


def test_places_without_a_truth_are_left_out_and_counted():
    truth = torch.tensor([1.0, torch.nan], dtype=torch.float64)
    found = parity("x", torch.tensor([1.0, 0.0]), truth.float(), truth)
    assert found.ok
    assert found.ignored == 1
    assert not parity("x", torch.tensor([torch.nan, 0.0]), truth.float(), truth).ok


def test_gradients_that_are_zero_in_exact_arithmetic_are_judged_by_rounding():
    """The keys' normalisation bias shifts all scores of a row alike: no gradient but rounding."""
    layer = Attention(64, 4, qk_norm=True)
    report = verify(layer, torch.randn(4, 65, 64))
    bias = next(p for p in report.gradients if p.name == "grad k_norm.bias")
    assert bias.exact_zero
    assert bias.scale < 1e-12 < bias.max_allowed < 1e-2
    assert report.ok, str(report)


def test_what_is_exactly_zero_is_judged_beside_the_largest_gradient():
    """Twice eager's rounding bounds nothing there; a real gradient in its place is still seen."""
    eps, eager = torch.finfo(torch.float32).eps, torch.full((4,), 1e-9)
    zero, truth = torch.zeros(4).double(), torch.full((4,), 3.0).double()

    def judged(error):
        run = {
            "weight": verification._errors("weight", truth.float(), truth.float(), truth),
            "bias": verification._errors("bias", torch.full((4,), error), eager, zero),
        }
        return verification._judge_all([run], largest=3.0)[1]

    assert judged(1e-8).ok and judged(1e-8).exact_zero
    assert judged(1e-8).max_allowed == pytest.approx(3.0 * eps)
    assert not judged(4.0 * eps).ok


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: verify(torch.sin, torch.ones(1)), TypeError, "torch.nn.Module to verify"),
        (
            lambda: parity("x", torch.ones(2), torch.ones(3), torch.ones(2).double()),
            ValueError,
            r"one shape, got \(2,\) \(ours\), \(3,\) \(eager\)",
        ),
        (
            lambda: parity("x", torch.ones(2), torch.ones(2).half(), torch.ones(2).double()),
            TypeError,
            "one dtype",
        ),
    ],
)
def test_wrong_input_says_expected_got_and_remedy(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_a_copy_is_what_runs():
    """Buffers that a model updates when it runs stay as they were."""
    model = nn.Sequential(Attention(32, 4), nn.BatchNorm1d(9))
    before = copy.deepcopy(model.state_dict())
    verify(model, torch.randn(2, 9, 32))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
