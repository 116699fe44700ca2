"""A decode step as a CUDA graph: captured once, replayed for every patch.

A decode step is some hundred small kernels; launched one by one from Python, the GPU waits for the
host. A graph launches them all at once (Gray, 2019, Getting started with CUDA graphs).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP = 3  # kernels are compiled and workspaces made before anything is captured


class GraphedStep:
    """`step(position)` of a drawing, by replaying a CUDA graph of it.

    Args:
        step: does the work of one position, int64 `[1]` on the device, and leaves its results in
            tensors of its own. It must not read a tensor on the host, must use the same shapes and
            the same buffers at every position, and give the same when run again at one position:
            the first position is run several times, to warm up.
        device: a CUDA device.

    A step that cannot be captured is run as it is from then on, with a warning that says why.
    """

    def __init__(self, step: Callable[[Tensor], object], device: torch.device) -> None:
        self._step = step
        self._position = torch.zeros(1, dtype=torch.int64, device=device)
        self._replay: Callable[[], object] | None = None

    def __call__(self, position: int) -> None:
        """Do the step at a position."""
        self._position.fill_(position)
        if self._replay is None:
            self._replay = self._captured()
        self._replay()

    def _captured(self) -> Callable[[], object]:
        try:
            return self._capture().replay
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            warnings.warn(
                f"expected a decode step that a CUDA graph can hold, got {reason!r}; drawing goes "
                "on step by step, more slowly. use_graph=False does so without trying",
                RuntimeWarning,
                stacklevel=4,
            )
            return lambda: self._step(self._position)

    def _capture(self) -> torch.cuda.CUDAGraph:
        with torch.cuda.device(self._position.device):
            beside, current = torch.cuda.Stream(), torch.cuda.current_stream()
            beside.wait_stream(current)
            with torch.cuda.stream(beside):
                for _ in range(WARM_UP):
                    self._step(self._position)
            current.wait_stream(beside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._step(self._position)
            return graph
