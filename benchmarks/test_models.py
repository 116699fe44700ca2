"""The suite "models" of `patchgen-fast bench` under pytest-benchmark; see conftest.py."""

from conftest import hand_over, parametrize


@parametrize("models")
def test_models(benchmark, measured, case, contender):
    hand_over(benchmark, measured(case), contender)
