"""`patchgen-fast plan` and `verify`: what they print, write, and exit with."""

import json

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from patchgen_fast import models
from patchgen_fast.cli import main
from patchgen_fast.swapping.patchgen import FastAttention


def run(*arguments):
    return CliRunner().invoke(main, list(arguments))


def block():
    return models.EncoderLayer(32, 4), (torch.randn(2, 9, 32),)


def plain():
    return nn.Linear(4, 4), torch.randn(2, 4)


class Wrong(FastAttention):
    def fused_forward(self, x, *args, **kwargs):
        return super().fused_forward(x, *args, **kwargs) * 1.01


def wrong():
    from patchgen_fast.swapping import swap

    layer = models.Attention(32, 4)
    swap(layer)
    layer.__class__ = Wrong
    return layer, torch.randn(2, 9, 32)


def here(function):
    return f"{__name__}:{function.__name__}"


def test_plan_says_what_would_be_swapped(tmp_path):
    done = run("plan", "patchgen:small", "--json", str(tmp_path / "plan.json"))
    assert done.exit_code == 0, done.output
    assert "would swap in patchgen_fast.models" in done.stdout
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["kind"] == "swap_report" and written["dry_run"]
    assert {row["action"] for row in written["rows"]} == {"would swap"}


def test_plan_as_json_alone_on_stdout():
    rows = json.loads(run("plan", here(block), "--format", "json").stdout)["rows"]
    assert {row["name"] for row in rows} == {"", "attn", "mlp"}


def test_plan_of_a_model_with_nothing_to_swap():
    done = run("plan", here(plain))
    assert done.exit_code == 1
    assert "nothing to swap" in done.stdout


def test_verify_passes_and_writes_its_verdict(tmp_path):
    path = tmp_path / "verify.json"
    done = run("verify", here(block), "--runs", "1", "--json", str(path))
    assert done.exit_code == 0, done.output
    assert json.loads(path.read_text())["verdict"] == "pass"
    assert "pass" in done.stdout


def test_verify_fails_with_3_and_says_where():
    done = run("verify", here(wrong), "--runs", "1", "--no-gradients")
    assert done.exit_code == 3
    assert "TOO FAR" in done.stdout


def test_verify_of_a_model_with_nothing_to_swap():
    assert run("verify", here(plain)).exit_code == 1


@pytest.mark.parametrize("command", ["plan", "verify"])
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["patchgen:smal"], "small"),
        (["nothing"], "expected a model as"),
        (["patchgen:small", "--backend", "gpu"], "expected backend None or one of"),
    ],
)
def test_wrong_usage_is_2_and_says_the_remedy(command, arguments, said):
    done = run(command, *arguments)
    assert done.exit_code == 2
    assert said in done.output
