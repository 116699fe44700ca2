"""Every shipped configuration, compiled for every chip: no spill, fitting memory, the matrix
instruction meant for the chip, wide loads, and room for a block on a multiprocessor.
"""

from __future__ import annotations

import pytest
from launches import BF16, attend, matrix, recorded

from patchgen_fast.triton import attention
from patchgen_fast.triton.aot import MATRIX_PTX, Binary, compile_launch
from patchgen_fast.triton.bounds import forward_bounds, keys_a_loop, tile_instructions
from patchgen_fast.triton.launch import Launch, recording

# Where the machine code is read to see that the instructions are those which the PTX promises.
DISASSEMBLED = ("short n197", "stream d72 causal", "backward short n197")
# Kernels without a product.
NO_PRODUCT = ("combine", "batch_sum", "sum_shares", "channel_sum", "norm", "rope")


def matrix_instruction(source: str, item: Launch, binary: Binary) -> str | None:
    """Which instruction the kernel must contain; None, with the reason, where none is meant."""
    if any(word in binary.name for word in NO_PRODUCT):
        return None
    if item.options.get("PHASES") == "delta":
        return None  # row sums; a product only to mend a log-sum-exp near finfo.min
    if "tf32" in source:
        return "MMA"
    if "f32" in source:
        return None  # IEEE float32 products run on the plain cores
    if "decode" in binary.name or "d256" in source or binary.warps % 4:
        return "MMA"  # tiles of 16 or 32 rows, too few for wgmma: at D 256 wider ones spill
    return binary.matrix_instruction


def spills_are_meant(source: str) -> bool:
    """D above 128 with masks or in float32: tiles of 16 rows are the smallest there are."""
    return "d256" in source and ("bias" in source or "f32" in source)


def scalar_loads_are_meant(source: str, binary: Binary) -> bool:
    """Patches of 14 or 2 pixels; pairs of neighbours taken apart; a mask's short last block."""
    return any(word in source for word in ("p14", "p2", "pairs", "bias"))


@pytest.mark.parametrize(
    ("source", "capability"),
    [pytest.param(source, cc, id=f"sm_{cc}-{source}") for source, cc in matrix()],
)
def test_compiles_to_what_was_meant(source: str, capability: int) -> None:
    launches = recorded(source, capability)
    assert launches
    for item in launches:
        binary = compile_launch(item, capability)
        what = f"{binary.name} {item.options}: {binary.registers} registers"
        if not spills_are_meant(source):
            assert not binary.spills, f"{what}, stack {binary.stack}"
        assert binary.fits, f"{what}, {binary.shared} bytes of shared memory"
        assert binary.blocks >= 1, what
        found, wanted = binary.matrix_instructions, matrix_instruction(source, item, binary)
        assert wanted is None or any(wanted in name for name in found), f"{what}: no {wanted}"
        if source in DISASSEMBLED:
            assert found == {name for name in MATRIX_PTX.values() if binary.instructions[name]}
        if not scalar_loads_are_meant(source, binary):
            assert binary.scalar_loads == 0, f"{what}: {binary.scalar_loads} scalar loads"


def forward_on_hopper(d: int, n: int, batch: int, heads: int) -> tuple[Binary, Launch]:
    with recording(90) as launches:
        attention.attention(*attend(d, n, batch=batch, h=heads, dtype=BF16))
    (item,) = launches
    return compile_launch(item, 90), item


def test_short_kernel_is_bound_by_memory_not_by_issue() -> None:
    """ViT-B, batch 128, 197 tokens, on an H200's rates."""
    binary, item = forward_on_hopper(64, 197, 128, 12)
    assert tile_instructions(binary, item, keys_a_loop(item)) <= 305
    bounds = forward_bounds(binary, item, 128, 12, 197, 197, 64)
    assert bounds.issue <= 1.1 * bounds.memory


@pytest.mark.parametrize(("n", "batch"), [(197, 64), (729, 32)])
def test_d72_costs_what_its_columns_cost(n: int, batch: int) -> None:
    """Instructions a useful product at D 72 at most a fifth above those at D 64."""
    each = {}
    for d in (64, 72):
        binary, item = forward_on_hopper(d, n, batch, 16)
        each[d] = tile_instructions(binary, item, keys_a_loop(item)) / d
    assert each[72] <= 1.2 * each[64]
