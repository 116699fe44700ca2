"""Checkpoints: a folder of safetensors and JSON, written whole or not at all.

    step-00001200/
        generator.json           the model's configuration, the names of the classes, the step
        model.safetensors        the averaged weights, which generate
        training.safetensors     the trained weights and the optimizer's state, to resume

A run keeps the last two of them in RUN/checkpoints. Nothing in a checkpoint is code.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models import PatchTransformerConfig
from .files import FileError, read_json, replace_folder
from .model import GeneratorConfig, PatchGenerator

KIND = "patchgen_fast.generator"
VERSION = 1
DESCRIPTION, MODEL, TRAINING = "generator.json", "model.safetensors", "training.safetensors"
KEPT = 2


@dataclass(frozen=True)
class Description:
    """What generator.json says.

    Args:
        config: the model.
        classes: names of the classes, in the order of their labels.
        step: optimizer steps done.
        settings: those of the training run, as its command line gave them.
    """

    config: GeneratorConfig
    classes: tuple[str, ...]
    step: int
    settings: dict[str, Any]


def save(
    run: Path, description: Description, model: dict[str, Tensor], training: dict[str, Tensor]
) -> Path:
    """Write RUN/checkpoints/step-N and drop the ones before the last two.

    Raises FileError where it cannot be written; the ones before are still there.
    """
    import json

    folder = run / "checkpoints"
    path = folder / f"step-{description.step:08d}"
    document = {
        "kind": KIND,
        "version": VERSION,
        "step": description.step,
        "classes": list(description.classes),
        "model": asdict(description.config),
        "settings": description.settings,
    }

    def write(partial: Path) -> None:
        (partial / DESCRIPTION).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        _write_tensors(partial / MODEL, model)
        _write_tensors(partial / TRAINING, training)

    replace_folder(path, write)
    for old in _complete(folder)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    for partial in folder.glob(".step-*.part"):  # of a process that was killed as it wrote
        shutil.rmtree(partial, ignore_errors=True)
    return path


def find(path: Path) -> Path:
    """The checkpoint that `path` is, or the last one of the run that it is.

    Raises FileError where there is none.
    """
    if (path / DESCRIPTION).is_file():
        return path
    complete = _complete(path / "checkpoints")
    if complete:
        return complete[-1]
    what = "no such folder" if not path.exists() else "a folder without one"
    raise FileError(
        f"expected a checkpoint (a folder with {DESCRIPTION}) or a run of patchgen-fast train, "
        f"got {path}: {what}"
    )


def describe(path: Path) -> Description:
    """Read generator.json of a checkpoint. Raises FileError for one that is foreign or damaged."""
    document = read_json(path / DESCRIPTION)
    if document.get("kind") != KIND or document.get("version") != VERSION:
        raise FileError(
            f"expected a checkpoint of {KIND}, version {VERSION}, in {path}, got "
            f"{document.get('kind')!r}, version {document.get('version')!r}"
        )
    try:
        fields = {name: _as_tuple(value) for name, value in document["model"].items()}
        shape = {name: _as_tuple(value) for name, value in fields.pop("transformer").items()}
        config = GeneratorConfig(PatchTransformerConfig(**shape), **fields)
        classes = tuple(str(name) for name in document["classes"])
        return Description(config, classes, int(document["step"]), dict(document["settings"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FileError(f"{path / DESCRIPTION} does not describe a generator: {error}") from error


def load_model(
    path: Path, device: torch.device | str = "cpu"
) -> tuple[PatchGenerator, Description]:
    """The averaged model of a checkpoint, in eval mode, and its description.

    Raises FileError for weights that are missing, damaged or of another model.
    """
    description = describe(path)
    model = PatchGenerator(description.config)
    restore(model, load_tensors(path / MODEL), path / MODEL)
    return model.to(device).eval(), description


def restore(model: torch.nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Load weights by name. Raises FileError where names or shapes are not the model's."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise FileError(f"{path} has the weights of another model: {error}") from error


def load_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file. Raises FileError where it is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise FileError(f"cannot read {path}: {error}") from error
    return found


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        raise OSError(str(error)) from error


def _complete(folder: Path) -> list[Path]:
    """Checkpoints of a run, oldest first; what was being written has another name."""
    return sorted(path for path in folder.glob("step-*") if (path / DESCRIPTION).is_file())


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
