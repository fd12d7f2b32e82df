"""Buckets: every batch fits one, and few padded rows are computed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compiledllm.graphs.buckets import StepShape, ladder, shape_for, step_shapes

max_sizes = st.integers(1, 2000)


def bucket_for(size: int, sizes: list[int]) -> int | None:
    """The batch size of the captured decode step for `size` requests."""
    shape = shape_for(StepShape(size, size, 1), [StepShape(s, s, 1) for s in sizes])
    return shape and shape.num_rows


@given(max_sizes)
def test_ladder_ascends_from_one_to_the_largest_size(max_size: int) -> None:
    sizes = ladder(max_size)
    assert sizes[0] == 1
    assert sizes[-1] == max_size
    assert sizes == sorted(set(sizes))


@given(max_sizes, max_sizes)
def test_batch_gets_the_smallest_bucket_that_holds_it(max_size: int, size: int) -> None:
    sizes = ladder(max_size)
    holding = [bucket for bucket in sizes if bucket >= size]
    assert bucket_for(size, sizes) == (holding[0] if holding else None)


@given(max_sizes.flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))))
def test_every_batch_fits_with_a_quarter_of_padding_at_most(case: tuple[int, int]) -> None:
    max_size, size = case
    bucket = bucket_for(size, ladder(max_size))
    assert bucket is not None
    assert 0 <= bucket - size <= size // 4
    assert bucket <= max_size


def test_small_batches_are_never_padded() -> None:
    assert ladder(8) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [bucket_for(size, ladder(64)) for size in range(1, 9)] == list(range(1, 9))


def test_largest_size_is_a_bucket_also_between_two_steps() -> None:
    assert ladder(13) == [*range(1, 9), 10, 12, 13]
    assert ladder(1) == [1]
    assert ladder(600)[-4:] == [384, 432, 512, 600]


def test_ladder_stays_short() -> None:
    assert len(ladder(256)) <= 36
    assert len(ladder(1024)) <= 44


def test_batch_above_the_largest_bucket_has_none() -> None:
    assert bucket_for(9, ladder(8)) is None
    assert bucket_for(1, []) is None


@pytest.mark.parametrize("max_size", [0, -3])
def test_ladder_without_a_size_is_refused(max_size: int) -> None:
    with pytest.raises(ValueError, match=f"must be at least 1, got {max_size}"):
        ladder(max_size)


# -- steps with prompts in them --------------------------------------------------------------------


@given(st.integers(1, 600), st.integers(1, 9000))
def test_shapes_have_more_tokens_than_rows_unless_they_decode(rows: int, tokens: int) -> None:
    """The kernels take a step with fewer tokens than rows, an empty one included, for a decode."""
    shapes = step_shapes(rows, tokens)
    assert len(set(shapes)) == len(shapes)
    assert [s.num_rows for s in shapes if s.is_decode] == ladder(rows)
    for shape in shapes:
        assert shape.num_rows <= rows
        if not shape.is_decode:
            assert shape.num_rows < shape.num_tokens <= tokens


@pytest.mark.parametrize("tokens", [1024, 8192, 16384])
def test_a_full_step_is_captured_whatever_its_rows(tokens: int) -> None:
    for rows in (1, 9, 200, 512):
        found = shape_for(StepShape(tokens, rows, 0), step_shapes(512, tokens))
        assert found is not None and found.num_tokens == tokens


@given(st.integers(1, 300), st.integers(1, 4000), st.booleans())
def test_a_step_gets_the_smallest_shape_of_its_kind(
    rows: int, tokens: int, is_decode: bool
) -> None:
    shapes = step_shapes(256, 8192)
    wanted = StepShape(rows if is_decode else tokens, rows, is_decode)
    found = shape_for(wanted, shapes)
    fits = [
        s
        for s in shapes
        if s.is_decode == is_decode and s.num_rows >= rows and s.num_tokens >= wanted.num_tokens
    ]
    assert found == (min(fits) if fits else None)


@given(st.integers(1, 512), st.integers(1024, 16384))
def test_large_steps_are_padded_by_a_quarter_at_most(rows: int, tokens: int) -> None:
    found = shape_for(StepShape(tokens, rows, 0), step_shapes(512, 16384))
    assert found is not None
    assert found.num_tokens <= tokens * (1.25 if tokens < 8192 else 1.125)


def test_captures_stay_few() -> None:
    assert len(step_shapes(512, 16384)) <= 100
