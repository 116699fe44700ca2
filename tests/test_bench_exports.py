"""Other formats: each is read back by a reader of that format, with hostile names in the data."""

from __future__ import annotations

import csv
import io
import json
import re
from xml.etree import ElementTree

import pytest
from bench_fakes import FakeClock, case, empty_result, options, problem

from patchgen_fast.bench import exports, plot, readme, results, runner, summary, tables
from patchgen_fast.bench.problems.base import Absent

HOSTILE = 'a|b<script>"&\x07\n'
TIMES = {"eager": 4.0, "sdpa": 3.0, "ours": 2.0}


@pytest.fixture
def result(tmp_path):
    """One good case, one red, one refused, and a peer that is not installed."""

    def absent():
        raise Absent("not installed (xyz)")

    clock = FakeClock()

    def build(wanted):
        wrong = {"ours": 1.0} if wanted.name == "red" else {}
        make = {"sdpa": absent} if wanted.name == HOSTILE else {}
        return problem(clock, TIMES, wrong, make)

    writer = results.ResultWriter(tmp_path / "r.json", empty_result())
    runner.run(
        [case("good"), case("red"), case(HOSTILE), case("gpu", device="cuda")],
        writer,
        options(clock, build),
    )
    return writer.result


def test_pytest_benchmark_has_its_statistics(result):
    document = json.loads(exports.pytest_benchmark(result))
    timed = [
        b for b in document["benchmarks"] if b["group"] == "attention/good/float32/forward/cpu-one"
    ]
    assert [b["param"] for b in timed] == list(TIMES)
    found = timed[2]["stats"]
    assert found["median"] == pytest.approx(2e-3)
    assert len(found["data"]) == found["rounds"] >= 5
    assert {"min", "max", "mean", "stddev", "q1", "q3", "iqr", "ops", "outliers"} <= set(found)
    assert {"machine_info", "commit_info", "datetime", "version"} <= set(document)


def test_pytest_benchmark_itself_reads_it(result, tmp_path, monkeypatch):
    from pytest_benchmark.cli import main

    path = tmp_path / "0001_x.json"
    exports.save(result, "pytest-benchmark", path)
    table = tmp_path / "out.csv"
    arguments = ["compare", str(path), f"--csv={table}", "--columns=median,rounds"]
    monkeypatch.setattr("sys.argv", ["pytest-benchmark", *arguments])
    main()
    rows = list(csv.DictReader(table.open()))
    assert len(rows) == 5  # three contenders of the good case, two of the one that lacks a peer


def test_github_action_has_name_unit_and_value(result):
    entries = json.loads(exports.github_action(result))
    by_name = {entry["name"]: entry for entry in entries}
    assert by_name["attention/good/float32/forward/cpu-one vs eager"]["value"] == 2.0
    assert {entry["unit"] for entry in entries} == {"x"}
    assert not any("red" in name for name in by_name)


def test_junit_counts_and_escapes(result):
    suite = ElementTree.fromstring(exports.junit(result).split("?>", 1)[1])
    counts = {name: suite.get(name) for name in ("tests", "failures", "errors", "skipped")}
    assert counts == {"tests": "4", "failures": "1", "errors": "0", "skipped": "1"}
    assert suite.find("testcase/failure").get("type") == "parity"


def test_csv_has_a_line_a_cell(result):
    lines = list(csv.DictReader(io.StringIO(tables.csv_text(result))))
    assert len(lines) == 3 + 3 + 3 + 1
    assert HOSTILE in {line["case"] for line in lines}
    assert all(not line["median_s"] for line in lines if line["case"] == "red")


def test_markdown_escapes_and_names_missing_peers(result):
    page = tables.markdown(result)
    assert "<script>" not in page and "a\\|b&lt;script>" in page
    assert "sdpa, absent: not installed (xyz)" in page


def test_summary_keeps_below_the_limit(result):
    assert "1 with a red parity check" in exports.summary(result)
    assert "Geometric mean of the speed-up over eager: 2.00" in exports.summary(result)
    result.cases = result.cases * 400
    cut = exports.summary(result, limit=20_000)
    assert len(cut.encode()) < 20_000 and cut.endswith("has all cases.\n")


