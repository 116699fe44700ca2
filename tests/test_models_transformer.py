"""The eager patch transformer: shapes, causality, cache, generation, completion, errors."""

import dataclasses
import doctest
import math

import pytest
import torch

from patchgen_fast.models import (
    CONFIGS,
    Attention,
    CrossAttention,
    DecoderCache,
    DecoderLayer,
    FeedForward,
    KeyValueCache,
    PatchEmbed,
    PatchTransformer,
    PatchTransformerConfig,
    PatchUnembed,
    patchify,
    position_table,
    sincos_2d,
    sinusoidal,
    transformer,
    unpatchify,
)
from patchgen_fast.models.layers import attend

TINY = CONFIGS["tiny"]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def model_of(**changes):
    return PatchTransformer(dataclasses.replace(TINY, **changes)).eval()


def images_for(model, batch=2):
    config = model.config
    return torch.rand(batch, config.channels, config.image_size, config.image_size)


# --------------------------------------------------------------------------------- positions


def test_sinusoidal_follows_the_paper():
    table = sinusoidal(50, 16)
    for position, feature in [(0, 0), (7, 4), (49, 14)]:
        angle = position / 10000 ** (feature / 16)
        assert table[position, feature].item() == pytest.approx(math.sin(angle), abs=1e-6)
        assert table[position, feature + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)


def test_sincos_2d_halves_tell_row_and_column():
    table = sincos_2d((3, 5), 16).reshape(3, 5, 16)
    rows, columns = table[..., :8], table[..., 8:]
    assert torch.equal(rows, rows[:, :1].expand_as(rows))
    assert torch.equal(columns, columns[:1].expand_as(columns))
    assert table[2, 0, 0].item() == pytest.approx(math.sin(2.0))
    assert table[0, 4, 8].item() == pytest.approx(math.sin(4.0))
    assert table.reshape(15, 16).unique(dim=0).shape[0] == 15


@pytest.mark.parametrize("kind", ["learned", "sinusoidal", "sincos_2d"])
def test_positions_are_trained_only_when_learned(kind):
    table = position_table(kind, (4, 4), 32)
    assert table.shape == (1, 16, 32)
    assert table.requires_grad == (kind == "learned")
    out = model_of(positions=kind)
    assert out(images_for(out)).shape == (2, 3, 16, 16)


# ------------------------------------------------------------------------------------ layers


def test_attend_is_softmax_of_scaled_products():
    query, key, value = (torch.randn(2, 3, 5, 8, dtype=torch.float64) for _ in range(3))
    weights = (torch.einsum("bhid,bhjd->bhij", query, key) / math.sqrt(8)).softmax(-1)
    expected = torch.einsum("bhij,bhjd->bhid", weights, value)
    torch.testing.assert_close(attend(query, key, value), expected)


@pytest.mark.parametrize("mask", ["none", "bool", "float"])
@pytest.mark.parametrize("past", [0, 3])
def test_attend_causal_with_a_past_and_a_mask(past, mask):
    query = torch.randn(2, 3, 4, 8, dtype=torch.float64)
    key, value = (torch.randn(2, 3, 4 + past, 8, dtype=torch.float64) for _ in range(2))
    scores = torch.einsum("bhid,bhjd->bhij", query, key) / math.sqrt(8)
    attn_mask = None
    if mask == "bool":
        attn_mask = torch.rand(4, 4 + past) > 0.3
        attn_mask[:, 0] = True
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif mask == "float":
        attn_mask = torch.randn(4, 4 + past, dtype=torch.float64)
        scores = scores + attn_mask
    for i in range(4):
        scores[..., i, i + past + 1 :] = -math.inf
    expected = torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), value)
    torch.testing.assert_close(attend(query, key, value, attn_mask, is_causal=True), expected)


