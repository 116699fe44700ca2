"""Few cases that hold every pair of choices, where the full product would be too many."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any


def pairwise(factors: dict[str, Sequence[Any]], tries: int = 24) -> list[dict[str, Any]]:
    """Choices of one value per factor such that every pair of values of two factors occurs.

    Greedy: each new case starts from a pair not yet seen and takes, of some random completions, the
    one that covers most unseen pairs. The same list every time.
    """
    random_source = random.Random(20)
    names = list(factors)
    unseen = {
        (a, i, b, j): None
        for a, b in itertools.combinations(names, 2)
        for i in range(len(factors[a]))
        for j in range(len(factors[b]))
    }

    def covered(case: dict[str, int]) -> list[tuple]:
        pairs = ((a, case[a], b, case[b]) for a, b in itertools.combinations(names, 2))
        return [pair for pair in pairs if pair in unseen]

    cases = []
    while unseen:
        a, i, b, j = next(iter(unseen))
        candidates = []
        for _ in range(tries):
            case = {name: random_source.randrange(len(factors[name])) for name in names}
            case[a], case[b] = i, j
            candidates.append(case)
        best = max(candidates, key=lambda case: len(covered(case)))
        for pair in covered(best):
            del unseen[pair]
        cases.append({name: factors[name][best[name]] for name in names})
    return cases
