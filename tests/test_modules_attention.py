"""Attention and CrossAttention against the eager layers: values, gradients, children, errors.

Meaning is tested in float64, where every difference is an error; precision by the parity rule.
"""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from patchgen_fast import attention, dispatch, models, modules
from patchgen_fast.dispatch import BackendRefused
from patchgen_fast.models import KeyValueCache
from patchgen_fast.swapping import parity


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def same(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def pair_of(eager_class, fast_class, *args, **kwargs):
    """The eager and the fast layer with the same random weights, in float64."""
    eager, fast = eager_class(*args, **kwargs).double(), fast_class(*args, **kwargs).double()
    for parameter in eager.parameters():
        nn.init.normal_(parameter, std=0.3)
    fast.load_state_dict(eager.state_dict())
    eager.load_state_dict(fast.state_dict())
    return eager.eval(), fast.eval()


def attention_pair(**kwargs):
    return pair_of(models.Attention, modules.Attention, 32, 4, **kwargs)


class LowRank(nn.Module):
    """What LoRA puts in the place of a linear layer."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.weight, self.bias = base.weight, base.bias  # wrappers show the base's attributes
        self.down = nn.Linear(base.in_features, 2, bias=False, dtype=base.weight.dtype)
        self.up = nn.Linear(2, base.out_features, bias=False, dtype=base.weight.dtype)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize("mask", ["none", "causal", "bool", "float", "bool causal"])
def test_attention_is_the_eager_one(mask, qkv_bias, qk_norm):
    eager, fast = attention_pair(qkv_bias=qkv_bias, qk_norm=qk_norm)
    x = torch.randn(3, 7, 32, dtype=torch.float64)
    attn_mask = None
    if "bool" in mask:
        attn_mask = torch.rand(3, 1, 7, 7) > 0.4
        attn_mask[..., 0] = True
    elif mask == "float":
        attn_mask = torch.randn(4, 7, 7, dtype=torch.float64)
    left, right = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected, got = (
        layer(x, attn_mask, is_causal="causal" in mask)
        for layer, x in ((eager, left), (fast, right))
    )
    same(got, expected)
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    (got * weights).sum().backward()
    same(right.grad, left.grad)
    for name, parameter in eager.named_parameters():
        same(fast.get_parameter(name).grad, parameter.grad)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("keys", [5, 7])
def test_cross_attention_is_the_eager_one(keys, qk_norm):
    eager, fast = pair_of(
        models.CrossAttention, modules.CrossAttention, 32, 4, qk_norm=qk_norm, memory_dim=24
    )
    x, memory = torch.randn(3, 7, 32).double(), torch.randn(3, keys, 24).double()
    mask = torch.rand(3, 4, 7, keys) > 0.2
    mask[..., 0] = True
    same(fast(x, memory), eager(x, memory))
    same(fast(x, memory, mask), eager(x, memory, mask))


@pytest.mark.parametrize("chunks", [[1] * 9, [4, 1, 4]])
def test_attention_with_a_cache_is_the_full_causal_pass(chunks):
    _, fast = attention_pair(qk_norm=True)
    x = torch.randn(2, 9, 32).double()
    cache = KeyValueCache(9)
    with torch.no_grad():
        parts = [fast(part, is_causal=True, cache=cache) for part in x.split(chunks, dim=1)]
        same(torch.cat(parts, dim=1), fast(x, is_causal=True))


def test_cross_attention_projects_the_memory_once():
    _, fast = pair_of(models.CrossAttention, modules.CrossAttention, 32, 4)
    x, memory = torch.randn(2, 3, 32).double(), torch.randn(2, 5, 32).double()
    cache = KeyValueCache(5)
    with torch.no_grad():
        first = fast(x, memory, cache=cache)
        same(fast(x, torch.full_like(memory, torch.nan), cache=cache), first)


def test_scale_norm_gate_and_other_head_sizes():
    fast = modules.Attention(
        32, 3, attn_head_dim=8, dim_out=20, qkv_bias=True, scale_norm=True, gated=True
    ).double()
    assert {"norm.weight", "gate.weight", "gate.bias"} <= set(fast.state_dict())
    x = torch.randn(2, 5, 32).double()
    qkv = fast.qkv(x).reshape(2, 5, 3, 3, 8).permute(2, 0, 3, 1, 4)
    weights = (qkv[0] @ qkv[1].mT / 8**0.5).softmax(-1)
    heads = (weights @ qkv[2]).transpose(1, 2).reshape(2, 5, 24)
    same(fast(x), fast.proj(fast.norm(heads) * fast.gate(x).sigmoid()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_parity(dtype, qk_norm):
    eager = models.Attention(64, 4, qkv_bias=True, qk_norm=qk_norm).to(dtype)
    fast = modules.Attention(64, 4, qkv_bias=True, qk_norm=qk_norm).to(dtype)
    fast.load_state_dict(eager.state_dict())
    truth = copy.deepcopy(eager).double()
    x = torch.randn(4, 65, 64).to(dtype)
    results = []
    for layer, given in ((fast, x), (eager, x), (truth, x.double())):
        given = given.clone().requires_grad_()
        out = layer(given)
        out.square().sum().backward()
        gradients = {name: p.grad for name, p in layer.named_parameters()}
        results.append({"out": out.detach(), "input": given.grad, **gradients})
    for name in results[0]:
        found = parity(name, *(result[name] for result in results))
        assert found.ok, found


def test_qkv_is_split_without_copies(monkeypatch):
    """The op sees views of the packed projection: one storage, head stride D, token stride 3E."""
    seen = []

    def spy(query, key, value, *args, **kwargs):
        seen.extend((query, key, value))
        return attention(query, key, value, *args, **kwargs)

    monkeypatch.setattr("patchgen_fast.modules.attention.attention", spy)
    modules.Attention(32, 4)(torch.randn(2, 5, 32))
    assert len({tensor.untyped_storage().data_ptr() for tensor in seen}) == 1
    assert all(tensor.stride() == (5 * 96, 8, 96, 1) for tensor in seen)


# ------------------------------------------------------------------------------------ children


def test_a_low_rank_adapter_is_called():
    eager, fast = attention_pair()
    for child in ("qkv", "proj"):
        adapter = LowRank(getattr(eager, child)).double()
        setattr(eager, child, adapter)
        setattr(fast, child, copy.deepcopy(adapter))
    x = torch.randn(2, 5, 32).double()
    same(fast(x), eager(x))
    fast(x).sum().backward()
    assert fast.qkv.up.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("child", ["qkv", "proj", "q_norm", "k_norm", "attn_drop", "proj_drop"])
def test_a_hook_on_a_child_runs_or_the_child_was_never_a_step(child):
    """Hooks on children that the fast layer can't do without run as often as in the eager one."""
    eager, fast = attention_pair(qk_norm=True)
    counts = []
    for layer in (eager, fast):
        calls = []
        getattr(layer, child).register_forward_hook(lambda *a, calls=calls: calls.append(a))
        layer(torch.randn(2, 5, 32).double())
        counts.append(len(calls))
    if child == "attn_drop":  # a rate that is read, in both layers
        assert counts == [0, 0]
    else:
        assert counts == [1, 1]


def test_a_hook_that_changes_the_result_is_obeyed():
    eager, fast = attention_pair()
    for layer in (eager, fast):
        layer.qkv.register_forward_hook(lambda module, args, out: out * 2)
        layer.proj.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    x = torch.randn(2, 5, 32).double()
    same(fast(x), eager(x))


@pytest.mark.parametrize("child", ["qkv", "proj"])
def test_a_parametrised_child_is_called(child):
    eager, fast = attention_pair()
    for layer in (eager, fast):
        torch.nn.utils.parametrizations.weight_norm(getattr(layer, child))
        with torch.no_grad():
            getattr(layer, child).parametrizations.weight.original0.mul_(1.5)
    x = torch.randn(2, 5, 32).double()
    same(fast(x), eager(x))


def test_pruning_is_obeyed():
    eager, fast = attention_pair()
    for layer in (eager, fast):
        prune.l1_unstructured(layer.qkv, "weight", amount=0.5)
    x = torch.randn(2, 5, 32).double()
    same(fast(x), eager(x))
    for layer in (eager, fast):  # what an optimiser step does to the weight behind the mask
        with torch.no_grad():
            layer.qkv.weight_orig.mul_(2)
    same(fast(x), eager(x))


# ------------------------------------------------------------------- state, backends, errors


def test_pickle_and_deepcopy_keep_backend_and_weights():
    fast = modules.Attention(32, 4, backend="reference")
    x = torch.randn(2, 5, 32)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert other._fast.backend == "reference"
        assert torch.equal(other(x), fast(x))
    assert fast._fast.calls == 2


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_the_backend_named_is_the_one_that_runs(backend):
    fast = modules.Attention(32, 4, backend=backend)
    with dispatch.counting() as ran:
        fast(torch.randn(2, 5, 32))
    assert ran == {f"attention.{backend}": 1, f"linear.{backend}": 2}


def test_a_backend_that_refuses_raises_with_its_reason():
    fast = modules.Attention(32, 4, backend="triton")
    with pytest.raises(BackendRefused, match="triton"):
        fast(torch.randn(2, 5, 32))


def test_dropout_runs_in_training_and_is_counted():
    fast = modules.Attention(32, 4, attn_drop=0.5, proj_drop=0.5)
    x = torch.randn(2, 5, 32)
    assert not torch.equal(fast(x), fast(x))
    assert fast._fast.fell_back == {"dropout": 2}
    fast.eval()
    assert torch.equal(fast(x), fast(x))
    assert fast._fast.fell_back == {"dropout": 2}


def test_autocast_gives_what_eager_gives():
    eager = models.Attention(32, 4, qkv_bias=True, qk_norm=True)
    fast = modules.Attention(32, 4, qkv_bias=True, qk_norm=True)
    fast.load_state_dict(eager.state_dict())
    truth = copy.deepcopy(eager).double()
    x = torch.randn(2, 33, 32)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = fast(x), eager(x)
    assert got.dtype == expected.dtype == torch.bfloat16
    found = parity("out", got, expected, truth(x.double()))
    assert found.ok, found


@pytest.mark.parametrize("causal", [False, True])
def test_compiles_without_a_graph_break(causal):
    fast = modules.Attention(32, 4, qk_norm=True)
    x = torch.randn(2, 5, 32)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, is_causal=causal), fast(x, is_causal=causal))
    assert fast._fast.calls == 1  # the eager call; compiled runs are not counted


