"""A cover of all pairs is what it says, and small."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from tests.support.pairwise import Case, pairwise_cover

grids = st.lists(st.integers(1, 4), min_size=1, max_size=5).map(
    lambda sizes: list(itertools.product(*(range(size) for size in sizes)))
)


def pairs(cases: list[Case]) -> set[tuple[tuple[int, object], ...]]:
    return {
        pair
        for case in cases
        for pair in itertools.combinations(enumerate(case), min(2, len(case)))
    }


@given(grids, st.data())
def test_every_pair_of_the_cases_is_in_the_cover(grid: list[Case], data: st.DataObject) -> None:
    cases = data.draw(st.lists(st.sampled_from(grid), unique=True))  # not all combinations exist
    chosen = pairwise_cover(cases)
    assert chosen == sorted(set(chosen))
    assert pairs([cases[index] for index in chosen]) == pairs(cases)


def test_a_cover_is_a_small_part_of_a_large_grid() -> None:
    grid = list(itertools.product(range(3), range(3), range(2), range(3), range(2)))
    assert len(pairwise_cover(grid)) <= 14 < len(grid) == 108
    alone = [(value,) for value in range(7)]
    assert pairwise_cover(alone) == list(range(7))
