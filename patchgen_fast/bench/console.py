"""What the commands share: exit codes, messages, reading, and the extra that they need."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

if TYPE_CHECKING:
    from patchgen_fast.bench.schema import ResultFile

REGRESSION, USAGE, PARITY, NO_GPU, INTERRUPTED = 1, 2, 3, 4, 130
EXTRA = "patchgen-fast[bench]"


def say(text: str) -> None:
    """A message for people: on stderr, so that stdout stays the result."""
    click.echo(text, err=True)


def stop(code: int, text: str) -> NoReturn:
    """End with an error message and this status."""
    say(f"Error: {text}")
    sys.exit(code)


def require_writable(*paths: Path | None) -> None:
    """A usage error for a path that can't be written: before minutes of measuring, not after."""
    for path in paths:
        if path is None:
            continue
        folder = path.absolute().parent
        while not folder.exists():
            folder = folder.parent
        if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
            raise click.UsageError(f"cannot write {path}; choose a place you may write to")


def require_packages() -> None:
    """A usage error where the extra is missing."""
    try:
        import msgspec  # noqa: F401
    except ImportError:
        raise click.UsageError(f"bench needs msgspec and rich: pip install '{EXTRA}'") from None


def read(path: Path) -> ResultFile:
    """A result file; ResultError as `results.read`."""
    from patchgen_fast.bench import results

    return results.read(path)


def wanted_exports(specifications: tuple[str, ...]) -> list[tuple[str, Path]]:
    """`FORMAT=PATH` texts as pairs; a usage error for a wrong one."""
    from patchgen_fast.bench import exports

    try:
        return [exports.parse(specification) for specification in specifications]
    except ValueError as error:
        raise click.UsageError(f"--export: {error}") from error
