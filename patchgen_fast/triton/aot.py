"""Compiles recorded launches to machine code where there is no GPU, and reads what came out.

`compile_launch` gives a launch the specialisation that a GPU of the named compute capability would
give it; Triton brings ptxas, nvdisasm and cuobjdump. Tests gate on the result, and `make
gpu-code-report` tabulates it.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from .launch import Launch

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# NVIDIA's CUDA C++ Programming Guide, "Technical specifications per compute capability": warps and
# blocks a multiprocessor, bytes of shared memory a multiprocessor and a block.
LIMITS = {
    80: (64, 32, 167936, 166912),
    86: (48, 16, 102400, 101376),
    89: (48, 24, 102400, 101376),
    90: (64, 32, 233472, 232448),
    100: (64, 32, 233472, 232448),
    103: (64, 32, 233472, 232448),
    120: (48, 24, 102400, 101376),
}
MATRIX_INSTRUCTION = {90: "HGMMA", 100: "UTCHMMA", 103: "UTCHMMA"}  # elsewhere HMMA
MATRIX_PTX = {"mma.sync": "HMMA", "wgmma.mma_async": "HGMMA", "tcgen05.mma": "UTCHMMA"}

_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P[T\d]+\s+)?([A-Z][A-Za-z0-9_.]*)(.*)")
_LABEL = re.compile(r"^\.?(L_x_\d+):")
_TARGET = re.compile(r"`\(\.?(L_x_\d+)\)")


class _CompileOnlyDriver:
    """As much of Triton's driver as compiling asks for."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # Triton's caches are per device: one for each capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, name: str) -> str:
        return name


