"""swap on transformers' models, built from small configurations; skips where it lacks."""

import copy
import pickle

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", exc_type=ImportError)

from patchgen_fast import dispatch  # noqa: E402
from patchgen_fast.swapping import swap, swapped, verify  # noqa: E402
from patchgen_fast.swapping import transformers as adapter  # noqa: E402

WIDTHS = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2}
VISION = {**WIDTHS, "num_attention_heads": 3, "image_size": 32, "patch_size": 8}
SEEDED = torch.Generator().manual_seed(0)  # what other tests drew must not matter
IMAGES = {"pixel_values": torch.rand(2, 3, 32, 32, generator=SEEDED)}

# configuration class: (changes, inputs)
MODELS = {
    "ViTConfig": (VISION, IMAGES),
    "DeiTConfig": (VISION, IMAGES),
    "ViTMAEConfig": ({**VISION, "mask_ratio": 0.0}, IMAGES),
    "Dinov2Config": (VISION, IMAGES),
    "Dinov2WithRegistersConfig": (VISION, IMAGES),
    "DINOv3ViTConfig": (VISION, IMAGES),
    "IJepaConfig": (VISION, IMAGES),
    "CLIPVisionConfig": (VISION, IMAGES),
    "SiglipVisionConfig": (VISION, IMAGES),
    "YolosConfig": ({**VISION, "image_size": [32, 32], "num_detection_tokens": 3}, IMAGES),
    "VivitConfig": (
        {**VISION, "num_frames": 4, "tubelet_size": [2, 8, 8]},
        {"pixel_values": torch.rand(2, 4, 3, 32, 32, generator=SEEDED)},
    ),
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def lively(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2 or parameter.std() < 1e-3:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def build(name, **changes):
    config = getattr(transformers, name)(**{**MODELS[name][0], **changes})
    return lively(transformers.AutoModel.from_config(config)).eval()


def doubled(inputs):
    return {k: x.double() if x.is_floating_point() else x for k, x in inputs.items()}


def outputs(model, inputs):
    out = model(**inputs)
    return out.last_hidden_state


@pytest.mark.parametrize("name", MODELS)
def test_means_the_same_in_float64(name):
    model, inputs = build(name).double(), doubled(MODELS[name][1])
    kwargs = {}
    if name == "ViTMAEConfig":
        kwargs["noise"] = torch.rand(2, 16).double()
    expected = outputs(model, inputs | kwargs)
    expected.square().sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    report = swap(model)
    left = report.with_action("refused", "unsupported")
    assert not left, str(report)
    with dispatch.counting() as ran:
        got = outputs(model, inputs | kwargs)
    assert sum(n for call, n in ran.items() if call.startswith("attention.")) == (
        3 if name == "SiglipVisionConfig" else 2  # its head has one more
    )
    assert sum(n for call, n in ran.items() if call.startswith("patch_embed.")) == 1
    assert any(row.kind == "feed_forward" for row in report.with_action("swapped")), str(report)
    assert all(c["calls"] == 1 and not c["fell_back"] for c in report.counters().values())
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    got.square().sum().backward()
    for n, p in model.named_parameters():
        if n in gradients:
            torch.testing.assert_close(p.grad, gradients[n], rtol=1e-8, atol=1e-8, msg=n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["ViTConfig", "DINOv3ViTConfig"])
def test_verify_passes(name, dtype):
    report = verify(
        build(name).to(dtype), kwargs={"pixel_values": IMAGES["pixel_values"].to(dtype)}
    )
    assert report.ok, str(report)


def test_padding_is_not_lost():
    """Siglip 2 pads its images: what lies in the padding must change nothing."""
    config = transformers.Siglip2VisionConfig(
        **WIDTHS, num_attention_heads=3, num_patches=16, patch_size=4
    )
    model = lively(transformers.AutoModel.from_config(config)).eval().double()
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[1, 12:] = 0
    shapes = torch.tensor([[4, 4], [3, 4]])
    pixels = torch.rand(2, 16, 48).double()

    def run(images):
        out = model(images, pixel_attention_mask=mask, spatial_shapes=shapes)
        return out.last_hidden_state[mask.bool()]

    expected = run(pixels)
    changed = pixels.clone()
    changed[1, 12:] = 7.0
    report = swap(model)
    torch.testing.assert_close(run(pixels), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(run(changed), expected, rtol=1e-9, atol=1e-9)
    assert all(c["calls"] > 0 and not c["fell_back"] for c in report.counters().values())


def test_packed_images_of_qwen_vl():
    """Patches cut already, one sequence an image, and Conv3d as one product."""
    config = transformers.Qwen2_5_VLConfig().vision_config
    for name, value in {
        "depth": 2, "hidden_size": 48, "num_heads": 3, "intermediate_size": 64,
        "out_hidden_size": 32, "fullatt_block_indexes": [1], "window_size": 56,
    }.items():  # fmt: skip
        setattr(config, name, value)
    model_class = (
        transformers.models.qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel
    )
    config._attn_implementation = "sdpa"
    model = lively(model_class(config)).eval().double()
    grid = torch.tensor([[1, 4, 6], [1, 8, 4]])
    patches = torch.rand(24 + 32, 3 * 2 * 14 * 14).double()
    expected = model(patches, grid_thw=grid).last_hidden_state
    expected.square().sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    report = swap(model)
    with dispatch.counting() as ran:
        got = model(patches, grid_thw=grid).last_hidden_state
    # one call a layer for all images and windows
    assert {op.partition(".")[0] for op in ran} >= {"varlen_attention", "linear"}
    assert sum(n for op, n in ran.items() if op.startswith("varlen_attention.")) == 2
    assert not any(op.startswith("attention.") for op in ran)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    got.square().sum().backward()
    for n, p in model.named_parameters():
        if n in gradients:
            torch.testing.assert_close(p.grad, gradients[n], rtol=1e-8, atol=1e-8, msg=n)
    counters = report.counters()
    assert counters["patch_embed.proj"] == {"calls": 1, "fell_back": {}}
    assert all(c["calls"] and not c["fell_back"] for c in counters.values()), str(report)


def test_packed_images_with_dropout_and_for_attention_maps():
    """What `varlen_attention` has not is done image by image."""
    from patchgen_fast.modules.recording import recording

    module = nn.Module()
    offsets = torch.tensor([0, 5, 12])
    heads = [torch.randn(1, 2, 12, 8) for _ in range(3)]
    lengths = dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), offsets)
    call = {**lengths, "max_length_q": 7, "max_length_k": 7, "is_causal": False}
    expected, _ = adapter.packed_attention_function(module, *heads, **call)
    with recording() as weights:
        got, _ = adapter.packed_attention_function(module, *heads, **call)
    torch.testing.assert_close(got, expected)
    assert [tuple(w.shape) for _, w in weights] == [(1, 2, 5, 5), (1, 2, 7, 7)]
    alone, _ = adapter.attention_function(module, *heads, None, is_causal=False)
    batch, _ = adapter.packed_attention_function(module, *heads, is_causal=False)  # as RADIO asks
    torch.testing.assert_close(batch, alone)
    dropped, _ = adapter.packed_attention_function(module, *heads, dropout=0.5, **call)
    assert dropped.shape == expected.shape
    assert not torch.allclose(dropped, expected)


def test_causal_and_masked_text_with_grouped_keys():
    config = transformers.LlamaConfig(
        **WIDTHS, num_attention_heads=4, num_key_value_heads=2, vocab_size=50
    )
    model = transformers.AutoModel.from_config(config).eval().double()
    tokens = torch.randint(0, 50, (2, 9))
    padded = torch.ones(2, 9, dtype=torch.long)
    padded[0, :4] = 0
    for mask in (None, padded):
        expected = model(tokens, attention_mask=mask).last_hidden_state
        with swapped(model) as report:
            got = model(tokens, attention_mask=mask).last_hidden_state
        valid = torch.ones(2, 9, dtype=torch.bool) if mask is None else mask.bool()
        torch.testing.assert_close(got[valid], expected[valid], rtol=1e-9, atol=1e-9)
        assert report.with_action("swapped")


def test_generation_with_a_cache():
    config = transformers.LlamaConfig(
        **WIDTHS, num_attention_heads=4, num_key_value_heads=2, vocab_size=50
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval().double()
    tokens = torch.randint(1, 50, (2, 5))
    run = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(tokens, **run)
    report = swap(model)
    assert torch.equal(model.generate(tokens, **run), expected)
    assert report.counters()["model.layers.0.self_attn"]["calls"] > 1


def test_another_implementation_is_refused_with_the_remedy():
    config = transformers.ViTConfig(**VISION)
    model = transformers.AutoModel.from_config(config, attn_implementation="eager")
    report = swap(model, patch_embed=False, feed_forward=False)
    rows = [row for row in report.rows if row.kind == "attention"]
    assert {(row.action, row.reason) for row in rows} == {("refused", "implementation")}
    assert "set_attn_implementation('sdpa')" in str(report)


def test_another_version_is_refused(monkeypatch):
    adapter._known_version.cache_clear()
    monkeypatch.setattr(adapter, "FINGERPRINTS", ("of another version",))
    report = swap(build("ViTConfig"), patch_embed=False, feed_forward=False)
    adapter._known_version.cache_clear()
    rows = [row for row in report.rows if row.kind == "attention"]
    assert {(row.action, row.reason) for row in rows} == {("refused", "unknown_version")}


def test_undo_copies_and_pickles():
    model = build("ViTConfig")
    config, classes = model.config, [type(m) for m in model.modules()]
    expected = model(**IMAGES).last_hidden_state
    report = swap(model)
    assert model.config is config
    assert model.config._attn_implementation == "sdpa"
    fast = model(**IMAGES).last_hidden_state
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(**IMAGES).last_hidden_state, fast)
    report.undo()
    assert [type(m) for m in model.modules()] == classes
    assert all(m.config is config for m in model.modules() if hasattr(m, "config"))
    assert torch.equal(model(**IMAGES).last_hidden_state, expected)


def test_twice_is_once_and_one_layer_may_be_left_out():
    model = build("ViTConfig")
    swap(model, filter_fn=lambda module, name: "layers.0" not in name and "layer.0" not in name)
    with dispatch.counting() as ran, torch.no_grad():
        model(**IMAGES)
    assert sum(n for call, n in ran.items() if call.startswith("attention.")) == 1
    second = swap(model)
    assert {row.name for row in second.with_action("swapped")} == {
        "layers.0",
        "layers.0.attention",
        "layers.0.mlp",
    }


def test_the_model_may_be_built_with_our_name():
    config = transformers.CLIPVisionConfig(**VISION)
    torch.manual_seed(1)
    fast = transformers.AutoModel.from_config(config, attn_implementation="patchgen_fast").eval()
    torch.manual_seed(1)
    config = transformers.CLIPVisionConfig(**VISION)  # the first model keeps its own
    eager = transformers.AutoModel.from_config(config, attn_implementation="sdpa").eval()
    with dispatch.counting() as ran, torch.no_grad():
        got = fast(**IMAGES).last_hidden_state
    assert any(call.startswith("attention.") for call in ran)
    torch.testing.assert_close(got, eager(**IMAGES).last_hidden_state, rtol=1e-4, atol=1e-4)


def test_compiles_whole():
    model = build("ViTConfig")
    swap(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = model(**IMAGES).last_hidden_state
    torch.testing.assert_close(compiled(**IMAGES).last_hidden_state, expected)


def test_a_class_of_a_user_is_not_touched():
    class Own(nn.Module):
        def forward(self, x):
            return x

    assert adapter.adapter_for(Own) is None
