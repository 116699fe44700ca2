"""`patchgen-fast tune` without a GPU: what it says, and how it chooses, by an invented clock."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("triton")

from patchgen_fast import dispatch
from patchgen_fast import triton as ours
from patchgen_fast.cli import main
from patchgen_fast.ops.attention import OP, AttentionArguments
from patchgen_fast.triton import configs, thresholds, tune, tuned
from patchgen_fast.triton.attention_configs import StreamConfig
from patchgen_fast.triton.configs import HALF, Question, Row, Table

SHIPPED = StreamConfig(64, 64, 4, 2)
QUESTION = Question(90, HALF, 64, 256, False)


@pytest.fixture(autouse=True)
def tuned_file(tmp_path, monkeypatch):
    """The tuned file of these tests, read anew by each."""
    monkeypatch.setenv("PATCHGEN_FAST_TUNED", str(tmp_path / "deep" / "tuned.json"))
    yield tmp_path / "deep" / "tuned.json"
    forget()


def forget():
    """As in a process that starts now."""
    tuned.document.cache_clear()
    tuned.distrust.cache_clear()
    thresholds.forget()


def table():
    """A table as a process that starts now would have it."""
    forget()
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


def test_a_search_is_not_misled_by_what_an_earlier_one_wrote():
    best = StreamConfig(128, 64, 8, 3)
    tune._keep(search(table(), lambda config: 50.0 if config == best else 100.0))
    again = search(table(), lambda config: {SHIPPED: 10.0, best: 20.0}.get(config, 90.0))
    assert (again.before, again.config) == (10.0, None)


@pytest.mark.parametrize("fact", ["gpu", "torch", "triton", "patchgen_fast"])
def test_a_file_made_elsewhere_is_not_believed(tuned_file, fact):
    tune._keep(search(table(), lambda config: 100.0 if config == SHIPPED else 50.0))
    document = json.loads(tuned_file.read_text())
    document["environment"][fact] = "another"
    tuned_file.write_text(json.dumps(document))
    assert table().choose(*QUESTION) == SHIPPED


BROKEN = {
    "cut short": '{"environment": ',
    "no object": "[1, 2]",
    "a field of another kind": '{"configs": [], "dispatch": []}',
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_not_believed_and_is_told_once(tuned_file, name):
    tuned_file.parent.mkdir()
    tuned_file.write_text(BROKEN[name])
    tables = table()
    with pytest.warns(RuntimeWarning, match="patchgen-fast tune` again, or delete") as told:
        assert tables.choose(*QUESTION) == SHIPPED
        assert tables.choose(*QUESTION._replace(n=512)) == SHIPPED
        assert thresholds.rules() == ()
    assert len(told) == 1 and str(tuned_file) in str(told[0].message)


@pytest.mark.parametrize(
    "entry",
    [{"block_m": 64}, {"block_m": "64", "block_n": 64, "warps": 4, "stages": 2}, 7],
    ids=["fields missing", "a string", "no object"],
)
def test_a_broken_configuration_is_not_believed(tuned_file, entry):
    tables = table()
    tuned.write(configs={tables.key(QUESTION): entry})
    with pytest.warns(RuntimeWarning, match=r"which has block_m \(int\)"):
        assert tables.choose(*QUESTION) == SHIPPED


def test_no_file_is_nothing_to_tell(tuned_file, recwarn):
    assert table().choose(*QUESTION) == SHIPPED and thresholds.rules() == ()
    assert not recwarn.list


# Which backend goes first ------------------------------------------------------------------------

RULES = [[64, 197, False, "triton"], [64, 577, False, "torch"], [64, 1024, False, "cuda"]]


def call(tokens=197, d=64, **changes):
    """The arguments of a plain call, as on a GPU."""
    query, key, value = torch.zeros(3, 2, 3, tokens, d, dtype=torch.bfloat16).unbind(0)
    args = AttentionArguments(query, key, value, None, None, None, False, 1.0, 0.0, False)
    return args._replace(**changes)


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(thresholds, "_on_gpu", lambda args: True)


def test_a_gpu_that_nobody_measured_has_torch_first(on_gpu):
    forget()
    assert thresholds.attention(call()) == "torch"


def test_a_measured_gpu_has_its_rules(on_gpu, monkeypatch):
    rules = tuple(thresholds.Rule(*rule) for rule in reversed(RULES))
    monkeypatch.setitem(thresholds.MEASURED, tuned.environment()["gpu"], rules)
    forget()
    first = [thresholds.attention(call(tokens)) for tokens in (1, 197, 198, 577, 578, 1025)]
    assert first == ["triton", "triton", "torch", "torch", "cuda", "torch"]


def test_what_tune_found_goes_before_what_ships(on_gpu, monkeypatch, tuned_file):
    shipped = (thresholds.Rule(64, 197, False, "cuda"),)
    monkeypatch.setitem(thresholds.MEASURED, tuned.environment()["gpu"], shipped)
    tuned.write(dispatch=RULES)
    forget()
    assert thresholds.attention(call()) == "triton"
    document = json.loads(tuned_file.read_text())
    document["environment"]["triton"] = "another"
    tuned_file.write_text(json.dumps(document))
    forget()
    assert thresholds.attention(call()) == "cuda"


def test_a_rule_is_for_calls_like_the_one_that_was_measured(on_gpu):
    tuned.write(dispatch=RULES)
    forget()
    mask = torch.empty(1, 1, 1, 197)
    others = [
        call(d=72),
        call(attn_mask=mask),
        call(is_causal=True),
        call(key=call(77).key, value=call(77).value),
        call(query=call().query.requires_grad_()),
        call(query=call().query.float()),
    ]
    assert {thresholds.attention(args) for args in others} == {"torch"}
    lengths = torch.empty(2, dtype=torch.int32)
    assert thresholds.attention(call(kv_lengths=lengths)) is None  # the usual order


@pytest.mark.parametrize("rule", [[64, 197, False], [64, 197, False, "tritn"], "triton"])
def test_a_broken_rule_is_not_believed(on_gpu, rule):
    tuned.write(dispatch=[*RULES, rule])
    forget()
    with pytest.warns(RuntimeWarning, match="got .* for \\[D, tokens, training, backend\\]"):
        assert thresholds.attention(call()) == "torch"


def test_dispatch_goes_by_the_rule(on_gpu, monkeypatch):
    """A backend that a rule names still only runs what it accepts."""
    tuned.write(dispatch=[[64, 197, False, "reference"], [64, 400, False, "triton"]])
    forget()
    assert dispatch.choose(OP, call()) == "reference"
    monkeypatch.setattr(OP.backends["triton"], "unavailable", "not here")
    assert dispatch.choose(OP, call(300)) == "cpu"


def test_a_compiled_graph_takes_the_rules_as_constants(on_gpu):
    tuned.write(dispatch=RULES)
    forget()

    @torch.compile(fullgraph=True, backend="eager")
    def which(args):
        return args.query + {"triton": 1, "torch": 2, "cuda": 3}[thresholds.attention(args)]

    args = call(197)
    assert torch.equal(which(args), args.query + 1)


def compared(monkeypatch, times, results=None):
    """What tune finds where backends take `times` in microseconds; those without one refuse."""
    ran = []

    def attention(query, key, value, backend):
        if backend not in times:
            raise dispatch.BackendRefused("not here", backend, None)
        ran.append(backend)
        return query * (results or {}).get(backend, 1.0)

    def clock(run):
        run()
        return times[ran[-1]]

    monkeypatch.setattr(tune, "public_attention", attention)
    return tune._compare(tune.Case("tiny", 1, 1, 16, 16), False, "cpu", clock)


def test_the_fastest_backend_becomes_a_rule(monkeypatch, tuned_file):
    choice = compared(monkeypatch, {"torch": 100.0, "triton": 50.0, "cuda": 70.0})
    assert choice.rule == (16, 16, False, "triton")
    assert str(choice) == (
        "tiny B1 H1 N16 D16, forward: triton first (torch 100.0 us, triton 50.0 us, cuda 70.0 us)"
    )
    tune._keep_rule(choice.rule)
    tune._keep_rule(choice.rule._replace(training=True))
    tune._keep_rule(choice.rule._replace(backend="cuda"))  # a later run finds otherwise
    forget()
    assert thresholds.rules() == ((16, 16, False, "cuda"), (16, 16, True, "triton"))


def test_torch_stays_first_within_the_noise_and_where_others_are_wrong(monkeypatch):
    assert compared(monkeypatch, {"torch": 100.0, "triton": 98.0}).rule.backend == "torch"
    wrong = compared(monkeypatch, {"torch": 100.0, "triton": 9.0}, {"triton": 1.5})
    assert wrong.rule.backend == "torch" and set(wrong.times) == {"torch"}


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
