"""swap on the patch transformer: same results, same object, exact undo, honest report."""

import copy
import dataclasses
import gc
import json
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from patchgen_fast import dispatch, models
from patchgen_fast.models import CONFIGS, PatchTransformer
from patchgen_fast.modules.state import state_of
from patchgen_fast.swapping import SwapError, parity, swap, swapped, unswap
from patchgen_fast.swapping.patchgen import FastAttention


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def small(dtype=torch.float32, **changes):
    """The model for digits, with a memory prefix so that completion of nothing works too."""
    config = dataclasses.replace(CONFIGS["small"], prefix_tokens=1, **changes)
    return PatchTransformer(config).to(dtype).eval()


def digits(batch=8, dtype=torch.float32):
    return torch.rand(batch, 1, 8, 8).to(dtype)


def classes(model):
    return [type(module) for module in model.modules()]


def run(model, images):
    images = images.clone().requires_grad_()
    out = model(images)
    out.square().sum().backward()
    found = {"out": out.detach(), "grad images": images.grad}
    found |= {f"grad {n}": p.grad for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad(set_to_none=True)
    return found


def by_the_parity_rule(fast, eager, truth):
    assert fast.keys() == eager.keys() == truth.keys()
    for name in eager:
        if name.endswith("attn.k_norm.bias"):
            continue  # it shifts all keys alike: 0 in exact arithmetic, rounding in both
        found = parity(name, fast[name], eager[name], truth[name])
        assert found.ok, found


@pytest.mark.parametrize("positions", ["learned", "sincos_2d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", [None, "torch"])
def test_outputs_and_gradients_within_the_parity_rule(backend, dtype, positions):
    """One run, tensor by tensor; on stock operators too: the layers themselves add no error."""
    model, images = small(dtype, positions=positions, qk_norm=True), digits(16, dtype)
    eager = run(model, images)
    truth = run(copy.deepcopy(model).double(), images.double())
    swap(model, backend=backend)
    with dispatch.counting() as ran:
        fast = run(model, images)
    assert sum(n for call, n in ran.items() if call.startswith("attention.")) == 12
    assert sum(n for call, n in ran.items() if call.startswith("patch_embed.")) == 2
    by_the_parity_rule(fast, eager, truth)


def test_everything_means_the_same_in_float64():
    """In float64 the reference runs, so that only a different formula makes a difference."""
    model, images = small(torch.float64), digits(4, torch.float64)
    memory = model.encode(images)
    before = [model(images), model.generate(memory), model.complete(images, 5), memory]
    swap(model)
    after = [
        model(images),
        model.generate(memory),
        model.complete(images, 5),
        model.encode(images),
    ]
    for got, expected in zip(after, before, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_uint8_images_go_in_as_they_are():
    model = small()
    raw = torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8)
    expected = model(raw)
    swap(model)
    torch.testing.assert_close(model(raw), expected)
    torch.testing.assert_close(model(raw / 255), expected)


def test_the_model_stays_the_same_object_with_the_same_parameters():
    model = small()
    parameters = {name: id(p) for name, p in model.named_parameters()}
    modules_before = {name: id(m) for name, m in model.named_modules()}
    keys = list(model.state_dict())
    attention = model.encoder.layers[0].attn
    swap(model)
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    assert {name: id(m) for name, m in model.named_modules()} == modules_before
    assert list(model.state_dict()) == keys
    assert isinstance(attention, models.Attention)
    assert type(attention) is FastAttention


def test_undo_is_exact_and_may_be_repeated():
    model = small()
    before, attributes = classes(model), [sorted(m.__dict__) for m in model.modules()]
    report = swap(model)
    assert classes(model) != before
    report.undo()
    assert classes(model) == before
    assert [sorted(m.__dict__) for m in model.modules()] == attributes
    report.undo()
    assert classes(model) == before
    assert "undone since" in str(report)


def test_the_context_manager_undoes_even_after_an_error():
    model = small()
    before = classes(model)
    with pytest.raises(ZeroDivisionError), swapped(model) as report:
        assert report.with_action("swapped")
        assert classes(model) != before
        _ = 1 / 0
    assert classes(model) == before


def test_twice_is_once():
    model = small()
    before = classes(model)
    first = swap(model)
    once = classes(model)
    second = swap(model)
    assert classes(model) == once
    assert not second.with_action("swapped")
    assert len(second.with_action("already")) == len(first.with_action("swapped"))
    assert "swapped already" in str(second)
    second.undo()  # did nothing, so undoes nothing
    assert classes(model) == once
    first.undo()
    assert classes(model) == before


def test_a_second_swap_sets_another_backend_and_its_undo_the_first():
    model = small()
    swap(model)
    second = swap(model, backend="reference")
    with dispatch.counting() as ran:
        model(digits())
    assert all(call.endswith(".reference") for call in ran)
    second.undo()
    assert model.encoder.layers[0].attn._fast.backend is None


def test_options_and_filter():
    model = small()
    report = swap(model, attention=False, patch_embed=False, dry_run=True)
    assert {row.kind for row in report.with_action("would swap")} == {"feed_forward", "layer"}
    assert {row.reason for row in report.with_action("skipped")} == {"option"}
    report = swap(model, filter_fn=lambda module, name: name.startswith("encoder."))
    assert report.with_action("swapped")
    for row in report.rows:
        inside = row.name.startswith("encoder.")
        assert row.action == ("swapped" if inside else "skipped")
        assert row.reason == ("" if inside else "filter")
    assert type(model.decoder.layers[0].attn) is models.Attention


def test_filtered_children_inside_a_swapped_layer_are_called():
    model, images = small(torch.float64), digits(2, torch.float64)
    expected = model(images)
    swap(model, filter_fn=lambda module, name: not name.endswith("attn"))
    assert type(model.encoder.layers[0].attn) is models.Attention
    torch.testing.assert_close(model(images), expected, rtol=1e-9, atol=1e-9)


def test_dry_run_changes_nothing():
    model = small()
    before = classes(model)
    report = swap(model, dry_run=True)
    assert classes(model) == before
    assert {row.action for row in report.rows} == {"would swap"}
    assert "would swap" in str(report)


def test_the_root_itself_may_be_the_layer():
    layer = models.Attention(32, 4).double()
    x = torch.randn(2, 5, 32).double()
    expected = layer(x)
    report = swap(layer)
    assert [row.name for row in report.rows] == [""]
    assert "(model)" in str(report)
    torch.testing.assert_close(layer(x), expected)


def test_backends_by_name():
    model, images = small(), digits()
    swap(model, backend="torch")
    with dispatch.counting() as ran:
        model(images)
    assert {call.partition(".")[2] for call in ran} == {"torch"}


def test_a_backend_that_an_op_lacks_is_refused_with_the_reason():
    report = swap(small(), backend="cuda", dry_run=True)
    refused = report.with_action("refused")
    assert {row.reason for row in refused} == {"no_backend"}
    assert any("cuda" in row.detail for row in refused)


# ------------------------------------------------------------------- what has to survive a swap


def test_state_dicts_both_ways():
    eager, fast = small(), small()
    swap(fast)
    fast.load_state_dict(eager.state_dict(), strict=True)
    images = digits()
    torch.testing.assert_close(fast(images), eager(images))
    with torch.no_grad():
        fast.encoder.norm.weight.mul_(2)
    eager.load_state_dict(fast.state_dict(), strict=True)
    torch.testing.assert_close(fast(images), eager(images))


def test_pickle_and_deepcopy_stay_fast_and_can_be_undone():
    model, images = small(), digits()
    before = classes(model)
    swap(model)
    expected = model(images)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert classes(other) == classes(model)
        assert torch.equal(other(images), expected)
        assert unswap(other) > 0
        assert classes(other) == before
        torch.testing.assert_close(other(images), expected)
    assert classes(model) != before


def test_saved_whole_and_loaded(tmp_path):
    model, images = small(), digits()
    swap(model)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(loaded(images), model(images))
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    torch.load(tmp_path / "weights.pt", weights_only=True)


def test_hooks_that_were_there_before_still_run():
    model, images = small(torch.float64), digits(2, torch.float64)
    calls: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *a, name=name: calls.append(name))
    expected = model(images)
    before, calls[:] = list(calls), []
    swap(model)
    got = model(images)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    assert sorted(calls) == sorted(before)


def test_backward_hooks_still_run():
    model = small()
    calls = []
    attention = model.encoder.layers[0].attn
    attention.register_full_backward_hook(lambda *a: calls.append("attn"))
    attention.proj.register_full_backward_hook(lambda *a: calls.append("proj"))
    swap(model)
    model(digits()).sum().backward()
    assert calls == ["proj", "attn"]


def test_gradient_checkpointing():
    from torch.utils.checkpoint import checkpoint

    model = small(torch.float64)
    swap(model)
    layer = model.encoder.layers[0]
    x = torch.randn(2, 5, 96, dtype=torch.float64, requires_grad=True)
    layer(x).sum().backward()
    expected, x.grad = x.grad, None
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_converted_after_the_swap(dtype):
    model = small()
    swap(model)
    assert model.to(dtype)(digits(2, dtype)).dtype == dtype


def test_built_on_the_meta_device_swapped_and_filled_later():
    eager = small()
    with torch.device("meta"):
        model = small()
    swap(model)
    model.to_empty(device="cpu")
    model.load_state_dict(eager.state_dict())
    images = digits()
    torch.testing.assert_close(model(images), eager(images))


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_compiles_whole(part):
    model, images = small(depth=1, decoder_depth=1), digits(2)
    swap(model)
    memory = model.encode(images)
    module = getattr(model, part)
    args = (images,) if part == "encoder" else (images, memory)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), module(*args))


