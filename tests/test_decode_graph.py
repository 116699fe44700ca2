"""The decode step whose position is data, as a CUDA graph needs it, and what captures it.

Without a GPU what can be shown is the substance: the step draws what the usual one draws, reads
nothing on the host, and runs the same operators on the same shapes and buffers at every position.
"""

import pytest
import torch
from generator_fakes import model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import patchgen_fast
from patchgen_fast.generator import sampling
from patchgen_fast.generator.heads import SamplingOptions
from patchgen_fast.generator.model import Task
from patchgen_fast.generator.orders import drawing_order
from patchgen_fast.generator.sampling import Steps, noise_for, sample
from patchgen_fast.models import KeyValueCache
from patchgen_fast.models.graph import WARM_UP, GraphedStep
from patchgen_fast.modules.recording import recording
from patchgen_fast.ops import attention

RASTER = torch.arange(16)
LABELS = torch.tensor([1, 7, 10])
READS = {"item", "_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "_unique2",
         "equal"}  # fmt: skip
HEADS = ["flow", "pixels", "mse"]


def a_model(fast, head="flow", order="raster"):
    made = model(heads=(head,), order=order)
    if fast:
        patchgen_fast.swap(made)
    return made


def a_task(kind, order="raster"):
    places = drawing_order(order, (4, 4), batch=3, generator=torch.Generator().manual_seed(1))
    places = places.expand(3, -1)
    return Task(places) if kind == "class" else Task(places, seen=places[:, :6], given=6)


def first_step(made, task, guidance=1.0):
    """The steps of a drawing after its first, and a position for those that follow."""
    steps = Steps(
        made,
        made.heads[made.config.heads[0]],
        LABELS,
        task,
        noise_for(made, 3, 0),
        torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(2)),
        SamplingOptions(guidance=guidance, steps=2),
        use_cache=True,
    )
    steps.usual(task.given)
    return steps, torch.zeros(1, dtype=torch.int64)


