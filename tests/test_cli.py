"""The `patchgen-fast` command: what it imports, what it refuses."""

import json
import os
import subprocess
import sys

import pytest

import patchgen_fast
from patchgen_fast.cli import COMMANDS

HEAVY = ("torch", "triton", "matplotlib", "sklearn", "numpy", "rich")


def run(*arguments, code=None, **environment):
    start = ["-c", code] if code else ["-m", "patchgen_fast"]
    return subprocess.run(
        [sys.executable, *start, *arguments],
        env={**os.environ, "COLUMNS": "100", **environment},
        capture_output=True,
        text=True,
    )


def modules_after(code):
    """Which of HEAVY are imported after `code`, and what it wrote to stderr."""
    done = run(code=f"{code}\nimport sys\nprint([m for m in {HEAVY!r} if m in sys.modules])")
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1], done.stderr


def test_importing_the_package_imports_nothing_heavy_and_warns_nothing():
    code = (
        "import warnings; warnings.simplefilter('error'); import patchgen_fast; dir(patchgen_fast)"
    )
    assert modules_after(code) == ("[]", "")


def test_using_an_op_imports_neither_triton_kernels_nor_the_benchmark():
    code = (
        "import torch, patchgen_fast, sys\n"
        "patchgen_fast.attention(*torch.randn(3, 1, 2, 5, 8))\n"
        "ours = [m for m in sys.modules if m.startswith('patchgen_fast.')]\n"
        "light = ['', '.thresholds', '.tuned']\n"  # no kernel in them
        "ours = [m for m in ours if m not in ['patchgen_fast.triton' + x for x in light]]\n"
        "assert not [m for m in ours if m.split('.')[1] in ('bench', 'triton', 'models')], ours\n"
    )
    loaded, _ = modules_after(code)
    assert "matplotlib" not in loaded and "sklearn" not in loaded and "rich" not in loaded


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], *([c, "--help"] for c in COMMANDS)]
)
def test_help_imports_nothing_heavy(arguments):
    code = f"from patchgen_fast.cli import main\nmain({arguments!r}, standalone_mode=False)\n"
    assert modules_after(code)[0] == "[]"


def test_help_lists_every_command_with_its_line():
    done = run("--help")
    assert done.returncode == 0
    for name, (_, line) in COMMANDS.items():
        assert name in done.stdout and line.split()[0] in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_where_the_table_says(name):
    done = run(name, "--help")
    assert done.returncode == 0, done.stderr
    assert f"Usage: python -m patchgen_fast {name}" in done.stdout


def test_the_module_and_the_command_are_the_same():
    assert run("--version").stdout == f"patchgen-fast, version {patchgen_fast.__version__}\n"


@pytest.mark.parametrize("typed, near", [("inof", "info"), ("infos", "info")])
def test_an_unknown_command_names_the_near_ones(typed, near):
    done = run(typed)
    assert done.returncode == 2
    assert f"no command '{typed}'. Did you mean {near}" in done.stderr


def test_a_command_far_from_all_points_to_help():
    done = run("zzzzzz")
    assert done.returncode == 2
    assert "no command 'zzzzzz'. See patchgen-fast --help." in done.stderr


def test_an_unknown_option_is_a_usage_error():
    assert run("info", "--nonsense").returncode == 2
    assert run("info", "--format", "yaml").returncode == 2


def test_info_prints_json_alone_on_stdout():
    done = run("info", "--format", "json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["versions"]["patchgen_fast"] == patchgen_fast.__version__


def test_output_has_no_escape_codes():
    done = run("info", NO_COLOR="1")
    assert "\x1b" not in done.stdout + done.stderr


def test_a_users_mistake_has_no_traceback_and_a_defect_has():
    import click
    from click.testing import CliRunner

    from patchgen_fast.cli import LazyGroup

    group = LazyGroup("group")

    ours = {"__name__": "patchgen_fast.somewhere"}
    exec("def mistake(): raise ValueError('expected 1, got 2. Pass 1')", ours)
    commands = {
        "mistake": click.Command("mistake", callback=ours["mistake"]),
        "defect": click.Command("defect", callback=lambda: int("x")),
    }
    group.get_command = lambda ctx, name: commands.get(name)
    group.resolve_command = lambda ctx, args: (args[0], commands[args[0]], args[1:])
    result = CliRunner().invoke(group, ["mistake"])
    assert result.exit_code == 1 and result.output == "Error: expected 1, got 2. Pass 1\n"
    result = CliRunner().invoke(group, ["defect"])
    assert isinstance(result.exception, ValueError) and not result.output


# The exports ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", patchgen_fast.__all__)
def test_every_export_is_there_and_listed(name):
    assert getattr(patchgen_fast, name) is not None
    assert name in dir(patchgen_fast)


def test_no_export_hides_a_module():
    """`patchgen_fast.NAME` must be the same thing before and after `import patchgen_fast.NAME`."""
    import pkgutil

    modules = {module.name for module in pkgutil.iter_modules(patchgen_fast.__path__)}
    assert not modules & set(patchgen_fast.__all__)


def test_what_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'atention'"):
        patchgen_fast.atention  # noqa: B018
