"""Ragged rows in Triton: assigns the programs of a grid of fixed size to pieces of rows."""

# Triton infers a kernel's types from each call, which mypy cannot follow.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_of_piece(index, query_start_loc, num_rows, SIZE: tl.constexpr):
    """The row of a piece, and the number of the row's first piece. A piece has up to SIZE tokens.

    The pieces of row r begin at query_start_loc[r] // SIZE + r and cover all its tokens, so that
    `num_tokens // SIZE + num_rows` pieces suffice, however the tokens are distributed. Some pieces
    begin past the end of their row and have no tokens.
    """
    low, high = 0, num_rows
    while low < high:
        middle = (low + high) // 2
        if tl.load(query_start_loc + middle) // SIZE + middle <= index:
            low = middle + 1
        else:
            high = middle
    row = low - 1
    return row, tl.load(query_start_loc + row) // SIZE + row
