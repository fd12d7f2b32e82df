"""Inputs of ragged steps for the ops of state layers, and comparisons with float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from compiledllm.kernels.backend import make_row_bound
from compiledllm.kernels.delta_rule import gated_delta_rule_reference
from compiledllm.kernels.delta_rule_triton import delta_rule

# (tokens in this step, tokens before it) of each batch row.
STEPS: dict[str, list[tuple[int, int]]] = {
    "decode": [(1, 7), (1, 0), (1, 64), (1, 1)],
    "short": [(2, 0), (0, 9), (1, 3), (3, 1), (2, 5), (1, 0)],
    "edges": [(63, 0), (64, 3), (65, 0), (0, 0), (65, 200)],
    "mixed": [(1, 40), (200, 0), (1, 0), (130, 6), (0, 0), (2, 2), (1, 999)],
    "one": [(200, 17)],
}
NUM_REQUEST_ROWS = 11
# Steps with snapshots: the step, and for each batch row the border of its snapshot (0: none).
KEPT: dict[str, tuple[list[tuple[int, int]], list[int]]] = {
    "in chunks": ([(150, 6), (70, 0), (1, 4), (65, 9), (20, 3)], [130, 48, 0, 1, 16]),
    "between chunks": ([(130, 0), (0, 0), (192, 64), (65, 0)], [64, 0, 128, 64]),
    "at ends": ([(65, 0), (200, 50), (2, 7), (64, 1)], [63, 199, 1, 0]),
}


class Rows(NamedTuple):
    """The last arguments of the state ops. `query_start_loc` has an empty row at the end."""

    rows: Tensor  # int64 [rows]
    query_start_loc: Tensor  # int32 [rows + 2]
    seq_lens: Tensor  # int32 [rows + 1]


def make_rows(step: list[tuple[int, int]], device: str) -> Rows:
    """Every batch row owns a different request row, in random order."""
    counts = torch.tensor([0, *(count for count, _ in step), 0])
    lengths = torch.tensor([*(count + before for count, before in step), 0])
    owned = torch.randperm(NUM_REQUEST_ROWS)[: len(step)]
    return Rows(owned.to(device), counts.cumsum(0).int().to(device), lengths.int().to(device))


def row_bound(step: list[tuple[int, int]], device: str) -> Tensor:
    """The bound of tokens per row: 1 for a decode step, otherwise 0 (unknown)."""
    is_decode = max(count for count, _ in step) == 1
    return make_row_bound(1 if is_decode else 0, torch.device(device))


def num_tokens(step: list[tuple[int, int]]) -> int:
    return sum(count for count, _ in step)


def make_snapshots(rows: Rows, borders: list[int]) -> Tensor:
    """int64 [rows + 1, 2]: the borders and, for each, a request row that no batch row owns."""
    free = iter(set(range(NUM_REQUEST_ROWS)) - set(rows.rows.tolist()))
    kept = [(border, next(free) if border else 0) for border in borders]
    return torch.tensor([*kept, (0, 0)], device=rows.rows.device)


def owned_by_nobody(rows: Rows, snapshots: Tensor | None = None) -> list[int]:
    """Request rows that must stay as they are: those without a batch row, or without tokens."""
    counts = rows.query_start_loc.diff().tolist()
    busy = {own for own, count in zip(rows.rows.tolist(), counts, strict=False) if count}
    busy |= {slot for border, slot in ([] if snapshots is None else snapshots.tolist()) if border}
    return sorted(set(range(NUM_REQUEST_ROWS)) - busy)


class DeltaInputs:
    """The arguments of `gated_delta_rule`, in order, for a ragged step.

    Query, key and value are parts of one tensor, as after a convolution. States of new requests
    hold NaN, which must not be read.
    """

    def __init__(
        self,
        step: list[tuple[int, int]],
        heads: tuple[int, int],  # key heads, value heads
        dims: tuple[int, int],  # of a key, of a value
        dtype: torch.dtype = torch.float32,
        state_dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        borders: list[int] | None = None,  # of each batch row: the border of its snapshot
    ) -> None:
        torch.manual_seed(sum(heads) + sum(dims))
        (num_keys, num_values), (key_dim, value_dim) = heads, dims
        tokens = num_tokens(step)
        sizes = num_keys * key_dim, num_keys * key_dim, num_values * value_dim
        mixed = torch.randn(tokens, sum(sizes), device=device).to(dtype)
        q, k, v = mixed.split(sizes, dim=1)
        self.query, self.key = (x.view(tokens, num_keys, key_dim) for x in (q, k))
        self.value = v.view(tokens, num_values, value_dim)
        # Decays as trained models have them: some heads forget at once, others hardly at all.
        self.log_decay_rate = torch.rand(num_values, device=device).mul(6).sub(4)
        self.step_bias = torch.randn(num_values, device=device)
        gates = torch.randn(tokens, 2 * num_values, device=device).mul(2).to(dtype)
        self.b, self.a = gates.chunk(2, dim=1)
        shape = NUM_REQUEST_ROWS, num_values, key_dim, value_dim
        self.state = torch.randn(shape, device=device).mul(0.3).to(state_dtype)
        self.rows = make_rows(step, device)
        self.row_bound = row_bound(step, device)
        self.snapshots = None if borders is None else make_snapshots(self.rows, borders)
        for own, (_, before) in zip(self.rows.rows.tolist(), step, strict=True):
            if not before:
                self.state[own] = float("nan")

    @property
    def tokens(self) -> list[Tensor]:
        """The arguments with a first dimension of tokens."""
        return [self.query, self.key, self.value, self.a, self.b]

    @property
    def of_heads(self) -> list[Tensor]:
        return [self.log_decay_rate, self.step_bias]

    def __iter__(self) -> Iterator[Tensor]:
        tensors = *self.tokens, *self.of_heads, self.state, *self.rows, self.row_bound
        return iter(tensors if self.snapshots is None else (*tensors, self.snapshots))

    def exact(self) -> tuple[Tensor, Tensor]:
        """Output and states in float64, from the same inputs; leaves `state` as it is."""
        state = self.state.double()
        inputs = [x.double() for x in (*self.tokens, *self.of_heads)]
        return gated_delta_rule_reference(*inputs, state, *self.rows, self.snapshots), state


def _same_keys(case: DeltaInputs) -> None:
    """One token again and again, written at full rate and never forgotten."""
    case.key.copy_(case.key[:1].clone())
    case.b.fill_(100)
    case.a.fill_(-300)


def _similar_keys(case: DeltaInputs) -> None:
    case.key.copy_(case.key[:1] + 0.1 * case.key)
    case.b.fill_(100)
    case.log_decay_rate.sub_(7)


def _forgetting(case: DeltaInputs) -> None:
    """Some tokens forget everything: exp of their decay, or of its inverse, is out of range."""
    case.a[::7] = 300 / case.log_decay_rate.exp()


def _zero_keys(case: DeltaInputs) -> None:
    case.key[::3] = 0
    case.query[::5] = 0
    case.b[::4] = -1000


# Changes of the inputs by which a chunk's triangular system is hard to invert, or by which decays
# leave the range of floats.
HARD_CASES: dict[str, Callable[[DeltaInputs], None]] = {
    "same keys": _same_keys,
    "similar keys": _similar_keys,
    "forgetting": _forgetting,
    "zero keys": _zero_keys,
}


def assert_near(case: DeltaInputs, float32_error: float = 3e-5) -> None:
    """Output and states of `delta_rule` are near those in float64, and no other state changes.

    The error's norm is at most `float32_error` of the exact result's in float32. In bfloat16, to
    which chunks round state, inverse, scores and updates before products, it is at most 1e-2; the
    rounding of the result alone is 1.7e-3.
    """
    expected, states = case.exact()
    idle = owned_by_nobody(case.rows, case.snapshots)
    busy = sorted(set(range(NUM_REQUEST_ROWS)) - set(idle))
    untouched = case.state[idle].clone()
    out = delta_rule(*case)
    largest = float32_error if case.value.dtype == torch.float32 else 1e-2
    assert out.dtype == case.value.dtype
    assert relative_error(out, expected) < largest
    assert relative_error(case.state[busy], states[busy]) < largest
    torch.testing.assert_close(case.state[idle], untouched, atol=0, rtol=0, equal_nan=True)


def relative_error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()
