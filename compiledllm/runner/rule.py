"""The interface of rules for logits, `Rule`, and the rows that rules edit together, `Draw`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from compiledllm.runner.device import to_device
from compiledllm.types import NewRequest

Tensors = TypeVar("Tensors")


class Draw:
    """Request rows with rules that draw their next tokens together.

    rows, positions: int64 [rows], the request rows and the positions of the tokens to be drawn.
    last_token_ids: int64 [rows], on the device; None if no rule reads the last tokens.
    """

    def __init__(
        self, rows: np.ndarray, positions: np.ndarray, last_token_ids: Tensor | None = None
    ) -> None:
        self.rows = rows
        self.positions = positions
        self.last_token_ids = last_token_ids
        self.key = rows.tobytes()

    def among(self, chosen: Iterable[int]) -> list[tuple[int, int]]:
        """(batch index, request row) of the rows that are in `chosen`."""
        return [(index, row) for index, row in enumerate(self.rows.tolist()) if row in chosen]


class Rule(ABC):
    """One kind of change to logits: its state for each request row that asks for the change."""

    follows_output: ClassVar[bool] = False  # whether the host must `record` each drawn token

    @abstractmethod
    def fill(self, row: int, request: NewRequest) -> bool:
        """Take a request into a row. Returns whether the request needs this kind of change."""

    @abstractmethod
    def release(self, row: int) -> None:
        """Drop the state of a row. Called only for rows for which `fill` returned true."""

    def record(self, row: int, token_id: int) -> None:  # noqa: B027
        """Note a drawn token of the row, once it has reached the host; -1 if no token was drawn."""

    @abstractmethod
    def apply(self, logits: Tensor, draw: Draw) -> dict[int, str]:
        """Edit logits, float32 [rows, vocab], in place. Returns error messages by batch index."""


class KeptTensors(Generic[Tensors]):
    """Device tensors that are kept from draw to draw, as long as the same rows draw.

    make: makes the tensors for the rows of a draw.
    """

    def __init__(self, make: Callable[[Draw], Tensors]) -> None:
        self._make = make
        self._last: tuple[bytes, Tensors] | None = None

    def clear(self) -> None:
        """Drop the tensors, because the request of a row has changed."""
        self._last = None

    def of(self, draw: Draw, key: bytes = b"") -> Tensors:
        """The tensors for the rows of `draw`. key: bytes of other values they depend on."""
        if self._last is None or self._last[0] != draw.key + key:
            self._last = draw.key + key, self._make(draw)
        return self._last[1]


def columns(
    lines: list[Any], device: torch.device, *dtypes: torch.dtype
) -> tuple[Tensor, ...] | None:
    """The columns of a list of tuples, one device tensor each; None for an empty list."""
    if not lines:
        return None
    arrays = map(np.array, zip(*lines, strict=True))
    return tuple(
        to_device(array, device, dtype) for array, dtype in zip(arrays, dtypes, strict=True)
    )
