"""ONNX Runtime on the CPU: its fused attention, and convolution for the patch embedding.

Float32 only: its CPU provider has no bfloat16 kernels for either. Inputs and outputs are bound to
torch's memory, so no copy is timed. Its threads do not spin, or they would slow every other peer.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch

from patchgen_fast.bench.cases import ONE, Case
from patchgen_fast.bench.peers import Tensors
from patchgen_fast.bench.problems.base import Absent, Refused, Runnable, first_line


def _modules() -> tuple[Any, Any]:
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise Absent(f"not installed ({error.name})") from error
    return onnx, onnxruntime


def _session(onnx: Any, ort: Any, case: Case, graph: Any) -> Any:
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1 if case.threads == ONE else len(os.sched_getaffinity(0))
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # the runtime's own words are the reason shown
        raise Refused(first_line(error)) from error


def _bound(session: Any, inputs: dict[str, torch.Tensor], shape: tuple[int, ...]) -> Runnable:
    """Run with the inputs in torch's memory and a fresh output of this shape for each call."""
    arrays = {name: tensor.detach().contiguous().numpy() for name, tensor in inputs.items()}

    def run() -> torch.Tensor:
        out = torch.empty(shape)
        binding = session.io_binding()
        for name, array in arrays.items():
            binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        binding.bind_output("out", "cpu", 0, np.float32, shape, out.data_ptr())
        session.run_with_iobinding(binding)
        return out

    return Runnable(run)


def _float32_only(case: Case) -> None:
    if case.dtype != "float32":
        raise Refused(f"its CPU provider has no {case.dtype} kernel for this")


def attention(case: Case, tensors: Tensors) -> Runnable:
    """`com.microsoft.MultiHeadAttention`, from packed qkv by a split, as its own models do it."""
    onnx, ort = _modules()
    _float32_only(case)
    if not case.options.get("packed"):
        raise Refused("measured from packed qkv only")
    batch, heads, tokens, width = (case.dims[name] for name in ("B", "H", "N", "D"))
    total = heads * width
    make = onnx.helper
    single = onnx.TensorProto.FLOAT
    nodes = [
        make.make_node("Split", ["qkv"], ["q", "k", "v"], axis=-1),
        make.make_node(
            "MultiHeadAttention",
            ["q", "k", "v"],
            ["out"],
            domain="com.microsoft",
            num_heads=heads,
        ),
    ]
    graph = make.make_graph(
        nodes,
        "attention",
        [make.make_tensor_value_info("qkv", single, [batch, tokens, 3 * total])],
        [make.make_tensor_value_info("out", single, [batch, tokens, total])],
    )
    qkv = tensors["qkv"]
    assert qkv is not None
    return _bound(_session(onnx, ort, case, graph), {"qkv": qkv}, (batch, tokens, total))


def patch_embed(case: Case, tensors: Tensors) -> Runnable:
    """Convolution, reshape, transpose, position and prefix, as an exported ViT has them."""
    onnx, ort = _modules()
    _float32_only(case)
    images, weight, bias, pos, prefix = (
        tensors[name] for name in ("images", "weight", "bias", "pos_embed", "prefix")
    )
    assert images is not None and weight is not None and bias is not None and pos is not None
    if images.dtype != torch.float32:
        raise Refused("measured from float images only")
    make, convert = onnx.helper, onnx.numpy_helper.from_array
    batch, width, sides = images.shape[0], weight.shape[0], list(weight.shape[2:])
    constants = [
        convert(weight.detach().numpy(), "weight"),
        convert(bias.detach().numpy(), "bias"),
        convert(pos.detach().numpy()[None], "pos"),
        convert(np.array([batch, width, -1], dtype=np.int64), "flat"),
    ]
    nodes = [
        make.make_node("Conv", ["images", "weight", "bias"], ["grid"], strides=sides),
        make.make_node("Reshape", ["grid", "flat"], ["rows"]),
        make.make_node("Transpose", ["rows"], ["tokens"], perm=[0, 2, 1]),
        make.make_node("Add", ["tokens", "pos"], ["out" if prefix is None else "placed"]),
    ]
    count = pos.shape[0]
    if prefix is not None:
        expanded = prefix.detach().expand(batch, -1, -1).contiguous().numpy()
        constants.append(convert(expanded, "prefix"))
        nodes.append(make.make_node("Concat", ["prefix", "placed"], ["out"], axis=1))
        count += prefix.shape[0]
    single = onnx.TensorProto.FLOAT
    graph = make.make_graph(
        nodes,
        "patch_embed",
        [make.make_tensor_value_info("images", single, list(images.shape))],
        [make.make_tensor_value_info("out", single, [batch, count, width])],
        constants,
    )
    return _bound(_session(onnx, ort, case, graph), {"images": images}, (batch, count, width))