def test_export_specifications():
    assert exports.parse("junit=a/b.xml")[0] == "junit"
    for wrong in ("xml=a", "junit", "junit=", "=a"):
        with pytest.raises(ValueError, match="expected FORMAT=PATH"):
            exports.parse(wrong)


def test_the_plot_is_a_picture_or_nothing(result, tmp_path):
    assert plot.save(result, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    result.cases = [case for case in result.cases if case.status != "ok"]
    assert not plot.save(result, tmp_path / "b.png")
    assert not (tmp_path / "b.png").exists()


def test_the_readme_shows_the_committed_results():
    assert readme.generate() == (readme.ROOT / "README.md").read_text(), "run `make readme`"


def test_the_readme_section_is_replaced_between_its_markers(result, tmp_path):
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    (tmp_path / "README.md").write_text(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n")
    assert "old" in readme.generate(tmp_path)  # no result yet
    result.cases = result.cases[:1]
    (folder / "a.json").write_text('{"kind": "another command"}')
    results.write_atomically(folder / "m.json", results.encode(result))
    new = readme.generate(tmp_path)
    assert new.startswith("before\n") and new.endswith("\nafter\n") and "old" not in new
    assert "| attention good |" in new and "benchmarks/results/m.json" in new
    (tmp_path / "README.md").write_text(new)
    assert readme.generate(tmp_path) == new
    results.write_atomically(folder / "n.json", results.encode(result))  # another machine, later
    both = readme.generate(tmp_path)
    assert both.count("| attention good |") == 2
    assert both.index("results/n.json") < both.index("| attention good |") < both.index("m.json")
    (tmp_path / "README.md").write_text("no markers")
    with pytest.raises(ValueError, match="bench:begin"):
        readme.generate(tmp_path)


def test_the_readme_sums_up_a_whole_suite(result, tmp_path):
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    (tmp_path / "README.md").write_text(f"{readme.BEGIN}\n{readme.END}\n")
    result.cases = [case for case in result.cases if case.case in ("good", "red")]
    results.write_atomically(folder / "a-quick.json", results.encode(result))
    result.settings.suite = "cpu"
    result.settings.filters = {"shapes": ["N197 D64"], "names": ["good"], "threads": ["one"]}
    results.write_atomically(folder / "b-cpu.json", results.encode(result))
    new = readme.generate(tmp_path)
    assert new.count("| attention good |") == 1  # of the quick suite
    command = "patchgen-fast bench --suite cpu --shape 'N197 D64' --case good --threads one"
    assert f"`{command}`" in new
    assert "(benchmarks/results/b-cpu.md)" in new and "was ended before" not in new
    assert "| attention | fp32 | 1 of 2 | 2.00 | 1.50 | 0 |" in new
    assert "Where a peer is faster" not in new
    result.complete = False
    results.write_atomically(folder / "b-cpu.json", results.encode(result))
    assert "which was ended before its last" in readme.generate(tmp_path)


def test_a_summary_names_what_was_lost(tmp_path):
    clock = FakeClock()
    times = {"won": {"eager": 4.0, "sdpa": 3.0}, "even": {"eager": 4.0, "sdpa": 2.0}}
    times["lost"] = {"eager": 4.0, "sdpa": 1.0}
    writer = results.ResultWriter(tmp_path / "r.json", empty_result())
    runner.run(
        [case(name) for name in times],
        writer,
        options(clock, lambda wanted: problem(clock, times[wanted.name] | {"ours": 2.0})),
    )
    assert [case.case for case in summary.losses(writer.result)] == ["lost"]
    text = summary.markdown(writer.result)
    assert "| attention | fp32 | 3 | 2.00 (2.00–2.00) | 1.00 (0.50–1.50) | 1 |" in text
    assert re.search(r"\| attention lost \|.*\| 0\.50 \(.*\| sdpa \|", text)


def test_the_readme_refuses_a_run_without_its_peers(result, tmp_path):
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    (tmp_path / "README.md").write_text(f"{readme.BEGIN}\n{readme.END}\n")
    results.write_atomically(folder / "m.json", results.encode(result))
    with pytest.raises(ValueError, match="peers absent from the run: sdpa"):
        readme.generate(tmp_path)
