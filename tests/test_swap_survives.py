"""What people do with a model after the swap, or did before: it goes on working.

State dicts, copies, hooks, conversions, LoRA, parametrisations and autocast; compile and export are
in `test_swap_compile.py`, DDP, FSDP2 and DTensors in `test_swap_distributed.py`.
"""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from swap_fixtures import classes, digits, small
from torch.nn.utils import parametrizations

from patchgen_fast import dispatch, models
from patchgen_fast.swapping import parity, swap, unswap


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def block(dtype=torch.float64):
    return models.EncoderLayer(32, 4, qkv_bias=True).to(dtype).eval()


def tokens(dtype=torch.float64, batch=2):
    return torch.randn(batch, 9, 32).to(dtype)


# -------------------------------------------------------------------- copies, hooks, conversions


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


def test_undo_keeps_nothing_alive():
    model = small()
    report = swap(model)
    reference = weakref.ref(model.encoder.layers[0].attn)
    report.undo()
    del model, report
    gc.collect()
    assert reference() is None


# ------------------------------------------------------------------------------- LoRA, parametrised


def with_lora(model):
    peft = pytest.importorskip("peft", exc_type=ImportError)
    config = peft.LoraConfig(r=4, target_modules=["qkv", "fc1"], init_lora_weights=False)
    torch.manual_seed(1)
    return peft.inject_adapter_in_model(config, model)


@pytest.mark.parametrize("when", ["before", "after"])
def test_lora(when):
    model, x = block(), tokens()
    eager = with_lora(copy.deepcopy(model))
    if when == "before":
        model = with_lora(model)
        swap(model)
    else:
        swap(model)
        model = with_lora(model)
    assert not torch.allclose(eager(x), block()(x))
    torch.testing.assert_close(model(x), eager(x), rtol=1e-9, atol=1e-9)
    eager(x).square().sum().backward()
    model(x).square().sum().backward()
    adapted = 0
    for (name, got), (_, expected) in zip(
        model.named_parameters(), eager.named_parameters(), strict=True
    ):
        if "lora" in name:
            adapted += 1
            torch.testing.assert_close(got.grad, expected.grad, msg=name)
    assert adapted == 4


TIMM = {"embed_dim": 24, "num_heads": 2, "num_classes": 5, "depth": 1}
STAGES = {"embed_dim": 24, "num_heads": (2, 4), "num_classes": 5, "depths": (1, 1)}
# the model: its arguments, and whether its eager form calls the adapters of qkv. Where the keys
# have no bias, eager reads the weight past them, and means just that.
ADAPTED = {
    "timm:vit_tiny_patch16_224": ({"img_size": 32, **TIMM}, True),
    "timm:swin_tiny_patch4_window7_224": ({"img_size": 56, **STAGES}, True),
    "timm:swinv2_tiny_window8_256": ({"img_size": 64, "window_size": 4, **STAGES}, False),
    "timm:swinv2_cr_tiny_224": ({"img_size": 56, **STAGES}, True),
    "timm:beit_base_patch16_224": ({"img_size": 32, **TIMM}, False),
    "timm:eva02_tiny_patch14_224": ({"img_size": 28, **TIMM}, False),
    "torchvision:swin_t": ({}, False),
    "torchvision:swin_v2_t": ({}, False),
}


def build(name, arguments):
    """New models have norms of weight 0, behind which nothing shows: they get random ones."""
    library, _, name = name.partition(":")
    if library == "timm":
        timm = pytest.importorskip("timm", exc_type=ImportError)
        model = timm.create_model(name, **arguments)
    else:
        torchvision_models = pytest.importorskip("torchvision.models", exc_type=ImportError)
        model = getattr(torchvision_models, name)(weights=None)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.double().eval()


@pytest.mark.parametrize("name", ADAPTED)
def test_lora_means_what_it_means_to_the_eager_model(name):
    """On qkv, on a patch convolution, and on the feed-forward part; before the swap and after."""
    peft = pytest.importorskip("peft", exc_type=ImportError)
    arguments, called = ADAPTED[name]
    model = build(name, arguments)
    images = torch.rand(1, 3, *[arguments.get("img_size", 64)] * 2).double()

    def adapted(model, targets):
        torch.manual_seed(1)
        config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
        return peft.inject_adapter_in_model(config, model)

    plain, of_qkv = model(images), adapted(copy.deepcopy(model), ["qkv"])(images)
    assert torch.allclose(plain, of_qkv, rtol=0, atol=1e-12) is not called
    targets = ["qkv", "proj", "fc1"]
    expected = adapted(copy.deepcopy(model), targets)(images)
    before, after = adapted(copy.deepcopy(model), targets), copy.deepcopy(model)
    swap(before)
    swap(after)
    torch.testing.assert_close(before(images), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(adapted(after, targets)(images), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("when", ["before", "after"])
def test_parametrised_children_are_called(when):
    model, x = block(), tokens()

    def change(model):
        parametrizations.weight_norm(model.attn.qkv)
        with torch.no_grad():
            model.attn.qkv.parametrizations.weight.original0.mul_(1.5)
        return model

    eager = change(copy.deepcopy(model))
    if when == "before":
        model = change(model)
        swap(model)
    else:
        swap(model)
        model = change(model)
    torch.testing.assert_close(model(x), eager(x), rtol=1e-9, atol=1e-9)


# ----------------------------------------------------------------------------------------- autocast


def test_autocast_within_the_parity_rule():
    model, x = block(torch.float32), tokens(torch.float32)
    truth = copy.deepcopy(model).double()(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        eager = model(x)
    swap(model)
    with torch.autocast("cpu", torch.bfloat16), dispatch.counting() as ran:
        got = model(x)
    assert got.dtype == eager.dtype
    assert any(call.startswith("attention.") for call in ran)
    found = parity("out", got.bfloat16(), eager.bfloat16(), truth)
    assert found.ok, found
