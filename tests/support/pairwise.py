"""Pairwise testing: a small part of a grid of cases that contains every pair of values.

Most faults of a kernel need only one or two particular values, not five. A cover of all pairs
therefore finds nearly all faults that the full grid finds, with a fraction of its cases (Kuhn,
Wallace and Gallo, IEEE TSE 30(6), 2004).
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence

Case = tuple[Hashable, ...]


def pairwise_cover(cases: Sequence[Case]) -> list[int]:
    """Ascending indices of a subset of cases that contains every pair of values of all cases.

    Greedy and deterministic: repeatedly takes the first case with the most missing pairs. `cases`
    need not be a full grid. Of cases with a single value each, all distinct cases are kept.
    """
    pairs_of = [set(itertools.combinations(enumerate(case), min(2, len(case)))) for case in cases]
    missing = set().union(*pairs_of)
    chosen = []
    while missing:
        best = max(range(len(cases)), key=lambda index: len(pairs_of[index] & missing))
        chosen.append(best)
        missing -= pairs_of[best]
    return sorted(chosen)
