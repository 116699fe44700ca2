"""swap on torchvision's ViT and Swin; skips where torchvision lacks."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("torchvision", exc_type=ImportError)

from torchvision.models import swin_transformer, vision_transformer  # noqa: E402
from torchvision.ops import MLP  # noqa: E402

from patchgen_fast import dispatch  # noqa: E402
from patchgen_fast.swapping import swap, verify  # noqa: E402
from patchgen_fast.swapping import torchvision as adapters  # noqa: E402
from patchgen_fast.swapping.adapters import fingerprint  # noqa: E402

STAGES = {"embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "num_classes": 5}
MODELS = {
    "vit": lambda: vision_transformer.VisionTransformer(32, 8, 2, 3, 48, 96, num_classes=5),
    "swin": lambda: swin_transformer.SwinTransformer(
        patch_size=[4, 4], window_size=[4, 4], **STAGES
    ),
    "swin_v2": lambda: swin_transformer.SwinTransformer(
        patch_size=[4, 4],
        window_size=[4, 4],
        block=swin_transformer.SwinTransformerBlockV2,
        downsample_layer=swin_transformer.PatchMergingV2,
        **STAGES,
    ),
}
# (attentions, patch convolutions) of one run
RUNS = {"vit": (2, 1), "swin": (4, 1), "swin_v2": (4, 1)}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def build(name):
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2 or parameter.std() < 1e-3:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.mark.parametrize("side", [32, 40])
@pytest.mark.parametrize("name", MODELS)
def test_means_the_same_in_float64(name, side):
    if name == "vit" and side != 32:
        pytest.skip("torchvision's ViT takes images of one size")
    model, images = build(name).double(), torch.randn(2, 3, side, side).double()
    expected = model(images)
    expected.square().sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    report = swap(model)
    assert not report.with_action("refused", "unsupported"), str(report)
    with dispatch.counting() as ran:
        got = model(images)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    attentions, convolutions = RUNS[name]
    assert sum(n for call, n in ran.items() if call.startswith("attention.")) == attentions
    assert sum(n for call, n in ran.items() if call.startswith("patch_embed.")) == convolutions
    assert all(c["calls"] and not c["fell_back"] for c in report.counters().values()), str(report)
    got.square().sum().backward()
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[n], rtol=1e-8, atol=1e-8, msg=n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_verify_passes(name, dtype):
    report = verify(build(name).to(dtype), torch.randn(2, 3, 32, 32).to(dtype))
    assert report.ok, str(report)


def test_compiles_and_undoes():
    model, images = build("vit"), torch.randn(2, 3, 32, 32)
    classes, expected = [type(m) for m in model.modules()], model(images)
    report = swap(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), expected, rtol=1e-4, atol=1e-4)
    report.undo()
    assert [type(m) for m in model.modules()] == classes
    assert torch.equal(model(images), expected)


def test_another_mlp_is_refused():
    report = swap(nn.Sequential(MLP(8, [16, 16, 8])))
    assert [(row.action, row.reason) for row in report.rows] == [("refused", "layers")]


def test_dropout_in_training_has_the_same_expectation():
    layer = swin_transformer.ShiftedWindowAttention(24, [4, 4], [2, 2], 2, dropout=0.5).double()
    fast = copy.deepcopy(layer)
    swap(fast)
    x = torch.randn(2, 8, 8, 24).double()
    torch.manual_seed(3)
    expected = layer(x)
    torch.manual_seed(3)
    torch.testing.assert_close(fast(x), expected)


def test_every_adapter_knows_the_installed_version():
    for adapter in adapters.ADAPTERS:
        if adapter.fingerprints is not None:
            assert fingerprint(adapter.source) in adapter.fingerprints, adapter.source
