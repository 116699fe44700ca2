"""`patchgen-fast tune` without a GPU: what it says, and how it chooses, by an invented clock."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("triton")

from patchgen_fast import triton as ours
from patchgen_fast.cli import main
from patchgen_fast.triton import configs, tune
from patchgen_fast.triton.attention import StreamConfig
from patchgen_fast.triton.configs import HALF, Question, Row, Table

SHIPPED = StreamConfig(64, 64, 4, 2)
QUESTION = Question(90, HALF, 64, 256, False)


@pytest.fixture(autouse=True)
def tuned_file(tmp_path, monkeypatch):
    """The tuned file of these tests, read anew by each."""
    monkeypatch.setenv("PATCHGEN_FAST_TUNED", str(tmp_path / "deep" / "tuned.json"))
    yield tmp_path / "deep" / "tuned.json"
    configs._tuned.cache_clear()


def table():
    """A table as a process that starts now would have it."""
    configs._tuned.cache_clear()
    return Table("attention", Row(SHIPPED, "the row"))


def search(tables, clock, result=lambda config: 1.0):
    """A search in which a configuration takes `clock(config)` and computes `result(config)`."""

    def choice():
        return tables.choose(*QUESTION)

    return tune._search(
        "case",
        tables,
        QUESTION,
        lambda: (torch.tensor([result(choice())]),),
        lambda run: clock(choice()),
        None,
    )


def test_the_fastest_is_kept_and_preferred(tuned_file):
    best = StreamConfig(128, 64, 8, 3)
    outcome = search(table(), lambda config: {SHIPPED: 100.0, best: 50.0}.get(config, 90.0))
    assert (outcome.before, outcome.after) == (100.0, 50.0)
    assert "100.0 us -> 50.0 us, 2.00 times" in str(outcome)
    tune._keep(outcome)
    assert table().choose(*QUESTION) == best
    assert table().choose(*QUESTION._replace(n=512)) == SHIPPED
    assert table().choose(*QUESTION._replace(masked=True)) == SHIPPED


def test_a_gain_within_the_noise_is_none(tuned_file):
    outcome = search(table(), lambda config: 100.0 if config == SHIPPED else 98.0)
    assert outcome.config is None and outcome.timed == 35 + 18
    tune._keep(outcome)
    assert json.loads(tuned_file.read_text())["configs"] == {}


def test_a_wrong_result_never_wins():
    wrong = StreamConfig(128, 128, 8, 1)
    outcome = search(
        table(),
        lambda config: {SHIPPED: 100.0, wrong: 1.0}.get(config, 60.0),
        lambda config: float("nan") if config == wrong else 1.0,
    )
    assert outcome.after == 60.0


def test_what_does_not_fit_the_chip_is_passed_over():
    def result(config):
        if config.block_m == 128:
            raise tune.TritonError("out of resources")
        return 1.0

    outcome = search(table(), lambda config: 100.0 if config == SHIPPED else 50.0, result)
    assert outcome.config["block_m"] in (32, 64)
    assert outcome.timed == 35


def test_searches_add_up_in_the_file(tuned_file):
    first = search(table(), lambda config: 100.0 if config == SHIPPED else 50.0)
    tune._keep(first)
    other = tune.Outcome("other", "attention", "attention/half/80/512", 9.0, 8.0, {"block_m": 1}, 3)
    tune._keep(other)
    found = json.loads(tuned_file.read_text())
    assert set(found["configs"]) == {first.key, other.key} == set(found["gains"])
    # The shipped row wins after all, in a second run.
    tune._keep(search(table(), lambda config: 10.0))
    assert set(json.loads(tuned_file.read_text())["configs"]) == {other.key}


@pytest.mark.parametrize("fact", ["gpu", "torch", "triton", "patchgen_fast"])
def test_a_file_made_elsewhere_is_not_believed(tuned_file, fact):
    tune._keep(search(table(), lambda config: 100.0 if config == SHIPPED else 50.0))
    document = json.loads(tuned_file.read_text())
    document["environment"][fact] = "another"
    tuned_file.write_text(json.dumps(document))
    assert table().choose(*QUESTION) == SHIPPED


def test_a_broken_file_is_not_believed(tuned_file):
    tuned_file.parent.mkdir()
    tuned_file.write_text('{"environment": ')
    assert table().choose(*QUESTION) == SHIPPED


def test_a_search_knows_what_a_call_asks():
    tables = table()
    with configs.asking() as asked:
        tables.choose(*QUESTION)
    tables.choose(*QUESTION)
    assert asked == [(tables, QUESTION)]


@pytest.fixture
def installed(monkeypatch):
    """As with a torch that was built for CUDA."""
    monkeypatch.setattr(ours, "unavailable_reason", lambda: None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to tune")
def test_the_command_without_a_gpu(installed, tuned_file):
    done = CliRunner().invoke(main, ["tune"])
    assert done.exit_code == 4
    assert "expected a CUDA device to time kernels on; found none" in done.output
    assert not tuned_file.exists()


def test_the_command_where_triton_cannot_run(monkeypatch):
    monkeypatch.setattr(ours, "unavailable_reason", lambda: "the reason")
    done = CliRunner().invoke(main, ["tune"])
    assert (done.exit_code, done.output) == (4, "Error: tune: the reason\n")


def test_the_command_lists_its_shapes_and_refuses_others(installed):
    listed = CliRunner().invoke(main, ["tune", "--list"])
    assert listed.exit_code == 0 and "vit-b B128 H12 N197 D64" in listed.output
    done = CliRunner().invoke(main, ["tune", "--case", "vit-c"])
    assert done.exit_code == 2 and "got vit-c" in done.output


def test_the_command_says_what_was_gained(installed, monkeypatch):
    seen = []

    def search(cases, *, progress):
        seen.extend(case.name for case in cases)
        yield tune.Outcome("vit-b", "attention", "key", 100.0, 50.0, {"block_m": 64}, 7)
        yield tune.Outcome("vit-b", "attention", "key", 100.0, 100.0, None, 7)

    monkeypatch.setattr(tune, "tune", search)
    done = CliRunner().invoke(main, ["tune", "--case", "vit-b"])
    assert (done.exit_code, seen) == (0, ["vit-b"])
    assert "100.0 us -> 50.0 us, 2.00 times, by block_m 64" in done.output
    assert "the shipped configuration stands" in done.output
    assert "1 configurations faster" in done.output
