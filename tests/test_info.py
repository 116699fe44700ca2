"""`info`, the native module's facts and its calibration loops."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from patchgen_fast import _native, calibration, info

native = _native.info_module()
needs_native = pytest.mark.skipif(native is None, reason="native part not built here")


def run_command(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "patchgen_fast", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def run_python(code, *launcher, **environment):
    return subprocess.run(
        [*launcher, sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


# The facts --------------------------------------------------------------------------------------


def test_facts_are_plain_json_and_complete():
    facts = json.loads(json.dumps(info.collect()))
    assert facts["versions"]["patchgen_fast"] == "0.1.0"
    assert facts["versions"]["torch"]
    assert set(facts["ops"]) >= {"attention", "patch_embed", "linear", "add_layer_norm"}
    for backends in facts["ops"].values():
        assert set(backends) == {"reference", "torch", "cpu", "triton", "cuda"}
        assert backends["reference"] == {"forward": True, "backward": True, "reason": ""}
        for state in backends.values():
            assert state["forward"] != bool(state["reason"])  # there, or a reason


def test_text_names_what_is_missing_and_the_remedy(monkeypatch):
    missing = _native.Status(False, "the compiler is on strike", "call it back")
    monkeypatch.setattr(_native, "status", lambda: missing)
    text = info.as_text(info.collect())
    assert "not there: the compiler is on strike" in text
    assert "remedy: call it back" in text


@needs_native
def test_instruction_sets_are_listed_best_first_and_the_last_runs_everywhere():
    sets = native.instruction_sets()
    assert sets[-1] == {"name": "baseline", "supported": True}
    supported = [row["name"] for row in sets if row["supported"]]
    assert native.choose_isa("") == supported[0]
    for name in supported:
        assert native.choose_isa(name) == name


@needs_native
@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="no /proc/cpuinfo")
def test_features_are_those_the_system_lists():
    words = set(Path("/proc/cpuinfo").read_text().replace("_", "").split())
    for name in native.cpu_features():
        assert name.replace(".", "") in words, name


@needs_native
def test_caches_grow_with_their_level():
    caches = native.caches()
    assert all(cache["type"] in ("data", "unified") for cache in caches)
    sizes = [cache["bytes"] for cache in caches]
    assert sizes == sorted(sizes) and all(size >= 4096 for size in sizes)


def test_kernels_are_shown_with_their_spills_and_occupancy(monkeypatch):
    shown = {"kernel": "attention<64>", "registers": 128, "local_bytes": 24, "shared_bytes": 49152}
    shown |= {"threads": 256, "blocks_per_multiprocessor": 2}
    monkeypatch.setattr(_native, "has_cuda", lambda: True)
    monkeypatch.setattr(_native, "cuda_kernels", lambda index: [shown])
    gpu = {"available": True, "reason": "", "devices": [{"name": "a GPU"}]}
    monkeypatch.setattr(info, "gpu", lambda: gpu)
    rows = dict(info._kernel_rows(info.kernels()))
    assert rows["cuda:0"] == "a GPU"
    assert rows["  attention<64>"] == (
        "128 registers, 24 bytes spilled, 48.0 KiB shared, 256 threads, 2 blocks a multiprocessor"
    )


def test_kernels_without_cuda_say_why(monkeypatch):
    monkeypatch.setattr(_native, "has_cuda", lambda: False)
    failure = _native.Status(False, "no CUDA toolkit", "install it")
    monkeypatch.setattr(_native, "build_failure", lambda part: failure)
    assert info.kernels() == {"reason": "no CUDA toolkit", "gpus": []}
    assert _native.cuda_kernels(0) == []


# Overriding the instruction set -----------------------------------------------------------------


@needs_native
@pytest.mark.parametrize("name", ["avx1024", "AVX2", "baseline "])
def test_an_unknown_instruction_set_is_refused_with_the_choices(name):
    with pytest.raises(ValueError, match=r"expected one of .*baseline; got '.*', which is not"):
        native.choose_isa(name)


@needs_native
def test_a_wrong_override_is_an_error_where_kernels_are_asked_for_and_a_line_in_info():
    code = "import patchgen_fast\npatchgen_fast.attention"
    done = run_python(code, PATCHGEN_FAST_CPU_ISA="avx1024")
    assert done.returncode != 0
    assert "ValueError: PATCHGEN_FAST_CPU_ISA: expected one of" in done.stderr
    assert run_python("import patchgen_fast", PATCHGEN_FAST_CPU_ISA="avx1024").returncode == 0
    done = run_command("info", PATCHGEN_FAST_CPU_ISA="avx1024")
    assert done.returncode == 0, done.stderr
    assert "got 'avx1024', which is not an instruction set of this build" in done.stdout


@needs_native
@pytest.mark.parametrize(
    "name", [row["name"] for row in native.instruction_sets()] if native else []
)
def test_every_override_is_obeyed_or_refused(name):
    code = "from patchgen_fast import _native_info as n; print(n.chosen_isa())"
    done = run_python(code, PATCHGEN_FAST_CPU_ISA=name)
    if {row["name"]: row["supported"] for row in native.instruction_sets()}[name]:
        assert done.stdout.strip() == name
    else:
        assert "which this CPU does not support" in done.stderr


# Calibration ------------------------------------------------------------------------------------


@needs_native
@pytest.mark.parametrize(
    "name", [row["name"] for row in native.instruction_sets() if row["supported"]] if native else []
)
def test_arithmetic_is_what_a_cpu_can_do(name):
    """At most two vector multiply-adds a cycle (bf16: each of two pairs), else the compiler dropped
    some of the work; and not far below one in two cycles, else the loop is poor. A sample that
    another process disturbed says nothing.
    """
    code = (
        "import json\nfrom patchgen_fast import _native_info as n\n"
        "print(json.dumps([n.measure_clock(), n.measure_arithmetic('fp32'),"
        " n.measure_arithmetic('bf16')]))"
    )
    done = run_python(code, PATCHGEN_FAST_CPU_ISA=name)
    assert done.returncode == 0, done.stderr
    clock, fp32, bf16 = json.loads(done.stdout)
    assert 0.1e9 < clock["best"] < 10e9
    if clock["disturbed"]:
        pytest.skip("another process kept every sample of the clock from running through")
    lanes = {"baseline": 4, "avx2": 8}.get(name, 16)
    peak = 4 * lanes * clock["best"]
    for measured, most in ((fp32, peak), (bf16, 2 * peak if name == "avx512_bf16" else peak)):
        assert measured["best"] < 1.3 * most
        assert measured["disturbed"] or measured["best"] > 0.2 * most


@needs_native
def test_bandwidth_falls_from_cache_to_memory():
    samples = 10
    cached = native.measure_bandwidth("read", 16 << 10, 1, samples)
    memory = native.measure_bandwidth("read", 256 << 20, 1, samples)
    assert cached["best"] > memory["best"] > 0.2e9
    assert cached["best"] >= cached["median"] > 0
    assert native.measure_bandwidth("copy", 16 << 10, 1, samples)["best"] > memory["best"]


@needs_native
@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: native.measure_arithmetic("fp16"), "expected 'fp32' or 'bf16', got 'fp16'"),
        (lambda: native.measure_arithmetic("fp32", threads=0), "threads: expected 1 or more"),
        (lambda: native.measure_arithmetic("fp32", samples=0), "samples: expected 1 or more"),
        (lambda: native.measure_bandwidth("write", 1 << 20), "expected 'read' or 'copy'"),
        (lambda: native.measure_bandwidth("read", 100), "expected 8192 or more, got 100"),
    ],
)
def test_calibration_refuses_what_it_cannot_do(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@needs_native
def test_calibrate_measures_everything_and_reports_progress(monkeypatch):
    seen = []
    monkeypatch.setattr(calibration, "buffer_bytes", lambda *_: {"L2": 1 << 16, "DRAM": 1 << 20})
    peaks = calibration.calibrate(
        (1, 2), samples=2, progress=lambda done, of, name: seen.append((done, of, name))
    )
    names = [(peak.name, peak.threads) for peak in peaks]
    kinds = ["fp32", "bf16", "L2 read", "L2 copy", "DRAM read", "DRAM copy"]
    assert names == [("clock", 1), *((kind, n) for n in (1, 2) for kind in kinds)]
    assert [(done, of) for done, of, _ in seen] == [(i, 13) for i in range(13)]
    assert all(peak.best >= peak.median > 0 for peak in peaks)
    text = dict(calibration.as_table(peaks))
    assert re.fullmatch(r"\d+ Gflop/s \([\d.]+ flop a cycle and core\).*", text["fp32, 2 threads"])


def test_calibration_without_the_native_module_says_why(monkeypatch):
    monkeypatch.setattr(_native, "info_module", lambda: None)
    with pytest.raises(RuntimeError, match=r"no calibration: .*Remedy: "):
        calibration.calibrate()


def cache(level, mebibytes, shared_by):
    return {"level": level, "bytes": int(mebibytes * 2**20), "shared_by": shared_by}


def test_buffers_lie_in_the_level_they_are_for():
    desktop = [cache(1, 0.03125, 2), cache(2, 1, 2), cache(3, 32, 16)]
    one = calibration.buffer_bytes(desktop, 1)
    assert one == {"L2": 2**19, "L3": 2**24, "DRAM": 2**28}
    # sixteen threads' shares of L3 are no bigger than their L2: it cannot be told apart
    assert "L3" not in calibration.buffer_bytes(desktop, 16)
    assert set(calibration.buffer_bytes([], 1)) == {"DRAM"}


# An old CPU -------------------------------------------------------------------------------------


@needs_native
@pytest.mark.skipif(
    shutil.which("qemu-x86_64") is None, reason="no qemu-x86_64 (Debian: qemu-user)"
)
@pytest.mark.parametrize("model, isa", [("Nehalem", "baseline"), ("Haswell", "avx2")])
def test_kernels_run_on_a_cpu_without_the_newer_instructions(model, isa):
    code = (
        "import torch, patchgen_fast\n"
        "from patchgen_fast import _native_info, dispatch\n"
        "x, w = torch.randn(1, 3, 32, 32), torch.randn(24, 3, 8, 8)\n"
        "got = patchgen_fast.patch_embed(x, w, backend='cpu')\n"
        "want = patchgen_fast.patch_embed(x, w, backend='reference')\n"
        "assert (got - want).abs().max() < 1e-4 * want.abs().max()\n"
        "print(_native_info.chosen_isa(), dispatch.counters()['patch_embed.cpu'])\n"
    )
    # Where OPENBLAS_CORETYPE names the host's kind of CPU, numpy's library would not look.
    unset = ["env", "-u", "OPENBLAS_CORETYPE"]
    done = run_python(code, *unset, "qemu-x86_64", "-cpu", model)
    assert done.stdout.split() == [isa, "1"], done.stderr[-2000:]


def test_platform_is_named_without_naming_the_host():
    assert platform.node() not in json.dumps(info.collect()) or len(platform.node()) < 4