def test_patch_embed_is_normalise_patchify_project():
    embed = PatchEmbed(8, 4, 3, 10, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    raw = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    scaled = raw.float() / 255
    normalised = (scaled - embed.mean[:, None, None]) / embed.std[:, None, None]
    weight = embed.proj.weight.reshape(10, -1)
    expected = patchify(normalised, 4).flatten(2) @ weight.T + embed.proj.bias
    torch.testing.assert_close(embed(raw), expected)
    torch.testing.assert_close(embed(scaled), expected)
    position, prefix = torch.randn(1, 4, 10), torch.randn(1, 2, 10)
    whole = embed(raw, pos_embed=position, prefix=prefix)
    torch.testing.assert_close(whole[:, 2:], expected + position)
    assert torch.equal(whole[:, :2], prefix.expand(2, -1, -1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_statistics_stay_float32_and_out_of_the_state_dict(dtype):
    embed = PatchEmbed(8, 4, 3, 10, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)).to(dtype)
    assert embed.mean.dtype == embed.std.dtype == torch.float32
    assert set(embed.state_dict()) == {"proj.weight", "proj.bias"}
    images = torch.rand(2, 3, 8, 8)
    back = embed.denormalise(embed.normalise(images, torch.float32))
    torch.testing.assert_close(back, images)
    assert embed.normalise(images, dtype).dtype == dtype
    assert torch.equal(embed.to("meta").to_empty(device="cpu").mean, torch.tensor([0.5, 0.4, 0.3]))


def test_patch_unembed_is_project_unpatchify():
    unembed = PatchUnembed((2, 3), 4, 3, 10)
    tokens = torch.randn(2, 6, 10)
    patches = tokens @ unembed.proj.weight.reshape(10, -1)
    expected = unpatchify(patches.unflatten(2, (3, 4, 4)), (2, 3))
    torch.testing.assert_close(unembed(tokens), expected + unembed.proj.bias[:, None, None])


@pytest.mark.parametrize("name", CONFIGS)
def test_state_dict_keys(name):
    config = dataclasses.replace(CONFIGS[name], depth=1, decoder_depth=1)
    with torch.device("meta"):
        keys = set(PatchTransformer(config).state_dict())
    for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"):
        assert {f"encoder.layers.0.{part}.weight", f"encoder.layers.0.{part}.bias"} <= keys
    parts = ("norm1", "attn.qkv", "attn.proj", "norm2", "cross_attn.q", "cross_attn.kv")
    for part in (*parts, "cross_attn.proj", "norm3", "mlp.fc1", "mlp.fc2"):
        assert {f"decoder.layers.0.{part}.weight", f"decoder.layers.0.{part}.bias"} <= keys


@pytest.mark.parametrize(
    ("name", "parameters"), [("vit_b_16", 85_797_888), ("vit_l_16", 303_300_608)]
)
def test_the_encoders_are_vit_sized(name, parameters):
    """The published parameters without the head and without a position for the class token."""
    with torch.device("meta"):
        encoder = PatchTransformer.from_name(name).encoder
    assert sum(p.numel() for p in encoder.parameters()) == parameters
    images = torch.zeros(1, 3, 224, 224, device="meta")
    assert encoder(images).shape == (1, 197, encoder.norm.weight.numel())


# -------------------------------------------------------------------------------- the decoder


def test_a_patch_depends_on_those_before_it_only():
    model = model_of()
    images = images_for(model, batch=1)
    memory = model.encode(images)
    before = patchify(model.decoder(images, memory), 4)
    changed = patchify(images, 4).clone()
    changed[:, 6] += 1.0
    after = patchify(model.decoder(unpatchify(changed, 4), memory), 4)
    assert torch.equal(before[:, :7], after[:, :7])
    assert (before[:, 7:] != after[:, 7:]).flatten(2).any(dim=2).all()


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("chunks", [[1] * 16, [16], [5, 1, 10], [1, 15]])
def test_decoding_with_a_cache_equals_the_full_causal_pass(chunks, qk_norm):
    layer = DecoderLayer(32, 4, qk_norm=qk_norm, memory_dim=24).double().eval()
    x, memory = torch.randn(3, 16, 32).double(), torch.randn(3, 9, 24).double()
    with torch.no_grad():
        full = layer(x, memory)
        cache = DecoderCache(1, steps=16, memory_length=9).layers[0]
        steps = [layer(part, memory, cache=cache) for part in x.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(steps, dim=1), full, rtol=1e-12, atol=1e-12)


def test_generation_equals_feeding_back_through_full_passes():
    model = model_of(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4)).double()
    memory = model.encode(images_for(model).double())
    drawn = torch.zeros(2, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        for index in range(16):
            full = model.to_pixels(model.decoder(drawn, memory))
            patches = patchify(drawn, 4)
            patches[:, index] = patchify(full, 4)[:, index]
            drawn = unpatchify(patches, 4)
    torch.testing.assert_close(model.generate(memory), drawn, rtol=1e-10, atol=1e-10)


def test_cache_memory_is_constant_and_preallocated():
    cache = KeyValueCache(8)
    keys, _ = cache.append(torch.ones(2, 3, 1, 4), torch.ones(2, 3, 1, 4))
    address, size = keys.data_ptr(), keys.untyped_storage().nbytes()
    for step in range(1, 8):
        new = torch.full((2, 3, 1, 4), float(step))
        keys, values = cache.append(new, -new)
        assert (keys.data_ptr(), keys.untyped_storage().nbytes()) == (address, size)
        assert keys.shape == values.shape == (2, 3, step + 1, 4)
        assert torch.equal(keys[:, :, -1:], new)
        assert torch.equal(values[:, :, -1:], -new)


@pytest.mark.parametrize("prefix_tokens", [0, 1])
def test_completion_keeps_what_is_given_and_sees_nothing_else(prefix_tokens):
    model = model_of(prefix_tokens=prefix_tokens)
    images = images_for(model)
    other = patchify(images, 4).clone()
    other[:, 5:] = torch.rand_like(other[:, 5:])
    completed = model.complete(images, 5)
    assert torch.equal(patchify(completed, 4)[:, :5], patchify(images, 4)[:, :5])
    assert torch.equal(completed, model.complete(unpatchify(other, 4), 5))


def test_completion_of_bytes_and_of_nothing_and_of_everything():
    model = model_of(prefix_tokens=1)
    raw = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    torch.testing.assert_close(model.complete(raw, 16), raw / 255)
    half = model.complete(raw, 8)
    torch.testing.assert_close(patchify(half, 4)[:, :8], patchify(raw / 255, 4)[:, :8])
    torch.testing.assert_close(half, model.complete(raw / 255, 8))
    assert model.complete(raw, 0).shape == (2, 3, 16, 16)


def test_drawing_stops_after_the_steps_asked_for():
    model = model_of()
    memory = model.encode(images_for(model))
    whole, part = model.generate(memory), model.generate(memory, steps=3)
    assert torch.equal(patchify(part, 4)[:, :3], patchify(whole, 4)[:, :3])
    assert patchify(part, 4)[:, 3:].count_nonzero() == 0
    assert len(list(model.draw(memory, steps=0))) == 0
    assert all(not patch.requires_grad for patch in model.draw(memory))
    assert torch.is_grad_enabled()


def test_gradients_reach_every_parameter():
    model = model_of(prefix_tokens=1, qk_norm=True)
    model(images_for(model)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_dropout_is_active_in_training_only():
    model = model_of(dropout=0.3, attention_dropout=0.3)
    images = images_for(model)
    assert torch.equal(model(images), model(images))
    model.train()
    assert not torch.equal(model(images), model(images))


def test_one_patch_and_rectangles_and_an_empty_batch():
    single = model_of(image_size=4)
    images = torch.rand(2, 3, 4, 4)
    assert single.generate(single.encode(images)).shape == (2, 3, 4, 4)
    wide = model_of(image_size=(8, 16), patch_size=(4, 2))
    images = torch.rand(2, 3, 8, 16)
    assert wide.generate(wide.encode(images)).shape == (2, 3, 8, 16)
    assert wide(images[:0]).shape == (0, 3, 8, 16)


def test_images_resembling_training_data_are_learned():
    """Fifty steps on two images bring the loss down: the pieces are wired together."""
    model = model_of().train()
    images = images_for(model)
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(50):
        loss = (model(images) - images).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# -------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (
            lambda m: m(torch.rand(2, 3, 20, 16)),
            ValueError,
            "expected images of 16 x 16, got 20 x 16; ",
        ),
        (
            lambda m: m(torch.rand(2, 1, 16, 16)),
            ValueError,
            r"expected images \[B, 3, 16, 16\], got",
        ),
        (lambda m: m(torch.rand(3, 16, 16)), ValueError, r"got shape \(3, 16, 16\)"),
        (
            lambda m: m(torch.zeros(2, 3, 16, 16, dtype=torch.int64)),
            TypeError,
            "uint8 images, got torch.int64",
        ),
        (lambda m: m.generate(torch.rand(2, 5, 31)), ValueError, r"expected memory \[B, N, 32\]"),
        (lambda m: m.generate(torch.rand(2, 0, 32)), ValueError, "at least one token"),
        (lambda m: m.generate(torch.rand(2, 5, 32), steps=17), ValueError, "at most 16 steps"),
        (
            lambda m: m.generate(torch.rand(2, 5, 32), torch.rand(2, 3, 4, 4)),
            ValueError,
            "patchify",
        ),
        (
            lambda m: m.generate(torch.rand(2, 5, 32), torch.rand(1, 2, 3, 4, 4)),
            ValueError,
            r"\[2, n",
        ),
        (lambda m: m.complete(torch.rand(2, 3, 16, 16), 17), ValueError, "between 0 and 16"),
        (lambda m: m.complete(torch.rand(2, 3, 16, 16), 0), ValueError, "at least one given patch"),
        (lambda m: Attention(10, 3), ValueError, "divides dim=10, got 3"),
        (lambda m: Attention(8, 2)(torch.rand(2, 8)), ValueError, r"expected tokens \[B, N, 8\]"),
        (
            lambda m: CrossAttention(8, 2)(torch.rand(1, 2, 8), torch.rand(1, 2, 9)),
            ValueError,
            "memory",
        ),
        (
            lambda m: PatchUnembed(4, 4, 3, 8)(torch.rand(2, 17, 8)),
            ValueError,
            "drop prefix tokens",
        ),
        (lambda m: PatchEmbed(16, 5), ValueError, "multiples of the patch"),
        (lambda m: PatchEmbed(16, 4, 3, 8, mean=(0.5,)), ValueError, "mean with 3 numbers"),
        (lambda m: PatchTransformer.from_name("huge"), ValueError, "tiny, small, medium"),
        (lambda m: PatchTransformerConfig(16, 4, positions="other"), ValueError, "sincos_2d"),
        (lambda m: PatchTransformerConfig(16, 4, depth=0), ValueError, "depth of at least 1"),
        (lambda m: KeyValueCache(0), ValueError, "at least 1 position"),
    ],
)
def test_wrong_input_says_expected_got_and_remedy(call, error, match):
    with pytest.raises(error, match=match):
        call(model_of())


