"""The catalogue, its filters, the least work of a case, and the shapes that each problem takes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from patchgen_fast.bench import cases, data, limits, parity, problems
from patchgen_fast.bench.problems import attention, base, models, patches
from patchgen_fast.bench.problems.base import Absent, Refused, evaluate, gradients_of
from patchgen_fast.bench.schema import Calibration, Cost

CATALOGUE = cases.catalogue()


def test_ids_are_unique():
    ids = [case.id for case in CATALOGUE]
    assert len(ids) == len(set(ids))


def test_the_quick_suite_covers_every_level_and_the_baselines():
    quick = cases.select("quick")
    assert {case.level for case in quick} == {"op", "layer", "block", "model"}
    ids = {case.id for case in quick}
    for op, name in (("attention", "vit_b"), ("patch_embed", "vit_b16")):
        for dtype in ("float32", "bfloat16"):
            assert f"{op}/{name}/{dtype}/forward/cpu-one" in ids
    assert {case.device for case in quick} == {"cpu"}


def test_every_quick_entry_names_a_case():
    named = {(case.op, case.name) for case in CATALOGUE}
    assert set(cases.QUICK) <= named


def test_suites_and_filters():
    assert {case.level for case in cases.select("ops")} == {"op"}
    assert {case.level for case in cases.select("layers")} == {"layer", "block"}
    assert {case.level for case in cases.select("models")} == {"model"}
    assert {case.device for case in cases.select("gpu")} == {"cuda"}
    assert {case.device for case in cases.select("cpu")} == {"cpu"}
    some = cases.select("ops", ops=["attention"], dtypes=["bfloat16"], phases=["both"])
    assert {(c.op, c.dtype, c.phase) for c in some} == {("attention", "bfloat16", "both")}
    assert {case.threads for case in cases.select("ops", threads="all")} == {"all"}
    sized = cases.select("ops", shapes=["N197 D32", "N1024"])
    assert {case.name for case in sized} == {"mae_decoder", "dit_xl_512", "rms_rope_d72"}
    twice = cases.select("quick", ops=["attention"], backends=["reference", "cpu"])
    assert {case.backend for case in twice} == {"reference", "cpu"}
    assert len({case.id for case in twice}) == len(twice)


def test_backward_alone_is_there_when_it_is_asked_for():
    asked = cases.select("cpu", phases=["backward"])
    assert {case.phase for case in asked} == {"backward"}
    assert {case.op for case in asked} == {case.op for case in CATALOGUE}
    assert {case.phase for case in cases.select("cpu")} == {"forward", "both"}
    assert "backward" in {case.phase for case in cases.select("gpu") if case.op == "attention"}


@pytest.mark.parametrize("device, shape", [
    ("cuda", "B128 H12 N197 D64"), ("cuda", "B256 H12 N197 D64"), ("cuda", "B256 H12 N50 D64"),
    ("cuda", "B256 H16 N197 D32"), ("cuda", "B64 H16 N256 D72"), ("cuda", "B64 H16 N577 D64"),
    ("cuda", "B32 H16 N729 D72"), ("cuda", "B32 H16 N1024 D72"), ("cuda", "B16 H24 N1370 D64"),
    ("cuda", "B1 H16 N8192 D64"), ("cuda", "B64 H12 Nq1 Nk256 D64"), ("cpu", "B8 H12 N197 D64"),
    ("cpu", "B2 H16 N577 D64"), ("cpu", "B1 H16 N729 D72"), ("cpu", "B2 H16 N1024 D72"),
    ("cpu", "B1 H8 N4096 D64"), ("cpu", "B4 H12 Nq196 Nk77 D64"), ("cpu", "B16 H12 Nq1 Nk1024 D64"),
    ("cpu", "B8 C3 S224 P16 E768"), ("cpu", "B32 C3 S224 P16 E768"),
    ("cpu", "B8 C3 S224 P14 E1024"),
    ("cpu", "B8 C3 S224 P8 E384"), ("cpu", "B8 C4 S64 P2 E1152"), ("cuda", "B256 C3 S224 P16 E768"),
    ("cpu", "B1 C3 T16 S224 Pt2 P16 E768"), ("cuda", "B32 C3 T16 S224 Pt2 P16 E768"),
])  # fmt: skip
def test_the_shapes_that_targets_were_set_for_are_cases(device, shape):
    phases = {case.phase for case in CATALOGUE if (case.device, case.shape) == (device, shape)}
    assert "forward" in phases


@pytest.mark.parametrize("device, op, words", [
    ("cpu", "attention", "vit_ti vit_s vit_b vit_l mae_encoder mae_decoder dit siglip dinov2_g "
                         "video decode cross"),
    ("cuda", "attention", "vit_ti vit_s vit_b vit_l mae_encoder mae_decoder dit siglip dinov2_g "
                          "video decode"),
    ("cpu", "patch_embed", "vit_ti vit_s vit_b vit_l dit siglip dinov2_g video"),
    ("cpu", "encoder_block", "vit_ti vit_s vit_b vit_l mae_encoder mae_decoder dinov2_g"),
    ("cpu", "attention_layer", "vit_b dit siglip"),
    ("cpu", "timm", "vit_tiny vit_base vit_large siglip"),
])  # fmt: skip
def test_the_families_of_models_are_there(device, op, words):
    names = {case.name for case in CATALOGUE if (case.device, case.op) == (device, op)}
    for word in words.split():
        assert any(word in name for name in names), word


def test_a_gpu_gets_batches_that_fill_it():
    shapes = {
        (case.device, case.op, case.name): case.dims for case in CATALOGUE if case.op == "linear"
    }
    assert (
        shapes["cuda", "linear", "vit_b_qkv"]["B"] == 16 * shapes["cpu", "linear", "vit_b_qkv"]["B"]
    )
    packed = next(c for c in CATALOGUE if c.op == "varlen_attention" and c.device == "cuda")
    assert sum(packed.options["lengths"]) == packed.dims["T"]


def test_patches_that_do_not_fill_the_image_are_left_out_as_a_convolution_does():
    images, weight = torch.randn(2, 3, 5, 11, 9), torch.randn(6, 3, 2, 4, 4)
    rows = patches.to_rows(images, weight.shape[2:])
    expected = torch.nn.functional.conv3d(images, weight, stride=(2, 4, 4)).flatten(2)
    torch.testing.assert_close(rows @ weight.flatten(1).T, expected.transpose(1, 2))


@pytest.mark.parametrize(
    "suite, filters, said",
    [
        ("fast", {}, "unknown suite 'fast'; expected one of cpu, gpu"),
        ("cpu", {"ops": ["conv"]}, "unknown op 'conv'"),
        ("cpu", {"names": ["vit_z"]}, "unknown case 'vit_z'"),
        ("cpu", {"shapes": ["N197 D63"]}, "unknown size 'D63'"),
        ("cpu", {"shapes": ["N577 D72"]}, "no case of suite 'cpu' passes"),
        ("cpu", {"peers": ["flash"]}, "unknown peer 'flash'; expected one of channels_last"),
        ("cpu", {"dtypes": ["float8"]}, "unknown dtype"),
        ("cpu", {"phases": ["sideways"]}, "unknown phase"),
        ("cpu", {"devices": ["tpu"]}, "unknown device"),
        ("cpu", {"backends": ["fpga"]}, "unknown backend"),
        ("quick", {"ops": ["linear"]}, "no case of suite 'quick' passes"),
    ],
)
def test_what_is_unknown_is_named(suite, filters, said):
    with pytest.raises(cases.UsageError, match=said):
        cases.select(suite, **filters)


SMALL = {
    "B": 2,
    "H": 2,
    "N": 12,
    "Nq": 5,
    "Nk": 7,
    "D": 16,
    "C": 3,
    "S": 16,
    "P": 4,
    "Pt": 2,
    "E": 24,
    "K": 16,
    "M": 24,
    "T": 20,
}


def small(case: cases.Case) -> cases.Case:
    """The same kind of case at sizes that take no time."""
    options = dict(case.options)
    if case.op == "varlen_attention":
        options["lengths"] = [1, 7, 12]
    dims = {name: SMALL.get(name, size) for name, size in case.dims.items()}
    if case.dims.get("Nq") == 1:
        dims["Nq"] = 1
    if case.dims.get("C") == 4:
        dims["C"] = 4
    return replace(case, dims=dims, options=options, threads=cases.ONE)


OPS = {
    (case.op, case.name, case.phase): small(case)
    for case in CATALOGUE
    if case.level == "op" and case.device == "cpu" and case.dtype == "float32"
}


@pytest.mark.parametrize("key", OPS, ids="-".join)
def test_every_contender_of_an_op_agrees_with_the_truth(key):
    case = OPS[key]
    problem = problems.build(case)
    exact = problem.truth()
    grads = [] if case.phase == "forward" else gradients_of(exact.outputs(), case)
    truth = evaluate(exact, case.phase, grads)
    assert all(tensor.dtype == torch.float64 for tensor in truth.values())
    roles, eager = [], {}
    for contender in problem.contenders:
        if contender.not_quick or (contender.forward_only and case.phase != "forward"):
            continue
        try:
            values = evaluate(contender.make(), case.phase, grads)
        except (Absent, Refused):
            assert contender.role == "peer"
            continue
        roles.append(contender.role)
        eager = eager or values
        factor = parity.PEER_FACTOR if contender.role == "peer" else parity.FACTOR
        wrong = parity.wrong(parity.check(values, eager, truth, factor))
        assert not wrong, f"{contender.name}: {wrong}"
    assert roles[0] == "eager" and "ours" in roles
    if case.phase == "both":
        assert any(name.startswith("grad ") for name in truth)


PEERS = {
    ("attention", "cpu"): {"sdpa", "torch.compile", "flex attention", "onnxruntime", "openvino"},
    ("attention", "cuda"): {
        *("sdpa", "torch.compile", "flex attention", "sdpa flash", "sdpa cudnn"),
        *("sdpa efficient", "flash-attn 2", "flash-attn 3", "xformers"),
    },
    ("patch_embed", "cpu"): {
        *("channels_last conv", "unfold + linear", "torch.compile", "onnxruntime", "openvino"),
    },
    ("encoder_block", "cpu"): {"torch.compile", "stock operators"},
    ("patch_transformer", "cpu"): {"torch.compile", "stock operators", "channels_last"},
}


@pytest.mark.parametrize("op, device", PEERS)
def test_every_peer_has_a_cell(op, device, monkeypatch):
    original = base.normal
    for module in (attention, patches, models):  # inputs stay on the CPU: none is run
        monkeypatch.setattr(
            module, "normal", lambda case, *a, **k: original(replace(case, device="cpu"), *a, **k)
        )
    chosen = next(
        case for case in CATALOGUE if (case.op, case.device, case.phase) == (op, device, "forward")
    )
    contenders = problems.build(small(chosen)).contenders
    assert {c.name for c in contenders if c.role == "peer"} == PEERS[op, device]


def test_every_peer_can_be_asked_for_by_name():
    named = {
        contender.name
        for case in {(case.op, case.level): case for case in CATALOGUE}.values()
        if case.level != "model"
        for contender in problems.build(small(replace(case, device="cpu"))).contenders
        if contender.role == "peer"
    }
    assert named | set().union(*PEERS.values()) == set(cases.PEERS)


def test_attention_cost_is_that_of_the_formula():
    cost = limits.attention_cost(8, 12, 197, 197, 64, "float32", "forward")
    assert cost.flops == 4 * 8 * 12 * 197 * 197 * 64
    assert cost.bytes == 4 * (8 * 12 * 197 * 64) * 4
    both = limits.attention_cost(8, 12, 197, 197, 64, "float32", "both")
    assert both.flops == pytest.approx(3.5 * cost.flops)


def test_memory_binds_where_it_is_slower_and_by_the_level_that_holds_the_data():
    peaks = Calibration(
        device="cpu",
        threads=1,
        source="test",
        fp32_flops=1e9,
        bf16_flops=2e9,
        bandwidth={"L2": 1e9, "L3": 1e8, "DRAM": 1e7},
        cache_bytes={"L2": 1000, "L3": 10_000},
    )
    small_one = limits.bind(Cost(flops=1e6, bytes=500.0), "float32", peaks)
    assert small_one.limit == "products" and small_one.floors["memory (L2)"] == 500 / 1e9
    middle = limits.bind(Cost(flops=1.0, bytes=5_000.0), "float32", peaks)
    assert middle.limit == "memory (L3)"
    large = limits.bind(Cost(flops=1.0, bytes=50_000.0), "bfloat16", peaks)
    assert large.limit == "memory (DRAM)" and large.peak_flops == 2e9
    assert limits.bind(Cost(flops=1.0, bytes=1.0), "float32", None).limit == ""


def test_real_images():
    pytest.importorskip("sklearn")
    pictures = data.photographs(4, 32, seed=3)
    assert pictures.shape == (4, 3, 32, 32) and pictures.dtype == torch.uint8
    assert torch.equal(pictures, data.photographs(4, 32, seed=3))
    assert pictures.float().std() > 10
    with pytest.raises(ValueError, match="expected size at most"):
        data.photographs(1, 4096)
    scans = data.digits(5)
    assert scans.shape == (5, 1, 8, 8) and 0 <= scans.min() < scans.max() <= 1
    assert data.digits(2, 16, channels=3).shape == (2, 3, 16, 16)


def test_openvino_holds_on_to_the_copy_of_a_strided_input():
    pytest.importorskip("openvino", reason="no openvino: pip install openvino")
    from patchgen_fast.bench.peers import open_vino

    case = next(case for case in CATALOGUE if case.op == "patch_embed" and case.device == "cpu")
    images = torch.randn(2, 32, 32, 3).permute(0, 3, 1, 2)
    weight, bias, pos = torch.randn(8, 3, 16, 16), torch.randn(8), torch.randn(4, 8)
    tensors = {"images": images, "weight": weight, "bias": bias, "pos_embed": pos, "prefix": None}
    run = open_vino.patch_embed(case, tensors)
    others = [torch.full((2, 3, 32, 32), 9e9) for _ in range(20)]  # would take the freed memory
    rows = torch.nn.functional.conv2d(images, weight, bias, stride=16).flatten(2).transpose(1, 2)
    torch.testing.assert_close(run.forward(), rows + pos, atol=1e-4, rtol=1e-4)
    del others