@dataclass(frozen=True)
class Binary:
    """A compiled kernel: resources a thread and a block, PTX and machine code."""

    capability: int
    name: str
    warps: int
    registers: int
    stack: int
    local: int
    shared: int
    ptx: str
    cubin: bytes

    @cached_property
    def sass(self) -> str:
        """The disassembly, made when it is first asked for: it takes a third of compiling."""
        return _tool("nvdisasm", "-c", self.cubin)

    @property
    def spills(self) -> bool:
        return self.stack > 0 or self.local > 0

    @property
    def fits(self) -> bool:
        return self.shared <= LIMITS[self.capability][3]

    @property
    def scalar_loads(self) -> int:
        """Global loads of 16 bits: where there are any, the compiler lost the alignment."""
        return len(re.findall(r"ld\.global\S*\.[bu]16\b", self.ptx))

    @property
    def matrix_instruction(self) -> str:
        return MATRIX_INSTRUCTION.get(self.capability, "HMMA")

    @property
    def matrix_instructions(self) -> set[str]:
        """Those of the machine code, by the PTX that ptxas makes each of them of."""
        return {sass for ptx, sass in MATRIX_PTX.items() if ptx in self.ptx}

    @property
    def blocks(self) -> int:
        """Blocks that a multiprocessor holds at once (the CUDA occupancy calculator's formula)."""
        warps, blocks, shared, _ = LIMITS[self.capability]
        a_warp = -(-self.registers * 32 // 256) * 256
        by_registers = 16384 // a_warp * 4 // self.warps
        by_shared = shared // (-(-(self.shared + 1024) // 128) * 128)
        return min(blocks, warps // self.warps, by_registers, by_shared)

    @cached_property
    def instructions(self) -> Counter[str]:
        """How often each opcode stands in the whole kernel; "all" is their sum."""
        return _count(_parse(self.sass)[0])

    @cached_property
    def loops(self) -> list[Counter[str]]:
        """Opcode counts of each natural loop, inner ones counted in outer ones too."""
        instructions, labels = _parse(self.sass)
        return [
            _count([instructions[i] for i in sorted(body)])
            for body in _natural_loops(instructions, labels)
        ]

    def innermost(self) -> list[Counter[str]]:
        """Loops that hold products and hold no smaller loop that does, smallest first."""
        instructions, labels = _parse(self.sass)
        bodies = [
            body
            for body in _natural_loops(instructions, labels)
            if any(self.matrix_instruction in instructions[i].opcode for i in body)
            or (
                self.capability in MATRIX_INSTRUCTION
                and any(instructions[i].opcode.startswith("HMMA") for i in body)
            )
        ]
        inner = [a for a in bodies if not any(b < a for b in bodies)]
        counted = [_count([instructions[i] for i in sorted(body)]) for body in inner]
        return sorted(counted, key=lambda counter: counter["all"])


@dataclass(frozen=True)
class _Instruction:
    predicate: str
    opcode: str
    operands: str


_compiled: dict[tuple, Binary] = {}


def compile_launch(item: Launch, capability: int) -> Binary:
    """Compiles a launch that `launch.recording(capability)` kept, once a process."""
    key = specialisation(item, capability)
    if key not in _compiled:
        _compiled[key] = _compile(item, capability)
    return _compiled[key]


def specialisation(item: Launch, capability: int) -> tuple:
    """What Triton would compile for this launch: equal for launches that share a binary."""
    with _compiling_for(capability):
        *_, binder = item.kernel.device_caches[capability]
        _, arguments, options = binder(*item.args, **item.options)
    return capability, item.kernel, tuple(arguments), str(options)


@contextmanager
def _compiling_for(capability: int) -> Iterator[None]:
    driver = triton.runtime.driver
    before = driver._active
    driver.set_active(_CompileOnlyDriver(capability))
    try:
        yield
    finally:
        driver._active = before


def _compile(item: Launch, capability: int) -> Binary:
    with _compiling_for(capability):
        compiled: Any = item.kernel.warmup(*item.args, grid=item.grid, **item.options)
    cubin = compiled.asm["cubin"]
    usage = dict(
        re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", _tool("cuobjdump", "-res-usage", cubin))
    )
    return Binary(
        capability=capability,
        name=compiled.metadata.name,
        warps=compiled.metadata.num_warps,
        registers=int(usage["REG"]),
        stack=int(usage["STACK"]),
        local=int(usage["LOCAL"]),
        shared=compiled.metadata.shared,
        ptx=compiled.asm["ptx"],
        cubin=cubin,
    )


def _tool(name: str, option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [str(TOOLS / name), option, file.name], capture_output=True, text=True, check=True
        )
    return done.stdout + done.stderr


def _parse(sass: str) -> tuple[list[_Instruction], dict[str, int]]:
    instructions: list[_Instruction] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := _LABEL.match(line.strip()):
            labels[label[1]] = len(instructions)
        if found := _INSTRUCTION.search(line):
            instructions.append(_Instruction((found[1] or "").strip(), found[2], found[3]))
    return instructions, labels


def _count(instructions: list[_Instruction]) -> Counter[str]:
    counter: Counter[str] = Counter(item.opcode.split(".")[0] for item in instructions)
    counter["all"] = len(instructions)
    for item in instructions:
        opcode = item.opcode
        if opcode.startswith(("HMMA", "HGMMA")):
            counter["flop"] += _matrix_flop(opcode)
    return counter


def _matrix_flop(opcode: str) -> int:
    """HMMA.16816.F32 is 16 x 8 x 16, HMMA.1688 16 x 8 x 8; HGMMA.64x208x16 says it plainly."""
    if shape := re.search(r"(\d+)x(\d+)x(\d+)", opcode):
        m, n, k = map(int, shape.groups())
    else:
        m, n, k = 16, 8, 16 if "16816" in opcode else 8
    return 2 * m * n * k


def _natural_loops(
    instructions: list[_Instruction], labels: dict[str, int]
) -> list[frozenset[int]]:
    """Instruction indices of each natural loop, by dominators over basic blocks.

    ptxas puts cold blocks at the end of a function, so a backward branch alone says nothing.
    """
    count = len(instructions)
    successors: list[list[int]] = []
    for i, item in enumerate(instructions):
        opcode = item.opcode.split(".")[0]
        target = _TARGET.search(item.operands)
        following = [labels[target[1]]] if opcode == "BRA" and target else []
        conditional = item.predicate not in ("", "@PT") or "P" in item.operands.split("`")[0]
        if not (opcode in ("BRA", "EXIT", "RET", "BRX") and not conditional) and i + 1 < count:
            following.append(i + 1)
        successors.append([j for j in following if j < count])
    leaders = {0} | {j for i in range(count) for j in successors[i] if successors[i] != [i + 1]}
    leaders |= {i + 1 for i in range(count - 1) if successors[i] != [i + 1]}
    starts = sorted(leaders)
    block_of = {}
    for b, start in enumerate(starts):
        for i in range(start, starts[b + 1] if b + 1 < len(starts) else count):
            block_of[i] = b
    ends = [*(start - 1 for start in starts[1:]), count - 1]
    after = [sorted({block_of[j] for j in successors[end]}) for end in ends]
    before: list[list[int]] = [[] for _ in starts]
    for b, following in enumerate(after):
        for other in following:
            before[other].append(b)
    reached, waiting = set(), [0]
    while waiting:
        b = waiting.pop()
        if b not in reached:
            reached.add(b)
            waiting += after[b]
    dominators = {b: set(reached) for b in reached}
    dominators[0] = {0}
    changed = True
    while changed:
        changed = False
        for b in sorted(reached - {0}):
            above = [dominators[p] for p in before[b] if p in reached]
            mine = {b} | (set.intersection(*above) if above else set())
            if mine != dominators[b]:
                dominators[b], changed = mine, True
    loops: dict[int, set[int]] = {}
    for b in reached:
        for head in after[b]:
            if head not in dominators[b]:
                continue
            body, waiting = loops.setdefault(head, {head}), [b]
            while waiting:
                x = waiting.pop()
                if x not in body:
                    body.add(x)
                    waiting += [p for p in before[x] if p in reached]
    return [frozenset(i for i in range(count) if block_of[i] in body) for body in loops.values()]