def test_a_cache_refuses_what_does_not_fit():
    one = torch.zeros(2, 3, 1, 4)
    cache = KeyValueCache(2)
    with pytest.raises(RuntimeError, match="append"):
        cache.view()
    cache.append(one, one)
    with pytest.raises(ValueError, match=r"expected keys \[2, 3, n, 4\]"):
        cache.append(torch.zeros(1, 3, 1, 4), torch.zeros(1, 3, 1, 4))
    with pytest.raises(ValueError, match="float32 .* got torch.float64"):
        cache.append(one.double(), one.double())
    with pytest.raises(ValueError, match="at most 1 more"):
        cache.append(torch.zeros(2, 3, 2, 4), torch.zeros(2, 3, 2, 4))
    with pytest.raises(RuntimeError, match="no_grad"):
        cache.append(one.clone().requires_grad_(), one)


def test_feed_forward_by_hand():
    layer = FeedForward(4, 8, 6)
    x = torch.randn(3, 4)
    hidden = torch.nn.functional.gelu(x @ layer.fc1.weight.T + layer.fc1.bias)
    torch.testing.assert_close(layer(x), hidden @ layer.fc2.weight.T + layer.fc2.bias)


def test_docstring_examples():
    failed, tried = doctest.testmod(transformer)
    assert tried >= 4
    assert failed == 0
