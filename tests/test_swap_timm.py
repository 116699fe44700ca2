"""swap on timm's models: fully swapped, right, and refused where a class is not the known one.

Needs timm, and with it a torchvision that fits this torch; skips with the reason where they lack.
"""

import copy

import pytest
import torch
from torch import nn

try:
    import timm
except Exception as error:  # torchvision of another torch fails in ways of its own
    pytest.skip(f"timm can't be imported: {error}", allow_module_level=True)

from timm.layers import (
    AttentionPool2d,
    AttentionPoolLatent,
    AttentionPoolPrr,
    Mlp,
    PatchEmbed,
    QuickGELU,
    RotAttentionPool2d,
)
from timm.layers.attention import Attention, AttentionRope
from timm.models.eva import EvaAttention
from timm.models.volo import ClassAttention

from patchgen_fast import dispatch
from patchgen_fast.swapping import swap, swapped, verify
from patchgen_fast.swapping import timm as adapters
from patchgen_fast.swapping.adapters import fingerprint

# name: constructor arguments that make it small
SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
STAGES = {"embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 5}
MAXVIT = {"depths": (1, 1, 1, 1), "embed_dim": (32, 32, 32, 64), "num_classes": 5}
MODELS = {
    "vit_tiny_patch16_224": {"img_size": 64, **SMALL},
    "vit_small_patch16_18x2_224": {"img_size": 32, **SMALL},  # parallel blocks
    "vit_base_patch16_clip_224": {"img_size": 64, **SMALL},  # norm before
    "deit_tiny_distilled_patch16_224": {"img_size": 64, **SMALL},  # two prefix tokens
    "deit3_small_patch16_224": {"img_size": 64, **SMALL},  # layer scale
    "vit_small_patch14_dinov2": {"img_size": 56, **SMALL},
    "vit_giant_patch14_reg4_dinov2": {"img_size": 56, **SMALL},  # SwiGLU, registers
    "vit_base_patch16_siglip_224": {"img_size": 64, **SMALL},  # attention pool
    "vit_base_patch32_plus_256": {"img_size": 64, **SMALL},
    "vit_so150m_patch16_reg4_gap_256": {"img_size": 64, **SMALL},
    "vit_medium_patch16_rope_reg1_gap_256": {"img_size": 64, **SMALL},
    "vit_small_patch16_rope_mixed_224": {"img_size": 64, **SMALL},  # rope per head
    "vit_small_patch16_rope_ape_224": {"img_size": 64, **SMALL},
    "vit_small_patch16_dinov3": {"img_size": 64, **SMALL},
    "vit_small_plus_patch16_dinov3": {"img_size": 64, **SMALL},
    "eva02_tiny_patch14_224": {"img_size": 56, **SMALL},
    "eva02_base_patch16_clip_224": {"img_size": 64, **SMALL},  # scaled norms, split qkv
    "eva_giant_patch14_224": {"img_size": 56, **SMALL},
    "vit_pe_core_tiny_patch16_384": {"img_size": 64, **SMALL},
    "beit_base_patch16_224": {"img_size": 64, **SMALL},
    "beitv2_base_patch16_224": {"img_size": 64, **SMALL},
    "beit3_base_patch16_224": {"img_size": 64, **SMALL},
    "vit_relpos_small_patch16_224": {"img_size": 64, **SMALL},  # bias by an MLP, of each block
    "vit_srelpos_small_patch16_224": {"img_size": 64, **SMALL},  # the model's
    "vit_relpos_medium_patch16_rpn_224": {"img_size": 64, **SMALL},  # norms after
    "naflexvit_base_patch16_gap": {**SMALL},
    "crossvit_9_240": {"depth": ((1, 1, 0),) * 2, "embed_dim": (24, 48), "num_heads": (2, 2)},
    "swin_tiny_patch4_window7_224": {"img_size": 56, **STAGES},
    "swinv2_tiny_window8_256": {"img_size": 64, "window_size": 4, **STAGES},
    "swinv2_cr_tiny_224": {"img_size": 56, **STAGES},
    "cait_xxs24_224": {"img_size": 64, "depth_token_only": 2, **SMALL},
    "xcit_nano_12_p16_224": {"img_size": 64, **SMALL},
    "maxvit_rmlp_pico_rw_256": {"img_size": 64, **MAXVIT},
    "coatnet_rmlp_1_rw2_224": {"img_size": 64, **MAXVIT},
    "samvit_base_patch16": {"img_size": 64, "window_size": 3, "global_attn_indexes": (1,), **SMALL},
}
# what they have that no fused kernel does, or that is known not to be a patch
LEFT = {
    "cait_xxs24_224": {"TalkingHeadAttn"},
    "xcit_nano_12_p16_224": {"XCA", "ConvPatchEmbed"},
    "coatnet_rmlp_1_rw2_224": {"ConvMlp"},
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def build(name, **kwargs):
    model = timm.create_model(name, **{**MODELS[name], **kwargs})
    with torch.no_grad():
        for parameter in model.parameters():  # zeros and tiny scales would hide mistakes
            if parameter.dim() < 2 or parameter.std() < 1e-3:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    size = MODELS[name].get("img_size") or model.pretrained_cfg["input_size"][-1]
    return model.eval(), torch.randn(2, 3, size, size)


@pytest.mark.parametrize("name", MODELS)
def test_means_the_same_in_float64(name):
    model, images = build(name)
    model, images = model.double(), images.double()
    expected = model(images)
    expected.square().sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    report = swap(model)
    got = model(images)
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8, msg=lambda m: f"{m}\n{report}")
    got.square().sum().backward()
    for n, p in model.named_parameters():
        if n in gradients:
            torch.testing.assert_close(p.grad, gradients[n], rtol=1e-7, atol=1e-7)
    counters = report.counters()
    assert all(c["calls"] > 0 for c in counters.values()), str(report)
    assert not any(c["fell_back"] for c in counters.values()), str(report)
    left = {row.cls.rpartition(".")[2] for row in report.with_action("refused", "unsupported")}
    assert left == LEFT.get(name, set()), str(report)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224",
        "deit3_small_patch16_224",
        "vit_small_patch16_dinov3",
        "eva02_base_patch16_clip_224",
        "beit_base_patch16_224",
    ],
)
def test_verify_passes(name, dtype):
    model, images = build(name)
    report = verify(model.to(dtype), images.to(dtype))
    assert report.ok, str(report)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3"])