@pytest.mark.parametrize("fast", [False, True], ids=["eager", "swapped"])
@pytest.mark.parametrize("order", ["raster", "random"])
@pytest.mark.parametrize("kind", ["class", "completion"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_steps_by_position_draw_what_the_usual_ones_draw(fast, order, kind, guidance):
    made, task = a_model(fast, order=order), a_task(kind, order)
    with torch.inference_mode():
        (usual, _), (steps, position) = (first_step(made, task, guidance) for _ in range(2))
        for number in range(task.given + 1, 16):
            usual.usual(number)
            steps.from_position(position.fill_(number))
    assert usual.canvas.flatten(2).abs().amax(2).gt(0).all(), "a patch was not drawn"
    torch.testing.assert_close(steps.canvas, usual.canvas, rtol=1e-4, atol=1e-4)


class Strict(TorchDispatchMode):
    """Every operator with the layouts of its tensors and its other arguments; no host reads."""

    def __init__(self):
        super().__init__()
        self.ran = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        leaves, _ = tree_flatten((args, kwargs or {}))
        by_mask = name in ("index", "index_put", "index_put_") and any(
            isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in leaves[1:]
        )
        assert name not in READS and not by_mask, f"{name} reads a tensor on the host"
        self.ran.append(
            (
                str(func),
                *(
                    (tuple(x.shape), x.stride(), x.dtype) if isinstance(x, Tensor) else x
                    for x in leaves
                ),
            )
        )
        return func(*args, **(kwargs or {}))


def refuse(*args, **kwargs):
    raise AssertionError("a tensor's values are read on the host")


@pytest.mark.parametrize("fast", [False, True], ids=["eager", "swapped"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_all_positions_run_the_same_operators_on_the_same_buffers(
    fast, head, guidance, monkeypatch
):
    made, task = a_model(fast, head), a_task("class")
    # As on a GPU, where lengths are not checked by their values.
    monkeypatch.setattr(attention, "is_readable", lambda x: False)
    with torch.inference_mode():
        steps, position = first_step(made, task, guidance)
        own = [layer.own for layer in steps.cache.layers]
        buffers = [steps.canvas, *(x for cache in own for x in (cache._keys, cache._values))]
        before = [x.data_ptr() for x in buffers]
        with monkeypatch.context() as patched:
            for way in ("tolist", "item", "numpy", "__bool__", "__int__", "__float__", "__index__"):
                patched.setattr(Tensor, way, refuse)
            traces = []
            for number in range(1, 16):
                position.fill_(number)
                with Strict() as strict:
                    steps.from_position(position)
                traces.append(strict.ran)
    assert len(traces[0]) > 20
    for trace in traces:
        assert trace == traces[0]
    now = [steps.canvas, *(x for cache in own for x in (cache._keys, cache._values))]
    assert [x.data_ptr() for x in now] == before


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.item(),
        lambda x: int(x),
        lambda x: bool(x),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: torch.arange(3)[x],
        lambda x: torch.equal(x, x),
    ],
)
def test_strict_notices_reads_on_the_host(read):
    with (
        torch.inference_mode(),
        Strict(),
        pytest.raises(AssertionError, match="reads a tensor on the host"),
    ):
        read(torch.ones((), dtype=torch.int64))


def test_strict_notices_the_growing_shapes_of_the_usual_step():
    with torch.inference_mode():
        steps, _ = first_step(a_model(False), a_task("class"))
        traces = []
        for number in (1, 2):
            with Strict() as strict:
                steps.usual(number)
            traces.append(strict.ran)
    assert traces[0] != traces[1]


def test_a_step_may_be_run_again_at_its_position():
    """As the first is, to warm up."""
    with torch.inference_mode():
        steps, position = first_step(a_model(True), a_task("class"))
        steps.from_position(position.fill_(1))
        once = steps.canvas.clone()
        for _ in range(WARM_UP):
            steps.from_position(position)
        assert torch.equal(steps.canvas, once)


def test_the_cache_takes_a_position_only_once_it_has_buffers():
    cache = KeyValueCache(4)
    position, lengths = torch.zeros(1, dtype=torch.int64), torch.ones(2, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="append to it first"):
        cache.follow(position, lengths)
    first = torch.randn(2, 1, 1, 8)
    cache.append(first, first)
    assert cache.seen() is None
    cache.follow(position, lengths)
    position.fill_(2)
    new = torch.randn(2, 1, 1, 8)
    keys, _ = cache.append(new, new)
    assert keys.shape == (2, 1, 4, 8)
    assert torch.equal(keys[:, :, 2:3], new)
    assert torch.equal(keys[:, :, :1], first)
    lengths.fill_(3)
    assert cache.seen().flatten().tolist() == [True, True, True, False] * 2


# ------------------------------------------------------------------- what captures, without a GPU


class Replayed:
    """Stands for a captured graph: runs the step, and counts."""

    def __init__(self, graphed, replays):
        self.graphed, self.replays = graphed, replays

    def replay(self):
        self.replays.append(self.graphed._position.item())
        self.graphed._step(self.graphed._position)


@pytest.fixture
def replays(monkeypatch):
    """Positions that were replayed, where the CPU is taken for a device that captures."""
    found = []
    monkeypatch.setattr(sampling, "may_capture", lambda device: True)
    monkeypatch.setattr(GraphedStep, "_capture", lambda self: Replayed(self, found))
    return found


@pytest.mark.parametrize("kind", ["class", "completion"])
def test_drawing_replays_every_step_but_the_first(kind, replays):
    made, task, images = a_model(True), a_task(kind), torch.rand(3, 1, 8, 8)
    arguments = (made, LABELS, task, noise_for(made, 3, 0), images)
    drawn = sample(*arguments)
    assert replays == list(range(task.given + 1, 16))
    replays.clear()
    plain = sample(*arguments, use_graph=False)
    sample(*arguments, use_cache=False)
    assert replays == []
    torch.testing.assert_close(drawn, plain, rtol=1e-4, atol=1e-4)


def test_a_step_that_cannot_be_captured_is_run_as_it_is(monkeypatch):
    def fail(self):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(sampling, "may_capture", lambda device: True)
    monkeypatch.setattr(GraphedStep, "_capture", fail)
    made, task = a_model(True), a_task("class")
    arguments = (made, LABELS, task, noise_for(made, 3, 0))
    with pytest.warns(RuntimeWarning, match="not permitted.*use_graph=False") as warned:
        drawn = sample(*arguments)
    assert len(warned) == 1
    torch.testing.assert_close(drawn, sample(*arguments, use_graph=False), rtol=1e-4, atol=1e-4)


def test_nothing_is_captured_on_a_cpu_or_while_attention_is_recorded():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert not sampling.may_capture(cpu)
    assert sampling.may_capture(gpu)
    with recording():
        assert not sampling.may_capture(gpu)
