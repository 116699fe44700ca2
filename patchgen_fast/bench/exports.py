"""Results in the formats that other tools read: pytest-benchmark, github-action-benchmark, JUnit,
CSV, and a step summary for GitHub Actions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from patchgen_fast.bench import stats, tables
from patchgen_fast.bench.results import write_atomically
from patchgen_fast.bench.schema import ABSENT, ERROR, OK, RED, CaseResult, Cell, ResultFile

SUMMARY_BYTES = 1 << 20  # what GitHub shows of a step summary at most


def pytest_benchmark(result: ResultFile) -> str:
    """The JSON of pytest-benchmark 5: one benchmark a timed contender, grouped by case."""
    env = result.environment
    document = {
        "machine_info": {
            "node": "",
            "processor": env.cpu,
            "machine": env.platform,
            "python_version": env.python,
            "system": env.platform.split()[0],
            "cpu": {"brand_raw": env.cpu, "count": env.cores},
        },
        "commit_info": {
            "id": env.commit,
            "time": result.started,
            "dirty": env.dirty,
            "project": "patchgen_fast",
            "branch": "",
        },
        "benchmarks": [
            _benchmark(case, cell) for case in result.cases for cell in case.cells if cell.timing
        ],
        "datetime": result.started,
        "version": "5.0.0",
    }
    return json.dumps(document, indent=1) + "\n"


def _benchmark(case: CaseResult, cell: Cell) -> dict[str, Any]:
    assert cell.timing is not None
    return {
        "group": case.id,
        "name": f"{case.id}[{cell.name}]",
        "fullname": f"benchmarks::{case.id}[{cell.name}]",
        "params": {"contender": cell.name, "dtype": case.dtype, "threads": case.threads},
        "param": cell.name,
        "extra_info": {
            "shape": case.shape,
            "backend": cell.backend,
            "speedup_of_ours": cell.speedup_of_ours.median if cell.speedup_of_ours else None,
        },
        "options": {"timer": "perf_counter", "warmup": True},
        "stats": spread(cell.timing.samples, cell.timing.calls_per_sample),
    }


def spread(samples: list[float], iterations: int) -> dict[str, Any]:
    """pytest-benchmark's statistics of these samples."""
    values = np.asarray(samples, dtype=np.float64)
    q1, median, q3 = (float(q) for q in np.quantile(values, [0.25, 0.5, 0.75]))
    mean = float(values.mean())
    deviation = float(values.std(ddof=1)) if values.size > 1 else 0.0
    low, high = q1 - 1.5 * (q3 - q1), q3 + 1.5 * (q3 - q1)
    inside = values[(values >= low) & (values <= high)]
    outside = int(values.size - inside.size)
    far = int((np.abs(values - mean) > deviation).sum())
    return {
        "min": float(values.min()),
        "max": float(values.max()),
        "mean": mean,
        "stddev": deviation,
        "rounds": int(values.size),
        "median": median,
        "iqr": q3 - q1,
        "q1": q1,
        "q3": q3,
        "iqr_outliers": outside,
        "stddev_outliers": far,
        "outliers": f"{far};{outside}",
        "ld15iqr": float(inside.min()),
        "hd15iqr": float(inside.max()),
        "ops": 1.0 / mean,
        "total": float(values.sum()),
        "iterations": iterations,
        "data": [float(value) for value in values],
    }


def github_action(result: ResultFile) -> str:
    """For github-action-benchmark's `customBiggerIsBetter`: the speed-up over each peer."""
    entries = []
    for case in result.cases:
        for cell in case.cells:
            r = cell.speedup_of_ours
            if r:
                entries.append(
                    {
                        "name": f"{case.id} vs {cell.name}",
                        "unit": "x",
                        "value": round(r.median, 4),
                        "range": f"{r.low:.3f} to {r.high:.3f}",
                        "extra": f"{case.shape}; backend {case.ours.backend if case.ours else ''}",
                    }
                )
    return json.dumps(entries, indent=1) + "\n"


def junit(result: ResultFile) -> str:
    """A test case a case: red parity and exceptions fail, what could not run is skipped."""
    suite = ElementTree.Element(
        "testsuite",
        name="patchgen_fast.bench",
        tests=str(len(result.cases)),
        failures=str(len(result.red)),
        errors=str(sum(case.status == ERROR for case in result.cases)),
        skipped=str(sum(case.status not in (OK, RED, ERROR) for case in result.cases)),
        time=f"{sum(case.seconds_spent for case in result.cases):.3f}",
        timestamp=result.started.rstrip("Z"),
    )
    for case in result.cases:
        node = ElementTree.SubElement(
            suite,
            "testcase",
            classname=f"patchgen_fast.bench.{case.op}",
            name=_plain(case.id),
            time=f"{case.seconds_spent:.3f}",
        )
        if case.status == RED:
            ElementTree.SubElement(node, "failure", message=_plain(case.reason), type="parity")
        elif case.status == ERROR:
            ElementTree.SubElement(node, "error", message=_plain(case.reason), type="exception")
        elif case.status != OK:
            ElementTree.SubElement(node, "skipped", message=_plain(case.reason or case.status))
        else:
            text = ElementTree.SubElement(node, "system-out")
            cells = zip(tables.HEADINGS, tables.row(case), strict=True)
            text.text = _plain("\n".join(f"{name}: {value}" for name, value in cells))
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def _plain(text: str) -> str:
    """Without the control characters that XML has no way to write."""
    return "".join(c for c in text if c in "\n\t" or ord(c) >= 32)


def summary(result: ResultFile, limit: int = SUMMARY_BYTES) -> str:
    """Markdown for `$GITHUB_STEP_SUMMARY`: the verdict, then the tables, cut before the limit."""
    timed = [
        case.eager.speedup_of_ours.median
        for case in result.cases
        if case.status == OK and case.eager and case.eager.speedup_of_ours
    ]
    head = [f"{len(result.cases)} cases, {len(result.red)} with a red parity check."]
    if timed:
        head.append(
            f"Geometric mean of the speed-up over eager: {stats.geometric_mean(timed):.2f}."
        )
    absent = sum(cell.status == ABSENT for case in result.cases for cell in case.cells)
    if absent:
        head.append(f"{absent} cells of peers that are not installed.")
    page = tables.markdown(result).split("\n", 1)
    text = f"{page[0]}\n\n{' '.join(head)}\n{page[1]}"
    if len(text.encode()) < limit:
        return text
    note = "\n\nCut here: the result file has all cases.\n"
    kept = text.encode()[: limit - len(note.encode()) - 1].decode(errors="ignore")
    return kept[: kept.rfind("\n")] + note


FORMATS: dict[str, Callable[[ResultFile], str]] = {
    "pytest-benchmark": pytest_benchmark,
    "github-action": github_action,
    "junit": junit,
    "csv": tables.csv_text,
    "summary": summary,
    "markdown": tables.markdown,
}


def parse(specification: str) -> tuple[str, Path]:
    """`FORMAT=PATH`; ValueError names the formats."""
    name, found, path = specification.partition("=")
    if name not in FORMATS or not found or not path:
        raise ValueError(
            f"expected FORMAT=PATH with FORMAT one of {', '.join(FORMATS)}, got {specification!r}"
        )
    return name, Path(path)


def save(result: ResultFile, name: str, path: Path) -> None:
    """Write one export, whole or not at all."""
    write_atomically(path, FORMATS[name](result).encode())
