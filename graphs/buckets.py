"""Chooses the step sizes to capture: pure functions of the maximum numbers of rows and tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

# (end of a range of sizes, distance between the sizes in the range). Sizes are dense where padding
# rows cost most. Beyond 256, sizes whose matmuls are slower than those of larger sizes are left out
# (four models, H100): 448 rows of an 8B model take 45 % longer than 512, and 832 rows of a 0.6B
# model 40 % longer than 896.
_STEPS = ((8, 1), (16, 2), (32, 4), (128, 8), (256, 16), (384, 64), (432, 48), (512, 80))


def ladder(max_size: int) -> list[int]:
    """Ascending bucket sizes, 128 apart beyond 512. The last size is `max_size` itself."""
    if max_size < 1:
        raise ValueError(f"the largest bucket must be at least 1, got {max_size}")
    sizes: list[int] = []
    start = 0
    for end, step in (*_STEPS, (max_size, 128)):
        sizes += range(start + step, end + 1, step)
        start = max(start, end)
    return [size for size in sizes if size < max_size] + [max_size]


class StepShape(NamedTuple):
    """Size and kind of a step.

    max_row_tokens: 1 in a decode step, where every row has one token, the row's last drawn token.
    0: rows have any number of tokens.
    """

    num_tokens: int
    num_rows: int
    max_row_tokens: int

    @property
    def is_decode(self) -> bool:
        """Whether the step reads all its tokens and lengths from the request rows on the device."""
        return self.max_row_tokens > 0


# Token counts of captured steps with prompts. A padding token costs a large step as much as a token
# and delays first tokens: by at most a quarter up to 8192 tokens, an eighth beyond.
_MIXED_TOKENS = (
    *(32, 64, 128, 192, 256, 384, 512, 768),
    *range(1024, 2048, 256),
    *range(2048, 8192, 512),
    *range(8192, 16384 + 1, 1024),
)
# (rows, largest token count for which this row count is captured). The maximum row count is always
# captured. Logits are computed for all rows, padding included, which a large step hardly notices.
_MIXED_ROWS = ((8, 768), (64, 1024), (192, 1024), (256, 2048))

# Steps of at most this size are captured before the first request.
_FIRST_ROWS, _FIRST_TOKENS = 4, 128


def step_shapes(max_rows: int, max_tokens: int) -> list[StepShape]:
    """The shapes to capture: decode steps of every bucket size, and steps with prompts.

    A captured step with prompts has more tokens than rows, as nearly every step with prompts has.
    """
    decode = [StepShape(size, size, 1) for size in ladder(max_rows)]
    row_counts = [(rows, limit) for rows, limit in _MIXED_ROWS if rows < max_rows]
    mixed = [
        StepShape(tokens, rows, 0)
        for tokens in _MIXED_TOKENS
        for rows, limit in (*row_counts, (max_rows, max_tokens))
        if rows < tokens <= min(limit, max_tokens)
    ]
    return decode + mixed


def is_needed_first(shape: StepShape) -> bool:
    """Whether to capture this shape before the first request: small batches and short prompts."""
    max_rows = _FIRST_ROWS if shape.is_decode else _MIXED_ROWS[0][0]
    return shape.num_rows <= max_rows and shape.num_tokens <= _FIRST_TOKENS


def shape_for(shape: StepShape, shapes: Iterable[StepShape]) -> StepShape | None:
    """The smallest of `shapes` that holds a step of this kind and size, or None."""
    return min(
        (
            s
            for s in shapes
            if s.max_row_tokens == shape.max_row_tokens
            and s.num_tokens >= shape.num_tokens
            and s.num_rows >= shape.num_rows
        ),
        default=None,
    )
