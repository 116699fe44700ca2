"""swap on the patch transformer: same results, same object, exact undo, honest report."""

import copy

import pytest
import torch
from swap_fixtures import classes, digits, small

from patchgen_fast import dispatch, models
from patchgen_fast.swapping import parity, swap, swapped
from patchgen_fast.swapping.patchgen import FastAttention


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


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
