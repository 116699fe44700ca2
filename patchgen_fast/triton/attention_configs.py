"""Configurations of the attention kernels, as data; how a table is read stands in configs.py."""

from __future__ import annotations

from dataclasses import dataclass

from .configs import BLACKWELL, DATACENTER, FLOAT32, HOPPER, IEEE, TF32, Row, Table


@dataclass(frozen=True)
class ShortConfig:
    """Query rows a tile, warps, loop stages; one_pass: all scores at once, or chunk by chunk."""

    block_m: int
    warps: int
    stages: int
    one_pass: bool


@dataclass(frozen=True)
class StreamConfig:
    """Query rows and keys a tile, warps, loads in flight."""

    block_m: int
    block_n: int
    warps: int
    stages: int


# d and n are D and the number of keys as their chunks cover them. None hands over to streaming.
SHORT: Table[ShortConfig | None] = Table(
    "attention_short",
    Row(None, "float32 keeps twice the bytes on chip: static, spills", kinds=FLOAT32),
    Row(
        ShortConfig(64, 4, 1, False),
        "static: tcgen05 reads each chunk's scores from tensor memory; at once takes 1.2 times the"
        " instructions",
        chips=BLACKWELL,
        d=80,
    ),
    Row(
        ShortConfig(64, 4, 1, True),
        "static: 128 keys, no spill at any D to 128",
        d=128,
        n=128,
    ),
    Row(
        ShortConfig(64, 4, 1, True),
        "static: scores of 208 keys at once, 193 registers at D 64 and 207 at D 72, two blocks",
        chips=HOPPER,
        d=80,
        n=208,
    ),
    Row(
        ShortConfig(64, 4, 1, False),
        "static: 199 registers; all scores of 256 keys at once take 255",
        chips=HOPPER,
        d=64,
    ),
    Row(ShortConfig(64, 4, 1, True), "static: 208 registers, no spill", d=64, n=208),
    Row(
        ShortConfig(64, 4, 1, False),
        "static: at once it spills at D 72 (sm_80); chunk by chunk it takes 197 registers",
        d=80,
        n=208,
    ),
    Row(None, "more would spill, or leaves one block a multiprocessor"),
)
STREAM: Table[StreamConfig] = Table(
    "attention",
    Row(StreamConfig(16, 32, 4, 1), "IEEE: 32 rows spill at D 64 (static)", kinds=(IEEE,), d=128),
    Row(StreamConfig(16, 16, 4, 1), "IEEE, wide heads: fewer registers", kinds=(IEEE,)),
    Row(
        StreamConfig(32, 32, 4, 2),
        "TF32: static, 64 rows spill at D 128",
        chips=(120,),
        kinds=(TF32,),
        d=128,
    ),
    Row(
        StreamConfig(64, 32, 4, 1),
        "TF32: static, loads in flight or 32 rows spill at D 128 on sm_80",
        kinds=(TF32,),
        d=128,
    ),
    Row(StreamConfig(32, 32, 4, 1), "TF32, wide heads: fits 99 KiB", kinds=(TF32,)),
    Row(
        StreamConfig(64, 64, 4, 2),
        "static: four blocks a multiprocessor; short keys waste least in narrow blocks",
        chips=(90, *BLACKWELL),
        d=64,
        n=256,
        masked=False,
    ),
    Row(
        StreamConfig(128, 128, 8, 2),
        "static: 228 instructions a 64 x 64 tile at D 64 and 256 at D 72, no spill",
        chips=HOPPER,
        d=128,
        masked=False,
    ),
    Row(
        StreamConfig(128, 64, 4, 3),
        "static: 243 instructions a 64 x 64 tile, two blocks; tcgen05 wants 128 rows",
        chips=BLACKWELL,
        d=64,
        masked=False,
    ),
    Row(
        StreamConfig(128, 128, 8, 2),
        "static: no spill, 300 instructions a tile at D 72; narrower blocks spill",
        chips=BLACKWELL,
        d=128,
        masked=False,
    ),
    Row(
        StreamConfig(64, 64, 4, 2),
        "static: no spill; 192 registers, two blocks",
        d=64,
        masked=False,
    ),
    Row(
        StreamConfig(64, 64, 4, 2),
        "static: no spill at D 72 on this chip (it does on sm_120)",
        chips=(80,),
        d=128,
        masked=False,
    ),
    Row(
        StreamConfig(64, 64, 4, 2),
        "static: 392 instructions a tile at D 72, no spill; 32 keys a block spill where causal",
        chips=(86, 89),
        d=80,
        masked=False,
    ),
    Row(
        StreamConfig(64, 32, 4, 2),
        "static: no spill, two blocks; a mask's tile needs registers of its own",
        d=128,
    ),
    Row(
        StreamConfig(64, 32, 4, 2),
        "static: 254 registers, two blocks",
        chips=(90, *BLACKWELL),
        masked=False,
    ),
    Row(StreamConfig(64, 32, 8, 2), "safe everywhere: 181 registers, 68 KiB at D 256"),
)


@dataclass(frozen=True)
class DecodeConfig:
    """Keys a block, warps, loads in flight."""

    block_n: int
    warps: int
    stages: int


DECODE: Table[DecodeConfig] = Table(
    "attention_decode",
    Row(DecodeConfig(32, 4, 2), "float32 takes twice the shared memory", kinds=FLOAT32, d=128),
    Row(DecodeConfig(16, 4, 2), "float32, wide heads: static, 64 KiB on every chip", kinds=FLOAT32),
    Row(DecodeConfig(64, 4, 3), "expected: three blocks of keys in flight hide latency", d=128),
    Row(DecodeConfig(32, 4, 2), "safe everywhere"),
)


