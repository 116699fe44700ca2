"""Compiles the CUDA kernels for the host and calls them on CPU tensors.

The emulator (emulator.h) stands in for the GPU; plan.h and *_plan.cuh choose instances, grids and
sizes exactly as the launchers do. Outputs are carved out of buffers of NaN, so that an element
that is never written is seen.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

HERE = Path(__file__).parent
KERNELS = HERE.parent.parent / "csrc" / "cuda"
COMPILER = shutil.which("g++") or shutil.which("clang++")
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]

# What a mutation test can leave out, in the order of emulator.h.
SYNCS = ("none", "block barrier", "warp barrier", "copy wait", "memory barrier", "descriptor step")

DTYPES = {
    torch.bfloat16: 0,
    torch.float16: 1,
    torch.float32: 2,
    torch.uint8: 3,
    torch.bool: 4,
}


def why_not() -> str | None:
    """Why the host tests cannot run on this machine, or None."""
    if COMPILER is None:
        return "no C++ compiler"
    if platform.system() != "Linux":
        return f"the fibers are written for Linux, not {platform.system()}"
    return None


def build_folder(request, tmp_path_factory) -> Path:
    """Where compiled kernels stay from one run to the next, or for this run only."""
    cache = getattr(request.config, "cache", None)
    return Path(cache.mkdir("cuda_host") if cache else tmp_path_factory.mktemp("cuda_host"))


def build(folder: Path, extra: tuple[str, ...] = (), kernels: Path = KERNELS) -> Path:
    """The kernels under `kernels` as a shared library, compiled once for each set of sources."""
    sources = sorted([*HERE.glob("*.h"), *HERE.glob("*.cpp"), *kernels.glob("*")])
    text = b"".join(path.read_bytes() for path in sources if path.is_file())
    name = hashlib.sha256(text + " ".join([str(COMPILER), *FLAGS, *extra]).encode()).hexdigest()
    library = folder / f"{name[:16]}.so"
    with open(folder / f"{name[:16]}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # workers of one run want the same library
        if not library.exists():
            compile_library(library, extra, kernels)
    return library


def compile_library(library: Path, extra: tuple[str, ...], kernels: Path) -> None:
    command = [str(COMPILER), *FLAGS, *extra, f"-I{HERE}", f"-I{kernels}"]
    jobs = []
    for source in sorted(HERE.glob("host_*.cpp")):
        target = library.with_suffix(f".{source.stem}.o")
        jobs.append((target, subprocess.Popen([*command, "-c", str(source), "-o", str(target)])))
    for target, job in jobs:
        if job.wait() != 0:
            raise RuntimeError(f"{target.name} does not compile: see what the compiler wrote")
    part = library.with_suffix(".part")
    objects = [str(target) for target, _ in jobs]
    subprocess.run([*command, "-shared", *objects, "-o", str(part)], check=True)
    part.rename(library)
    for target, _ in jobs:
        target.unlink()


class Strides(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "head", "row")]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Strides:
        assert tensor.stride(3) == 1 or tensor.shape[3] <= 1
        return cls(*tensor.stride()[:3])

    @classmethod
    def of_packed(cls, tensor: torch.Tensor) -> Strides:
        """Of [tokens, heads, head_dim]."""
        assert tensor.stride(2) == 1
        return cls(0, tensor.stride(1), tensor.stride(0))


class Mask(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("kind", ctypes.c_int),
        *[(name, ctypes.c_int64) for name in ("batch", "head", "query", "key")],
    ]

    @classmethod
    def of(cls, mask: torch.Tensor | None, dtype: torch.dtype) -> Mask:
        if mask is None:
            return cls(None, 0, 0, 0, 0, 0)
        kind = {torch.bool: 1, dtype: 2, torch.float32: 3}[mask.dtype]
        strides = [0 if n == 1 else s for n, s in zip(mask.shape, mask.stride(), strict=True)]
        return cls(mask.data_ptr(), kind, *strides)


class Packed(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("query_starts", "key_starts")],
        *[(name, ctypes.c_int) for name in ("all_queries", "all_keys")],
    ]


class AttentionInputs(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("query", "key", "value")],
        *[(f"{name}_stride", Strides) for name in ("query", "key", "value")],
        ("mask", Mask),
        *[(name, ctypes.c_void_p) for name in ("kv_lengths", "query_offset")],
        ("packed", Packed),
        *[(n, ctypes.c_int) for n in ("batch", "heads", "kv_heads", "queries", "keys", "head_dim")],
        ("dtype", ctypes.c_int),
        ("causal", ctypes.c_bool),
        ("scale", ctypes.c_float),
    ]


class AttentionForward(ctypes.Structure):
    _fields_ = [
        ("inputs", AttentionInputs),
        ("out", ctypes.c_void_p),
        ("out_stride", Strides),
        ("lse", ctypes.c_void_p),
    ]


class AttentionBackward(ctypes.Structure):
    _fields_ = [
        ("inputs", AttentionInputs),
        *[(name, ctypes.c_void_p) for name in ("out", "lse", "grad_out", "grad_lse")],
        *[(f"{name}_stride", Strides) for name in ("out", "grad_out")],
        *[(name, ctypes.c_void_p) for name in ("grad_query", "grad_key", "grad_value")],
        *[(f"{name}_stride", Strides) for name in ("grad_query", "grad_key", "grad_value")],
    ]


class PatchGeometry(ctypes.Structure):
    _fields_ = [
        ("images", ctypes.c_void_p),
        ("image_dtype", ctypes.c_int),
        *[(f"{name}_stride", ctypes.c_int64) for name in ("b", "c", "t", "y", "x")],
        *[(name, ctypes.c_int) for name in ("batch", "channels")],
        *[(name, ctypes.c_int) for name in ("patch_t", "patch_h", "patch_w")],
        *[(name, ctypes.c_int) for name in ("grid_t", "grid_h", "grid_w")],
        *[(name, ctypes.c_void_p) for name in ("mean", "std")],
    ]

    @classmethod
    def of(cls, images, weight, mean, std) -> PatchGeometry:
        if images.dim() == 4:
            images, weight = images.unsqueeze(2), weight.unsqueeze(2)
        batch, channels, *size = images.shape
        patch = weight.shape[2:]
        grid = [n // p for n, p in zip(size, patch, strict=True)]
        return cls(
            *(images.data_ptr(), DTYPES[images.dtype], *images.stride(), batch, channels),
            *(*patch, *grid, pointer(mean), pointer(std)),
        )

    @property
    def patches(self) -> int:
        return self.grid_t * self.grid_h * self.grid_w


class PatchEmbedForward(ctypes.Structure):
    _fields_ = [
        ("geometry", PatchGeometry),
        *[(n, ctypes.c_void_p) for n in ("weight", "bias", "pos_embed", "prefix", "out")],
        *[(name, ctypes.c_int) for name in ("prefix_tokens", "embed", "dtype")],
    ]


class PatchEmbedBackward(ctypes.Structure):
    _fields_ = [
        ("geometry", PatchGeometry),
        *[(name, ctypes.c_void_p) for name in ("weight", "grad_out", "grad_images")],
        *[(name, ctypes.c_void_p) for name in ("grad_weight", "grad_sum", "workspace")],
        *[(name, ctypes.c_int) for name in ("splits", "prefix_tokens", "embed", "dtype")],
    ]


class Options(ctypes.Structure):
    _fields_ = [
        ("late_copies", ctypes.c_int),
        ("seed", ctypes.c_uint32),
        ("multiprocessors", ctypes.c_int),
        ("left_out", ctypes.c_int),
        ("left_out_index", ctypes.c_int),
    ]


class Result(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_long) for name in ("matrices_loaded", "wavefronts", "products")],
        ("syncs", ctypes.c_int * len(SYNCS)),
        ("error", ctypes.c_char * 512),
    ]


class EmulatorError(RuntimeError):
    """The emulator stopped: a deadlock, a divergent warp, a misaligned address."""


def pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def rows_like(batch: int, heads: int, rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """[batch, heads, rows, width] in memory [batch, rows, heads, width], full of NaN."""
    return torch.full((batch, rows, heads, width), torch.nan, dtype=dtype).transpose(1, 2)


@dataclass
class Host:
    """The kernels, under one timing of asynchronous copies, one seed, one size of GPU."""

    library: ctypes.CDLL
    late_copies: bool = True
    seed: int = 1
    multiprocessors: int = 1
    left_out: str = "none"
    left_out_index: int = 0
    result: Result | None = None

    def call(self, function: str, *problem: ctypes.Structure) -> None:
        left_out = SYNCS.index(self.left_out)
        options = Options(
            self.late_copies, self.seed, self.multiprocessors, left_out, self.left_out_index
        )
        self.result = Result()
        status = getattr(self.library, function)(
            *map(ctypes.byref, problem), ctypes.byref(options), ctypes.byref(self.result)
        )
        if status:
            raise EmulatorError(self.result.error.decode())

    @property
    def wavefronts_per_matrix(self) -> float:
        """1 where no load of a matrix fragment meets a bank conflict."""
        assert self.result is not None
        return self.result.wavefronts / max(self.result.matrices_loaded, 1)

    @staticmethod
    def attention_inputs(
        query, key, value, attn_mask, kv_lengths, query_offset, is_causal, scale
    ) -> AttentionInputs:
        batch, heads, queries, head_dim = query.shape
        return AttentionInputs(
            *[pointer(tensor) for tensor in (query, key, value)],
            *[Strides.of(tensor) for tensor in (query, key, value)],
            Mask.of(attn_mask, query.dtype),
            pointer(kv_lengths),
            pointer(query_offset),
            Packed(),
            *(batch, heads, key.shape[1], queries, key.shape[2], head_dim),
            DTYPES[query.dtype],
            is_causal,
            scale,
        )

    def attention(
        self,
        query,
        key,
        value,
        attn_mask=None,
        kv_lengths=None,
        query_offset=None,
        is_causal=False,
        scale=1.0,
        function="host_attention_forward",
    ) -> tuple[torch.Tensor, torch.Tensor]:
        batch, heads, queries, head_dim = query.shape
        out = rows_like(batch, heads, queries, head_dim, query.dtype)
        lse = torch.full((batch, heads, queries), torch.nan)
        inputs = self.attention_inputs(
            query, key, value, attn_mask, kv_lengths, query_offset, is_causal, scale
        )
        self.call(function, AttentionForward(inputs, pointer(out), Strides.of(out), pointer(lse)))
        return out, lse

    def attention_backward(
        self,
        grad_out,
        grad_lse,
        query,
        key,
        value,
        out,
        lse,
        attn_mask=None,
        kv_lengths=None,
        query_offset=None,
        is_causal=False,
        scale=1.0,
        function="host_attention_backward",
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        inputs = self.attention_inputs(
            query, key, value, attn_mask, kv_lengths, query_offset, is_causal, scale
        )
        grads = [rows_like(*tensor.shape, tensor.dtype) for tensor in (query, key, value)]
        problem = AttentionBackward(
            inputs,
            *[pointer(tensor) for tensor in (out, lse, grad_out, grad_lse)],
            *[Strides.of(tensor) for tensor in (out, grad_out)],
            *[pointer(tensor) for tensor in grads],
            *[Strides.of(tensor) for tensor in grads],
        )
        self.call(function, problem)
        return grads[0], grads[1], grads[2]

    @staticmethod
    def packed_inputs(
        query, key, value, starts_q, starts_k, longest_q, longest_k, is_causal, scale
    ) -> AttentionInputs:
        """Of tensors [tokens, heads, head_dim], as varlen_attention_op.cpp makes them."""
        views = [tensor.transpose(0, 1).unsqueeze(0) for tensor in (query, key, value)]
        inputs = Host.attention_inputs(*views, None, None, None, is_causal, scale)
        inputs.packed = Packed(pointer(starts_q), pointer(starts_k), len(query), len(key))
        inputs.query_stride, inputs.key_stride, inputs.value_stride = map(
            Strides.of_packed, (query, key, value)
        )
        inputs.batch = len(starts_q)
        inputs.queries = max(1, min(longest_q, len(query)))
        inputs.keys = min(longest_k, len(key))
        return inputs

    def varlen_attention(self, query, key, value, *sequences) -> tuple[torch.Tensor, torch.Tensor]:
        out = torch.full(query.shape, torch.nan, dtype=query.dtype)
        lse = torch.full(query.shape[1::-1], torch.nan)
        inputs = self.packed_inputs(query, key, value, *sequences)
        results = (pointer(out), Strides.of_packed(out), pointer(lse))
        self.call("host_attention_forward", AttentionForward(inputs, *results))
        return out, lse

    def varlen_attention_backward(
        self, grad_out, grad_lse, query, key, value, out, lse, *sequences
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        inputs = self.packed_inputs(query, key, value, *sequences)
        grads = [torch.full(t.shape, torch.nan, dtype=t.dtype) for t in (query, key, value)]
        problem = AttentionBackward(
            inputs,
            *[pointer(tensor) for tensor in (out, lse, grad_out, grad_lse)],
            *map(Strides.of_packed, (out, grad_out)),
            *[pointer(tensor) for tensor in grads],
            *map(Strides.of_packed, grads),
        )
        self.call("host_attention_backward", problem)
        return grads[0], grads[1], grads[2]

    def patch_embed(
        self, images, weight, bias=None, pos_embed=None, prefix=None, mean=None, std=None
    ) -> torch.Tensor:
        geometry = PatchGeometry.of(images, weight, mean, std)
        prefix_tokens = 0 if prefix is None else prefix.shape[0]
        tokens, embed = prefix_tokens + geometry.patches, weight.shape[0]
        out = torch.full((images.shape[0], tokens, embed), torch.nan, dtype=weight.dtype)
        parameters = [pointer(tensor) for tensor in (weight, bias, pos_embed, prefix, out)]
        sizes = (prefix_tokens, embed, DTYPES[weight.dtype])
        self.call("host_patch_embed", PatchEmbedForward(geometry, *parameters, *sizes))
        return out

    def patch_embed_backward(
        self, grad_out, images, weight, mean=None, std=None, images_grad=True
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        geometry = PatchGeometry.of(images, weight, mean, std)
        grad_images = torch.zeros(images.shape, dtype=images.dtype) if images_grad else None
        grad_geometry = PatchGeometry.of(
            images if grad_images is None else grad_images, weight, mean, std
        )
        grad_weight = torch.full(weight.shape, torch.nan, dtype=weight.dtype)
        grad_sum = torch.full(grad_out.shape[1:], torch.nan)
        splits = self.library.host_patch_embed_splits(
            ctypes.byref(geometry), weight.shape[0], self.multiprocessors
        )
        workspace = torch.full((splits, *weight.shape), torch.nan)
        tensors = (weight, grad_out, grad_images, grad_weight, grad_sum, workspace)
        prefix_tokens = grad_out.shape[1] - geometry.patches
        sizes = (splits, prefix_tokens, weight.shape[0], DTYPES[weight.dtype])
        problem = PatchEmbedBackward(geometry, *map(pointer, tensors), *sizes)
        self.call("host_patch_embed_backward", problem, grad_geometry)
        return grad_images, grad_weight, grad_sum
