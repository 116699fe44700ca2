"""Memory of dead results: found again, bounded, never shared, and no different to its users."""

from __future__ import annotations

import copy
import io
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading

import pytest
import torch

import patchgen_fast
from patchgen_fast import _native, layer_norm
from patchgen_fast.memory import empty_cache, kept_bytes, results_by_torch
from patchgen_fast.profiling.trace import peak_memory

MIB = 1 << 20


def keeps() -> bool:
    """Whether this torch has what it takes (2.11), and the kernels are there."""
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    return _native.status().loaded and version >= (2, 11)


pytestmark = pytest.mark.skipif(not keeps(), reason="no native kernels, or torch before 2.11")


def result(mib: float = 1, fill: float | None = None) -> torch.Tensor:
    """A result of a CPU kernel; with `fill`, of that number alone."""
    rows = torch.randn(int(mib * MIB) // 4 // 64, 64)
    if fill is None:
        return layer_norm(rows, backend="cpu")
    return layer_norm(rows, torch.zeros(64), torch.full((64,), fill), backend="cpu")


@pytest.fixture(autouse=True)
def nothing_kept():
    empty_cache()
    yield
    empty_cache()


def run(code: str, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", "from test_kept_memory import *\n" + code],
        cwd=os.path.dirname(__file__),
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )


def test_the_memory_of_a_dead_result_is_found_again():
    first = result()
    place = first.data_ptr()
    del first
    assert kept_bytes() == MIB
    again = result()
    assert again.data_ptr() == place
    assert kept_bytes() == 0


def test_small_results_are_the_c_librarys():
    result(0.125)
    assert kept_bytes() == 0


def test_a_live_result_is_nobody_elses():
    alive = [result(fill=float(i)) for i in range(5)]
    assert len({x.data_ptr() for x in alive}) == 5
    view = alive.pop()[17]
    for _ in range(3):
        result()
    for i, x in enumerate(alive):
        assert (x == i).all()
    assert (view == 4).all()


def test_a_block_serves_what_wastes_at_most_a_quarter():
    result(2)
    result(1.5)
    assert kept_bytes() == 3.5 * MIB
    small = result(1.25)
    assert kept_bytes() == 2 * MIB
    del small


def test_what_there_is_no_room_for_is_torchs():
    """Live results count too; nothing is unmapped for a result that comes once."""
    code = """
alive = [result(1), result(2)]
result(3)  # torch's
assert kept_bytes() == 0
alive.clear()
assert kept_bytes() == 3 * MIB
result(4)
assert kept_bytes() == 3 * MIB
result(2)
assert kept_bytes() == 3 * MIB
"""
    done = run(code, PATCHGEN_FAST_KEPT_MIB="5")
    assert done.returncode == 0, done.stderr


def test_a_block_that_nobody_wants_for_long_makes_room():
    code = """
alive = [result(0.5), result(4)]
alive.clear()
for _ in range(5000):
    result(0.5)
result(3)
assert kept_bytes() == 3.5 * MIB, kept_bytes()
"""
    done = run(code, PATCHGEN_FAST_KEPT_MIB="5")
    assert done.returncode == 0, done.stderr


def test_more_results_than_room_map_nothing_anew():
    """As in a training step: run again, they find what the first run mapped."""
    code = """
def step():
    return [result(0.25) for _ in range(40)]
step()
before = kept_bytes()
assert before == 5 * MIB
step()
assert kept_bytes() == before
"""
    done = run(code, PATCHGEN_FAST_KEPT_MIB="5")
    assert done.returncode == 0, done.stderr


def test_nothing_is_kept_where_0_is_asked():
    done = run("result(); assert kept_bytes() == 0", PATCHGEN_FAST_KEPT_MIB="0")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("wrong", ["much", "-1", "1.5", "99999999999999999999"])
def test_a_wrong_limit_is_an_error_of_the_call(wrong):
    done = run("result()", PATCHGEN_FAST_KEPT_MIB=wrong)
    assert done.returncode != 0
    assert "PATCHGEN_FAST_KEPT_MIB" in done.stderr and repr(wrong) in done.stderr


def test_empty_cache_hands_it_back():
    result(2)
    assert kept_bytes() > 0
    patchgen_fast.empty_cache()
    assert kept_bytes() == 0


def test_torchs_profiler_counts_results_where_it_is_asked_to():
    result()
    with results_by_torch():
        result()
    assert kept_bytes() == MIB  # neither used nor added to
    rows = torch.randn(MIB // 256, 64)
    assert peak_memory(lambda: layer_norm(rows, backend="cpu")) >= MIB


def test_threads_that_make_and_free_results():
    wrong = []

    def work(number: int) -> None:
        for i in range(40):
            fill = float(100 * number + i)
            x = result(0.5, fill)
            if not (x == fill).all():
                wrong.append(fill)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def _child(queue) -> None:
    torch.set_num_threads(1)
    queue.put(float(result(fill=3.0).sum()))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_goes_on():
    result()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_child, args=(queue,))
    process.start()
    assert queue.get(timeout=60) == 3.0 * MIB // 4
    process.join()


def test_a_result_travels_as_any_tensor():
    x = result(fill=2.0)
    expected = torch.full_like(x, 2.0)
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    copies = [pickle.loads(pickle.dumps(x)), copy.deepcopy(x), torch.load(file)]
    shared = result(fill=2.0).share_memory_()
    array = x.numpy()  # holds the memory when x is gone
    del x
    result(fill=5.0)
    for got in (*copies, shared, torch.from_numpy(array)):
        assert torch.equal(got, expected)
