"""What a training run is told: its settings, as they stand in its checkpoints."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Settings:
    """Everything but the model's shape that decides what a run computes.

    Args:
        data: see `data.open_data`.
        steps: optimizer steps in all.
        batch: images a step, over all devices and all parts of an accumulated step.
        accumulate: parts that a step is computed in.
        lr: the learning rate after `warmup` steps; a cosine brings it to 0 at the last step.
        weight_decay, clip: AdamW's, and the largest norm of the gradient (0: any).
        ema: decay of the averaged weights; it ramps up, so that early weights are forgotten.
        label_dropout: share of labels that is not told, for classifier-free guidance.
        augment: see `augment.augment`.
        bf16: run matrix products in bfloat16 (torch.autocast).
        seed: of the weights, the order of images, and all noise.
        strict: an unreadable image is an error.
        evaluate_every, save_every: steps between evaluations and checkpoints.
    """

    data: str = "digits"
    steps: int = 1500
    batch: int = 128
    accumulate: int = 1
    lr: float = 2e-3
    warmup: int = 100
    weight_decay: float = 0.05
    clip: float = 1.0
    ema: float = 0.995
    label_dropout: float = 0.1
    augment: str = "affine"
    bf16: bool = False
    seed: int = 0
    strict: bool = False
    evaluate_every: int = 250
    save_every: int = 250

    def __post_init__(self) -> None:
        least = {
            "steps": 1, "batch": 1, "accumulate": 1, "lr": 0, "warmup": 0, "weight_decay": 0,
            "clip": 0, "ema": 0, "label_dropout": 0, "seed": 0,
            "evaluate_every": 1, "save_every": 1,
        }  # fmt: skip
        for name, lowest in least.items():
            value = getattr(self, name)
            if not value >= lowest or math.isinf(value):
                raise ValueError(f"expected {name} of at least {lowest}, got {value}")
        for name in ("ema", "label_dropout"):
            if getattr(self, name) > 1:
                raise ValueError(f"expected {name} of at most 1, got {getattr(self, name)}")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def lr_at(self, step: int) -> float:
        """The learning rate of step `step`, counted from 0 (Loshchilov and Hutter, 2017)."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        share = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (1 + math.cos(math.pi * share)) / 2
