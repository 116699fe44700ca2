"""Everything that needs a GPU, in one command for a machine that is lent for minutes.

    python benchmarks/gpu/run.py --out DIR --minutes 9.5

Builds the CUDA kernels for the GPU at hand, then checks, measures and profiles, the most important
first. Each step is bounded in time and starts only if enough of ``--minutes`` is left; what was
done is on disk when a step ends, so that a stop at any moment leaves what was measured. Nothing is
installed and no network is needed: torch with CUDA, triton, nvcc, ninja and pybind11 build it,
pytest, hypothesis, msgspec, rich and matplotlib test and measure it (PYTHONPATH may name a folder
with those that are missing). Clocks and power limits are read, never set.

``DIR`` then holds ``steps.json`` (what ran, for how long, how it ended), ``run.log`` (everything
that the steps printed), ``results.json`` (the measurements, as ``patchgen-fast bench`` writes
them), ``results-wgmma.json`` (the same of the wgmma kernels) and ``counters.csv`` (Nsight
Compute's). ``--rehearse`` runs the same steps on a machine without a GPU, by tiny stand-ins, so
that the script itself is tested.

Exit status: 0 if every step that ran passed, 1 if one failed, 2 for wrong usage.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import click

ROOT = Path(__file__).parent.parent.parent
PYTHON = sys.executable
OURS = ("--backend", "cuda", "--backend", "triton")
WGMMA = {"PATCHGEN_FAST_CUDA_WGMMA": "1"}  # on Hopper; elsewhere it changes nothing
CHECKED = "attention or decode or gradients or patch_embed or capture"


@dataclass(frozen=True)
class Step:
    """A command, the most seconds that it may take, and the least that are worth starting it."""

    name: str
    command: tuple[str, ...]
    seconds: float
    least: float = 20
    rehearsal: tuple[str, ...] = ()  # what stands in for it without a GPU; empty: nothing can
    needs: str | None = None  # a program that may be absent
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Outcome:
    """How a step ended: passed, failed, timeout, absent (a program), or skipped (no time)."""

    name: str
    status: str
    seconds: float = 0.0
    detail: str = ""

    @property
    def red(self) -> bool:
        return self.status in ("failed", "timeout")


def bench(out: Path, *arguments: str, results: str = "results.json") -> tuple[str, ...]:
    where = ("--json", str(out / results), "--resume", "--quiet")
    return (PYTHON, "-m", "patchgen_fast", "bench", *where, *arguments)


def steps(out: Path) -> list[Step]:
    """In the order of their worth. Measurements share one result file, each resuming the last."""
    pytest = (PYTHON, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider")
    gpu = ("--suite", "gpu", "--require-gpu", *OURS)
    wgmma = ("--suite", "gpu", "--require-gpu", "--backend", "cuda")
    of_attention = ("--op", "attention", "--dtype", "bfloat16")
    tiny = ("--suite", "quick", "--quick", "--dtype", "float32", "--phase", "forward")
    tiny = (*tiny, "--op", "attention")
    ops = sorted(str(path) for path in (ROOT / "tests").glob("test_*attention.py"))
    ops += [str(ROOT / "tests" / f"test_{name}.py") for name in ("patch_embed", "qk_norm_rope")]
    tests = str(ROOT / "tests" / "gpu")
    kernels = str(ROOT / "tests" / "gpu" / "test_cuda.py")

    def sanitizer(tool: str, seconds: float) -> Step:
        return Step(
            f"sanitize {tool}",
            ("compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *pytest, kernels)
            + ("-k", CHECKED),
            seconds,
            rehearsal=(*pytest, kernels),
            needs="compute-sanitizer",
        )

    return [
        Step(
            "build",
            (PYTHON, "setup.py", "--quiet", "build_ext", "--inplace"),
            400,
            least=120,
            rehearsal=(PYTHON, "-m", "patchgen_fast", "info"),
            needs="nvcc",
            # With lines, so that the sanitizers and the profiler name them.
            environment={"PATCHGEN_FAST_BUILD": "cuda", "NVCC_APPEND_FLAGS": "-lineinfo"},
        ),
        Step("kernels right", (*pytest, tests), 180, rehearsal=(*pytest, tests)),
        Step(
            "wgmma kernels right",
            (*pytest, kernels, "-k", "attention or gradients"),
            60,
            rehearsal=(*pytest, kernels),
            environment=WGMMA,
        ),
        Step(
            "measure attention forward",
            bench(out, *gpu, *of_attention, "--phase", "forward"),
            150,
            rehearsal=bench(out, *tiny),
        ),
        Step(
            "measure patch embed",
            bench(out, *gpu, "--op", "patch_embed", "--dtype", "bfloat16", "--phase", "forward"),
            90,
            rehearsal=bench(out, *tiny),
        ),
        sanitizer("memcheck", 120),
        sanitizer("racecheck", 120),
        Step(
            "measure attention backward",
            bench(out, *gpu, *of_attention, "--phase", "both"),
            150,
            rehearsal=bench(out, *tiny),
        ),
        Step(
            "measure attention by wgmma",
            bench(out, *wgmma, *of_attention, "--phase", "both", results="results-wgmma.json"),
            100,
            rehearsal=bench(out, *tiny),
            environment=WGMMA,
        ),
        Step(
            "operators right",
            (*pytest, "-n", "8", "-k", "cuda or triton", *ops),
            300,
            rehearsal=(*pytest, *ops, "-k", "triton or cuda", "--collect-only"),
        ),
        Step(
            "counters",
            ("ncu", "--clock-control", "none", "--set", "basic", "--csv", "--log-file")
            + (str(out / "counters.csv"), "--kernel-name", "regex:attention|patch")
            + (*pytest, kernels, "-k", CHECKED),
            120,
            rehearsal=(*pytest, kernels),
            needs="ncu",
        ),
        sanitizer("synccheck", 90),
        sanitizer("initcheck", 90),
        Step("measure everything", bench(out, *gpu), 600, least=60, rehearsal=bench(out, *tiny)),
    ]


def machine() -> dict[str, str]:
    """What a reader must know of the machine; the result file holds more."""
    facts = {"host": platform.platform(), "python": platform.python_version()}
    asked = "name,driver_version,clocks.sm,clocks.mem,power.draw,power.limit,temperature.gpu"
    for name, command in {
        "gpu": ("nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"),
        "processes": (
            "nvidia-smi",
            "--query-compute-apps=pid,used_memory",
            "--format=csv,noheader",
        ),
        "nvcc": ("nvcc", "--version"),
        "commit": ("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        "versions": (
            PYTHON,
            "-c",
            "import torch, triton; print(torch.__version__, triton.__version__)",
        ),
    }.items():
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
            facts[name] = (done.stdout or done.stderr).strip()[-400:]
        except (OSError, subprocess.TimeoutExpired) as error:
            facts[name] = f"absent: {error}"
    return facts


def run(step: Step, command: tuple[str, ...], seconds: float, log: Path) -> Outcome:
    """Run one command, its output appended to ``log``; the whole process group ends with it."""
    environment = {**os.environ, **step.environment}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    begun = time.monotonic()
    with log.open("a") as file:
        file.write(f"\n== {step.name}: {' '.join(command)}\n")
        file.flush()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:  # also on an interruption of this script
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    took = time.monotonic() - begun
    if code is None:
        return Outcome(step.name, "timeout", took, f"stopped after {seconds:.0f} s")
    return Outcome(step.name, "passed" if code == 0 else "failed", took, f"exit {code}")


def write(out: Path, facts: dict[str, str], outcomes: list[Outcome]) -> None:
    """Through a temporary name, so that a reader never meets half a file."""
    text = json.dumps({"machine": facts, "steps": [asdict(o) for o in outcomes]}, indent=1)
    part = out / "steps.json.part"
    part.write_text(text + "\n")
    part.replace(out / "steps.json")


def go_through(
    chosen: list[Step], minutes: float, rehearse: bool, log: Path, done: Callable[[Outcome], None]
) -> None:
    """Run the steps while time is left, and hand over each outcome as it comes."""
    end = time.monotonic() + 60 * minutes
    for step in chosen:
        left = end - time.monotonic()
        command = step.rehearsal if rehearse else step.command
        if left < (1 if rehearse else step.least):
            done(Outcome(step.name, "skipped", detail=f"{max(left, 0):.0f} s were left"))
        elif not rehearse and step.needs and not shutil.which(step.needs):
            done(Outcome(step.name, "absent", detail=f"no {step.needs} on PATH"))
        else:
            click.echo(f"{step.name} ...", err=True)
            outcome = run(step, command, min(left, step.seconds), log)
            # With no GPU a whole file of tests is skipped: nothing collected, status 5.
            if rehearse and outcome.detail == "exit 5":
                outcome = Outcome(step.name, "passed", outcome.seconds, "no GPU: tests skipped")
            done(outcome)


@click.command(context_settings={"help_option_names": ["-h", "--help"]}, help=__doc__)
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder of the results."
)
@click.option("--minutes", type=click.FloatRange(min=0), default=9.5, show_default=True)
@click.option("--step", "names", multiple=True, help="Only this step; repeatable.")
@click.option("--rehearse", is_flag=True, help="Stand-ins for a machine without a GPU.")
@click.option("--list", "listing", is_flag=True, help="Show the steps and do nothing.")
def main(out: Path, minutes: float, names: tuple[str, ...], rehearse: bool, listing: bool) -> None:
    known = steps(out.absolute())
    unknown = set(names) - {step.name for step in known}
    if unknown:
        raise click.UsageError(
            f"expected --step to be one of {', '.join(s.name for s in known)}; "
            f"got {', '.join(sorted(unknown))}"
        )
    chosen = [step for step in known if not names or step.name in names]
    if listing:
        for step in chosen:
            click.echo(f"{step.name:28s} at most {step.seconds:4.0f} s  {' '.join(step.command)}")
        return
    # The end of a lease is a SIGTERM: end the running step too, rather than leave it behind.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    out.mkdir(parents=True, exist_ok=True)
    facts, outcomes = machine(), []
    write(out, facts, outcomes)

    def done(outcome: Outcome) -> None:
        outcomes.append(outcome)
        write(out, facts, outcomes)

    go_through(chosen, minutes, rehearse, out / "run.log", done)
    for outcome in outcomes:
        click.echo(
            f"{outcome.name:28s} {outcome.status:8s} {outcome.seconds:6.1f} s  {outcome.detail}"
        )
    click.echo(f"written: {out}")
    sys.exit(1 if any(outcome.red for outcome in outcomes) else 0)


if __name__ == "__main__":
    main()