def test_undo_is_exact(name):
    model, images = build(name)
    classes, keys = [type(m) for m in model.modules()], list(model.state_dict())
    expected = model(images)
    with swapped(model):
        assert list(model.state_dict()) == keys
        assert [type(m) for m in model.modules()] != classes
    assert [type(m) for m in model.modules()] == classes
    assert torch.equal(model(images), expected)


def attention_pair(cls, **kwargs):
    eager = cls(48, 3, norm_layer=nn.LayerNorm, **kwargs).double().eval()
    for parameter in eager.parameters():
        nn.init.normal_(parameter, std=0.3)
    fast = copy.deepcopy(eager)
    assert swap(fast).with_action("swapped")
    return eager, fast


@pytest.mark.parametrize("attn_mask", ["none", "bool", "float", "causal"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"qkv_bias": True, "qk_norm": True},
        {"scale_norm": True, "gated": True, "proj_bias": False},
        {"attn_head_dim": 8, "dim_out": 20},
    ],
)
def test_attention_options(options, attn_mask):
    eager, fast = attention_pair(Attention, **options)
    x = torch.randn(2, 5, 48).double()
    kwargs = {}
    if attn_mask == "causal":
        kwargs["is_causal"] = True
    elif attn_mask == "bool":
        kwargs["attn_mask"] = torch.rand(2, 1, 5, 5) > 0.3
        kwargs["attn_mask"][..., 0] = True
    elif attn_mask == "float":
        kwargs["attn_mask"] = torch.randn(1, 3, 5, 5).double()
    torch.testing.assert_close(fast(x, **kwargs), eager(x, **kwargs), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rope", ["none", "shared", "per head"])
@pytest.mark.parametrize("rotate_half", [False, True])
@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (AttentionRope, {"num_prefix_tokens": 2, "qk_norm": True, "scale_norm": True}),
        (AttentionRope, {"qkv_fused": False, "num_kv_heads": 1}),
        (EvaAttention, {"qkv_bias": True, "qk_norm": True}),
        (EvaAttention, {"qkv_bias": True, "qkv_bias_separate": True, "num_prefix_tokens": 0}),
        (EvaAttention, {"qkv_fused": False, "gated": True}),
        (EvaAttention, {"qkv_bias": False, "scale_norm": False}),
    ],
)
def test_rotary_attention_options(cls, options, rotate_half, rope):
    if rope == "per head" and "num_kv_heads" in options:
        pytest.skip("timm has no rotary embedding per head with grouped keys")
    eager, fast = attention_pair(cls, rotate_half=rotate_half, **options)
    prefix = options.get("num_prefix_tokens", 1)
    x = torch.randn(2, 7, 48).double()
    table = None
    if rope != "none":
        table = torch.randn(*((3,) if rope == "per head" else ()), 7 - prefix, 32).double()
    torch.testing.assert_close(fast(x, table), eager(x, table), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("build_pool", "shape"),
    [
        (lambda: ClassAttention(48, 3, qkv_bias=True), (2, 7, 48)),
        (lambda: AttentionPoolLatent(48, num_heads=3), (2, 7, 48)),
        (
            lambda: AttentionPoolLatent(
                48, 24, num_heads=3, latent_len=2, pos_embed="abs", feat_size=7, qk_norm=True
            ),
            (2, 7, 48),
        ),
        (
            lambda: AttentionPoolLatent(48, 0, num_heads=3, q_proj=False, pool_type="avg"),
            (2, 7, 48),
        ),
        (lambda: AttentionPoolPrr(48, 3, pool_type="avg", pre_norm=True), (2, 7, 48)),
        (lambda: AttentionPool2d(48, 3, out_features=20, head_dim=16), (2, 48, 4, 3)),
        (lambda: AttentionPool2d(48, qkv_separate=True, head_dim=16, pool_type=""), (2, 48, 7, 7)),
        (lambda: RotAttentionPool2d(48, class_token=True, head_dim=16), (2, 48, 3, 4)),
        (lambda: RotAttentionPool2d(48, head_dim=16, rope_type="dinov3"), (2, 48, 3, 4)),
    ],
)
def test_class_attention_and_pools(build_pool, shape):
    eager = build_pool().double().eval()
    for parameter in eager.parameters():
        nn.init.normal_(parameter, std=0.3)
    fast = copy.deepcopy(eager)
    report = swap(fast)
    x = torch.randn(shape).double()
    expected = eager(x)
    torch.testing.assert_close(fast(x), expected, rtol=1e-9, atol=1e-9)
    assert not report.with_action("refused", "unsupported"), str(report)
    expected.square().sum().backward()
    fast(x).square().sum().backward()
    for name, parameter in fast.named_parameters():
        torch.testing.assert_close(parameter.grad, eager.get_parameter(name).grad, msg=name)


