"""`bench` and `compare` as commands: what goes where, and every exit code."""

from __future__ import annotations

import csv
import io
import json

import pytest
import torch
from bench_fakes import PLAN, FakeClock, case, peaks, problem
from click.testing import CliRunner

from patchgen_fast.bench import calibrate, cases, problems, results, timing
from patchgen_fast.cli import main

TIMES = {"eager": 4.0, "sdpa": 3.0, "ours": 2.0}


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """The commands on a fake clock and a fake problem; `fake.times` and `fake.wrong` are knobs."""

    class Knobs:
        clock = FakeClock()
        times = dict(TIMES)
        wrong: dict[str, float] = {}

    knobs = Knobs()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cases, "select", lambda suite, **filters: [case()])
    monkeypatch.setattr(problems, "build", lambda _: problem(knobs.clock, knobs.times, knobs.wrong))
    monkeypatch.setattr(timing, "SystemClock", lambda: knobs.clock)
    monkeypatch.setattr(timing, "QUICK", PLAN)
    monkeypatch.setattr(timing, "FULL", PLAN)
    monkeypatch.setattr(calibrate, "make_sentinel", lambda: knobs.clock.taking(0.1))
    monkeypatch.setattr(calibrate, "calibrate_cpu", lambda threads, samples: peaks("cpu", threads))
    return knobs


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_it_writes_json_table_and_picture_and_says_where(fake, tmp_path):
    done = run("bench", "--quick")
    assert done.exit_code == 0, done.output
    folder = tmp_path / "results"
    for name in ("bench-quick.json", "bench-quick.md", "bench-quick.png"):
        assert (folder / name).stat().st_size > 0
        assert name in done.stderr
    stored = results.read(folder / "bench-quick.json")
    assert stored.complete and stored.settings.suite == "quick"
    assert stored.environment.packages["torch"] == torch.__version__
    assert stored.calibration("cpu", 1).fp32_flops == 1e9
    assert (folder / "bench-quick.png").read_bytes().startswith(b"\x89PNG")
    assert "2.00 (2.00–2.00)" in done.stdout  # × eager, a table on stdout
    assert "[1/1]" in done.stderr and "[1/1]" not in done.stdout


def test_other_formats_on_stdout(fake, tmp_path):
    document = json.loads(run("bench", "--quick", "--format", "json", "--quiet").stdout)
    assert document["cases"][0]["cells"][0]["role"] == "eager"
    lines = list(csv.DictReader(io.StringIO(run("bench", "--quick", "--format", "csv").stdout)))
    assert [line["contender"] for line in lines] == list(TIMES)
    assert float(lines[0]["median_s"]) == pytest.approx(4e-3)


def test_paths_of_the_users_choice(fake, tmp_path):
    done = run(
        "bench",
        "--json",
        tmp_path / "a/x.json",
        "--markdown",
        tmp_path / "y.md",
        "--plot",
        tmp_path / "z.png",
    )
    assert done.exit_code == 0
    assert (tmp_path / "a/x.json").exists() and (tmp_path / "y.md").exists()
    assert (tmp_path / "z.png").exists() and not (tmp_path / "results").exists()


def test_red_parity_exits_with_3_and_prints_no_number(fake):
    fake.wrong = {"ours": 1e-2}
    done = run("bench", "--quick")
    assert done.exit_code == 3
    assert "Parity is red" in done.stderr
    assert "RED" in done.stdout and "2.00" not in done.stdout


def test_baseline_regression_exits_with_1_after_a_second_try(fake, tmp_path):
    base = tmp_path / "base.json"
    assert run("bench", "--json", base).exit_code == 0
    assert run("bench", "--baseline", base).exit_code == 0
    fake.times = {**TIMES, "ours": 2.6}
    done = run("bench", "--baseline", base)
    assert done.exit_code == 1
    assert "measured once more" in done.stderr and "1 slower" in done.stderr


def test_the_baseline_is_not_written_over(fake, tmp_path):
    base = tmp_path / "base.json"
    run("bench", "--json", base)
    before = base.read_bytes()
    done = run("bench", "--json", base, "--baseline", tmp_path / "." / "base.json")
    assert done.exit_code == 2 and "choose another --json" in done.stderr
    assert base.read_bytes() == before