def test_attention_compiled_by_inductor():
    model = small()
    swap(model)
    layer, x = model.encoder.layers[0].attn, torch.randn(2, 17, 96)
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True)
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-5)


def test_a_block_compiled_and_trained():
    model = small()
    swap(model)
    layer, x = model.encoder.layers[0], torch.randn(2, 17, 96)
    torch.compile(layer, fullgraph=True, backend="aot_eager")(x).sum().backward()
    compiled_gradients = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    layer(x).sum().backward()
    for got, p in zip(compiled_gradients, layer.parameters(), strict=True):
        torch.testing.assert_close(got, p.grad, rtol=1e-4, atol=1e-5)


def test_swapping_and_undoing_a_model_that_is_compiled_already():
    model, images = small(torch.float64, depth=1), digits(2, torch.float64)
    counter = CompileCounter()
    encoder = torch.compile(model.encoder, backend=counter)
    expected = encoder(images)
    graphs = counter.frame_count
    with swapped(model):
        torch.testing.assert_close(encoder(images), expected)
        assert counter.frame_count > graphs  # traced again, with the fast layers
    torch.testing.assert_close(encoder(images), expected)


def test_export():
    model, images = small(), digits(2)
    swap(model)
    program = torch.export.export(model.encoder, (images,))
    torch.testing.assert_close(program.module()(images), model.encoder(images))


def test_undo_keeps_nothing_alive():
    model = small()
    report = swap(model)
    reference = weakref.ref(model.encoder.layers[0].attn)
    report.undo()
    del model, report
    gc.collect()
    assert reference() is None


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
