"""The suite "ops" of `patchgen-fast bench` under pytest-benchmark; see conftest.py."""

from conftest import hand_over, parametrize


@parametrize("ops")
def test_ops(benchmark, measured, case, contender):
    hand_over(benchmark, measured(case), contender)
