"""FeedForward, EncoderLayer, DecoderLayer against the eager ones: fusion changes nothing."""

import copy

import pytest
import torch
from torch import nn

from patchgen_fast import _native, dispatch, linear, models, modules
from patchgen_fast.models import DecoderCache
from patchgen_fast.modules import fused
from patchgen_fast.swapping import parity


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def same(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def pair_of(name, *args, **kwargs):
    eager = getattr(models, name)(*args, **kwargs).double()
    fast = getattr(modules, name)(*args, **kwargs).double()
    for parameter in eager.parameters():
        nn.init.normal_(parameter, std=0.3)
    fast.load_state_dict(eager.state_dict())
    eager.load_state_dict(fast.state_dict())
    return eager, fast


@pytest.mark.parametrize("act", [nn.GELU, nn.ReLU, nn.SiLU, nn.Tanh, nn.Hardswish])
@pytest.mark.parametrize("bias", [False, True])
def test_feed_forward_is_the_eager_one(act, bias):
    eager, fast = pair_of("FeedForward", 8, 16, 12, act_layer=act, bias=bias)
    x = torch.randn(2, 5, 8).double()
    same(fast(x), eager(x))
    same(fast(x[0, 0]), eager(x[0, 0]))


def test_feed_forward_with_tanh_gelu_norm_and_one_bias():
    fast = modules.FeedForward(
        8, 16, act_layer=lambda: nn.GELU("tanh"), norm_layer=nn.LayerNorm, bias=(True, False)
    ).double()
    assert "fc2.bias" not in fast.state_dict()
    x = torch.randn(2, 5, 8).double()
    same(fast(x), fast.fc2(fast.norm(nn.functional.gelu(fast.fc1(x), approximate="tanh"))))


@pytest.mark.parametrize("child", ["fc1", "act", "drop1", "fc2", "drop2"])
def test_a_hook_on_any_child_of_feed_forward_runs(child):
    eager, fast = pair_of("FeedForward", 8, 16)
    x = torch.randn(2, 5, 8).double()
    for layer in (eager, fast):
        getattr(layer, child).register_forward_hook(lambda module, args, out: out * 1.5)
    same(fast(x), eager(x))


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_encoder_layer_is_the_eager_one(causal, qk_norm):
    eager, fast = pair_of("EncoderLayer", 32, 4, 2.0, qkv_bias=True, qk_norm=qk_norm)
    x = torch.randn(2, 5, 32).double()
    mask = torch.randn(5, 5).double()
    same(fast(x, is_causal=causal), eager(x, is_causal=causal))
    same(fast(x, mask, causal), eager(x, mask, causal))


def by_hand(layer, x, shape_attn=lambda y: y, shape_mlp=lambda y: y):
    x = x + shape_attn(layer.attn(layer.norm1(x)))
    return x + shape_mlp(layer.mlp(layer.norm2(x)))


def test_layer_scale_is_on_both_branches():
    layer = modules.EncoderLayer(32, 4, init_values=0.1).double()
    assert {"ls1.gamma", "ls2.gamma"} <= set(layer.state_dict())
    for scale in (layer.ls1, layer.ls2):
        nn.init.normal_(scale.gamma)
    x = torch.randn(2, 5, 32).double()
    same(layer(x), by_hand(layer, x, layer.ls1, layer.ls2))


def test_stochastic_depth_leaves_whole_branches_out_in_training_only():
    layer = modules.EncoderLayer(32, 4, drop_path=0.5).double()
    x = torch.randn(64, 5, 32).double()
    same(layer.eval()(x), by_hand(layer, x))
    changed = (layer.train()(x) - x).abs().amax(dim=(1, 2))
    left_out = int((changed == 0).sum())  # both branches of a sample: a quarter of them
    assert 4 <= left_out <= 32
    one = modules.branch.DropPath(0.75).train()
    kept = one(torch.ones(4000, 3))
    assert set(kept.unique().tolist()) == {0.0, 4.0} and 0.9 < float(kept.mean()) < 1.1
    assert (kept == kept[:, :1]).all()


@pytest.mark.parametrize("probability", [-0.1, 1.0])
def test_a_probability_out_of_range_is_an_error(probability):
    with pytest.raises(ValueError, match="from 0 to below 1"):
        modules.branch.DropPath(probability)


@pytest.mark.parametrize("memory_dim", [None, 24])
def test_decoder_layer_is_the_eager_one(memory_dim):
    eager, fast = pair_of("DecoderLayer", 32, 4, qkv_bias=True, memory_dim=memory_dim)
    x, memory = torch.randn(2, 5, 32).double(), torch.randn(2, 7, memory_dim or 32).double()
    left, right = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected, got = eager(left, memory), fast(right, memory)
    same(got, expected)
    expected.square().sum().backward()
    got.square().sum().backward()
    same(right.grad, left.grad)
    for name, parameter in eager.named_parameters():
        same(fast.get_parameter(name).grad, parameter.grad)


@pytest.mark.parametrize("chunks", [[1] * 9, [4, 1, 4], [9]])
def test_decoding_with_a_cache_equals_the_full_causal_pass(chunks):
    _, fast = pair_of("DecoderLayer", 32, 4, qkv_bias=True, qk_norm=True)
    x, memory = torch.randn(2, 9, 32).double(), torch.randn(2, 6, 32).double()
    cache = DecoderCache(1, steps=9, memory_length=6).layers[0]
    with torch.no_grad():
        parts = [fast(part, memory, cache=cache) for part in x.split(chunks, dim=1)]
        same(torch.cat(parts, dim=1), fast(x, memory))


@pytest.mark.parametrize("name", ["EncoderLayer", "DecoderLayer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parity(name, dtype):
    eager, fast = (getattr(m, name)(64, 4, qkv_bias=True).to(dtype) for m in (models, modules))
    fast.load_state_dict(eager.state_dict())
    truth = copy.deepcopy(eager).double()
    x = torch.randn(4, 65, 64).to(dtype)
    memory = [torch.randn(4, 33, 64).to(dtype)] if name == "DecoderLayer" else []
    outs = []
    for layer in (fast, eager, truth):
        convert = (lambda t: t.double()) if layer is truth else (lambda t: t)
        outs.append(layer(convert(x), *map(convert, memory)).detach())
    found = parity("out", *outs)
    assert found.ok, found


def test_residuals_are_added_inside_the_products(monkeypatch):
    """No sum outside linear: the residual goes in as its argument."""
    seen = []

    def spy(*args, **kwargs):
        seen.append(kwargs["residual"] is not None)
        return linear(*args, **kwargs)

    monkeypatch.setattr("patchgen_fast.modules.fused.linear", spy)
    modules.EncoderLayer(32, 4)(torch.randn(2, 5, 32))
    assert sum(seen) == 2  # proj and fc2; qkv and fc1 have none


@pytest.mark.skipif(not _native.status().loaded, reason="no native kernels")
@pytest.mark.parametrize("wanted", [False, True], ids=["plain", "with_gradients"])
def test_norms_of_many_tokens_are_our_kernels(wanted, monkeypatch):
    """Both norms of a layer, its sums being in the products; few tokens are torch's."""
    monkeypatch.setattr(fused, "FEWEST_NORMALISED", 9 * 64)
    fast = modules.EncoderLayer(64, 4)
    with torch.set_grad_enabled(wanted):
        for tokens, ours in ((9, 2), (8, 0)):
            with dispatch.counting() as ran:
                fast(torch.randn(1, tokens, 64))
            assert ran.get("layer_norm.cpu", 0) == ours
            with dispatch.counting() as ran, torch.autocast("cpu"):
                fast(torch.randn(1, tokens, 64))
            assert "layer_norm.cpu" not in ran


def test_sum_and_norm_are_one_op_where_the_branch_can_not_add():
    fast = modules.EncoderLayer(32, 4)
    expected = fast(torch.ones(2, 5, 32))
    fast.attn.register_forward_hook(lambda *a: None)
    with dispatch.counting() as ran:
        got = fast(torch.ones(2, 5, 32))
    assert sum(n for call, n in ran.items() if call.startswith("add_layer_norm.")) == 1
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("child", ["norm1", "attn", "norm2", "mlp", "attn.proj", "mlp.fc2"])
def test_a_hook_anywhere_sees_and_changes_what_it_would_in_the_eager_layer(child):
    eager, fast = pair_of("EncoderLayer", 32, 4)
    x = torch.randn(2, 5, 32).double()
    seen = []

    def hook(module, args, out):
        seen.append(out)
        return out * 1.5

    for layer in (eager, fast):
        layer.get_submodule(child).register_forward_hook(hook)
    same(fast(x), eager(x))
    same(seen[0], seen[1])


def test_global_hooks_are_called():
    fast = modules.EncoderLayer(32, 4)
    names = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, out: names.append(type(module).__name__)
    )
    try:
        fast(torch.randn(2, 5, 32))
    finally:
        handle.remove()
    assert names.count("Linear") == 4
    assert names.count("Attention") == names.count("FeedForward") == 1


def test_a_users_subclass_of_attention_is_called_not_bypassed():
    class Doubled(modules.Attention):
        def forward(self, x, attn_mask=None, is_causal=False, *, cache=None):
            return 2 * super().forward(x, attn_mask, is_causal, cache=cache)

    fast = modules.EncoderLayer(32, 4).double()
    doubled = Doubled(32, 4).double()
    doubled.load_state_dict(fast.attn.state_dict())
    x = torch.randn(2, 5, 32).double()
    expected = x + 2 * fast.attn(fast.norm1(x))
    expected = expected + fast.mlp(fast.norm2(expected))
    fast.attn = doubled
    same(fast(x), expected)


@pytest.mark.parametrize("name", ["EncoderLayer", "DecoderLayer"])
def test_autocast_keeps_the_stream_in_float32_as_eager_does(name):
    eager, fast = (getattr(m, name)(32, 4, qkv_bias=True) for m in (models, modules))
    fast.load_state_dict(eager.state_dict())
    truth = copy.deepcopy(eager).double()
    args = [torch.randn(2, 33, 32)] * (2 if name == "DecoderLayer" else 1)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = fast(*args), eager(*args)
    assert got.dtype == expected.dtype == torch.float32
    found = parity("out", got, expected, truth(*[a.double() for a in args]))
    assert found.ok, found


def test_dropout_in_training_keeps_the_residual():
    fast = modules.EncoderLayer(32, 4, proj_drop=1.0)
    x = torch.randn(2, 5, 32)
    torch.testing.assert_close(fast(x), x)  # all of both branches is dropped


@pytest.mark.parametrize("name", ["EncoderLayer", "DecoderLayer"])
def test_compiles_without_a_graph_break(name):
    fast = getattr(modules, name)(32, 4, qkv_bias=True)
    args = [torch.randn(2, 5, 32) for _ in range(2 if name == "DecoderLayer" else 1)]
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), fast(*args))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (
            lambda: modules.FeedForward(8)(torch.randn(2, 9)),
            r"expected tokens \[..., 8\], got .*2, 9",
        ),
        (lambda: modules.EncoderLayer(32, 4)(torch.randn(5, 32)), r"expected tokens \[B, N, 32\]"),
        (lambda: modules.EncoderLayer(30, 4), "divides dim=30, got 4"),
        (
            lambda: modules.DecoderLayer(32, 4)(torch.randn(1, 5, 32), torch.randn(1, 5, 9)),
            r"expected memory \[B, N, 32\]",
        ),
        (lambda: modules.DecoderLayer(32, 4, backend="gpu"), "got 'gpu'"),
    ],
)
def test_wrong_input_says_expected_got_and_remedy(call, match):
    with pytest.raises(ValueError, match=match):
        call()
