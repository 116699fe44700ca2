"""The HTML page: escaped, self-contained, complete; and, where a browser is, really looked at."""

from __future__ import annotations

import html.parser
import re
import subprocess
from dataclasses import replace

import browser
import pytest
from bench_fakes import FakeClock, case, empty_result, options, problem
from click.testing import CliRunner

from patchgen_fast.bench import report, results, runner, svg
from patchgen_fast.cli import main

HOSTILE = '"><script>alert(1)</script>&|'
TIMES = {"eager": 4.0, "sdpa": 3.0, "ours": 2.0}


def make_result(tmp_path, ours=2.0):
    clock = FakeClock()
    writer = results.ResultWriter(tmp_path / "r.json", empty_result())
    sized = [replace(case(f"n{n}"), dims={"B": 2, "H": 3, "N": n, "D": 64}) for n in (50, 197, 577)]
    layers = [
        replace(case("vit"), op=op, level=level)
        for op, level in (
            ("attention_layer", "layer"),
            ("feed_forward", "layer"),
            ("encoder_block", "block"),
        )
    ]
    parts = {"attention_layer": 1.0, "feed_forward": 1.5, "encoder_block": 3.0}

    def build(wanted):
        scale = parts.get(wanted.op, wanted.dims.get("N", 4) / 50)
        times = {name: t * scale for name, t in {**TIMES, "ours": ours}.items()}
        return problem(clock, times, {"ours": 1.0} if wanted.name == "red" else {})

    cases = [*sized, *layers, case("red"), case(HOSTILE), case("gpu", device="cuda")]
    runner.run(cases, writer, options(clock, build))
    writer.result.environment.cpu = HOSTILE
    writer.result.started = f"2026-01-0{1 if ours == 2.0 else 2}T00:00:00Z"
    return writer.result


class Checker(html.parser.HTMLParser):
    """Counts tags, and sees what would be fetched."""

    def __init__(self):
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.fetched += [value for name, value in attributes if name in ("src", "href", "action")]


def test_the_page_is_escaped_and_fetches_nothing(tmp_path):
    page = report.render([make_result(tmp_path)])
    assert "alert(1)" in page and "<script>alert" not in page
    checker = Checker()
    checker.feed(page)
    assert checker.tags.count("script") == 1
    assert checker.fetched == []
    assert not re.search(r"url\(|@import", page)
    assert "prefers-color-scheme: dark" in page and "width=device-width" in page


def test_every_chart_that_has_data_is_there(tmp_path):
    titles = [figure.title for figure in report.figures(make_result(tmp_path))]
    assert titles[:2] == ["Speed-up", "Roofline (CPU, 1 thread)"]
    assert "Time of a block" in titles
    ends = [title.rpartition(": ")[2] for title in titles if "Attention against N" in title]
    assert ends == ["time a head", "rate", "peak memory a head"]


def test_red_cases_are_announced_and_have_no_time(tmp_path):
    result = make_result(tmp_path)
    page = report.render([result])
    assert "1 case with a red parity check" in page
    line = next(
        row for row in (report.row(c, [result]) for c in result.cases) if row.state == "red"
    )
    assert not any(re.search(r"\d ms", value) for _, value in line.details)


def test_history_over_several_results(tmp_path):
    old, new = make_result(tmp_path), make_result(tmp_path, ours=1.0)
    page = report.render([new, old])
    assert "history" in page and page.count('class="spark"') == 7
    assert "2.00, c0ffee: 4.00" in page  # old before new, whatever the order given
    assert "history" not in report.render([old])


def test_an_empty_result_is_a_page_too():
    assert "All cases" in report.render([empty_result()])
    with pytest.raises(ValueError, match="at least one result"):
        report.render([])


def test_ticks_are_round_and_cover():
    assert svg.linear_ticks(1.76) == pytest.approx([0, 0.5, 1.0, 1.5])
    assert svg.log_ticks(40, 600) == [50, 100, 200, 500]
    assert svg.number(197e9) == "197G" and svg.number(0.5) == "0.5"


def test_the_command(tmp_path):
    path = tmp_path / "r.json"
    results.write_atomically(path, results.encode(make_result(tmp_path)))
    junit = tmp_path / "j.xml"
    done = CliRunner().invoke(main, ["report", str(path), "--export", f"junit={junit}"])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")
    assert junit.exists() and "r.html" in done.stderr
    (tmp_path / "bad.json").write_text("{")
    done = CliRunner().invoke(main, ["report", str(path), str(tmp_path / "bad.json")])
    assert done.exit_code == 2 and "not valid JSON" in done.stderr


@pytest.mark.parametrize("width", [1200, 390])
def test_a_browser_draws_it(tmp_path, width):
    page = tmp_path / "page.html"
    page.write_text(report.render([make_result(tmp_path), make_result(tmp_path, ours=1.0)]))
    # Scripts do the asking: sort by "ours ms", filter, and measure the layout.
    probe = """<script>
      const column = headings.findIndex((heading) => heading.textContent === "ours ms");
      const cell = (row) => row.cells[column].textContent.trim();
      headings[column].querySelector("button").click();
      const first = [...body.rows].map(cell).map(parseFloat).filter((x) => !isNaN(x));
      const sorted = first.every((x, i) => i === 0 || first[i - 1] <= x);
      const box = document.getElementById("filter");
      box.value = "n197"; box.dispatchEvent(new Event("input"));
      const left = [...body.rows].filter((row) => !row.hidden).length;
      const overflow = document.documentElement.scrollWidth > innerWidth;
      document.title = JSON.stringify({sorted, left, overflow, n: first.length,
        svg: [...document.querySelectorAll("figure")].every((figure) =>
          [...figure.querySelectorAll("svg")].filter(
            (s) => s.getBoundingClientRect().height > 50).length === 1)});
    </script></body>"""
    page.write_text(page.read_text().replace("</body>", probe))
    done = subprocess.run(
        browser.command(
            f"--window-size={width},1400",
            "--virtual-time-budget=2000",
            "--dump-dom",
            page.as_uri(),
        ),
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    title = re.search(r"<title>(.*?)</title>", done.stdout).group(1)
    assert title == '{"sorted":true,"left":1,"overflow":false,"n":7,"svg":true}'