def test_empty_batch_and_one_token():
    fast = modules.Attention(32, 4, qk_norm=True)
    assert fast(torch.randn(0, 5, 32)).shape == (0, 5, 32)
    assert fast(torch.randn(2, 1, 32)).shape == (2, 1, 32)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: modules.Attention(30, 4), "divides dim=30, got 4; choose"),
        (lambda: modules.Attention(32, 4, backend="fastest"), "one of .*, got 'fastest'"),
        (
            lambda: modules.Attention(32, 4)(torch.randn(5, 32)),
            r"expected tokens \[B, N, 32\], got",
        ),
        (lambda: modules.Attention(32, 4)(torch.randn(1, 5, 31)), r"got shape \(1, 5, 31\)"),
        (
            lambda: modules.CrossAttention(32, 4)(torch.randn(1, 5, 32), torch.randn(1, 5, 30)),
            r"expected memory \[B, N, 32\]",
        ),
        (
            lambda: modules.Attention(32, 4)(torch.randn(1, 5, 32), torch.ones(1, 4) > 0),
            r"expected attn_mask .* broadcastable to \[1, 4, 5, 5\]",
        ),
    ],
)
def test_wrong_input_says_expected_got_and_remedy(call, match):
    with pytest.raises(ValueError, match=match):
        call()