def test_resume_goes_on(fake, tmp_path):
    path = tmp_path / "r.json"
    assert run("bench", "--json", path).exit_code == 0
    fake.times = {**TIMES, "ours": 9.0}  # would show if it were measured again
    assert run("bench", "--json", path, "--resume").exit_code == 0
    assert results.read(path).cases[0].ours.timing.median == pytest.approx(2e-3)


def test_resume_begins_where_there_is_nothing_to_go_on_with(fake, tmp_path):
    path = tmp_path / "r.json"
    assert run("bench", "--json", path, "--resume").exit_code == 0
    assert results.read(path).complete


@pytest.mark.parametrize("content", ["{", '{"kind": "other"}', "plain text"])
def test_a_foreign_file_is_not_overwritten(fake, tmp_path, content):
    path = tmp_path / "mine.json"
    path.write_text(content)
    for extra in ([], ["--resume"]):
        done = run("bench", "--json", path, *extra)
        assert done.exit_code == 2
        assert "Error:" in done.stderr
    assert path.read_text() == content


def test_an_unwritable_place_is_a_usage_error(fake, tmp_path):
    (tmp_path / "file").write_text("")
    done = run("bench", "--json", tmp_path / "file" / "r.json")
    assert done.exit_code == 2
    assert "cannot write" in done.stderr


@pytest.mark.parametrize(
    "option",
    [("--markdown", "file/x.md"), ("--plot", "file/x.png"), ("--export", "junit=file/x.xml")],
)
def test_what_can_not_be_written_is_said_before_anything_is_measured(fake, tmp_path, option):
    (tmp_path / "file").write_text("mine")
    done = run("bench", "--quick", *option)
    assert done.exit_code == 2 and "cannot write" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_unknown_names_are_usage_errors():
    for arguments in (["--suite", "fast"], ["--op", "conv"], ["--backend", "fpga"]):
        done = run("bench", *arguments)
        assert done.exit_code == 2
        assert "unknown" in done.stderr and "expected one of" in done.stderr


def test_no_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    few = ("--suite", "gpu", "--op", "patch_embed", "--case", "vit_b16_b256")
    done = run("bench", *few, "--require-gpu")
    assert done.exit_code == 4 and "no GPU here" in done.stderr
    assert list(tmp_path.iterdir()) == []
    done = run("bench", *few)
    assert done.exit_code == 0
    assert "skipped: no GPU here" in done.stdout
    assert run("bench", "--quick", "--require-gpu").exit_code == 2


def test_list_measures_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run("bench", "--list", "--quick")
    assert done.exit_code == 0
    assert "attention/vit_b/float32/forward/cpu-one\tB8 H12 N197 D64" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_compare_exit_codes_and_formats(fake, tmp_path):
    old, new, red = (tmp_path / f"{name}.json" for name in ("old", "new", "red"))
    run("bench", "--json", old)
    fake.times = {**TIMES, "ours": 2.6}
    run("bench", "--json", new)
    fake.wrong = {"ours": 1e-2}
    run("bench", "--json", red)
    assert run("compare", old, old).exit_code == 0
    assert run("compare", old, new).exit_code == 1
    assert run("compare", old, new, "--relative", "50").exit_code == 0
    assert run("compare", old, red).exit_code == 3
    done = run("compare", old, tmp_path / "missing.json")
    assert done.exit_code == 2 and "cannot read" in done.stderr
    assert "<!-- patchgen-fast" in run("compare", old, new, "--format", "markdown").stdout
    parsed = json.loads(run("compare", old, new, "--format", "json").stdout)
    assert parsed[0]["verdict"] == "slower"


def test_help_imports_neither_torch_nor_matplotlib():
    import subprocess
    import sys

    code = (
        "import sys\n"
        "from click.testing import CliRunner\n"
        "from patchgen_fast.cli import main\n"
        "for name in ('bench', 'compare'):\n"
        "    done = CliRunner().invoke(main, [name, '--help'])\n"
        "    assert done.exit_code == 0 and 'Exit codes' in done.stdout, done.output\n"
        "CliRunner().invoke(main, ['bench', '--list', '--quick'])\n"
        "assert not {'torch', 'matplotlib', 'numpy'} & set(sys.modules), sorted(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
