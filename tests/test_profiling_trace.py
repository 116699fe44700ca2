"""The Kineto trace that `profile` writes, and what Perfetto and HTA make of it.

A slice that overlaps another on its thread without lying in it is drawn wrongly by Perfetto and
breaks HTA's call trees, so that is looked for event by event.
"""

from __future__ import annotations

import gzip
import importlib.metadata
import json
from collections import Counter, defaultdict

import perfetto
import pytest

import patchgen_fast
from patchgen_fast import model_source
from patchgen_fast.profiling.trace import STEP

ATTENTION = "encoder.layers.0.attn: attention"
MODES = {
    "forward": {},
    "training": {"training": True},
    "eager": {"fast": False},
    "compiled": {"compile": True},
}


@pytest.fixture(scope="module", params=MODES)
def traced(request, tmp_path_factory):
    """(mode, file) of one step of a small model."""
    source = model_source.find("patchgen:tiny")
    model = source.model()
    path = tmp_path_factory.mktemp(request.param) / "trace.json.gz"
    patchgen_fast.profile(
        model,
        *source.inputs(model, 2).args,
        trace=path,
        seconds=1e-3,
        calibrate=False,
        **MODES[request.param],
    )
    return request.param, path


def load(path):
    return json.loads(gzip.decompress(path.read_bytes()))


def slices(document):
    return [event for event in document["traceEvents"] if event["ph"] == "X"]


def test_slices_nest_on_every_thread(traced):
    threads = defaultdict(list)
    for event in slices(load(traced[1])):
        assert event["name"] and event["dur"] >= 0
        threads[event["pid"], event["tid"]].append(event)
    for events in threads.values():
        open_until: list[float] = []
        for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
            while open_until and open_until[-1] <= event["ts"]:
                open_until.pop()
            end = event["ts"] + event["dur"]
            # Times are in microseconds, in steps of a nanosecond.
            assert not open_until or end <= open_until[-1] + 2e-3, event["name"]
            open_until.append(end)


def test_the_step_and_the_layers_have_their_names(traced):
    mode, path = traced
    document = load(path)
    names = {event["name"] for event in slices(document)}
    assert document["distributedInfo"]["rank"] == 0 and STEP in names
    if mode == "compiled":
        assert any("attention" in name for name in names)
        return
    layer = ATTENTION if mode != "eager" else "encoder.layers.0.attn.qkv"
    assert layer in names
    whole = next(event for event in slices(document) if event["name"] == STEP)
    part = next(event for event in slices(document) if event["name"] == layer)
    assert whole["ts"] <= part["ts"] < part["ts"] + part["dur"] <= whole["ts"] + whole["dur"]


def test_who_may_read_the_file_is_as_for_any_other(traced, tmp_path):
    (tmp_path / "plain").write_text("")
    assert traced[1].stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_perfetto_reads_every_event_and_reports_no_error(traced, tmp_path):
    _, path = traced
    found = perfetto.answers(
        path,
        {
            "errors": "select name, value from stats where severity != 'info' and value != 0",
            "names": "select name, count(*) as n from slice group by name",
            "unfinished": "select name from slice where dur < 0",
        },
        tmp_path / "chromium",
    )
    assert found["errors"] == [] and found["unfinished"] == []
    read = {row["name"]: int(row["n"]) for row in found["names"]}
    # Instants, too, are slices to it, of no length.
    events = [event for event in load(path)["traceEvents"] if event["ph"] in "Xi"]
    assert read == Counter(event["name"] for event in events)


def with_kernels(document):
    """The trace as on a GPU, as Kineto writes it: under each operator that has none below it, a
    launch and, later, the kernel on a stream of its own. Made up: no GPU was at hand.
    """
    operators = [e for e in slices(document) if e["cat"] == "cpu_op"]
    added = []
    for number, operator in enumerate(operators, 1):
        start, length = operator["ts"], operator["dur"]
        if any(start < e["ts"] < start + length for e in operators):
            continue
        same = {"correlation": number, "External id": operator["args"]["External id"]}
        launch = {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "args": same}
        kernel = {"ph": "X", "cat": "kernel", "name": f"{operator['name']}_kernel", "pid": 0}
        added.append(
            {**launch, "pid": operator["pid"], "tid": operator["tid"], "ts": start, "dur": length}
        )
        added.append(
            {**kernel, "tid": 7, "args": {**same, "device": 0, "stream": 7},
             "ts": start + length, "dur": 1.0}
        )  # fmt: skip
    return {**document, "traceEvents": document["traceEvents"] + added}


@pytest.fixture
def analysis(traced, monkeypatch):
    """Reads a folder with a trace in it, by HTA."""
    how = "pip install HolisticTraceAnalysis 'pandas<3'"
    module = pytest.importorskip("hta.trace_analysis", reason=f"no HTA: {how}")
    if int(importlib.metadata.version("pandas").partition(".")[0]) >= 3:
        pytest.skip(f"HTA's call trees fail with pandas 3: {how}")
    # By default HTA rounds to microseconds, which gives shorter operators a negative duration.
    monkeypatch.setenv("HTA_DISABLE_NS_ROUNDING", "1")
    return lambda path: module.TraceAnalysis(trace_dir=str(path.parent))


def test_hta_reads_the_operators_the_layers_and_the_call_tree(traced, analysis):
    from hta.common.trace_call_graph import CallGraph

    mode, path = traced
    found = analysis(path)
    table = found.t.get_trace(0)
    names = {found.t.symbol_table.get_sym_table()[number] for number in table["name"]}
    assert found.get_profiler_steps() == [0] and STEP in names
    assert mode in ("compiled", "eager") or ATTENTION in names
    expected = {event["name"] for event in slices(load(path)) if event["cat"] == "cpu_op"}
    assert expected <= names
    stacks = CallGraph(found.t).call_stacks
    depth = max(node.depth for stack in stacks for node in stack.get_nodes().values())
    assert depth >= 2  # the step, a layer or kernel, what it calls


def test_hta_analyses_kernels(traced, analysis, tmp_path):
    _, path = traced
    document = with_kernels(load(path))
    target = tmp_path / "trace.json.gz"
    target.write_bytes(gzip.compress(json.dumps(document).encode()))
    found = analysis(target)
    kernels = sum(event["cat"] == "kernel" for event in slices(document))
    launches = found.get_cuda_kernel_launch_stats(visualize=False)[0]
    assert len(launches) == kernels > 0
    assert found.get_temporal_breakdown(visualize=False)["compute_time(us)"].iloc[0] > 0
    kinds, _ = found.get_gpu_kernel_breakdown(visualize=False)
    assert "COMPUTATION" in set(kinds["kernel_type"])
