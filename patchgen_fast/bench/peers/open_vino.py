"""OpenVINO on the CPU: its fused attention, and convolution for the patch embedding.

bfloat16 is its own inference precision between bfloat16 inputs and outputs. Tensors are views of
torch's memory; the output is written into a fresh tensor for each call, as torch's own ops do.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch

from patchgen_fast.bench.cases import ONE, Case
from patchgen_fast.bench.peers import Tensors
from patchgen_fast.bench.problems.base import Absent, Refused, Runnable, first_line

_NUMPY = {torch.float32: np.float32, torch.bfloat16: np.uint16, torch.uint8: np.uint8}


def _module() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise Absent("not installed (openvino)") from error
    return openvino


def _type(ov: Any, dtype: torch.dtype) -> Any:
    names = {torch.float32: ov.Type.f32, torch.bfloat16: ov.Type.bf16, torch.uint8: ov.Type.u8}
    if dtype not in names:
        raise Refused(f"measured in float32 and bfloat16 only, not {dtype}")
    return names[dtype]


def _view(ov: Any, tensor: torch.Tensor) -> Any:
    """An OpenVINO tensor on the memory of a contiguous torch tensor."""
    storage = tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
    return ov.Tensor(storage.numpy(), list(tensor.shape), _type(ov, tensor.dtype))


def _constant(ov: Any, tensor: torch.Tensor) -> Any:
    from openvino import opset13 as ops

    value = ops.constant(tensor.detach().float().contiguous().numpy())
    return value if tensor.dtype == torch.float32 else ops.convert(value, _type(ov, tensor.dtype))


def _compiled(
    ov: Any, case: Case, node: Any, parameter: Any, source: torch.Tensor, dtype: torch.dtype
) -> Runnable:
    config = {
        "INFERENCE_NUM_THREADS": 1 if case.threads == ONE else len(os.sched_getaffinity(0)),
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,
        "INFERENCE_PRECISION_HINT": _type(ov, dtype),
        "PERFORMANCE_HINT": "LATENCY",
    }
    try:
        model = ov.Model([node], [parameter], case.op)
        request = ov.Core().compile_model(model, "CPU", config).create_infer_request()
        source = source.detach().contiguous()
        request.set_input_tensor(_view(ov, source))
        shape = list(node.output(0).get_shape())
    except (RuntimeError, ValueError) as error:
        raise Refused(first_line(error)) from error

    # The request has no more than a view of the source, which is a copy if it was strided.
    def run(_kept: torch.Tensor = source) -> torch.Tensor:
        out = torch.empty(shape, dtype=dtype)
        request.set_output_tensor(_view(ov, out))
        request.infer()
        return out

    return Runnable(run)


def attention(case: Case, tensors: Tensors) -> Runnable:
    """`scaled_dot_product_attention` of opset 13 between a split of packed qkv and [B,N,C]."""
    ov = _module()
    if not case.options.get("packed"):
        raise Refused("measured from packed qkv only")
    from openvino import opset13 as ops

    qkv = tensors["qkv"]
    assert qkv is not None
    batch, heads, tokens, width = (case.dims[name] for name in ("B", "H", "N", "D"))
    parameter = ops.parameter([batch, tokens, 3 * heads * width], _type(ov, qkv.dtype))
    split = ops.reshape(parameter, np.array([batch, tokens, 3, heads, width]), False)
    apart = ops.split(ops.transpose(split, np.array([2, 0, 3, 1, 4])), np.array(0), 3)
    query, key, value = (ops.squeeze(apart.output(i), np.array([0])) for i in range(3))
    out = ops.scaled_dot_product_attention(query, key, value, causal=False)
    rows = ops.transpose(out, np.array([0, 2, 1, 3]))
    merged = ops.reshape(rows, np.array([batch, tokens, heads * width]), False)
    return _compiled(ov, case, merged, parameter, qkv, qkv.dtype)


def patch_embed(case: Case, tensors: Tensors) -> Runnable:
    """Convolution, reshape, transpose, position and prefix."""
    ov = _module()
    from openvino import opset13 as ops

    images, weight, bias, pos, prefix = (
        tensors[name] for name in ("images", "weight", "bias", "pos_embed", "prefix")
    )
    assert images is not None and weight is not None and bias is not None and pos is not None
    if images.dtype == torch.uint8:
        raise Refused("measured from float images only")
    batch, width, sides = images.shape[0], weight.shape[0], list(weight.shape[2:])
    none, ones = [0] * len(sides), [1] * len(sides)
    parameter = ops.parameter(list(images.shape), _type(ov, images.dtype))
    grid = ops.convolution(parameter, _constant(ov, weight), sides, none, none, ones)
    rows = ops.reshape(grid, np.array([batch, width, -1]), False)
    tokens = ops.transpose(rows, np.array([0, 2, 1]))
    placed = ops.add(tokens, _constant(ov, (pos + bias).unsqueeze(0)))
    if prefix is not None:
        before = _constant(ov, prefix.expand(batch, -1, -1))
        placed = ops.concat([before, placed], 1)
    return _compiled(ov, case, placed, parameter, images, weight.dtype)
