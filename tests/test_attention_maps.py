"""attention_maps: the weights that the fused kernels used, their rollout, their picture."""

import pytest
import torch
from torch import nn

from patchgen_fast import attention_maps, models, swap
from patchgen_fast.models import CONFIGS, PatchTransformer
from patchgen_fast.modules.recording import attention_weights, recording


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def encoder():
    model = PatchTransformer(CONFIGS["small"]).encoder.eval()
    swap(model)
    return model


IMAGES = torch.rand(2, 1, 8, 8)


def test_the_weights_are_those_of_the_layer():
    """Weights times values, through the projection, is what the layer gives."""
    layer = models.Attention(32, 4).double().eval()
    swap(layer)
    x = torch.randn(2, 7, 32).double()
    maps = attention_maps(layer, x)
    (weights,) = maps.values()
    assert weights.shape == (2, 4, 7, 7)
    value = layer.qkv(x)[..., 64:].unflatten(-1, (4, 8)).transpose(1, 2)
    again = layer.proj((weights.double() @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(again, layer(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mask", ["none", "bool", "float", "causal"])
def test_masks_are_in_the_weights(mask):
    query, key = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    given, causal = None, mask == "causal"
    scores = query @ key.repeat_interleave(2, dim=1).transpose(-2, -1) * 0.3
    if mask == "bool":
        given = torch.rand(2, 1, 5, 5) > 0.4
        given[0, 0, 2] = False
        scores = scores.masked_fill(~given, -torch.inf)
    elif mask == "float":
        given = torch.randn(1, 4, 5, 5)
        scores = scores + given
    elif causal:
        scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    expected = scores.softmax(-1).nan_to_num(0.0)
    torch.testing.assert_close(attention_weights(query, key, given, causal, 0.3), expected)


def test_every_layer_has_its_name_and_rows_sum_to_one():
    maps = attention_maps(encoder(), IMAGES)
    assert list(maps) == [f"layers.{i}.attn" for i in range(4)]
    for weights in maps.values():
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


def test_rollout_of_one_layer_without_residual_is_its_mean():
    layer = models.Attention(32, 4).eval()
    swap(layer)
    maps = attention_maps(layer, torch.randn(2, 7, 32))
    (weights,) = maps.values()
    torch.testing.assert_close(maps.rollout(residual=0.0), weights.mean(1))
    torch.testing.assert_close(maps.rollout(residual=1.0), torch.eye(7).expand(2, 7, 7))
    with pytest.raises(ValueError, match="from 0 to 1"):
        maps.rollout(residual=2.0)


def test_heat_lies_on_the_grid_and_its_picture_on_the_image():
    pytest.importorskip("PIL")
    maps = attention_maps(encoder(), IMAGES)
    heat = maps.heat()
    assert heat.shape == (2, *maps.grid)
    assert float(heat.max()) == 1.0
    assert maps.heat("layers.1.attn", head=2, token=3).shape == heat.shape
    picture = maps.picture("layers.0.attn", index=1)
    assert picture.size == (8, 8) and picture.mode == "RGB"


def test_multihead_attention_of_torch():
    layer = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    x = torch.randn(2, 7, 32)
    hidden = torch.zeros(2, 7, dtype=torch.bool)
    hidden[0, 5:] = True
    _, expected = layer(x, x, x, key_padding_mask=hidden, average_attn_weights=False)
    swap(layer)
    maps = attention_maps(layer, x, x, x, key_padding_mask=hidden, need_weights=False)
    torch.testing.assert_close(maps[""], expected)


def test_the_model_is_as_it_was_and_nothing_is_kept():
    model = encoder()
    expected = model(IMAGES)
    attention_maps(model, IMAGES)
    assert torch.equal(model(IMAGES), expected)
    with recording() as found:
        pass
    assert found == []


def test_what_is_missing_is_said():
    with pytest.raises(ValueError, match="call patchgen_fast.swap"):
        attention_maps(nn.Linear(2, 2), torch.randn(1, 2))
    layer = models.FeedForward(8, 16)
    swap(layer)
    with pytest.raises(ValueError, match="swapped attention layer to run"):
        attention_maps(layer, torch.randn(1, 8))
    with pytest.raises(KeyError, match=r"those that did: layers.0.attn"):
        attention_maps(encoder(), IMAGES)["blocks.0"]
