"""What every op promises besides its numbers: float64, autocast, threads, determinism, safety."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from cases.every_op import DTYPES, SAMPLES, Sample, leaves_of
from oracle import DTYPE_NAMES, Evaluation, Target, proving, require
from torch import Tensor

from patchgen_fast import attention, patch_embed
from patchgen_fast.dispatch import BackendRefused
from patchgen_fast.registry import KERNEL_BACKENDS, OPS

each_sample = pytest.mark.parametrize("sample", SAMPLES, ids=str)
ROOT = Path(__file__).parents[1]

# Small enough for finite differences of every input.
TINY: dict[str, dict[str, Any]] = {
    "attention": {"batch": 1, "nq": 3, "nk": 4, "dim": 3, "mask": "same:inf_rows:b1qk"},
    "varlen_attention": {"lengths": (2, 0, 3), "lengths_k": (3, 1, 3), "dim": 3, "heads": (2, 1)},
    "qk_norm_rope": {"batch": 1, "tokens": 3, "dim": 4, "heads": (2, 1), "norm": "layer",
                     "table_dtype": torch.float64},
    "patch_embed": {"batch": 1, "size": (5, 4), "patch": (2, 2), "embed": 3, "channels": 2,
                    "images": "same"},
    "patch_unembed": {"batch": 1, "grid": (2, 1), "patch": (2, 3), "embed": 3, "channels": 2},
    "linear": {"rows": (2, 2), "inner": 3, "outer": 2},
    "layer_norm": {"rows": (2, 2), "embed": 4},
    "add_layer_norm": {"rows": (2, 2), "embed": 4},
}  # fmt: skip


# ------------------------------------------------------------------------------------------ float64


@each_sample
def test_gradcheck_in_float64(sample: Sample) -> None:
    """The reference against finite differences."""
    tiny = sample.of(dtype=torch.float64, **TINY[sample.name])
    stated = tiny.problem()
    leaves = leaves_of(stated)
    names = stated.differentiable
    assert all(leaves[name].dtype == torch.float64 for name in names)

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        found = tiny.call("reference", **{**leaves, **dict(zip(names, tensors, strict=True))})
        # An empty row's log-sum-exp is -inf, which has no differences.
        return tuple(x.masked_fill(x == -torch.inf, 0.0) for x in found.values())

    assert torch.autograd.gradcheck(function, [leaves[name] for name in names])


@each_sample
@pytest.mark.parametrize("backend", ["torch", *KERNEL_BACKENDS])
def test_float64_is_refused_by_all_but_the_reference(sample: Sample, backend: str) -> None:
    tiny = sample.of(dtype=torch.float64, **TINY[sample.name])
    if OPS[sample.name].backends[backend].unavailable is not None:
        pytest.skip(f"{sample.name} has no {backend} kernel here")
    with pytest.raises(BackendRefused) as caught:
        tiny.call(backend, **tiny.problem().inputs)
    assert caught.value.refusal.code in ("float64", "device")


# ----------------------------------------------------------------------------------------- autocast

LOWERED = ("attention", "varlen_attention", "patch_embed", "patch_unembed", "linear")


@each_sample
def test_autocast_casts_as_torchs_own_ops_do(sample: Sample, target: Target) -> None:
    """Products in autocast's dtype, norms in their own, on the CPU; leaves' gradients in theirs."""
    if target.device != "cpu":
        pytest.skip("what CUDA's autocast does to norms is tested on a GPU")
    require(sample.name, target)
    stated = sample.problem(target.device)
    leaves = leaves_of(stated)
    with proving(sample.name, target), torch.autocast("cpu", torch.bfloat16):
        got = sample.call(target.backend, **leaves)
    lowered = sample.name in LOWERED
    for name, x in got.items():
        expected = torch.bfloat16 if lowered and name != "lse" else torch.float32
        assert x.dtype == expected, f"{name} in {x.dtype}"
    cast = dict(leaves)
    if lowered:
        for name, x in leaves.items():
            kept = name in ("attn_mask", "images", "mean", "std")
            if isinstance(x, Tensor) and x.is_floating_point() and not kept:
                cast[name] = x.to(torch.bfloat16)
    want = sample.call(target.backend, **cast)
    for name, x in got.items():
        assert torch.equal(x, want[name]), f"{name} isn't what a cast by hand gives"
    wanted = [leaves[name] for name in stated.differentiable]
    outputs = [got[name] for name in stated.cotangents]
    cotangents = [stated.cotangents[name].to(got[name].dtype) for name in stated.cotangents]
    for name, grad in zip(
        stated.differentiable, torch.autograd.grad(outputs, wanted, cotangents), strict=True
    ):
        assert grad.dtype == leaves[name].dtype, f"gradient of {name} in {grad.dtype}"
        assert grad.isfinite().all()


# ---------------------------------------------------------------- gradients where they're asked for


@each_sample
def test_no_gradient_where_none_is_asked_for(sample: Sample, target: Target) -> None:
    """Under inference_mode and no_grad: the same work, and no graph."""
    require(sample.name, target)
    stated = sample.problem(target.device)
    function = functools.partial(sample.call, target.backend)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode(), proving(sample.name, target):
            found = function(**leaves_of(stated))
        for name, x in found.items():
            assert not x.requires_grad, f"{name} under {mode.__name__}"
        sample.compare(Evaluation(found), target)


@each_sample
def test_each_input_may_be_the_only_one_with_a_gradient(sample: Sample, target: Target) -> None:
    require(sample.name, target)
    stated = sample.problem(target.device)
    all_grads = sample.run(target.backend, target.device).grads
    for name in stated.differentiable:
        leaves = leaves_of(stated)
        leaves = {
            n: x.detach().requires_grad_(n == name) if isinstance(x, Tensor) else x
            for n, x in leaves.items()
        }
        results = sample.call(target.backend, **leaves)
        used = [n for n in stated.cotangents if results[n].requires_grad]
        (grad,) = torch.autograd.grad(
            [results[n] for n in used], [leaves[name]], [stated.cotangents[n] for n in used]
        )
        torch.testing.assert_close(grad, all_grads[name], msg=lambda text, n=name: f"{n}: {text}")


# --------------------------------------------------------------------------- threads, processes


@each_sample
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES.get)
def test_the_same_twice_bit_for_bit(sample: Sample, dtype: torch.dtype, target: Target) -> None:
    require(sample.name, target)
    first, second = (sample.of(dtype=dtype).run(target.backend, target.device) for _ in range(2))
    for kind in ("results", "grads"):
        for name, x in getattr(first, kind).items():
            assert torch.equal(x, getattr(second, kind)[name]), f"{kind} of {name} differ"


@each_sample
def test_more_threads_than_cores(sample: Sample, target: Target) -> None:
    require(sample.name, target)
    before = torch.get_num_threads()
    torch.set_num_threads(5)
    try:
        sample.check(target)
        sample.of_size(197 if sample.name != "patch_unembed" else 17).check(target)
    finally:
        torch.set_num_threads(before)


@each_sample
def test_called_from_several_threads_at_once(sample: Sample, target: Target) -> None:
    """As many calls at once, each with its own numbers; a thread that fails, fails the test."""
    require(sample.name, target)
    sizes = [sample.of_size(n) for n in (5, 12, 33, 20)]
    for sized in sizes:
        sized.run(target.backend, target.device)  # inputs and kernels are made before
    start = threading.Barrier(len(sizes))

    def work(sized: Sample) -> list[Evaluation]:
        start.wait()
        return [sized.run(target.backend, target.device) for _ in range(5)]

    with ThreadPoolExecutor(len(sizes)) as pool, proving(sample.name, target, calls=20):
        found = list(pool.map(work, sizes))
    for sized, evaluations in zip(sizes, found, strict=True):
        for one in evaluations:
            sized.compare(one, target)


def python(code: str, **environment: str) -> str:
    """The output of a fresh interpreter; a failure shows its errors."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_computes_what_its_parent_did() -> None:
    """As a loader's workers do: forked after the parent has used its threads, then one thread."""
    found = python(
        """
        import os, torch
        from cases.every_op import SAMPLES

        torch.set_num_threads(2)
        before = [sample.run(None) for sample in SAMPLES]
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            same = all(
                torch.allclose(x, want.results[name], rtol=1e-4, atol=1e-5)
                for sample, want in zip(SAMPLES, before)
                for name, x in sample.run(None).results.items()
            )
            os._exit(0 if same else 3)
        print("child", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        """
    )
    assert found.strip() == "child 0"


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in /proc")
def test_set_num_threads_is_obeyed() -> None:
    """No thread is started where torch may use one, and some where it may use more."""
    found = python(
        """
        import os, torch
        from cases.every_op import SAMPLES

        def threads():
            return len(os.listdir("/proc/self/task"))

        torch.set_num_threads(1)
        for sample in SAMPLES:
            sample.call(None, **sample.problem().inputs)
        before = threads()
        for sample in SAMPLES:
            large = sample.of_size(197 if sample.name != "patch_unembed" else 17)
            large.call(None, **large.problem().inputs)
        print(threads() - before)
        torch.set_num_threads(3)
        for sample in SAMPLES:
            large = sample.of_size(197 if sample.name != "patch_unembed" else 17)
            large.call(None, **large.problem().inputs)
        print(threads() - before)
        """
    )
    with_one, with_three = map(int, found.split())
    assert with_one == 0
    assert with_three > 0


def test_meta_tensors_have_shapes_and_no_autocast():
    query = torch.empty(2, 3, 5, 8, device="meta")
    assert attention(query, query, query).shape == query.shape
    weight = torch.empty(6, 3, 4, 4, device="meta")
    tokens = patch_embed(torch.empty(2, 3, 8, 8, device="meta"), weight)
    assert tokens.shape == (2, 4, 6) and tokens.device.type == "meta"
