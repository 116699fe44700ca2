"""Training: it learns, it resumes exactly, it survives being stopped, and it runs on many."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

pytest.importorskip("safetensors", reason="checkpoints need safetensors")

from generator_fakes import config, random_data

from patchgen_fast.generator import checkpoint, distributed, training
from patchgen_fast.generator.data import ImageSet
from patchgen_fast.generator.files import FileError, replace_file
from patchgen_fast.generator.model import Task
from patchgen_fast.generator.settings import Settings
from patchgen_fast.generator.speed import FlopCounter
from patchgen_fast.generator.tasks import SHARES, images_of_step, new_step, new_task, seeded
from patchgen_fast.generator.training import Trainer

ALONE = distributed.World(0, 1, torch.device("cpu"))


def trainer(run, *, data=None, resume=None, world=ALONE, **changes):
    given = {"steps": 12, "batch": 8, "warmup": 2, "save_every": 4, "evaluate_every": 100}
    fast = changes.pop("fast", True)
    made = Trainer(
        config(), Settings(**{**given, **changes}), data or random_data(), run, world,
        fast=fast, quiet=True,
    )  # fmt: skip
    if resume is not None:
        made.resume(resume)
    return made


def losses(run, name="loss"):
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if line["kind"] == "train"}


def state(made):
    optimizer = [
        tensor
        for p in made.model.parameters()
        for tensor in made.optimizer.state.get(p, {}).values()
    ]
    weights = [*made.model.state_dict().values(), *made.averaged.state_dict().values()]
    return [*weights, *optimizer]


# ----------------------------------------------------------------------------------- learning


@pytest.mark.parametrize("fast", [False, True])
def test_the_loss_falls(tmp_path, fast):
    """Two images, each with its label, over and over."""
    data = random_data()
    two = ImageSet(data.train.images[:2].repeat(8, 1, 1, 1), torch.arange(2).repeat(8), "01")
    made = trainer(
        tmp_path, data=data._replace(train=two), fast=fast, steps=100, lr=1e-2, augment="none",
        label_dropout=0.0, save_every=100,
    )  # fmt: skip
    made.train()
    curve = losses(tmp_path, "loss_mse")
    assert curve[100] < 0.5 * curve[10]


def test_swapped_and_eager_train_alike(tmp_path):
    for name, fast in (("fast", True), ("eager", False)):
        trainer(tmp_path / name, fast=fast, steps=20).train()
    fast, eager = losses(tmp_path / "fast"), losses(tmp_path / "eager")
    assert fast == pytest.approx(eager, rel=1e-3)


def test_parts_of_a_step_add_up(tmp_path):
    for parts in (1, 4):
        trainer(tmp_path / str(parts), accumulate=parts, steps=20).train()
    assert losses(tmp_path / "1") == pytest.approx(losses(tmp_path / "4"), rel=1e-4)


def test_bfloat16_trains(tmp_path):
    for name, bf16 in (("bf16", True), ("fp32", False)):
        made = trainer(tmp_path / name, bf16=bf16, steps=20)
        made.train()
    assert losses(tmp_path / "bf16") == pytest.approx(losses(tmp_path / "fp32"), rel=0.1)
    assert losses(tmp_path / "bf16") != losses(tmp_path / "fp32")


def test_averages_follow_the_weights(tmp_path):
    made = trainer(tmp_path, ema=0.0)
    made.train()
    for average, weight in zip(
        made.averaged.module.parameters(), made.model.parameters(), strict=True
    ):
        torch.testing.assert_close(average, weight)


def test_the_learning_rate_rises_then_falls():
    settings = Settings(steps=100, warmup=10, lr=1.0)
    rates = [settings.lr_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == pytest.approx(1.0)
    assert rates[9:] == sorted(rates[9:], reverse=True) and rates[-1] < 0.01


# -------------------------------------------------------------------------------------- chance


def test_an_epoch_sees_every_image_once():
    seen = torch.cat([images_of_step(40, 8, seed=0, step=step) for step in range(5)])
    assert sorted(seen.tolist()) == list(range(40))
    again = torch.cat([images_of_step(40, 8, seed=0, step=step) for step in range(5, 10)])
    assert sorted(again.tolist()) == list(range(40)) and not torch.equal(seen, again)


def test_a_step_depends_on_its_seed_and_number_only():
    data, settings = random_data(), Settings(batch=8)
    one, same = (new_step(config(), settings, data.train, 5) for _ in range(2))
    other = new_step(config(), settings, data.train, 6)
    assert torch.equal(one.noise, same.noise) and torch.equal(one.images, same.images)
    assert not torch.equal(one.noise, other.noise)


def test_rows_of_a_step_are_those_of_the_whole_step():
    data, settings = random_data(), Settings(batch=8)
    for number in range(6):  # several kinds of tasks
        whole = new_step(config(order="random"), settings, data.train, number)
        half = new_step(config(order="random"), settings, data.train, number, slice(4, 8))
        expected = whole.rows(slice(4, 8), torch.device("cpu"))
        for ours, theirs in zip(
            (*half[:2], *half[3:5]), (*expected[:2], *expected[3:5]), strict=True
        ):
            assert torch.equal(ours, theirs)
        assert torch.equal(half.task.order, expected.task.order)
        assert half.task.given == expected.task.given and half.kind == expected.kind


@pytest.mark.parametrize("order", ["raster", "random"])
@pytest.mark.parametrize("kind", SHARES)
def test_tasks_leave_something_to_draw(kind, order):
    for seed in range(20):
        task = new_task(kind, config(order=order), 4, seeded(seed, 0))
        assert 0 <= task.given < 16
        assert (task.seen is None) == (kind == "class")
        if kind == "completion":
            assert torch.equal(task.seen, task.order[..., : task.given])


def test_operations_are_counted_as_three_forwards():
    """The products of the tiny model, written out: two operations for each multiplication."""
    step = new_step(config(), Settings(batch=8), random_data().train, 0)
    step = step._replace(task=Task(torch.arange(16)))
    images, patches, dim, width, layers = 8, 16, 16, 16, 2
    own = 4 * dim * dim + 2 * patches * dim  # qkv, out; scores, sums
    cross = 2 * dim * dim + 2 * 1 * dim  # query, out; one token of memory
    of_token = layers * (own + cross + 8 * dim * dim)
    of_memory = layers * 2 * dim * dim
    heads = dim * 4 + dim * 5 * width + 4 * width + 2 * width * 2 * width + width * 4
    of_image = of_memory + 64 * width + width * 5 * width  # keys and values; the time
    embedding = (patches - 1) * 4 * dim
    forward = 2 * images * (patches * (of_token + heads) + embedding + of_image)
    assert FlopCounter(config())(step) == 3 * forward


# ------------------------------------------------------------------------------------ resuming


def test_resuming_is_bit_identical(tmp_path):
    whole = trainer(tmp_path / "whole")
    whole.train()
    paths = sorted((tmp_path / "whole" / "checkpoints").iterdir())
    assert [path.name for path in paths] == ["step-00000008", "step-00000012"]
    resumed = trainer(tmp_path / "resumed", resume=paths[0])
    resumed.train()
    assert len(state(whole)) == len(state(resumed))
    assert all(torch.equal(a, b) for a, b in zip(state(whole), state(resumed), strict=True))


TRAIN = [sys.executable, "-m", "patchgen_fast", "train", "--device", "cpu", "--threads", "1"]
SMALL = ["--dim", "16", "--depth", "1", "--decoder-depth", "1", "--batch", "16", "--samples", "0"]


def started(run, after, *more):
    """`patchgen-fast train`, once it has written a checkpoint beyond step `after`."""
    process = subprocess.Popen(
        [*TRAIN, *SMALL, "--out", str(run), "--steps", "100000", "--save-every", "3",
         "--evaluate-every", "100000", *more],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while True:
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        saved = sorted(run.glob("checkpoints/step-*"))
        if saved and int(saved[-1].name.removeprefix("step-")) > after:
            return process
        time.sleep(0.05)


def test_a_killed_run_goes_on_and_an_interrupted_one_says_how(tmp_path):
    process = started(tmp_path, 0)
    process.kill()
    process.communicate(timeout=60)
    at_kill = checkpoint.describe(checkpoint.find(tmp_path)).step
    (tmp_path / "checkpoints" / ".step-00099999.77.part").mkdir()  # as if killed while it wrote
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"kind": "tra')

    process = started(tmp_path, at_kill, "--resume")
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130, told
    assert f"stopped by SIGINT; continue with --resume --out {tmp_path}" in told
    path = checkpoint.find(tmp_path)
    assert checkpoint.describe(path).step > at_kill
    assert checkpoint.describe(path).step >= max(losses(tmp_path), default=0)
    assert not list(tmp_path.glob("checkpoints/.step*"))
    loaded, _ = checkpoint.load_model(path)
    assert all(p.isfinite().all() for p in loaded.parameters())


# --------------------------------------------------------------------------------- checkpoints


def test_a_checkpoint_gives_back_the_model(tmp_path):
    made = trainer(tmp_path)
    made.train()
    loaded, description = checkpoint.load_model(checkpoint.find(tmp_path))
    assert description.config == made.config
    assert description.classes == made.data.classes and description.step == 12
    for name, tensor in made.averaged.module.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_a_full_disk_keeps_what_was_there(tmp_path, monkeypatch):
    made = trainer(tmp_path, steps=6)
    made.train()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def full(path, tensors):
        path.write_bytes(b"half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write_tensors", full)
    made.step = 7
    with pytest.raises(FileError, match="No space left on device. Free some space"):
        made.save()
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before


def test_a_limit_of_the_file_system_is_told_by_its_name(tmp_path):
    """What safetensors raises at a file that may not grow is a FileError too."""
    resource = pytest.importorskip("resource", reason="limits of POSIX")
    made = trainer(tmp_path, steps=2)
    made.train()
    before = sorted(tmp_path.rglob("*"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    made.step = 7
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        with pytest.raises(FileError, match="cannot write .*step-00000007"):
            made.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    made = trainer(tmp_path, steps=20, save_every=5)
    with torch.no_grad():
        made.model.decoder.start.fill_(float("nan"))
    with pytest.raises(ValueError, match="expected a finite loss, got .*nan.* at step 5"):
        made.train()
    assert not (tmp_path / "checkpoints").exists()


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    target = tmp_path / "file"
    target.write_text("old")

    def fails(partial):
        partial.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(FileError, match="cannot write"):
        replace_file(target, fails)
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda path: (path / "generator.json").write_text("{"), "is not JSON"),
        (lambda path: (path / "generator.json").write_text('{"kind": "x"}'), "version 1, in"),
        (lambda path: (path / "model.safetensors").write_bytes(b"12345678"), "cannot read"),
        (lambda path: (path / "model.safetensors").unlink(), "cannot read"),
        (
            lambda path: (path / "generator.json").write_text(
                (path / "generator.json").read_text().replace('"dim": 16', '"dim": 32', 1)
            ),
            "the weights of another model",
        ),
        (
            lambda path: (path / "generator.json").write_text(
                (path / "generator.json").read_text().replace('"raster"', '"zigzag"')
            ),
            "does not describe a generator",
        ),
    ],
)
def test_a_foreign_or_damaged_checkpoint_is_an_error(tmp_path, damage, match):
    made = trainer(tmp_path, steps=2)
    made.train()
    path = checkpoint.find(tmp_path)
    damage(path)
    with pytest.raises(FileError, match=match):
        checkpoint.load_model(path)


def test_no_checkpoint_is_an_error(tmp_path):
    with pytest.raises(FileError, match="a folder without one"):
        checkpoint.find(tmp_path)
    with pytest.raises(FileError, match="no such folder"):
        checkpoint.find(tmp_path / "none")


# ------------------------------------------------------------------------------ many processes

MANY = """
import sys, torch
sys.path.insert(0, {tests!r})
from pathlib import Path
from generator_fakes import config, random_data
from patchgen_fast.generator import checkpoint, distributed
from patchgen_fast.generator.settings import Settings
from patchgen_fast.generator.training import Trainer
torch.set_num_threads(1)
settings, run = Settings(steps=20, batch=8, warmup=2, save_every=10), Path({run!r})
with distributed.joined("cpu") as world:
    how = dict(fsdp={fsdp}, quiet=True)
    Trainer(config(), settings, random_data(), run, world, **how).train()
    resumed = Trainer(config(), settings, random_data(), run / "resumed", world, **how)
    resumed.resume(run / "checkpoints" / "step-00000010")
    resumed.train()
