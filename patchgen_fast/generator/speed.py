"""Images a second and MFU: the share of the machine's peak that the model's products come to.

Model FLOPs utilisation (Chowdhery et al., 2022, PaLM, arXiv:2204.02311): operations of the eager
model, training counted as three forwards, over time and peak. Recomputation, normalisation and the
optimizer count as nothing.
"""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from .model import GeneratorConfig, PatchGenerator
from .tasks import Step

# Dense peaks from NVIDIA's data sheets, FLOP/s: (name, float32 without TF32, bfloat16).
GPU_PEAKS = (("H100 PCIe", 51e12, 756e12), ("H100", 67e12, 989e12), ("H200", 67e12, 989e12),
             ("A100", 19.5e12, 312e12))  # fmt: skip


class FlopCounter:
    """Operations of training steps, counted once a shape on a model without memory."""

    def __init__(self, config: GeneratorConfig) -> None:
        self._model = PatchGenerator(config).to("meta")
        self._counted: dict[tuple, int] = {}

    def __call__(self, step: Step) -> int:
        """Floating-point operations of a step: forward and backward."""
        seen = None if step.task.seen is None else step.task.seen.shape[-1]
        key = (len(step.images), seen, step.task.given)
        if key not in self._counted:
            arguments = step.rows(slice(None), torch.device("meta"))[:5]
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                self._model(*arguments)
            self._counted[key] = 3 * counter.get_total_flops()
        return self._counted[key]


def peak_flops(device: torch.device, *, bf16: bool) -> float | None:
    """The FLOP/s that a device reaches: measured on a CPU, by data sheet on a GPU, None unknown."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, float32, bfloat16 in GPU_PEAKS:
            if all(word in name for word in known.split()):
                return bfloat16 if bf16 else float32
        return None
    from patchgen_fast import _native

    module = _native.info_module()
    if module is None:
        return None
    try:
        found = module.measure_arithmetic("bf16" if bf16 else "fp32", torch.get_num_threads(), 5)
    except ValueError:  # an unknown PATCHGEN_FAST_CPU_ISA; the swapped layers have said it
        return None
    return float(found["best"]) or None
