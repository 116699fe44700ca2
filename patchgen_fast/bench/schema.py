"""The result file: one JSON document, versioned, described by msgspec structs.

Times are in seconds, rates in units per second, memory in bytes, unless a name says otherwise.
"""

from __future__ import annotations

import msgspec

KIND = "patchgen_fast.bench"
SCHEMA_VERSION = 1

# Cell states. Only "ok" cells carry a time.
OK = "ok"
ABSENT = "absent"  # the peer is not installed, or not built for this device
REFUSED = "refused"  # it is there, and declines this case
SKIPPED = "skipped"  # left out by the settings of this run
RED = "red"  # its parity check failed: no number
ERROR = "error"  # it raised


class Parity(msgspec.Struct, kw_only=True):
    """Errors of one output or gradient against float64, and what the rule allows."""

    output: str
    ok: bool
    max_error: float
    mean_error: float
    max_allowed: float
    mean_allowed: float
    truth_max: float
    reason: str = ""


class Timing(msgspec.Struct, kw_only=True):
    """Kept samples of one contender; sample i belongs to the same round in every contender."""

    median: float
    low: float  # bootstrap interval of the median
    high: float
    best: float
    samples: list[float]
    calls_per_sample: int = 1
    first_call: float | None = None


class Ratio(msgspec.Struct, kw_only=True):
    """Paired ratios "this contender's time / ours": how many times faster ours is."""

    median: float
    low: float
    high: float


class GpuTiming(msgspec.Struct, kw_only=True):
    """The further figures of a GPU cell; `Cell.timing` holds the cold-L2 time."""

    graph_replay: float | None = None
    graph_refusal: str = ""
    host: float | None = None  # processor time per call until the launch returns


class GpuState(msgspec.Struct, kw_only=True):
    """What the GPU was doing at one moment, by NVML."""

    sm_clock_mhz: int | None = None
    memory_clock_mhz: int | None = None
    power_w: float | None = None
    temperature_c: int | None = None
    throttle: list[str] = []
    processes: int | None = None  # that compute on it, this one among them
    missing: str = ""  # why fields are empty


class Cell(msgspec.Struct, kw_only=True):
    """One contender in one case."""

    name: str
    role: str  # "eager", "peer" or "ours"
    status: str
    reason: str = ""
    backend: str = ""  # ours: the backend that ran, by dispatch's counters
    parity: list[Parity] = []
    timing: Timing | None = None
    speedup_of_ours: Ratio | None = None
    gpu: GpuTiming | None = None
    peak_memory: int | None = None  # of a call, beyond what was there; torch's allocator alone


class Cost(msgspec.Struct, kw_only=True):
    """What the case must do at least, and how long the measured machine needs for each part."""

    flops: float
    bytes: float
    exps: float = 0.0
    floors: dict[str, float] = {}  # limit -> seconds at the measured peak
    limit: str = ""  # the largest floor: "products", "memory (L2)", "exponentials" ...
    peak_flops: float | None = None
    peak_is_lower_bound: bool = False


class CaseResult(msgspec.Struct, kw_only=True):
    """One case with all its contenders."""

    id: str
    op: str
    case: str
    level: str  # "op", "layer", "block" or "model"
    shape: str
    dtype: str
    phase: str  # "forward", "backward" or "both"
    device: str
    threads: int
    status: str
    reason: str = ""
    items: int = 0  # images per call, for images a second; 0: does not apply
    cost: Cost | None = None
    cells: list[Cell] = []
    rounds: int = 0
    discarded_rounds: int = 0
    undisturbed: bool = True
    handover_s: float | None = None  # a cache line from core to core, several threads only
    gpu_before: GpuState | None = None
    gpu_after: GpuState | None = None
    seconds_spent: float = 0.0

    def cell(self, name: str) -> Cell | None:
        """The cell of this name, if there is one."""
        return next((cell for cell in self.cells if cell.name == name), None)

    @property
    def ours(self) -> Cell | None:
        return next((cell for cell in self.cells if cell.role == "ours"), None)

    @property
    def eager(self) -> Cell | None:
        return next((cell for cell in self.cells if cell.role == "eager"), None)

    @property
    def best_peer(self) -> Cell | None:
        """The fastest peer besides eager that was timed."""
        timed = [cell for cell in self.cells if cell.role == "peer" and cell.timing]
        return min(timed, key=lambda cell: cell.timing.median if cell.timing else 0.0, default=None)


class Calibration(msgspec.Struct, kw_only=True):
    """Peaks of this machine, measured in this run."""

    device: str
    threads: int
    source: str  # "native loops" or what stood in for them
    disturbed: bool = False  # other work took the cores: peaks are lower bounds
    clock: float | None = None  # cycles a second of one core
    fp32_flops: float | None = None
    bf16_flops: float | None = None
    bandwidth: dict[str, float] = {}  # "L2", "L3", "DRAM" (CPU) or "copy" (GPU) -> bytes a second
    exps: float | None = None
    cache_bytes: dict[str, int] = {}  # of one core (L2) or shared (L3)


class Environment(msgspec.Struct, kw_only=True):
    """Where and with what the run was made."""

    commit: str
    dirty: bool
    version: str
    python: str
    platform: str
    cpu: str
    cores: int
    isa: str
    native: str  # "loaded", or why not
    packages: dict[str, str]
    variables: dict[str, str]
    gpu: dict[str, str] = {}
    notes: list[str] = []


class Settings(msgspec.Struct, kw_only=True):
    """What was asked for; a resumed run must ask for the same."""

    suite: str
    filters: dict[str, list[str]] = {}
    plan: dict[str, float] = {}


class ResultFile(msgspec.Struct, kw_only=True):
    """The document."""

    kind: str = KIND
    schema_version: int = SCHEMA_VERSION
    started: str
    updated: str
    complete: bool = False
    settings: Settings
    environment: Environment
    calibrations: list[Calibration] = []
    cases: list[CaseResult] = []

    def calibration(self, device: str, threads: int) -> Calibration | None:
        """The calibration for this device and number of threads, if measured."""
        return next(
            (c for c in self.calibrations if c.device == device and c.threads == threads), None
        )

    @property
    def red(self) -> list[CaseResult]:
        """Cases whose parity check is red."""
        return [case for case in self.cases if case.status == RED]
