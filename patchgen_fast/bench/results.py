"""Reading and writing result files: whole or not at all, and never over what cannot be read."""

from __future__ import annotations

import contextlib
import os
import tempfile
from datetime import datetime, timezone
from pathlib import Path

import msgspec

from patchgen_fast.bench.schema import KIND, SCHEMA_VERSION, CaseResult, ResultFile, Settings


class ResultError(Exception):
    """A result file that is missing, corrupt, foreign or of another schema."""


class _Header(msgspec.Struct):
    kind: str = ""
    schema_version: int = 0


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def write_atomically(path: Path, data: bytes) -> None:
    """Write to a temporary name beside `path`, then rename: a reader sees the old or the new."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    except OSError as error:
        raise ResultError(
            f"cannot write {path}: {error.strerror or error}; choose a folder you may write to"
        ) from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise ResultError(f"cannot write {path}: {error.strerror or error}") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def encode(result: ResultFile) -> bytes:
    """The document as indented JSON."""
    return msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n"


def is_ours(path: Path) -> bool:
    """Whether a file is bench's by its kind; one that can't be read may be, and `read` says why."""
    try:
        return msgspec.json.decode(Path(path).read_bytes(), type=_Header).kind in (KIND, "")
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return True


def read(path: Path) -> ResultFile:
    """Read a result file; ResultError says what is wrong with it and what to do."""
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ResultError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        header = msgspec.json.decode(data, type=_Header)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ResultError(
            f"{path} is not valid JSON ({error}); it may be cut off: measure again"
        ) from error
    if header.kind != KIND:
        raise ResultError(
            f"{path}: expected a result of `patchgen-fast bench` (kind {KIND!r}), "
            f"got kind {header.kind!r}"
        )
    if header.schema_version != SCHEMA_VERSION:
        age = "an older" if header.schema_version < SCHEMA_VERSION else "a newer"
        raise ResultError(
            f"{path}: expected schema version {SCHEMA_VERSION}, got {header.schema_version}, "
            f"written by {age} patchgen_fast; measure again with this version"
        )
    try:
        return msgspec.json.decode(data, type=ResultFile)
    except msgspec.MsgspecError as error:
        raise ResultError(f"{path} does not fit the schema: {error}") from error


class ResultWriter:
    """Keeps a result on disk as it grows: after each case the file is whole."""

    def __init__(self, path: Path, result: ResultFile) -> None:
        self.path = Path(path)
        self.result = result
        self.save()

    def save(self) -> None:
        self.result.updated = now()
        write_atomically(self.path, encode(self.result))

    def add(self, case: CaseResult) -> None:
        """Record a case, in place of an earlier one of the same id."""
        self.result.cases = [old for old in self.result.cases if old.id != case.id] + [case]
        self.save()

    def finish(self) -> None:
        self.result.complete = True
        self.save()


def resumable(path: Path, settings: Settings, commit: str) -> ResultFile:
    """The earlier result to go on with; ResultError if its numbers do not belong to this run."""
    earlier = read(path)
    if earlier.environment.commit != commit:
        raise ResultError(
            f"{path} was measured at commit {earlier.environment.commit or 'unknown'}, this is "
            f"{commit or 'unknown'}; their numbers do not belong in one file: drop --resume"
        )
    if earlier.settings.plan != settings.plan:
        raise ResultError(f"{path} was measured with other timing settings: drop --resume")
    earlier.settings = settings
    earlier.complete = False
    return earlier


def refuse_foreign(path: Path) -> None:
    """ResultError if something lies at `path` that is not a result of ours: never overwrite it."""
    if not Path(path).exists():
        return
    try:
        read(path)
    except ResultError as error:
        raise ResultError(
            f"not overwriting what cannot be read as an earlier result: {error}; "
            "move it away or choose another --json"
        ) from error
