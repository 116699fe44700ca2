"""What every reference needs: the dtype of sums, and the stand-in for an absent result."""

import torch
from torch import Tensor


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are made in: float64 for float64, float32 for all else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def nothing(like: Tensor) -> Tensor:
    """The stand-in for a result that nobody asked for."""
    return like.new_empty(0)
