"""The suite "layers" of `patchgen-fast bench` under pytest-benchmark; see conftest.py."""

from conftest import hand_over, parametrize


@parametrize("layers")
def test_layers(benchmark, measured, case, contender):
    hand_over(benchmark, measured(case), contender)
