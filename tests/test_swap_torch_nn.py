"""swap on torch.nn's transformer layers: also in evaluation, where torch takes a way of its own."""

import copy

import pytest
import torch
from torch import nn

from patchgen_fast import dispatch
from patchgen_fast.modules import MultiheadAttention
from patchgen_fast.swapping import parity, swap

E, H = 32, 4


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def randomised(module, dtype=torch.float64):
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.to(dtype)


def encoder_layer(dtype=torch.float64, **kwargs):
    kwargs = {"dropout": 0.0, "batch_first": True, **kwargs}
    return randomised(nn.TransformerEncoderLayer(E, H, 48, **kwargs), dtype)


def attention_calls(ran):
    return sum(n for call, n in ran.items() if call.startswith("attention."))


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def padding(*lengths, tokens=5):
    return torch.arange(tokens) >= torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("batch_first", [False, True])
def test_multihead_attention_is_swapped_in_place(batch_first):
    layer = randomised(nn.MultiheadAttention(E, H, batch_first=batch_first))
    x = torch.randn(2, 5, E).double()
    expected = layer(x, x, x)
    report = swap(layer)
    assert type(layer) is MultiheadAttention
    got = layer(x, x, x)
    close(got[0], expected[0])
    close(got[1], expected[1])
    report.undo()
    assert type(layer) is nn.MultiheadAttention
    assert "_fast" not in layer.__dict__


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu", nn.SiLU(), torch.tanh])
@pytest.mark.parametrize("batch_first", [False, True])
def test_encoder_layer(batch_first, activation, norm_first, training):
    layer = encoder_layer(batch_first=batch_first, activation=activation, norm_first=norm_first)
    layer.train(training)
    x = torch.randn(2, 5, E).double()
    with torch.set_grad_enabled(training):
        expected = layer(x)
        report = swap(layer)
        with dispatch.counting() as ran:
            close(layer(x), expected)
    assert attention_calls(ran) == 1  # no way past our attention
    assert report.counters()[""] == {"calls": 1, "fell_back": {}}
    assert report.counters()["self_attn"] == {"calls": 1, "fell_back": {}}


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("masks", ["padding", "mask", "both", "causal", "float both"])
def test_encoder_layer_masks(masks, norm_first):
    layer = encoder_layer(norm_first=norm_first).eval()
    hidden, blocked = padding(5, 3), torch.ones(5, 5, dtype=torch.bool).triu(1)
    added = torch.zeros(5, 5).double().masked_fill(blocked, -torch.inf)
    kwargs = {
        "padding": {"src_key_padding_mask": hidden},
        "mask": {"src_mask": blocked},
        "both": {"src_mask": blocked, "src_key_padding_mask": hidden},
        "causal": {"src_mask": added, "is_causal": True},
        "float both": {
            "src_mask": added,
            "src_key_padding_mask": torch.zeros(2, 5).double().masked_fill(hidden, -torch.inf),
        },
    }[masks]
    x = torch.randn(2, 5, E).double()
    with torch.no_grad():
        expected = layer(x, **kwargs)
        swap(layer)
        close(layer(x, **kwargs), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder_layer_parity(norm_first, dtype):
    layer = nn.TransformerEncoderLayer(E, H, 64, 0.0, batch_first=True, norm_first=norm_first)
    layer = layer.to(dtype)
    x = torch.randn(4, 65, E).to(dtype)
    truth = copy.deepcopy(layer).double()(x.double()).detach()
    eager = layer(x).detach()
    swap(layer)
    found = parity("out", layer(x).detach(), eager, truth)
    assert found.ok, found


def test_a_float_mask_in_evaluation_is_added():
    """torch's own evaluation path takes any number but 0 in it for "hidden"; ours does not."""
    layer = encoder_layer().eval()
    x, mask = torch.randn(2, 5, E).double(), torch.randn(5, 5).double()
    expected = layer(x, mask)  # with gradients torch adds it too
    swap(layer)
    with torch.no_grad():
        close(layer(x, mask), expected)


def test_encoder_layer_gradients():
    layer = encoder_layer()
    x, mask = torch.randn(2, 5, E).double(), torch.randn(5, 5).double()
    found = []
    for _ in range(2):
        given = x.clone().requires_grad_()
        layer(given, src_mask=mask).square().sum().backward()
        found.append([given.grad, *(p.grad.clone() for p in layer.parameters())])
        layer.zero_grad()
        swap(layer)
    for got, expected in zip(found[1], found[0], strict=True):
        close(got, expected)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("enable_nested_tensor", [False, True])
@pytest.mark.parametrize("lengths", [(5, 3), (5, 5), (2, 1)])
def test_encoder_stack_in_evaluation_with_padding(lengths, enable_nested_tensor, norm):
    """torch packs the sequences and zeroes what is padded; ours does the same without packing."""
    stack = nn.TransformerEncoder(
        encoder_layer(),
        2,
        nn.LayerNorm(E).double() if norm else None,
        enable_nested_tensor=enable_nested_tensor,
    ).eval()
    x, hidden = torch.randn(2, 5, E).double(), padding(*lengths)
    with torch.no_grad():
        expected = stack(x, src_key_padding_mask=hidden)
        report = swap(stack)
        with dispatch.counting() as ran:
            got = stack(x, src_key_padding_mask=hidden)
    close(got, expected)
    assert attention_calls(ran) == 2
    assert all(row["fell_back"] == {} for row in report.counters().values())


def test_encoder_stack_with_padding_in_front_is_not_zeroed_as_in_torch():
    stack = nn.TransformerEncoder(encoder_layer(), 2).eval()
    x, hidden = torch.randn(2, 5, E).double(), padding(5, 3).flip(1)
    with torch.no_grad():
        expected = stack(x, src_key_padding_mask=hidden)
        swap(stack)
        close(stack(x, src_key_padding_mask=hidden), expected)


@pytest.mark.parametrize("how", ["train", "grad", "mask", "causal mask", "float padding"])
def test_encoder_stack_where_torch_does_not_pack(how):
    stack = nn.TransformerEncoder(encoder_layer(), 2)
    stack.train(how == "train")
    x, hidden = torch.randn(2, 5, E).double(), padding(5, 3)
    kwargs = {"src_key_padding_mask": hidden}
    if how == "mask":
        kwargs["mask"] = torch.rand(5, 5) > 0.8
        kwargs["mask"].fill_diagonal_(False)
    elif how == "causal mask":
        kwargs = {"mask": nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)}
    elif how == "float padding":
        kwargs = {"src_key_padding_mask": torch.zeros(2, 5).double()}
        kwargs["src_key_padding_mask"][1, 3:] = -torch.inf
    with torch.set_grad_enabled(how in ("train", "grad")):
        expected = stack(x, **kwargs)
        swap(stack)
        close(stack(x, **kwargs), expected)


