"""Times candidate configurations on the user's GPU and keeps those that win: `patchgen-fast tune`.

For every question (kernel, kind of arithmetic, D, keys) of the cases asked for, each candidate is
compiled, dropped if it spills or does not fit, checked against the table's own result, and timed
with its inputs out of cache. A candidate that is at least 3 % faster than the table's row is
written to `configs.tuned_path()`, which `Table.choose` prefers as long as GPU, torch and triton are
the same.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton

from . import attention, attention_backward, configs
from .configs import Table, environment, kind_of, tuned_key, tuned_path

LEAST_GAIN = 1.03

# name, batch, heads, tokens, D
CASES = (
    ("MAE encoder", 256, 12, 50, 64),
    ("ViT-B", 128, 12, 197, 64),
    ("MAE decoder", 256, 16, 197, 32),
    ("DiT", 64, 16, 256, 72),
    ("ViT-L", 64, 16, 577, 64),
    ("SigLIP", 32, 16, 729, 72),
    ("DINOv2-g", 16, 24, 1370, 64),
)


@dataclass(frozen=True)
class Gain:
    """One question's answer: what the table takes and what won, in microseconds."""

    case: str
    key: str
    before: float
    after: float
    config: dict[str, Any]


def candidates(table: Table[Any]) -> Iterator[Any]:
    """Configurations worth a try for a table of attention kernels."""
    if table is attention.SHORT:
        for block_m, warps in ((64, 4), (128, 8), (32, 2)):
            for stages in (1, 2):
                for one_pass in (True, False):
                    yield attention.ShortConfig(block_m, warps, stages, one_pass)
        return
    config = (
        attention.StreamConfig if table is attention.STREAM else attention_backward.BackwardConfig
    )
    for block_m in (32, 64, 128):
        for block_n in (32, 64, 128):
            for warps in (4, 8):
                for stages in (1, 2, 3):
                    yield config(block_m, block_n, warps, stages)


def microseconds(run: Callable[[], Any], repeats: int = 20) -> float:
    """Median time of `run` on the GPU with a cold L2: a buffer larger than it is written before."""
    flush = torch.empty(256 * 1024 * 1024, dtype=torch.int8, device="cuda")
    times = []
    for _ in range(repeats + 3):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times[3:])


def _tables(n: int) -> tuple[Table[Any], ...]:
    forward = attention.SHORT if n <= attention.SHORT_KEYS else attention.STREAM
    if n <= attention_backward.SHORT_ROWS:
        return forward, attention_backward.SHORT_BACKWARD
    return forward, attention_backward.KV_BACKWARD, attention_backward.Q_BACKWARD


def _key(table: Table[Any], kind: str, d: int, n: int) -> str:
    from .attention_parts import covered

    short = table in (attention.SHORT, attention_backward.SHORT_BACKWARD)
    keys = covered(n, 128) if short else triton.next_power_of_2(n)
    return tuned_key(table.name, kind, covered(d), keys, False)


def tune(report: Callable[[str], None] = print, cases: tuple[Any, ...] = CASES) -> list[Gain]:
    """Searches, writes the file, and returns what was gained. Raises RuntimeError without a GPU."""
    if not torch.cuda.is_available():
        raise RuntimeError("tune: expected a CUDA device to time kernels on; found none")
    gains = []
    for name, batch, heads, n, d in cases:
        shape = (batch, n, 3, heads, d)
        qkv = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        common = (None, None, None, False, d**-0.5)
        out, lse = attention.attention(query, key, value, *common)
        grad = torch.randn_like(out)

        def forward(args=(query, key, value, *common)):
            return attention.attention(*args)[:1]

        def backward(args=(grad, None, query, key, value, out, lse, *common, False)):
            return attention_backward.attention_backward(*args)[:3]

        kind = kind_of(query.dtype, "tf32")
        for table in _tables(n):
            run = forward if table in (attention.SHORT, attention.STREAM) else backward
            gain = _best(f"{name} B{batch} N{n} D{d}", table, _key(table, kind, d, n), run)
            if gain is not None:
                report(
                    f"{gain.case}: {table.name} {gain.before:.1f} -> {gain.after:.1f} us, "
                    f"{gain.config}"
                )
                gains.append(gain)
    _write(gains)
    report(f"{len(gains)} configurations faster than the shipped ones, in {tuned_path()}")
    return gains


def _best(case: str, table: Table[Any], key: str, run: Callable[[], Any]) -> Gain | None:
    """The fastest candidate that is right, if it beats the row that stands."""
    expected = [x.float() for x in run()]
    before = microseconds(run)
    best, after = None, before / LEAST_GAIN
    for candidate in candidates(table):
        with configs.answering(table, candidate):
            try:
                got = run()
                torch.cuda.synchronize()
            except (triton.runtime.errors.OutOfResources, triton.CompilationError, ValueError):
                continue
            close = all(
                torch.allclose(a.float(), b, atol=2e-2, rtol=2e-2)
                for a, b in zip(got, expected, strict=True)
            )
            time = microseconds(run) if close else float("inf")
        if time < after:
            best, after = candidate, time
    return None if best is None else Gain(case, key, before, after, asdict(best))


def _write(gains: list[Gain]) -> None:
    document = {
        "environment": environment(),
        "configs": {gain.key: gain.config for gain in gains},
        "gains": [asdict(gain) for gain in gains],
    }
    path = tuned_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(document, indent=1))
    temporary.replace(path)