@dataclass(frozen=True)
class BackwardConfig:
    """Query rows and keys a tile, warps, loads in flight."""

    block_m: int
    block_n: int
    warps: int
    stages: int


# d and n: D and the number of keys as their chunks cover them. None: the three kernels instead.
SHORT_BACKWARD: Table[BackwardConfig | None] = Table(
    "attention_short_backward",
    Row(None, "float32: static, spills", kinds=FLOAT32),
    Row(
        BackwardConfig(64, 64, 4, 1),
        "static: 254 registers, no spill, two blocks",
        chips=HOPPER,
        d=64,
        masked=False,
    ),
    Row(
        BackwardConfig(32, 32, 4, 1),
        "static: 123 registers, four blocks; 64 keys spill",
        chips=(120,),
        d=64,
        masked=False,
    ),
    Row(
        BackwardConfig(32, 64, 4, 1),
        "static: 250 registers, no spill on sm_80",
        d=64,
        masked=False,
    ),
    Row(None, "static: D 72 spills, and so does a mask's tile"),
)
KV_BACKWARD: Table[BackwardConfig] = Table(
    "attention_backward_kv",
    Row(
        BackwardConfig(32, 32, 8, 1),
        "IEEE products on the plain cores: four warps spill on sm_80 (static)",
        kinds=(IEEE,),
        d=128,
        masked=False,
    ),
    Row(
        BackwardConfig(16, 32, 8, 1),
        "IEEE: 32 rows beside a mask's tile spill on sm_90 (static)",
        kinds=(IEEE,),
        d=128,
    ),
    Row(BackwardConfig(16, 16, 4, 1), "IEEE, wide heads", kinds=(IEEE,)),
    Row(BackwardConfig(32, 32, 4, 1), "TF32 takes twice the shared memory", kinds=(TF32,), d=128),
    Row(BackwardConfig(16, 32, 8, 1), "TF32, wide heads", chips=DATACENTER, kinds=(TF32,)),
    Row(BackwardConfig(16, 16, 4, 1), "TF32, wide heads: fits 99 KiB", kinds=(TF32,)),
    Row(
        BackwardConfig(64, 64, 4, 1),
        "static: 174 registers, 440 instructions a 64 x 64 tile; a mask's tile spills",
        chips=HOPPER,
        d=64,
        masked=False,
    ),
    Row(
        BackwardConfig(64, 128, 8, 2),
        "static: 489 instructions a tile, no spill; 64 keys a block spill",
        chips=HOPPER,
        d=80,
        masked=False,
    ),
    Row(BackwardConfig(64, 64, 8, 1), "static: 248 registers", chips=HOPPER, d=128),
    Row(
        BackwardConfig(32, 64, 4, 2),
        "static: no spill, beside a mask's tile neither",
        chips=(90, *BLACKWELL),
        d=64,
    ),
    Row(
        BackwardConfig(32, 64, 4, 1),
        "static: 248 registers on sm_80 where causal; with loads in flight it spills there",
        d=64,
        masked=False,
    ),
    Row(
        BackwardConfig(32, 32, 4, 2),
        "static: 168 registers on sm_80, 182 on sm_120; a mask's tile of 64 keys spills",
        d=64,
    ),
    Row(BackwardConfig(32, 64, 8, 1), "static: eight warps halve the sums of each", d=128),
    Row(BackwardConfig(32, 32, 8, 1), "safe everywhere: 170 registers at D 256"),
)
Q_BACKWARD: Table[BackwardConfig] = Table(
    "attention_backward_q",
    Row(
        BackwardConfig(32, 32, 8, 1),
        "IEEE: four warps spill at D 128 on sm_90 (static)",
        kinds=(IEEE,),
        d=128,
        masked=False,
    ),
    Row(
        BackwardConfig(32, 32, 4, 1),
        "IEEE: eight warps beside a mask's tile spill on sm_80 (static)",
        kinds=(IEEE,),
        d=128,
    ),
    Row(BackwardConfig(16, 16, 4, 1), "IEEE, wide heads", kinds=(IEEE,)),
    Row(BackwardConfig(32, 32, 4, 1), "TF32 takes twice the shared memory", kinds=(TF32,), d=128),
    Row(BackwardConfig(16, 32, 8, 1), "TF32, wide heads", kinds=(TF32,)),
    Row(
        BackwardConfig(64, 64, 4, 2),
        "static: 243 instructions a 64 x 64 tile at D 64, 164 registers at D 72",
        chips=HOPPER,
        d=80,
        masked=False,
    ),
    Row(
        BackwardConfig(128, 64, 8, 2),
        "static: no spill where 64 rows on four warps do",
        chips=(80,),
        d=64,
        masked=False,
    ),
    Row(
        BackwardConfig(64, 32, 4, 2),
        "static: 174 registers at D 128 on sm_90",
        chips=(90, *BLACKWELL),
        d=128,
    ),
    Row(
        BackwardConfig(64, 32, 4, 1),
        "static: 176 registers at D 128 on sm_80, 230 at D 72 on sm_120; loads in flight spill",
        d=128,
    ),
    Row(BackwardConfig(32, 32, 4, 1), "safe everywhere: 200 registers at D 256"),
)
MASK_GRAD: Table[BackwardConfig] = Table(
    "attention_mask_grad",
    Row(BackwardConfig(32, 32, 4, 1), "float32: fits 99 KiB", kinds=FLOAT32, d=128),
    Row(BackwardConfig(16, 16, 4, 1), "float32, wide heads", kinds=FLOAT32),
    Row(BackwardConfig(64, 32, 4, 1), "static: the sums of 64 x 64 spill on sm_90", d=128),
    Row(BackwardConfig(16, 32, 4, 1), "safe everywhere: no spill at D 256 on sm_80"),
)
