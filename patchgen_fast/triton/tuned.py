"""What `patchgen-fast tune` found on the user's GPU: the file, and whether it is to be believed.

A document made with another GPU, torch, triton or patchgen_fast is passed over; one that can't be
read is passed over with a warning. Importing this module imports neither torch nor triton.
"""

from __future__ import annotations

import json
import os
import warnings
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .. import __version__

# configs: a kernel's configuration by its table's question. gains: the searches' outcomes, for a
# reader. dispatch: `thresholds.Rule`s, as lists.
EMPTY: dict[str, Any] = {"configs": {}, "gains": {}, "dispatch": []}


def path() -> Path:
    """Where `patchgen-fast tune` writes; PATCHGEN_FAST_TUNED names another file."""
    named = os.environ.get("PATCHGEN_FAST_TUNED")
    if named:
        return Path(named)
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "patchgen_fast" / "tuned.json"


def environment() -> dict[str, str]:
    """What a document must have been made with to be believed."""
    import torch

    has_triton = find_spec("triton") is not None
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "triton": import_module("triton").__version__ if has_triton else "none",
        "patchgen_fast": __version__,
    }


@cache
def distrust(file: Path, reason: str) -> None:
    """Says once that the file, or a part of it, is passed over."""
    warnings.warn(
        f"{file}: expected what `patchgen-fast tune` writes; {reason}. The shipped tables serve "
        "instead: run `patchgen-fast tune` again, or delete the file",
        RuntimeWarning,
        stacklevel=2,
    )


def read() -> dict[str, Any]:
    """The document as it is on disk; an empty one where there is none to believe."""
    file = path()
    try:
        document = json.loads(file.read_text())
    except FileNotFoundError:
        return dict(EMPTY)
    except (OSError, ValueError) as error:
        distrust(file, f"got {type(error).__name__}: {error}")
        return dict(EMPTY)
    if not isinstance(document, dict) or any(
        not isinstance(document.get(name, empty), type(empty)) for name, empty in EMPTY.items()
    ):
        distrust(file, f"got JSON without an object's {', '.join(EMPTY)}")
        return dict(EMPTY)
    if document.get("environment") != environment():
        return dict(EMPTY)
    return {**EMPTY, **document}


@cache
def document() -> dict[str, Any]:
    """`read`, once a process."""
    return read()


def write(**changes: Any) -> None:
    """Puts `changes` beside what the file holds already, unless that was made elsewhere."""
    contents = {**read(), "environment": environment(), **changes}
    file = path()
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(contents, indent=1) + "\n")
    temporary.replace(file)
