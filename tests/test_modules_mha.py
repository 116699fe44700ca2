"""MultiheadAttention against torch's: every argument, in float64 and by the parity rule."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn

from patchgen_fast import dispatch
from patchgen_fast.modules import MultiheadAttention
from patchgen_fast.swapping import parity

B, H, NQ, NK, E = 2, 4, 5, 7, 32


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def pair_of(**kwargs):
    kwargs = {"dtype": torch.float64, **kwargs}
    stock, fast = nn.MultiheadAttention(E, H, **kwargs), MultiheadAttention(E, H, **kwargs)
    for parameter in stock.parameters():
        nn.init.normal_(parameter, std=0.3)
    fast.load_state_dict(stock.state_dict())
    stock.load_state_dict(fast.state_dict())
    return stock, fast


def inputs(batch_first, kdim=E, vdim=E, self_attention=False, batched=True, dtype=torch.float64):
    shape = (lambda n, dim: (B, n, dim) if batch_first else (n, B, dim)) if batched else None
    make = lambda n, dim: torch.randn(*(shape(n, dim) if shape else (n, dim)), dtype=dtype)  # noqa: E731
    if self_attention:
        x = make(NQ, E)
        return x, x, x
    return make(NQ, E), make(NK, kdim), make(NK, vdim)


def masks(kind, rows, keys, batched=True):
    """Arguments of forward for a kind of mask; no row is hidden whole."""
    batch = B if batched else 1
    hidden = torch.rand(batch, keys) < 0.4
    hidden[:, 0] = False
    blocked = torch.rand(rows, keys) < 0.4
    blocked[:, 0] = False
    if not batched:
        hidden = hidden[0]
    return {
        "none": {},
        "padding": {"key_padding_mask": hidden},
        "float padding": {"key_padding_mask": torch.randn(hidden.shape).double()},
        "mask": {"attn_mask": blocked},
        "float mask": {"attn_mask": torch.randn(rows, keys).double()},
        "mask per head": {"attn_mask": blocked.expand(batch * H, rows, keys).clone()},
        "both": {"attn_mask": blocked, "key_padding_mask": hidden},
        "both float": {
            "attn_mask": torch.randn(rows, keys).double(),
            "key_padding_mask": torch.zeros(hidden.shape).double().masked_fill(hidden, -torch.inf),
        },
        "causal": {
            "attn_mask": torch.ones(rows, keys, dtype=torch.bool).triu(1),
            "is_causal": True,
        },
        "causal padding": {
            "attn_mask": torch.ones(rows, keys, dtype=torch.bool).triu(1),
            "is_causal": True,
            "key_padding_mask": hidden,
        },
    }[kind]


MASKS = [
    "none",
    "padding",
    "float padding",
    "mask",
    "float mask",
    "mask per head",
    "both",
    "both float",
    "causal",
    "causal padding",
]


def check(stock, fast, args, kwargs):
    expected, expected_weights = stock(*args, **kwargs)
    got, weights = fast(*args, **kwargs)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    if expected_weights is None:
        assert weights is None
    else:
        torch.testing.assert_close(weights, expected_weights, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("self_attention", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_masks(batch_first, self_attention, need_weights, mask):
    stock, fast = pair_of(batch_first=batch_first)
    args = inputs(batch_first, self_attention=self_attention)
    keys = NQ if self_attention else NK
    check(stock, fast, args, {"need_weights": need_weights, **masks(mask, NQ, keys)})
    assert fast._fast.fell_back == {}


OPTIONS = ["bias_kv", "zero_attn", "no_bias", "kdim_vdim"]


@pytest.mark.parametrize("mask", ["none", "both", "both float", "mask per head"])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(
    "options", [c for n in (1, 2, 4) for c in itertools.combinations(OPTIONS, n)]
)
def test_constructor_options(options, batch_first, mask):
    kwargs = {"batch_first": batch_first}
    kwargs |= {"add_bias_kv": True} if "bias_kv" in options else {}
    kwargs |= {"add_zero_attn": True} if "zero_attn" in options else {}
    kwargs |= {"bias": False} if "no_bias" in options else {}
    kwargs |= {"kdim": 24, "vdim": 40} if "kdim_vdim" in options else {}
    stock, fast = pair_of(**kwargs)
    args = inputs(batch_first, kwargs.get("kdim", E), kwargs.get("vdim", E))
    check(stock, fast, args, masks(mask, NQ, NK))
    check(stock, fast, args, {**masks(mask, NQ, NK), "average_attn_weights": False})
    assert fast._fast.fell_back == {}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("need_weights", [False, True])
def test_unbatched(need_weights, mask):
    stock, fast = pair_of()
    args = inputs(False, batched=False)
    check(stock, fast, args, {"need_weights": need_weights, **masks(mask, NQ, NK, batched=False)})


def test_key_and_value_that_are_one_tensor_but_not_the_query():
    stock, fast = pair_of(batch_first=True)
    query, memory, _ = inputs(True)
    check(stock, fast, (query, memory, memory), {})


@pytest.mark.parametrize("need_weights", [False, True])
def test_gradients_of_inputs_parameters_and_masks(need_weights):
    stock, fast = pair_of(batch_first=True, add_bias_kv=True)
    found = []
    args, mask = inputs(True), torch.randn(NQ, NK).double()
    for layer in (stock, fast):
        leaves = [x.clone().requires_grad_() for x in (*args, mask)]
        out, weights = layer(*leaves[:3], attn_mask=leaves[3], need_weights=need_weights)
        loss = out.square().sum()
        if need_weights:
            loss = loss + weights.sin().sum()
        loss.backward()
        found.append([x.grad for x in leaves] + [p.grad for p in layer.parameters()])
    for got, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parity(dtype):
    stock, fast = pair_of(batch_first=True, dtype=dtype)
    truth = copy.deepcopy(stock).double()
    x = torch.randn(4, 65, E).to(dtype)
    outs = [m(y, y, y) for m, y in ((fast, x), (stock, x), (truth, x.double()))]
    for name, *three in zip(("out", "weights"), *outs, strict=True):
        found = parity(name, *(t.detach() for t in three))
        assert found.ok, found


def test_a_row_that_sees_nothing_is_zero_and_so_are_its_gradients():
    _, fast = pair_of(batch_first=True, bias=False)
    x = inputs(True)[0].requires_grad_()
    hidden = torch.zeros(B, NQ, dtype=torch.bool)
    hidden[0] = True
    out, weights = fast(x, x, x, key_padding_mask=hidden)
    assert out[0].count_nonzero() == 0
    assert weights[0].count_nonzero() == 0
    (out.sum() + weights.square().sum()).backward()
    assert x.grad.isfinite().all()


def test_it_is_an_nn_multihead_attention():
    _, fast = pair_of()
    assert isinstance(fast, nn.MultiheadAttention)
    args = inputs(False)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(other(*args)[0], fast(*args)[0])


@pytest.mark.parametrize(
    ("reason", "kwargs", "call"),
    [
        ("weights_with_dropout", {"dropout": 0.5}, {}),
        ("causal_with_extra_keys", {"add_zero_attn": True}, {"is_causal": True, "mask": True}),
    ],
)
def test_what_goes_to_the_parent_is_counted(reason, kwargs, call):
    _, fast = pair_of(batch_first=True, **kwargs)
    args = inputs(True, self_attention=True)
    call = dict(call)
    if call.pop("mask", False):
        call["attn_mask"] = torch.ones(NQ, NQ, dtype=torch.bool).triu(1)
        call["need_weights"] = False
    with dispatch.counting() as ran:
        out, _ = fast(*args, **call)
    assert out.isfinite().all()
    assert fast._fast.fell_back == {reason: 1}
    assert fast._fast.calls == 1
    assert not any(name.startswith("attention") for name in ran)


def test_nested_tensors_go_to_the_parent():
    fast = MultiheadAttention(E, H, batch_first=True).eval()
    nested = torch.nested.nested_tensor([torch.randn(3, E), torch.randn(5, E)])
    with torch.no_grad():
        out, _ = fast(nested, nested, nested, need_weights=False)
    assert out.is_nested
    assert fast._fast.fell_back == {"nested_tensor": 1}


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        (((3, E), (2, 4, E), (2, 4, E)), {}),
        (((2, 3, E), (2, 4, E - 1), (2, 4, E - 1)), {}),
        (((2, 3, E), (2, 4, E), (2, 4, E)), {"attn_mask": torch.zeros(4, 3)}),
        (((2, 3, E), (2, 4, E), (2, 4, E)), {"key_padding_mask": torch.zeros(3, 4)}),
        (((2, 3, E), (2, 4, E), (2, 4, E)), {"is_causal": True, "need_weights": False}),
    ],
)
def test_malformed_input_raises_what_the_parent_raises(args, kwargs):
    args = [torch.randn(shape) for shape in args]
    errors = []
    for cls in (nn.MultiheadAttention, MultiheadAttention):
        with pytest.raises((AssertionError, RuntimeError, ValueError)) as caught:
            cls(E, H, batch_first=True)(*args, **kwargs)
        errors.append((type(caught.value), str(caught.value)))
    assert errors[0] == errors[1]


def test_dropout_without_weights_runs_ours():
    _, fast = pair_of(batch_first=True, dropout=0.5)
    args = inputs(True, self_attention=True)
    first, second = (fast(*args, need_weights=False)[0] for _ in range(2))
    assert not torch.equal(first, second)
    assert "weights_with_dropout" not in fast._fast.fell_back


def test_autocast():
    stock, fast = pair_of(batch_first=True, dtype=torch.float32)
    x = torch.randn(2, 9, E)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = (m(x, x, x, need_weights=False)[0] for m in (fast, stock))
    truth = copy.deepcopy(stock).double()(*[x.double()] * 3)[0]
    assert got.dtype == expected.dtype
    found = parity("out", got.detach(), expected.detach(), truth.detach())
    assert found.ok, found


def test_compiles_without_a_graph_break():
    fast = MultiheadAttention(E, H, batch_first=True)
    x, hidden = torch.randn(2, 5, E), torch.zeros(2, 5, dtype=torch.bool)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    got = compiled(x, x, x, key_padding_mask=hidden, need_weights=False)[0]
    expected = fast(x, x, x, key_padding_mask=hidden, need_weights=False)[0]
    torch.testing.assert_close(got, expected)


def test_a_default_device_does_not_send_it_to_the_parent():
    """It is a mode that sees every function, and no reason to run the eager one."""
    layer, x = MultiheadAttention(32, 4, batch_first=True), torch.randn(2, 5, 32)
    with torch.device("cpu"):
        layer(x, x, x)
    assert (layer._fast.calls, layer._fast.fell_back) == (1, {})
