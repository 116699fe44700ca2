"""The README's Python blocks run, its links lead somewhere, its figures are those on record."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def test_there_are_blocks():
    assert len(BLOCKS) >= 3


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_block_runs(number, capsys):
    for library in re.findall(r"\b(timm|torchvision|transformers|diffusers)\b", BLOCKS[number]):
        pytest.importorskip(library, exc_type=ImportError)
    exec(compile(BLOCKS[number], f"README.md, block {number + 1}", "exec"), {"__name__": "readme"})


def test_links_lead_to_files():
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_tables_show_ops_layers_blocks_and_models():
    """A part of a suite, put among the results, would take the place of the whole."""
    table = README.partition("<!-- bench:begin -->")[2].partition("<!-- bench:end -->")[0]
    assert re.findall(r"^### (\w+)$", table, flags=re.MULTILINE)[:4] == [
        "Ops",
        "Layers",
        "Blocks",
        "Models",
    ]


def test_figures_of_the_demo_are_those_on_record():
    table = README.partition("<!-- demo:begin -->")[2].partition("<!-- demo:end -->")[0]
    shown = re.findall(r"^\| ([a-z].*?) \| ([0-9.]+) \|", table, flags=re.MULTILINE)
    record = json.loads((ROOT / "benchmarks" / "results" / "digits-demo.json").read_text())
    assert len(shown) >= 6
    for name, figure in shown:
        digits = len(figure.partition(".")[2])
        assert figure == f"{record['evaluation'][name]:.{digits}f}", name
