"""A headless Chromium, for tests that look at pages. Where there is none, they skip."""

from __future__ import annotations

import shutil

import pytest

NAMES = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome")


def command(*options: str) -> list[str]:
    """How to start it, with `options` after those that every test wants."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip("no Chromium here: apt install chromium")
    return [program, "--headless", "--no-sandbox", "--disable-gpu", *options]