@pytest.mark.parametrize("norm_first", [False, True])
def test_decoder_layer(norm_first):
    layer = randomised(
        nn.TransformerDecoderLayer(E, H, 48, 0.0, batch_first=True, norm_first=norm_first)
    )
    x, memory = torch.randn(2, 5, E).double(), torch.randn(2, 7, E).double()
    kwargs = {
        "tgt_mask": torch.ones(5, 5, dtype=torch.bool).triu(1),
        "tgt_is_causal": True,
        "memory_key_padding_mask": padding(7, 4, tokens=7),
    }
    expected = layer(x, memory, **kwargs)
    swap(layer)
    with dispatch.counting() as ran:
        close(layer(x, memory, **kwargs), expected)
    assert attention_calls(ran) == 2


def test_the_whole_transformer():
    model = randomised(nn.Transformer(E, H, 2, 2, 48, 0.0, batch_first=True))
    source, target = torch.randn(2, 7, E).double(), torch.randn(2, 5, E).double()
    expected = model(source, target)
    report = swap(model)
    close(model(source, target), expected)
    assert {row.action for row in report.rows} == {"swapped"}
    assert "encoder.layers.0-1.self_attn" in str(report)


def test_dropout_in_training():
    layer = encoder_layer(torch.float32, dropout=1.0)
    swap(layer)
    x = torch.randn(2, 5, E)
    expected = layer.norm2(layer.norm1(x))  # both branches are dropped
    torch.testing.assert_close(layer(x), expected)


def test_a_low_rank_adapter_in_the_feed_forward_part_is_called():
    class Scaled(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.weight, self.bias = base, base.weight, base.bias

        def forward(self, x):
            return 3 * self.base(x)

    layer = encoder_layer()
    layer.linear2 = Scaled(layer.linear2)
    x = torch.randn(2, 5, E).double()
    expected = layer(x)
    swap(layer)
    close(layer(x), expected)


def test_nested_tensors_go_to_torch_and_are_counted():
    layer = encoder_layer(torch.float32).eval()
    report = swap(layer)
    nested = torch.nested.nested_tensor([torch.randn(3, E), torch.randn(5, E)])
    with torch.no_grad():
        assert layer(nested).is_nested
    assert report.counters()[""]["fell_back"] == {"nested_tensor": 1}


@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_compiles_without_a_graph_break(name):
    args = [torch.randn(2, 5, E)]
    if name == "encoder":
        layer = encoder_layer(torch.float32)
    else:
        layer = nn.TransformerDecoderLayer(E, H, 48, 0.0, batch_first=True)
        args.append(torch.randn(2, 7, E))
    swap(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), layer(*args))
