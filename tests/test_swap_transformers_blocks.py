"""transformers' feed-forward parts and layers, known by the source of their forwards."""

import copy
import pickle
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", exc_type=ImportError)

from transformers import activations  # noqa: E402

from patchgen_fast import dispatch  # noqa: E402
from patchgen_fast.modules import fused  # noqa: E402
from patchgen_fast.swapping import swap, swapped, verify  # noqa: E402
from patchgen_fast.swapping import transformers_blocks as blocks  # noqa: E402

WIDTHS = {"hidden_size": 24, "intermediate_size": 32, "mlp_ratio": 2, "use_swiglu_ffn": False}
CONFIG = SimpleNamespace(
    **WIDTHS, hidden_act="gelu", mlp_bias=True, mlp_dim=32, num_hidden_layers=1, use_bias=True,
    d_model=24, encoder_ffn_dim=32, activation_function="relu", hidden_dropout_prob=0.1,
    dropout=0.1,
    activation_dropout=0.1, drop_rate=0.1, embed_dim=24, hidden_activation="gelu_pytorch_tanh",
    is_multimodal=False, activation_dropout_prob=0.1, use_gated_mlp=False, num_channels=3,
)  # fmt: skip


def mlp(model, cls, *args, **kwargs):
    path = import_module(f"transformers.models.{model}.modeling_{model}")
    return getattr(path, cls)(*args, **kwargs)


# one class of each source
FEED_FORWARDS = {
    "2bbd04211d2751d4": lambda: mlp("siglip", "SiglipMLP", CONFIG),
    "1fce95b8c71c940f": lambda: mlp("vjepa2", "VJEPA2MLP", CONFIG, hidden_size=24, mlp_ratio=2.0),
    "b583608dd70c7aa9": lambda: mlp("qwen2_vl", "VisionMlp", 24, 32, "quick_gelu"),
    "072b0f6d9766aba8": lambda: mlp("qwen3_vl", "Qwen3VLVisionMLP", CONFIG),
    "42b5ea7aa8e7d75b": lambda: mlp("dinov3_vit", "DINOv3ViTMLP", CONFIG),
    "89a70e256af9713e": lambda: mlp("sam", "SamMLPBlock", CONFIG),
    "779aa1114fc460ae": lambda: mlp(
        "vitdet",
        "VitDetMlp",
        SimpleNamespace(hidden_act="gelu", dropout_prob=0.1),
        in_features=24,
        hidden_features=32,
    ),
    "13bdfcf06b759949": lambda: mlp("mgp_str", "MgpstrMlp", CONFIG, 32),
    "11bda47b63efba33": lambda: mlp("focalnet", "FocalNetMlp", CONFIG, 24, 32, drop=0.1),
    "3b104c0e13561627": lambda: mlp("detr", "DetrMLP", CONFIG, 24, 32),
    "4cd949b84db8e002": lambda: mlp("dinov3_vit", "DINOv3ViTGatedMLP", CONFIG),
    "e5a658ad326f2ab9": lambda: mlp("qwen2_5_vl", "Qwen2_5_VLMLP", CONFIG, bias=True),
    "99222b327e2207be": lambda: mlp("idefics", "IdeficsMLP", 24, 32, "silu"),
    "571d9a54767bb8aa": lambda: mlp("lfm3_vl", "Lfm3VlVisionMLP", CONFIG),
    "f3694455008b42c7": lambda: mlp("yolos", "YolosIntermediate", CONFIG),
}