@pytest.mark.parametrize("output_fmt", [None, "NHWC", "NCHW", "NLC", "NCL"])
@pytest.mark.parametrize("norm_layer", [None, nn.LayerNorm])
@pytest.mark.parametrize("pad", [False, True])
def test_patch_embed_options(pad, norm_layer, output_fmt):
    if norm_layer is not None and output_fmt in ("NCHW", "NCL"):
        pytest.skip("timm's normalisation wants channels last")
    eager = PatchEmbed(
        None if pad else 32,
        8,
        norm_layer=norm_layer,
        embed_dim=24,
        output_fmt=output_fmt,
        dynamic_img_pad=pad,
    ).double()
    fast = copy.deepcopy(eager)
    swap(fast)
    images = torch.randn(2, 3, 30 if pad else 32, 32).double()
    torch.testing.assert_close(fast(images), eager(images), rtol=1e-9, atol=1e-9)


def test_another_input_and_patch_size_after_the_swap():
    model, _ = build("vit_tiny_patch16_224")
    eager = copy.deepcopy(model)
    swap(model)
    for m in (model, eager):
        m.set_input_size(img_size=48, patch_size=8)
    images = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(model(images), eager(images), rtol=1e-4, atol=1e-4)


def test_dynamic_image_size():
    model, _ = build("vit_tiny_patch16_224", dynamic_img_size=True)
    images = torch.randn(2, 3, 48, 80)
    expected = model(images)
    swap(model)
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)


def test_channels_last_and_compile():
    model, images = build("vit_tiny_patch16_224")
    model = model.to(memory_format=torch.channels_last)
    images = images.contiguous(memory_format=torch.channels_last)
    expected = model(images)
    swap(model)
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["deit3_small_patch16_224", "vit_tiny_patch16_224"])
def test_drop_path_and_layer_scale_in_training(name):
    model, images = build(name, drop_path_rate=0.5)
    model, images = model.double().train(), images.double()
    torch.manual_seed(1)
    expected = model(images)
    swap(model)
    torch.manual_seed(1)
    torch.testing.assert_close(model(images), expected, rtol=1e-8, atol=1e-8)


def test_a_convolutional_mlp_is_refused():
    report = swap(nn.Sequential(Mlp(8, 16, use_conv=True)))
    assert [(row.action, row.reason) for row in report.rows] == [("refused", "convolutional")]


@pytest.mark.parametrize("grad", [False, True])
def test_an_activation_that_linear_has_not(grad):
    layer, x = Mlp(8, 16, act_layer=QuickGELU).double(), torch.randn(2, 5, 8).double()
    expected = layer(x)
    swap(layer)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-9)


def test_a_class_of_another_version_is_refused(monkeypatch):
    def forward(self, x, attn_mask=None, is_causal=False):
        return x

    monkeypatch.setattr(Attention, "forward", forward)
    model = nn.Sequential(Attention(48, 3), Mlp(8, 16))
    report = swap(model)
    assert [(row.action, row.reason) for row in report.rows] == [
        ("refused", "unknown_version"),
        ("swapped", ""),
    ]
    assert "timm.layers.attention.Attention differs" in str(report)


def test_every_adapter_knows_the_installed_version():
    for adapter in adapters.ADAPTERS:
        assert fingerprint(adapter.source) in adapter.fingerprints, adapter.source


def test_a_class_that_is_only_called_attention_is_reported():
    from timm.models.cait import TalkingHeadAttn

    report = swap(nn.Sequential(TalkingHeadAttn(48, 3)), dry_run=True)
    assert [(row.action, row.reason) for row in report.rows] == [("unsupported", "talking_heads")]


def test_every_softmax_attention_runs_ours():
    model, images = build("vit_tiny_patch16_224")
    swap(model)
    with dispatch.counting() as ran, torch.no_grad():
        model(images)
    assert sum(n for call, n in ran.items() if call.startswith("attention.")) == 2
    assert sum(n for call, n in ran.items() if call.startswith("patch_embed.")) == 1
