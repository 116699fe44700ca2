"""Writing files: whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


class FileError(ValueError):
    """A file that cannot be written or read; says which, why, and what to do."""


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename: readers see the old or the new.

    Raises FileError where that fails; the temporary file is gone then, and the old file untouched.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        flush_to_disk(partial)
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise cannot_write(path, error) from error


def replace_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary folder beside `path`, then rename it; as `replace_file`.

    A folder that is there already gives way.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write(partial)
        for file in partial.iterdir():
            flush_to_disk(file)
        if path.exists():
            shutil.rmtree(path)
        os.replace(partial, path)
        flush_to_disk(path.parent)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise cannot_write(path, error) from error


def flush_to_disk(path: Path) -> None:
    """What was written survives a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def cannot_write(path: Path, error: OSError) -> FileError:
    """The error for people; what was there before is still there."""
    return FileError(
        f"cannot write {path}: {error.strerror or error}. Free some space, or choose a folder that "
        "you may write to; what was written before is untouched"
    )


def write_json(path: Path, document: Any) -> None:
    """An indented JSON document, atomically."""
    text = json.dumps(document, indent=2) + "\n"
    replace_file(path, lambda partial: _write_text(partial, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises FileError where it is missing or something else."""
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise FileError(f"{path} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise FileError(f"expected a JSON object in {path}, got {type(document).__name__}")
    return document