"""


@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp2"])
def test_two_processes_train_and_resume_as_one_does(tmp_path, fsdp):
    one, two = tmp_path / "one", tmp_path / "two"
    trainer(one, steps=20, save_every=10).train()
    script = tmp_path / "many.py"
    script.write_text(MANY.format(tests=os.path.dirname(__file__), run=str(two), fsdp=fsdp))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
         "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(script)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    assert losses(two / "resumed")[20] == pytest.approx(losses(one)[20], rel=1e-4)
    for name in ("model.safetensors", "training.safetensors"):
        ours = checkpoint.load_tensors(checkpoint.find(two) / name)
        alone = checkpoint.load_tensors(checkpoint.find(one) / name)
        assert ours.keys() == alone.keys()
        assert all(ours[key].shape == alone[key].shape for key in alone)


def test_a_batch_that_cannot_be_shared_is_an_error():
    world = distributed.World(0, 3, torch.device("cpu"))
    with pytest.raises(ValueError, match="3 processes with 1 parts each share evenly, got 8"):
        world.rows(8, 1)
    rows = [distributed.World(rank, 2, torch.device("cpu")).rows(8, 2) for rank in range(2)]
    halves = [slice(0, 2), slice(2, 4)]
    assert rows == [(slice(0, 4), halves), (slice(4, 8), halves)]


def test_a_batch_larger_than_the_data_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="at most the 20 training images"):
        trainer(tmp_path, batch=32)


@pytest.mark.parametrize(
    "changes", [{"steps": 0}, {"lr": -1.0}, {"lr": float("nan")}, {"ema": 1.5}, {"batch": 0}]
)
def test_settings_out_of_range_are_an_error(changes):
    with pytest.raises(ValueError, match=f"expected {next(iter(changes))} of"):
        Settings(**changes)


def test_interrupted_says_how_to_resume(tmp_path):
    assert str(training.Interrupted(15, tmp_path)) == (
        f"stopped by SIGTERM; continue with --resume --out {tmp_path}"
    )
