"""What is measured: named real shapes, as data. No torch here, so that `bench --list` is instant.

A case is an op or a piece of a model at a real shape, in one dtype, one phase, on one device.
The batch sizes on the CPU are those a laptop sees, on the GPU those that fill a large one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

PHASES = ("forward", "backward", "both")
DTYPES = ("float32", "bfloat16", "float16")
SUITES = ("standard", "quick", "ops", "layers", "models", "cpu", "gpu")
LEVELS = ("op", "layer", "block", "model")
ONE, ALL = "one", "all"
PEERS = (
    *("sdpa", "sdpa flash", "sdpa cudnn", "sdpa efficient", "sdpa per sequence"),
    *("torch.compile", "flex attention", "flash-attn 2", "flash-attn 3", "xformers"),
    *("channels_last conv", "unfold + linear", "linear + fold", "onnxruntime", "openvino"),
    *("stock operators", "channels_last"),
)


@dataclass(frozen=True)
class Case:
    """One measurement; `dims` are sizes by name, `options` whatever else defines it."""

    op: str
    name: str
    level: str
    dims: dict[str, int]
    dtype: str = "float32"
    phase: str = "forward"
    device: str = "cpu"
    threads: str = ONE  # "one" or "all"
    options: dict[str, Any] = field(default_factory=dict)
    quick: bool = False
    backend: str | None = None  # None: what dispatch takes

    @property
    def id(self) -> str:
        """Stable name: what `--resume` and `compare` match on."""
        where = f"{self.device}-{self.threads}" if self.device == "cpu" else self.device
        parts = [self.op, self.name, self.dtype, self.phase, where]
        return "/".join(parts + ([self.backend] if self.backend else []))

    @property
    def shape(self) -> str:
        """The sizes as one short word group, such as `B8 H12 N197 D64`."""
        return " ".join(f"{name}{size}" for name, size in self.dims.items())

    @property
    def seed(self) -> int:
        """A seed of its own, the same in every run."""
        return sum((i + 1) * ord(c) for i, c in enumerate(self.id)) % (2**31)


def _attention(name: str, B: int, H: int, N: int, D: int, Nk: int | None = None) -> Case:
    dims = (
        {"B": B, "H": H, "N": N, "D": D}
        if Nk is None
        else {"B": B, "H": H, "Nq": N, "Nk": Nk, "D": D}
    )
    return Case("attention", name, "op", dims, options={"packed": Nk is None})


ATTENTION_CPU = [
    _attention("vit_ti", 8, 3, 197, 64),
    _attention("vit_s", 8, 6, 197, 64),
    _attention("vit_b", 8, 12, 197, 64),
    _attention("vit_l", 8, 16, 197, 64),
    _attention("vit_l14_336", 2, 16, 577, 64),
    _attention("siglip_so400m", 1, 16, 729, 72),
    _attention("dit_xl_256", 8, 16, 256, 72),
    _attention("dit_xl_512", 2, 16, 1024, 72),
    _attention("mae_encoder", 8, 12, 50, 64),
    _attention("mae_decoder", 8, 16, 197, 32),
    _attention("dinov2_g", 1, 24, 1370, 64),
    _attention("videomae_b", 1, 12, 1568, 64),
    _attention("long_4096", 1, 8, 4096, 64),
    _attention("cross_77", 4, 12, 196, 64, 77),
    _attention("decode_1024", 16, 12, 1, 64, 1024),
]

ATTENTION_GPU = [
    _attention("vit_ti_b256", 256, 3, 197, 64),
    _attention("vit_s_b256", 256, 6, 197, 64),
    _attention("vit_b_b128", 128, 12, 197, 64),
    _attention("vit_b_b256", 256, 12, 197, 64),
    _attention("vit_l_b128", 128, 16, 197, 64),
    _attention("mae_encoder_b256", 256, 12, 50, 64),
    _attention("mae_decoder_b256", 256, 16, 197, 32),
    _attention("dit_xl_256_b64", 64, 16, 256, 72),
    _attention("vit_l14_336_b64", 64, 16, 577, 64),
    _attention("siglip_so400m_b32", 32, 16, 729, 72),
    _attention("dit_xl_512_b32", 32, 16, 1024, 72),
    _attention("dinov2_g_b16", 16, 24, 1370, 64),
    _attention("video_8192", 1, 16, 8192, 64),
    _attention("decode_b64", 64, 12, 1, 64, 256),
]


def _patch_embed(name: str, B: int, C: int, S: int, P: int, E: int, **options: Any) -> Case:
    dims = {"B": B, "C": C, "S": S, "P": P, "E": E}
    return Case("patch_embed", name, "op", dims, options={"prefix": 1, **options})


def _video_embed(name: str, B: int, T: int, S: int, Pt: int, P: int, E: int) -> Case:
    """T frames, of which Pt and P x P pixels make a patch: a Conv3d in other libraries."""
    dims = {"B": B, "C": 3, "T": T, "S": S, "Pt": Pt, "P": P, "E": E}
    return Case("patch_embed", name, "op", dims, options={"prefix": 0})


PATCH_EMBED_CPU = [
    _patch_embed("vit_ti16", 8, 3, 224, 16, 192),
    _patch_embed("vit_s16", 8, 3, 224, 16, 384),
    _patch_embed("vit_b16", 8, 3, 224, 16, 768),
    _patch_embed("vit_b16_b32", 32, 3, 224, 16, 768),
    _patch_embed("vit_l14", 8, 3, 224, 14, 1024),
    _patch_embed("siglip_so400m", 1, 3, 384, 14, 1152, prefix=0),
    _patch_embed("dinov2_g14", 8, 3, 224, 14, 1536),
    _patch_embed("vit_s8", 8, 3, 224, 8, 384),
    _patch_embed("dit_xl2_latents", 8, 4, 64, 2, 1152, prefix=0),
    _patch_embed("vit_b16_uint8", 8, 3, 224, 16, 768, uint8=True),
    _video_embed("videomae_b", 1, 16, 224, 2, 16, 768),
]

PATCH_EMBED_GPU = [
    _patch_embed("vit_b16_b256", 256, 3, 224, 16, 768),
    _patch_embed("vit_b16_b256_uint8", 256, 3, 224, 16, 768, uint8=True),
    _patch_embed("vit_l14_b128", 128, 3, 224, 14, 1024),
    _patch_embed("dit_xl2_latents_b64", 64, 4, 64, 2, 1152, prefix=0),
    _video_embed("videomae_b_b32", 32, 16, 224, 2, 16, 768),
]

# Rows: B images of N tokens, K features in, M out.
OTHER_OPS = [
    Case("linear", "vit_b_qkv", "op", {"B": 8, "N": 197, "K": 768, "M": 2304}),
    Case(
        "linear",
        "vit_b_proj_residual",
        "op",
        {"B": 8, "N": 197, "K": 768, "M": 768},
        options={"residual": True},
    ),
    Case(
        "linear",
        "vit_b_fc1_gelu",
        "op",
        {"B": 8, "N": 197, "K": 768, "M": 3072},
        options={"activation": "gelu"},
    ),
    Case(
        "linear",
        "vit_b_fc2_residual",
        "op",
        {"B": 8, "N": 197, "K": 3072, "M": 768},
        options={"residual": True},
    ),
    Case("layer_norm", "vit_b", "op", {"B": 8, "N": 197, "E": 768}),
    Case("add_layer_norm", "vit_b", "op", {"B": 8, "N": 197, "E": 768}),
    Case("add_layer_norm", "vit_l", "op", {"B": 8, "N": 197, "E": 1024}),
    Case(
        "qk_norm_rope",
        "dinov3_b",
        "op",
        {"B": 8, "H": 12, "N": 201, "D": 64},
        options={"norm": None, "prefix": 5},
    ),
    Case(
        "qk_norm_rope",
        "rms_rope_d72",
        "op",
        {"B": 2, "H": 16, "N": 1024, "D": 72},
        options={"norm": "rms", "prefix": 0},
    ),
    Case("patch_unembed", "mae_decoder", "op", {"B": 8, "C": 3, "S": 224, "P": 16, "E": 512}),
    Case("patch_unembed", "dit_xl2_latents", "op", {"B": 8, "C": 4, "S": 64, "P": 2, "E": 1152}),
    Case(
        "varlen_attention",
        "navit_b",
        "op",
        {"T": 1576, "H": 12, "D": 64},
        options={"lengths": [64, 100, 144, 196, 196, 256, 256, 364]},
    ),
]

LAYERS = [
    Case("attention_layer", "vit_b", "layer", {"B": 8, "N": 197, "E": 768, "H": 12}),
    Case("attention_layer", "dit_xl_256", "layer", {"B": 4, "N": 256, "E": 1152, "H": 16}),
    Case("attention_layer", "siglip_so400m", "layer", {"B": 1, "N": 729, "E": 1152, "H": 16}),
    Case("feed_forward", "vit_b", "layer", {"B": 8, "N": 197, "E": 768}),
    Case("encoder_block", "vit_ti", "block", {"B": 8, "N": 197, "E": 192, "H": 3}),
    Case("encoder_block", "vit_s", "block", {"B": 8, "N": 197, "E": 384, "H": 6}),
    Case("encoder_block", "vit_b", "block", {"B": 8, "N": 197, "E": 768, "H": 12}),
    Case("encoder_block", "vit_l", "block", {"B": 4, "N": 197, "E": 1024, "H": 16}),
    Case("encoder_block", "mae_encoder", "block", {"B": 8, "N": 50, "E": 768, "H": 12}),
    Case("encoder_block", "mae_decoder", "block", {"B": 8, "N": 197, "E": 512, "H": 16}),
    Case("encoder_block", "dinov2_g", "block", {"B": 1, "N": 1370, "E": 1536, "H": 24}),
    Case("decoder_block", "vit_b", "block", {"B": 8, "N": 196, "E": 768, "H": 12}),
]


def _model(op: str, name: str, B: int, model: str, data: str = "photographs") -> Case:
    return Case(op, name, "model", {"B": B}, options={"model": model, "data": data})


MODELS = [
    _model("patch_transformer", "digits", 64, "patchgen:small", "digits"),
    _model("patch_transformer", "vit_b16", 2, "patchgen:vit_b_16"),
    *(
        _model("timm", name, 2, f"timm:{name}")
        for name in (
            "vit_tiny_patch16_224",
            "vit_base_patch16_224",
            "vit_large_patch16_224",
            "vit_small_patch16_dinov3",
            "vit_so400m_patch14_siglip_224",
        )
    ),
    _model("torchvision", "vit_b_16", 2, "torchvision:vit_b_16"),
]

# (op, name) -> (dtype, phase) pairs of the quick suite.
_BOTH_DTYPES = [("float32", "forward"), ("bfloat16", "forward")]
QUICK = {
    ("attention", "vit_b"): [*_BOTH_DTYPES, ("float32", "both")],
    ("attention", "siglip_so400m"): [("bfloat16", "forward")],
    ("patch_embed", "vit_b16"): _BOTH_DTYPES,
    ("patch_embed", "vit_b16_uint8"): [("bfloat16", "forward")],
    ("attention_layer", "vit_b"): _BOTH_DTYPES,
    ("feed_forward", "vit_b"): _BOTH_DTYPES,
    ("encoder_block", "vit_b"): _BOTH_DTYPES,
    ("patch_transformer", "digits"): [("float32", "forward"), ("float32", "both")],
    ("patch_transformer", "vit_b16"): _BOTH_DTYPES,
}


def _expand(
    shapes: Iterable[Case],
    dtypes: Iterable[str],
    phases: Iterable[str],
    device: str = "cpu",
    threads: Iterable[str] = (ONE, ALL),
) -> list[Case]:
    out = []
    for shape in shapes:
        for dtype in dtypes:
            for phase in phases:
                if shape.options.get("uint8") and phase != "forward":
                    continue  # no gradient reaches uint8 images; weights alone are not this case
                if shape.dims.get("Nq") == 1 and phase != "forward":
                    continue  # decoding is inference
                few = ALL if shape.level == "model" else ONE  # of the quick suite
                for count in threads:
                    quick = (dtype, phase) in QUICK.get((shape.op, shape.name), [])
                    out.append(
                        replace(
                            shape,
                            dtype=dtype,
                            phase=phase,
                            device=device,
                            threads=count,
                            quick=quick and count == few and device == "cpu",
                        )
                    )
    return out


def catalogue() -> list[Case]:
    """Every case there is, ops first, then layers, blocks and models."""
    both = ("float32", "bfloat16")
    half = ("bfloat16", "float16")
    cases = _expand([*ATTENTION_CPU, *PATCH_EMBED_CPU, *OTHER_OPS, *LAYERS, *MODELS], both, PHASES)
    gpu = {"device": "cuda", "threads": (ONE,)}
    cases += _expand(ATTENTION_GPU, half, PHASES, **gpu)  # type: ignore[arg-type]
    cases += _expand(PATCH_EMBED_GPU, half, PHASES, **gpu)  # type: ignore[arg-type]
    rest = [*map(_for_gpu, [*OTHER_OPS, *LAYERS, *MODELS])]
    cases += _expand(rest, ("bfloat16",), PHASES, **gpu)  # type: ignore[arg-type]
    return cases


def _for_gpu(case: Case, times: int = 16) -> Case:
    """The same shape at a batch that fills a GPU."""
    dims, options = dict(case.dims), dict(case.options)
    for name in ("B", "T"):
        if name in dims:
            dims[name] *= times
    if "lengths" in options:
        options["lengths"] = options["lengths"] * times
    return replace(case, dims=dims, options=options)


class UsageError(Exception):
    """The user asked for something that is not there; exit code 2."""


def select(
    suite: str = "standard",
    *,
    ops: Iterable[str] = (),
    names: Iterable[str] = (),
    shapes: Iterable[str] = (),
    dtypes: Iterable[str] = (),
    phases: Iterable[str] = (),
    devices: Iterable[str] = (),
    threads: str | None = None,
    backends: Iterable[str] = (),
    peers: Iterable[str] = (),
) -> list[Case]:
    """The cases of a suite that pass every filter; UsageError names what is unknown or empty.

    shapes: sizes that a case must have, such as "N197 D64"; with several, those of any.
    backends: measure each case once with each of these; none: what dispatch takes.
    peers: choose no cases, and are only looked at for names that do not exist.
    """
    everything = catalogue()
    _known("suite", [suite], SUITES)
    _known("op", ops, {case.op for case in everything})
    _known("case", names, {case.name for case in everything})
    sizes = [set(shape.split()) for shape in shapes]
    _known("size", sorted(set().union(*sizes)), {w for c in everything for w in c.shape.split()})
    _known("dtype", dtypes, DTYPES)
    _known("phase", phases, PHASES)
    _known("device", devices, ("cpu", "cuda"))
    _known("backend", backends, ("reference", "torch", "cpu", "triton", "cuda"))
    _known("peer", peers, PEERS)
    devices = list(devices) or {"cpu": ["cpu"], "gpu": ["cuda"]}.get(suite, ["cpu"])
    kept = [
        case
        for case in everything
        if _in_suite(case, suite)
        and case.device in devices
        and _passes(case.op, ops)
        and _passes(case.name, names)
        and (not sizes or any(wanted <= set(case.shape.split()) for wanted in sizes))
        and _passes(case.dtype, dtypes)
        and _passes(case.phase, phases or _usual_phases(case))
        and (case.threads == threads if threads else True)
    ]
    if not kept:
        raise UsageError(
            f"no case of suite {suite!r} passes these filters; `patchgen-fast bench --list` shows "
            "what there is"
        )
    if not list(backends):
        return kept
    return [replace(case, backend=backend) for case in kept for backend in backends]


def _usual_phases(case: Case) -> tuple[str, ...]:
    """Backward alone is measured for attention on a GPU, and elsewhere where it is asked for."""
    if case.device == "cuda" and case.op == "attention":
        return PHASES
    return ("forward", "both")


def _in_suite(case: Case, suite: str) -> bool:
    if suite in ("quick", "standard"):  # the same cases; they differ in rounds and slow peers
        return case.quick
    if suite == "ops":
        return case.level == "op"
    if suite == "layers":
        return case.level in ("layer", "block")
    if suite == "models":
        return case.level == "model"
    return True  # "cpu" and "gpu" differ by device


def _passes(value: str, wanted: Iterable[str]) -> bool:
    wanted = list(wanted)
    return not wanted or value in wanted


def _known(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    for value in given:
        if value not in known:
            raise UsageError(
                f"unknown {what} {value!r}; expected one of {', '.join(sorted(known))}"
            )
