"""The search of `patchgen-fast tune` from end to end, on the interpreter and an invented clock."""

import json
from dataclasses import asdict

import interpreter  # noqa: F401  (first: it repairs bfloat16, or skips this module)
import pytest

from patchgen_fast.triton import attention, attention_backward, configs, thresholds, tune
from patchgen_fast.triton.attention_configs import BackwardConfig, ShortConfig

CASE = tune.Case("small", 1, 1, 16, 16)
BEST = {
    "attention_short": ShortConfig(32, 2, 1, False),
    "attention_short_backward": BackwardConfig(32, 32, 8, 2),
}


@pytest.fixture(autouse=True)
def small_search(tmp_path, monkeypatch):
    """Few candidates, and a tuned file of this test's own."""
    few = tune.candidates
    monkeypatch.setattr(tune, "candidates", lambda config: list(few(config))[:6])
    monkeypatch.setenv("PATCHGEN_FAST_TUNED", str(tmp_path / "tuned.json"))
    yield tmp_path / "tuned.json"
    monkeypatch.undo()
    configs.reread(attention.SHORT, attention_backward.SHORT_BACKWARD)
    thresholds.forget()


def clock(run):
    """A run takes 100 microseconds, but 50 where its table answers with the best configuration."""
    with configs.asking() as asked:
        run()
    answers = {table.name: table.choose(*question) for table, question in asked}
    return 50.0 if any(BEST.get(name) == config for name, config in answers.items()) else 100.0


def test_it_finds_the_fastest_and_writes_it(small_search):
    found = list(tune.tune((CASE,), device="cpu", timer=clock))
    outcomes = {outcome.table: outcome for outcome in found if isinstance(outcome, tune.Outcome)}
    assert set(outcomes) == set(BEST)
    for name, outcome in outcomes.items():
        assert (outcome.before, outcome.after) == (100.0, 50.0), name
        assert outcome.config == asdict(BEST[name])
    document = json.loads(small_search.read_text())
    assert {key.split("/")[0] for key in document["configs"]} == set(BEST)
    # Then, with what was found, beside torch's kernels.
    choices = [choice for choice in found if isinstance(choice, tune.Choice)]
    assert [choice.times for choice in choices] == [{"torch": 100.0, "triton": 50.0}] * 2
    rules = [[16, 16, training, "triton"] for training in (False, True)]
    assert document["dispatch"] == rules


def test_what_was_found_before_an_interruption_is_kept(small_search):
    def interrupted(run):
        with configs.asking() as asked:
            run()
        if asked[0][0] is attention_backward.SHORT_BACKWARD:
            raise KeyboardInterrupt
        return clock(run)

    with pytest.raises(KeyboardInterrupt):
        list(tune.tune((CASE,), device="cpu", timer=interrupted))
    written = json.loads(small_search.read_text())["configs"]
    assert [key.split("/")[0] for key in written] == ["attention_short"]
