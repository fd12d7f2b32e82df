"""A small part of a grid of cases in which every pair of values still meets.

Most faults of a kernel need one value or two together, not five: a cover of all pairs keeps what a
full grid finds at a fraction of its cases (Kuhn, Wallace and Gallo, IEEE TSE 30(6), 2004).
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence

Case = tuple[Hashable, ...]


def pairwise_cover(cases: Sequence[Case]) -> list[int]:
    """Indices, in order, of cases that hold every pair of values that the cases hold.

    Greedy and deterministic: the case with the most pairs that are still missing, the first of
    equals. `cases` need not be a full grid. Of cases with one value each, all differing are kept.
    """
    pairs_of = [set(itertools.combinations(enumerate(case), min(2, len(case)))) for case in cases]
    missing = set().union(*pairs_of)
    chosen = []
    while missing:
        best = max(range(len(cases)), key=lambda index: len(pairs_of[index] & missing))
        chosen.append(best)
        missing -= pairs_of[best]
    return sorted(chosen)
