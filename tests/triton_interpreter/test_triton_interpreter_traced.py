"""Every op's Triton kernels by torch.library.opcheck, in the interpreter: schema, fakes and what
torch.compile makes of them.
"""

import interpreter  # noqa: F401  (first: it repairs bfloat16, or skips this module)
import pytest
import torch
from cases.every_op import SAMPLES, Sample

# These have no Triton kernel.
WITHOUT = ("linear", "layer_norm")
TRACED = [sample.of_size(9) for sample in SAMPLES if sample.name not in WITHOUT]


@pytest.fixture
def allocations() -> None:
    """Ordinary outputs: guarded ones have a storage offset, which the fakes have not."""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("sample", TRACED, ids=str)
def test_opcheck(sample: Sample) -> None:
    torch._dynamo.reset()
    found = torch.library.opcheck(sample.op.overloads["triton"], tuple(sample.arguments()))
    assert set(found.values()) == {"SUCCESS"}, found
