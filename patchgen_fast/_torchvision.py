"""torchvision beside a torch that its native part was not built for.

The torchvision on PyPI for Linux is built for CUDA. Beside a torch without CUDA its native part
does not load, and `import torchvision` then fails, for want of two declarations alone; timm and
transformers fail with it. Models need none of the operators in there.
"""

from __future__ import annotations

import importlib.util
import sys

import torch

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_declared: list[torch.library.Library] = []


def make_importable() -> None:
    """Declare the operators whose absence stops `import torchvision`, where it would stop.

    They stay without an implementation: calling one still says that torchvision's part is missing.
    """
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None:
        return
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(operator + _SCHEMA)
        _declared.append(library)  # a library that is collected takes its operators with it