# one class of each source, and whether the residual is added
OUTPUTS = {
    "ec67b85adb2c3283": (lambda: mlp("yolos", "YolosOutput", CONFIG), True),
    "d5c2346d9efbb4a3": (lambda: mlp("swinv2", "Swinv2Output", CONFIG, 32), False),
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_every_known_source_is_tested():
    assert FEED_FORWARDS.keys() == blocks.FEED_FORWARDS.keys()
    assert OUTPUTS.keys() == blocks.OUTPUTS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("source", FEED_FORWARDS)
def test_parity_with_gradients(source, dtype):
    layer, x = FEED_FORWARDS[source]().to(dtype), torch.randn(2, 9, 24).to(dtype)
    with swapped(layer) as report:
        assert [row.action for row in report.rows] == ["swapped"], str(report)
        assert layer._names == blocks.FEED_FORWARDS[source]
        with dispatch.counting() as ran:
            layer(x)
        assert any(call.startswith("linear.") for call in ran)
    report = verify(layer, x)
    assert report.ok, str(report)


@pytest.mark.parametrize("source", FEED_FORWARDS)
def test_dropout_and_residual_in_training(source):
    layer, x = FEED_FORWARDS[source]().double().train(), torch.randn(2, 9, 24).double()
    torch.manual_seed(1)
    expected = layer(x)
    residual = torch.randn_like(expected)
    swap(layer)
    torch.manual_seed(1)
    got = layer.fused_forward(x, residual=residual)
    torch.testing.assert_close(got, expected + residual, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("source", OUTPUTS)
def test_second_halves(source, dtype):
    build, adds = OUTPUTS[source]
    layer = build().to(dtype).eval()
    x = torch.randn(2, 9, layer.dense.in_features).to(dtype)
    sum_with = (torch.randn(2, 9, layer.dense.out_features).to(dtype),) if adds else ()
    with swapped(layer) as report:
        assert [row.action for row in report.rows] == ["swapped"], str(report)
        with dispatch.counting() as ran:
            layer(x, *sum_with)
    assert any(call.startswith("linear.") for call in ran)
    report = verify(layer, x, *sum_with)
    assert report.ok, str(report)
    layer.double().train()
    x, *sum_with = (t.double() for t in (x, *sum_with))
    torch.manual_seed(1)
    expected = layer(x, *sum_with)
    with swapped(layer):
        torch.manual_seed(1)
        torch.testing.assert_close(layer(x, *sum_with), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_quick_gelu_in_place_is_the_same_to_the_bit(dtype):
    activation, x = activations.QuickGELUActivation(), torch.randn(999).to(dtype) * 8
    assert torch.equal(fused.IN_PLACE[type(activation)](x.clone()), activation(x))


def test_quick_gelu_in_place_only_where_nobody_looks():
    layer, x = FEED_FORWARDS["b583608dd70c7aa9"]().double(), torch.randn(2, 9, 24).double()
    assert type(layer.act) is activations.QuickGELUActivation
    expected = layer(x)
    swap(layer)
    torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-9)
        seen = []
        layer.act.register_forward_hook(lambda module, args, out: seen.append((*args, out)))
        torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-9)
    ((given, out),) = seen
    assert torch.equal(out, activations.QuickGELUActivation()(given))


def test_quick_gelu_compiled():
    layer, x = FEED_FORWARDS["b583608dd70c7aa9"](), torch.randn(2, 9, 24)
    swap(layer)
    with torch.no_grad():
        expected = layer(x)
        got = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(got, expected)


def test_by_keyword_copied_and_pickled():
    layer, x = FEED_FORWARDS["2bbd04211d2751d4"](), torch.randn(2, 9, 24)
    eager = type(layer)
    report = swap(layer)
    expected = layer(x)
    assert torch.equal(layer(hidden_states=x), expected)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(other) is type(layer)
        assert isinstance(other, eager)
        assert torch.equal(other(x), expected)
    assert [row.action for row in swap(layer).rows] == ["already"]
    report.undo()
    assert type(layer) is eager


def test_a_name_that_is_no_class_is_said():
    with pytest.raises(AttributeError, match="has no attribute 'vit__modeling_vit__Nothing'"):
        _ = blocks.vit__modeling_vit__Nothing


def test_another_source_of_the_same_name_is_left():
    class SiglipMLP(nn.Module):
        def forward(self, hidden_states):
            return self.fc2(self.fc1(hidden_states))

    assert blocks.adapter_for(SiglipMLP) is None
    SiglipMLP.__module__ = "transformers.models.siglip.modeling_siglip"
    assert (
        blocks.adapter_for(type("Other", (SiglipMLP,), {"__module__": SiglipMLP.__module__}))
        is None
    )


def test_lora_and_hooks_are_not_passed_by():
    peft = pytest.importorskip("peft", exc_type=ImportError)
    layer, x = FEED_FORWARDS["2bbd04211d2751d4"]().double(), torch.randn(2, 9, 24).double()
    config = peft.LoraConfig(r=4, target_modules=["fc1", "fc2"], init_lora_weights=False)
    layer = peft.inject_adapter_in_model(config, layer)
    seen = []
    layer.fc2.register_forward_hook(lambda *_: seen.append("fc2"))
    expected = layer(x)
    swap(layer)
    torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-9)
    assert seen == ["fc2", "fc2"]


def small(model, name, **changes):
    import transformers

    shape = {"image_size": 32, "patch_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = getattr(transformers, name)(hidden_size=32, intermediate_size=64, **shape, **changes)
    return transformers.AutoModel.from_config(config).eval()


@pytest.mark.parametrize(
    ("name", "changes", "layer"),
    [
        ("ViTConfig", {"hidden_dropout_prob": 0.1}, blocks.FastViTLayer),
        ("CLIPVisionConfig", {}, blocks.FastClipLayer),
        ("SiglipVisionConfig", {}, blocks.FastClipLayer),
        ("Dinov2Config", {"drop_path_rate": 0.2}, blocks.FastDinoLayer),
        ("DINOv3ViTConfig", {"drop_path_rate": 0.2}, blocks.FastDinoLayer),
        ("BlipVisionConfig", {}, blocks.FastBlipLayer),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_layers_mean_the_same(name, changes, layer, training):
    import transformers

    if name == "BlipVisionConfig":
        config = transformers.BlipVisionConfig(
            hidden_size=32, intermediate_size=64, image_size=32, patch_size=8,
            num_hidden_layers=2, num_attention_heads=2,
        )  # fmt: skip
        model = transformers.BlipVisionModel(config)
    else:
        model = small(name, name, **changes)
    model, images = model.double().train(training), torch.rand(4, 3, 32, 32).double()
    torch.manual_seed(1)
    expected = model(images).last_hidden_state
    report = swap(model)
    fast = [m for m in model.modules() if isinstance(m, layer)]
    assert len(fast) == 2, str(report)
    torch.manual_seed(1)
    got = model(images).last_hidden_state
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    assert all(m._fast.calls == 1 for m in fast)


def test_gradient_checkpointing_and_hidden_states():
    model = small("ViTConfig", "ViTConfig").double()
    images = torch.rand(2, 3, 32, 32).double()
    expected = model(images, output_hidden_states=True)
    swap(model)
    got = model(images, output_hidden_states=True)
    for one, other in zip(got.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    model.train()
    model(images).last_hidden_state.sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(images).last_hidden_state.sum().backward()
    again = [p.grad for p in model.parameters() if p.grad is not None]
    for one, other in zip(again, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
