"""swap on diffusers' transformers: DiT, PixArt, SD3, Flux; skips where diffusers lacks."""

import copy
import pickle

import pytest
import torch

pytest.importorskip("diffusers", exc_type=ImportError)

import diffusers  # noqa: E402

from patchgen_fast import dispatch  # noqa: E402
from patchgen_fast.swapping import diffusers as adapters  # noqa: E402
from patchgen_fast.swapping import diffusers_feed_forward as feed_forward  # noqa: E402
from patchgen_fast.swapping import swap, swapped, verify  # noqa: E402
from patchgen_fast.swapping.adapters import fingerprint  # noqa: E402

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2}
LATENTS = {"sample_size": 8, "patch_size": 2, "in_channels": 4}


def dit():
    model = diffusers.DiTTransformer2DModel(
        **HEADS, **LATENTS, out_channels=8, num_embeds_ada_norm=10, norm_num_groups=2
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([1, 5]),
        "class_labels": torch.tensor([1, 2]),
    }
    return model, inputs, 2, 1


def pixart():
    model = diffusers.PixArtTransformer2DModel(
        **HEADS, **LATENTS, cross_attention_dim=32, caption_channels=24, norm_num_groups=2,
        use_additional_conditions=False,
    )  # fmt: skip
    padding = torch.ones(2, 5)
    padding[0, 3:] = 0
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 5, 24),
        "encoder_attention_mask": padding,
        "timestep": torch.tensor([1, 5]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    return model, inputs, 4, 1


def sd3(**changes):
    model = diffusers.SD3Transformer2DModel(
        **HEADS, **LATENTS, caption_projection_dim=32, joint_attention_dim=24,
        pooled_projection_dim=20, pos_embed_max_size=8, **changes,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 5, 24),
        "pooled_projections": torch.randn(2, 20),
        "timestep": torch.tensor([1, 5]),
    }
    return model, inputs, 2 + len(changes.get("dual_attention_layers", ())), 1


def flux():
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=24, pooled_projection_dim=20,
        axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(2, 16, 8),
        "encoder_hidden_states": torch.randn(2, 5, 24),
        "pooled_projections": torch.randn(2, 20),
        "timestep": torch.tensor([0.1, 0.5]),
        "img_ids": torch.rand(16, 3),
        "txt_ids": torch.rand(5, 3),
    }
    return model, inputs, 2, 0


MODELS = {
    "dit": dit,
    "pixart": pixart,
    "sd3": sd3,
    "sd3.5": lambda: sd3(dual_attention_layers=(0,), qk_norm="rms_norm"),
    "flux": flux,
}

FEED_FORWARDS = {"dit": 2, "pixart": 2, "sd3": 3, "sd3.5": 3, "flux": 2}  # joint layers have two


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def build(name):
    model, inputs, attentions, convolutions = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2 or parameter.std() < 1e-3:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval(), inputs, attentions, convolutions


def converted(inputs, dtype):
    return {
        k: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for k, x in inputs.items()
    }


@pytest.mark.parametrize("name", MODELS)
def test_means_the_same_in_float64(name):
    model, inputs, attentions, convolutions = build(name)
    model, inputs = model.double(), converted(inputs, torch.float64)
    expected = model(**inputs).sample
    expected.square().sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    report = swap(model)
    assert not report.with_action("refused", "unsupported"), str(report)
    fed = sum(row.kind == "feed_forward" for row in report.with_action("swapped"))
    assert fed == FEED_FORWARDS[name]
    with dispatch.counting() as ran:
        got = model(**inputs).sample
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    assert sum(n for call, n in ran.items() if call.startswith("attention.")) == attentions
    assert sum(n for call, n in ran.items() if call.startswith("patch_embed.")) == convolutions
    assert all(c["calls"] and not c["fell_back"] for c in report.counters().values()), str(report)
    got.square().sum().backward()
    for n, p in model.named_parameters():
        if n in gradients:
            torch.testing.assert_close(p.grad, gradients[n], rtol=1e-8, atol=1e-8, msg=n)


def test_the_padding_of_a_prompt_changes_nothing():
    model, inputs, *_ = build("pixart")
    swap(model)
    expected = model(**inputs).sample
    inputs["encoder_hidden_states"][0, 3:] = 9.0
    torch.testing.assert_close(model(**inputs).sample, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("final_dropout", [False, True])
@pytest.mark.parametrize(
    "activation",
    ["gelu", "gelu-approximate", "geglu", "geglu-approximate", "swiglu", "linear-silu"],
)
def test_feed_forward_parity(activation, final_dropout, dtype):
    from diffusers.models.attention import FeedForward

    layer = FeedForward(24, 20, activation_fn=activation, dropout=0.5, final_dropout=final_dropout)
    layer, x = layer.to(dtype), torch.randn(2, 9, 24).to(dtype)
    report = verify(layer, x)
    assert report.ok and report.swapped_layers == 1, str(report)
    with swapped(layer), dispatch.counting() as ran:
        layer.train()
        torch.manual_seed(1)
        got = layer(x)
    assert any(call.startswith("linear.") for call in ran)
    torch.manual_seed(1)
    torch.testing.assert_close(got, layer(x), rtol=3e-2, atol=3e-2)


def test_a_feed_forward_part_with_a_low_rank_adapter_is_called():
    peft = pytest.importorskip("peft", exc_type=ImportError)
    from diffusers.models.attention import FeedForward

    layer, x = FeedForward(24, activation_fn="geglu").double(), torch.randn(2, 9, 24).double()
    config = peft.LoraConfig(r=4, target_modules=["net.0.proj", "net.2"], init_lora_weights=False)
    layer = peft.inject_adapter_in_model(config, layer)
    expected = layer(x)
    swap(layer)
    torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["dit", "sd3"])
def test_verify_passes(name):
    model, inputs, *_ = build(name)
    report = verify(model, kwargs=inputs)
    assert report.ok, str(report)


def test_undo_copies_and_pickles():
    model, inputs, *_ = build("sd3")
    processors = {n: p for n, p in model.attn_processors.items()}
    expected = model(**inputs).sample
    report = swap(model)
    fast = model(**inputs).sample
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(**inputs).sample, fast)
    report.undo()
    assert all(model.attn_processors[n] is p for n, p in processors.items())
    assert torch.equal(model(**inputs).sample, expected)


def test_another_processor_is_refused():
    model, *_ = build("dit")
    model.transformer_blocks[0].attn1.set_processor(
        diffusers.models.attention_processor.AttnProcessor()
    )
    rows = {row.name: row for row in swap(model).rows}
    row = rows["transformer_blocks.0.attn1"]
    assert (row.action, row.reason) == ("refused", "processor")
    assert rows["transformer_blocks.1.attn1"].action == "swapped"


def test_the_processors_are_of_the_installed_version():
    found = [fingerprint(cls, "__call__") for cls in adapters.PROCESSORS]
    assert found == list(adapters.FINGERPRINTS)
    assert {c: fingerprint(c) for c in feed_forward.FINGERPRINTS} == feed_forward.FINGERPRINTS
    (adapter,) = feed_forward.ADAPTERS
    assert fingerprint(adapter.source) in adapter.fingerprints


def test_a_feed_forward_part_of_another_version_is_refused(monkeypatch):
    from diffusers.models.attention import FeedForward

    first = feed_forward.activations.GEGLU
    monkeypatch.setitem(feed_forward.FINGERPRINTS, first, "of another version")
    (row,) = swap(FeedForward(8), dry_run=True).rows
    assert (row.action, row.reason) == ("refused", "unknown_version")
