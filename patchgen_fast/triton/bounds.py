"""Lower bounds of an attention forward's time from its machine code: static, nothing is timed.

Four limits, each as if it were alone: bytes that must move, products with their padding,
exponentials with theirs, and instructions to issue. A kernel is never faster than the largest; how
near it comes is for a GPU to say.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from .aot import Binary
from .attention_parts import covered
from .launch import Launch


class Chip(NamedTuple):
    """Rates of one GPU: what a kernel's bounds are divided by."""

    name: str
    multiprocessors: int
    clock: float
    bytes_per_second: float
    flop_per_second: float

    @property
    def exponentials_per_second(self) -> float:
        return 16 * self.multiprocessors * self.clock

    @property
    def warp_instructions_per_second(self) -> float:
        return 4 * self.multiprocessors * self.clock


# Copy and product rates as measured elsewhere on an H200, not here; the clock is that at which its
# exponentials come to 3.86 T/s.
H200 = Chip("H200", 132, 1.83e9, 4.3e12, 790e12)


@dataclass(frozen=True)
class Bounds:
    """Microseconds."""

    memory: float
    products: float
    exponentials: float
    issue: float

    @property
    def largest(self) -> float:
        return max(self.memory, self.products, self.exponentials, self.issue)

    @property
    def limit(self) -> str:
        return max(("memory", "products", "exponentials", "issue"), key=lambda n: getattr(self, n))


def tile_instructions(binary: Binary, item: Launch, keys: int) -> float:
    """Instructions of one warp of four for a 64 x 64 tile of scores, in the main loop."""
    loop = binary.innermost()[0]["all"]
    return loop * binary.warps / 4 / (item.options["BLOCK_M"] * keys / 4096)


def keys_a_loop(item: Launch) -> int:
    """How many keys, padding included, one pass of the main loop takes."""
    if "KEY_CHUNKS" in item.options:
        return sum(width for _, width in item.options["KEY_CHUNKS"])
    return item.options["BLOCK_N"]


def forward_bounds(
    binary: Binary, item: Launch, batches: int, heads: int, nq: int, nk: int, d: int,
    chip: Chip = H200,
) -> Bounds:  # fmt: skip
    """Bounds of a 16-bit, unmasked forward of these sizes that `item` launches."""
    block_m, programs = item.options["BLOCK_M"], item.grid[0]
    row_tiles = -(-nq // block_m)
    whole, loops = binary.instructions["all"], binary.innermost()
    if "KEY_CHUNKS" in item.options:
        keys = keys_a_loop(item)
        passes = row_tiles * batches * heads / programs
        a_program = whole + loops[0]["all"] * (passes - 1)
    else:
        block_n = item.options["BLOCK_N"]
        keys = -(-nk // block_n) * block_n
        main, tail = loops[0]["all"], loops[-1]["all"]
        full, rest = nk // block_n, int(nk % block_n > 0)
        a_program = whole - main - tail + main * full + tail * rest
    scores = batches * heads * row_tiles * block_m * keys
    moved = 2 * batches * heads * d * (2 * nq + 2 * nk) + 4 * batches * heads * nq
    return Bounds(
        memory=moved / chip.bytes_per_second * 1e6,
        products=4 * scores * covered(d) / chip.flop_per_second * 1e6,
        exponentials=scores / chip.exponentials_per_second * 1e6,
        issue=a_program * binary.warps * programs / chip.warp_instructions_per_second * 1e6,
    )


def decode_bounds(
    binary: Binary, item: Launch, batches: int, heads: int, kv_heads: int, nq: int, nk: int, d: int,
    chip: Chip = H200,
) -> Bounds:  # fmt: skip
    """Bounds of a 16-bit, unmasked decoding step whose keys `item` passes once."""
    block_n, programs = item.options["BLOCK_N"], item.grid[0]
    shares = programs // (batches * kv_heads)
    blocks = -(-nk // (shares * block_n))
    loop = binary.innermost()[0]["all"]
    a_program = binary.instructions["all"] + loop * (blocks - 1)
    scores = programs * item.options["ROWS"] * blocks * block_n
    moved = 4 * d * batches * (kv_heads * nk + heads * nq) + 4 * batches * heads * nq
    return Bounds(
        memory=moved / chip.bytes_per_second * 1e6,
        products=4 * scores * covered(d) / chip.flop_per_second * 1e6,
        exponentials=scores / chip.exponentials_per_second * 1e6,
        issue=a_program * binary.warps * programs / chip.warp_instructions_per_second * 1e6,
    )
