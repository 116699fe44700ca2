"""Swapped models under torch.compile and torch.export."""

import pytest
import torch
from swap_fixtures import digits, small
from torch._dynamo.testing import CompileCounter

from patchgen_fast.swapping import swap, swapped


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


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
