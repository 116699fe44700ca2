"""The `patchgen-fast` command. Commands are imported when they run: `--help` imports no torch."""

from __future__ import annotations

import difflib
from importlib import import_module
from typing import Any

import click

from patchgen_fast import __version__

# name -> (where the click command is, its line in --help). The module named imports click and
# nothing heavy at its top, so that `patchgen-fast COMMAND --help` is quick too.
COMMANDS: dict[str, tuple[str, str]] = {
    "info": (
        "patchgen_fast.info:command",
        "Versions, native kernels and why not, instruction sets, caches, backends by op, GPU.",
    ),
    "plan": (
        "patchgen_fast.swap_commands:plan",
        "What swap would do to a model, layer by layer, and why not the rest.",
    ),
    "verify": (
        "patchgen_fast.swap_commands:verify",
        "Is a swapped model as right as the eager one? Both against float64.",
    ),
    "bench": (
        "patchgen_fast.bench.command:bench",
        "Parity and speed of the fast layers against eager PyTorch and other peers.",
    ),
    "compare": (
        "patchgen_fast.bench.compare_command:compare",
        "Two results of bench: has anything become slower?",
    ),
    "profile": (
        "patchgen_fast.profiling.command:profile",
        "Where a model's step goes, layer by layer: time, FLOP/s, memory, error, beside eager.",
    ),
    "report": (
        "patchgen_fast.bench.report_command:report",
        "Results of bench as one HTML page, and in other tools' formats.",
    ),
    "train": (
        "patchgen_fast.generator.train_command:command",
        "Train a generator of images, patch by patch; digits in minutes on a CPU.",
    ),
    "generate": (
        "patchgen_fast.generator.generate_command:command",
        "Draw, complete, reconstruct or vary images with a trained generator.",
    ),
    "tune": (
        "patchgen_fast.triton.tune_command:tune",
        "Search this GPU's fastest configurations of the Triton kernels; used from then on.",
    ),
}


class LazyGroup(click.Group):
    """A group whose commands are named in COMMANDS and imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(import_module(module), name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            near = difflib.get_close_matches(name, COMMANDS, n=3, cutoff=0.5)
            hint = f"Did you mean {' or '.join(near)}?" if near else "See patchgen-fast --help."
            raise click.UsageError(f"no command {name!r}. {hint}", ctx)  # exit status 2
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (TypeError, ValueError) as error:
            # Ours are written for users: expected, got, remedy. A defect shows its traceback.
            if ctx.obj == "traceback" or not _is_ours(error):
                raise
            raise click.ClickException(str(error)) from error


def _is_ours(error: BaseException) -> bool:
    """Whether the innermost frame that raised is a line of this package."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
    return bool(module.split(".")[0] == "patchgen_fast")


@click.command(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="patchgen-fast")
@click.option("--traceback", is_flag=True, help="Show the traceback of an error in the arguments.")
@click.pass_context
def main(ctx: click.Context, traceback: bool) -> None:
    """Fast layers for patch transformers.

    NO_COLOR is obeyed; PATCHGEN_FAST_CPU_ISA names the CPU instruction set to use.
    """
    ctx.obj = "traceback" if traceback else None
