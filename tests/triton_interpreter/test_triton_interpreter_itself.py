"""What the tests put in the place of parts of Triton's interpreter."""

from __future__ import annotations

import interpreter  # noqa: F401  (first: it sets the interpreter right, or skips this module)
import pytest
import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["a", "b"])
def _arithmetic_kernel(result, a, b, OPERATION: tl.constexpr):
    if OPERATION == "add":
        value = a + b
    elif OPERATION == "sub":
        value = a - b
    else:
        value = a * b
    tl.store(result, value)


@pytest.mark.parametrize(
    ("operation", "a", "b"), [("add", 2**31 - 1, 1), ("sub", -(2**31), 1), ("mul", 2**16, 2**15)]
)
def test_integer_overflow_is_noticed(operation, a, b):
    """By NumPy, in place of Triton's own check."""
    result = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(Exception, match=f"int32 overflow in {operation}"):
        _arithmetic_kernel[(1,)](result, a, b, OPERATION=operation)
    _arithmetic_kernel[(1,)](result, 7, 3, OPERATION=operation)
    assert result.item() == {"add": 10, "sub": 4, "mul": 21}[operation]
