"""Profiles: the parts add up, the counts are the eager model's, and the model is left alone."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import patchgen_fast
from patchgen_fast import model_source, models
from patchgen_fast.cli import main
from patchgen_fast.profiling import kernels, measure, rows, timeline, work
from patchgen_fast.profiling.result import Row, Spread
from patchgen_fast.swapping import swap

QUICK = {"seconds": 1e-3, "calibrate": False}


@pytest.fixture(scope="module")
def tiny():
    source = model_source.find("patchgen:tiny")
    model = source.model()
    return model, source.inputs(model, 4).args


@pytest.fixture(scope="module")
def profiled(tiny, tmp_path_factory):
    """(profile of a forward, profile of a training step, the forward's trace)."""
    model, args = tiny
    path = tmp_path_factory.mktemp("trace") / "step.json.gz"
    forward = patchgen_fast.profile(model, *args, trace=path, **QUICK)
    return forward, patchgen_fast.profile(model, *args, training=True, **QUICK), path


class Steps:
    """A meter that goes on by one whenever it is read."""

    value = 0

    def __call__(self):
        self.value += 1
        return self.value


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("fast", [False, True])
def test_the_parts_of_a_step_are_the_whole_step(tiny, training, fast):
    model, args = tiny
    model = model_source.find("patchgen:tiny").model()
    if fast:
        swap(model)
    meter = Steps()
    watch = timeline.Timeline(model, timeline.layers_of(model), meter)
    with watch.watching():
        measure.make_step(model, args, {}, training)()
    parts = watch.parts()
    assert sum(parts.values()) == meter.value - 1
    assert len({place.layer for place, _ in parts}) > 10
    assert any(way == timeline.BACKWARD for _, way in parts) == training


def test_a_backward_belongs_to_the_layers_of_its_forward():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    watch = timeline.Timeline(model, timeline.layers_of(model), Steps())
    with watch.watching():
        model(torch.ones(3, 4)).sum().backward()
    backwards = [mark.place.layer for mark in watch.marks if mark.direction == timeline.BACKWARD]
    assert backwards == ["2", "1", "0"]
    assert not model[0]._forward_hooks and not model[0]._forward_pre_hooks


def test_watching_a_fast_layer_takes_nothing_apart(tiny):
    """A hook inside a fast layer would make it run its children one by one."""
    _, args = tiny
    model = model_source.find("patchgen:tiny").model()
    swap(model)
    with patchgen_fast.dispatch.counting() as plain, torch.inference_mode():
        model(*args)
    watch = timeline.Timeline(model, timeline.layers_of(model), Steps())
    with patchgen_fast.dispatch.counting() as watched, watch.watching(), torch.inference_mode():
        model(*args)
    assert watched == plain and plain
    seen = sum(count for place, count in watch.calls.items() if place.op)
    assert seen == sum(plain.values())


def test_flops_are_those_of_the_eager_model_on_the_meta_device(tiny, profiled):
    forward, training, _ = profiled
    with torch.device("meta"):
        eager = model_source.find("patchgen:tiny").make()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        eager(tiny[1][0].to("meta"))
    assert forward.flops == counter.get_total_flops() == forward.eager_flops
    assert training.flops == 3 * forward.flops == training.eager_flops
    assert forward.flops_agree and sum(row.flops for row in forward.layers) == forward.flops


def test_a_model_that_reads_values_is_profiled_without_the_second_count():
    class Reads(nn.Linear):
        def forward(self, x):
            return super().forward(x) * float(x.sum())

    found = patchgen_fast.profile(Reads(4, 4), torch.ones(2, 4), fast=False, **QUICK)
    assert found.eager_flops is None and found.flops == 2 * 2 * 4 * 4
    assert "not compared with the eager model" in str(found)


def test_rows_have_what_their_columns_promise(profiled):
    forward, training, _ = profiled
    found = {(row.name, row.op): row for row in forward.rows}
    layer, op = found["encoder.layers.0.attn", ""], found["encoder.layers.0.attn", "attention"]
    assert op.backend == ("cpu" if _has_cpu() else "torch")
    assert op.backend in layer.backend
    assert op.flops == 4 * 4 * 4 * 16 * 16 * 8 and op.shape == "4×4×16×8" and op.calls == 1
    assert layer.seconds.median >= op.seconds.median > 0
    assert layer.error < 1e-5 and layer.eager_error < 1e-5 and layer.speedup > 0
    assert op.byte_rate == op.bytes / op.forward and op.bytes == 4 * 4 * (4 * 4 * 16 * 8) + 4 * 256
    assert layer.peak_memory > 0 and forward.peak_memory >= layer.peak_memory
    assert not layer.backward
    again = {(row.name, row.op): row for row in training.rows}
    assert again["encoder.layers.0.attn", "attention"].backward > 0
    assert "linear (qkv)" in {row.op for row in forward.rows}
    assert forward.tokens == 4 * 16 and forward.batch == 4


def test_shares_are_of_the_step_that_nothing_observed():
    places = timeline.Place("a"), timeline.Place("a", "attention"), timeline.Place("b")
    part = {(place, timeline.FORWARD): 1.0 for place in places}
    watched = measure.Watched(
        steps=[2.0, 4.0, 3.0], parts=[part] * 3, calls=dict.fromkeys(places, 1)
    )
    layers = {"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)}
    found = rows.layer_rows(layers, watched, None, {}, {}, {}, False)
    shares = [(row.name, row.op, round(row.share, 6)) for row in found]
    third = round(1 / 3, 6)
    assert shares == [("a", "", round(2 / 3, 6)), ("a", "attention", third), ("b", "", third)]
    assert rows.coverage_of(watched) == 1.0


def _has_cpu():
    from patchgen_fast.registry import OPS

    return OPS["attention"].backends["cpu"].unavailable is None


def test_repeated_layers_are_one_row(profiled):
    forward, _, _ = profiled
    joined = {(row.name, row.op): row for row in forward.collapsed()}
    both = joined["encoder.layers.0-1.attn", "attention"]
    single = [row for row in forward.rows if row.op == "attention" and "encoder" in row.name]
    assert both.calls == 2 and both.flops == sum(row.flops for row in single)
    assert both.seconds.median == pytest.approx(sum(row.seconds.median for row in single))


def test_the_trace_has_the_layers_names_and_a_rank(profiled):
    _, _, path = profiled
    document = json.loads(gzip.decompress(path.read_bytes()))
    names = {event.get("name") for event in document["traceEvents"]}
    assert {"encoder.layers.0.attn: attention", "decoder.head: patch_unembed (proj)"} <= names
    assert any(name and name.startswith(("patchgen_fast::", "aten::")) for name in names)
    assert document["distributedInfo"]["rank"] == 0
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_the_text_has_every_total(profiled):
    forward, training, path = profiled
    text = str(forward)
    for word in ("share", "TFLOP/s", "× eager", "error ours / eager", "images/s", "tokens/s",
                 "Amdahl", "peak memory", str(path), "counts the same"):  # fmt: skip
        assert word in text, word
    assert "training step" in str(training)
    document = json.loads(forward.to_json())
    assert document["kind"] == "patchgen_fast.profile" and len(document["rows"]) > 20


def test_the_model_is_left_as_it_was(tiny):
    model, args = tiny
    before = model(*args)
    patchgen_fast.profile(model, *args, training=True, **QUICK)
    assert torch.equal(model(*args), before)
    assert all(p.grad is None for p in model.parameters())
    assert not [m for m in model.modules() if m._forward_hooks or "_fast" in m.__dict__]


def test_a_layer_says_why_it_is_not_fast():
    class MyAttention(models.Attention):
        pass

    model = nn.Sequential(MyAttention(8, 2), models.Attention(8, 2, attn_drop=0.1)).train()
    found = patchgen_fast.profile(model, torch.randn(2, 5, 8), **QUICK)
    refused, fell_back = (next(r for r in found.layers if r.name == name) for name in "01")
    assert refused.reason == "subclass" and refused.error is None
    assert fell_back.reason == "fell back: dropout" and fell_back.error is not None


def test_amdahl_says_what_the_fast_layers_can_do(profiled):
    forward = profiled[0]
    slow = Row(
        "a", cls="A", seconds=Spread.of([1.0]), eager_seconds=3.0, error=0.0, eager_error=0.0
    )
    rest = Row("b", seconds=Spread.of([1.0]), eager_seconds=1.0)
    made = replace(forward, rows=(slow, rest), step=Spread.of([2.0]), eager_step=Spread.of([4.0]))
    assert "were 75% of the eager step and became 3.00 times as fast" in made.amdahl()
    assert "makes the step 2.00 times" in made.amdahl() and "would be 4.00 times" in made.amdahl()


def test_disturbed_rounds_are_left_out_if_enough_are_quiet():
    watched = measure.Watched(
        steps=[1.0, 9.0, 1.0, 1.0, 1.0, 1.0], parts=[{}] * 6, quiet=[True, False] + [True] * 4
    )
    assert watched.keep_quiet() and watched.steps == [1.0] * 5 and len(watched.parts) == 5


def test_without_quiet_rounds_the_time_worked_counts():
    part = {(timeline.Place("a"), timeline.FORWARD): 1.0}
    watched = measure.Watched(
        steps=[9.0] * 5, parts=[{}] * 5, quiet=[False] * 5, worked=[(1.0, part)] * 5
    )
    assert not watched.keep_quiet() and watched.steps == [1.0] * 5 and watched.parts == [part] * 5


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
def test_a_compiled_model_is_shown_by_kernel(tiny, training):
    model, args = tiny
    found = patchgen_fast.profile(model, *args, compile=True, training=training, **QUICK)
    names = [row.name for row in found.rows]
    assert any(name.startswith("patchgen_fast::") for name in names) and found.compiled
    assert names[-1] == "(between kernels)" and found.eager_step is not None


def test_flops_of_an_operator_by_its_shapes():
    assert kernels.flops_of("aten::mm", [[2, 3], [3, 4]]) == 2 * 2 * 3 * 4
    assert kernels.flops_of("patchgen_fast::attention", [[1, 2, 8, 16]] * 3) == 4 * 2 * 8 * 8 * 16
    assert kernels.flops_of("aten::add", [[2], [2]]) == 0 and kernels.flops_of("range", []) == 0


def test_wrong_arguments():
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module to profile, got str"):
        patchgen_fast.profile("model")
    with pytest.raises(ValueError, match=r"expected a trace called \*.json.gz"):
        patchgen_fast.profile(nn.Linear(2, 2), torch.ones(1, 2), trace="x.json")
    with pytest.raises(ValueError, match="got neither"):
        patchgen_fast.profile(nn.Identity())
    with pytest.raises(ValueError, match="expected seconds above 0"):
        patchgen_fast.profile(nn.Linear(2, 2), torch.ones(1, 2), seconds=0)


# ------------------------------------------------------------------------------------ the command


def run(*arguments):
    return CliRunner().invoke(main, ["profile", *(str(argument) for argument in arguments)])


FEW = ("--batch", "2", "--seconds", "0.001", "--no-calibrate", "--threads", "one")


def test_the_command_writes_what_it_is_asked_for(tmp_path):
    done = run("patchgen:tiny", *FEW, "--json", tmp_path / "p.json",
               "--trace", tmp_path / "t.json.gz")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "encoder.layers.0-1.attn" in done.stdout and "counting" in done.stderr
    assert json.loads((tmp_path / "p.json").read_text())["batch"] == 2
    assert (tmp_path / "t.json.gz").stat().st_size > 0
    done = run("patchgen:tiny", *FEW, "--eager", "--every-layer", "--quiet", "--format", "markdown")
    assert done.exit_code == 0 and not done.stderr
    assert "| encoder.layers.1.attn |" in done.stdout and "× eager" not in done.stdout


@pytest.mark.parametrize(
    "arguments, status, text",
    [
        (["patchgen:tin"], 2, "did you mean tiny"),
        (["patchgen:tiny", "--backend", "fpga"], 2, "unknown backend 'fpga'"),
        (["patchgen:tiny", "--device", "tpu"], 2, "unknown device 'tpu'"),
        (["patchgen:tiny", "--batch", "0"], 2, "batch of at least 1"),
        (["patchgen:tiny", "--trace", "x.json"], 2, "expected a name *.json.gz"),
        (["patchgen:tiny", "--json", "file/x.json"], 2, "cannot write file/x.json"),
    ],
)
def test_wrong_use_of_the_command(arguments, status, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    done = run(*arguments)
    assert done.exit_code == status and text in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = run("patchgen:tiny", "--device", "cuda")
    assert done.exit_code == 4 and "no GPU here" in done.stderr


def test_help_imports_no_torch():
    import subprocess
    import sys

    code = (
        "import sys\n"
        "from click.testing import CliRunner\n"
        "from patchgen_fast.cli import main\n"
        "done = CliRunner().invoke(main, ['profile', '--help'])\n"
        "assert done.exit_code == 0 and 'Exit codes' in done.stdout, done.output\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --------------------------------------------------------------------------- what issue 7 must show


@pytest.mark.slow
def test_the_shares_of_a_vit_add_up_to_the_step():
    try:
        source = model_source.find("timm:vit_base_patch16_224")
    except ValueError as reason:
        pytest.skip(str(reason))
    model = source.model()
    from patchgen_fast.bench import machine

    with machine.held(1):
        found = patchgen_fast.profile(
            model, *source.inputs(model, 8).args, seconds=60, calibrate=False
        )
    assert found.flops == found.eager_flops == work.eager_flops(model, *source.inputs(model, 8))
    assert 0.97 <= sum(row.share for row in found.layers) <= 1.03, str(found)
