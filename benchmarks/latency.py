"""Latency of a batch that starts together: a grid of batch sizes and prompt lengths.

TTFT is the time of one token for the whole batch; TPOT is the time that each further token adds.
Both are measured the same way for every engine: as a caller of the offline API sees them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

from compiledllm.benchmarks.floor import (
    Ceilings,
    time_per_output_token_floor,
    time_to_first_token_floor,
)
from compiledllm.benchmarks.model import Model
from compiledllm.benchmarks.peers import Peer
from compiledllm.benchmarks.report import Row, against_floor, percentiles, spread
from compiledllm.benchmarks.workload import SampleRequest, random_requests

_WARMUP_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Cell:
    """One point of the grid: `batch` prompts of `input_len` tokens, `output_len` out of each."""

    batch: int
    input_len: int
    output_len: int

    def requests(self, vocab_size: int, seed: int, output_len: int) -> list[SampleRequest]:
        return random_requests(self.batch, self.input_len, output_len, vocab_size, seed)


@dataclass(frozen=True, slots=True)
class LatencyGrid:
    """The cells to measure, the repeats, and the seed of the prompts."""

    batch_sizes: Sequence[int]
    input_lens: Sequence[int]
    output_len: int
    repeats: int
    warmups: int
    seed: int
    vocab_size: int

    def cells(self) -> list[Cell]:
        pairs = itertools.product(self.batch_sizes, self.input_lens)
        return [Cell(batch, length, self.output_len) for batch, length in pairs]

    def num_measurements(self, num_peers: int) -> int:
        """How many times `measure_grid` calls `advance`."""
        return len(self.cells()) * num_peers * (self.warmups + self.repeats + 1)


def measure_grid(
    peers: Sequence[Peer], grid: LatencyGrid, advance: Callable[[str], None]
) -> Iterator[Row]:
    """Yield a row for each cell and engine, without floors. Within a cell the engines take turns.

    advance: called after each measurement with a description of it.
    """
    for cell in grid.cells():
        yield from _measure_cell(peers, cell, grid, advance)


def _measure_cell(
    peers: Sequence[Peer], cell: Cell, grid: LatencyGrid, advance: Callable[[str], None]
) -> Iterator[Row]:
    first: dict[str, list[float]] = {peer.name: [] for peer in peers}
    whole: dict[str, list[float]] = {peer.name: [] for peer in peers}
    for turn in range(-grid.warmups, grid.repeats):
        for peer in peers:
            tokens = cell.output_len if turn >= 0 else min(cell.output_len, _WARMUP_TOKENS)
            seed = grid.seed + 2 * turn
            one = peer.generate(cell.requests(grid.vocab_size, seed, 1)).seconds
            all_ = one
            if tokens > 1:
                requests = cell.requests(grid.vocab_size, seed + 1, tokens)
                all_ = peer.generate(requests).seconds
            if turn >= 0:
                first[peer.name].append(one)
                whole[peer.name].append(all_)
            advance(f"{peer.name}, batch {cell.batch}, input {cell.input_len}")
    for peer in peers:
        yield _row(peer, cell, grid, first[peer.name], whole[peer.name])
        advance(f"{peer.name}, batch {cell.batch}, input {cell.input_len}, single tokens")


def _row(
    peer: Peer, cell: Cell, grid: LatencyGrid, first: Sequence[float], whole: Sequence[float]
) -> Row:
    row: Row = {"engine": peer.name, **asdict(cell)}
    row["ttft_ms"] = spread([run_s * 1e3 for run_s in first])
    row["tpot_ms"] = row["itl_ms"] = row["step_ms"] = None
    tokens = cell.batch * cell.output_len
    row["output_tokens_per_s"] = spread([tokens / run_s for run_s in whole])
    if cell.output_len == 1:
        return row
    steps = cell.output_len - 1
    pairs = zip(first, whole, strict=True)
    row["tpot_ms"] = spread([(all_ - one) / steps * 1e3 for one, all_ in pairs])
    requests = cell.requests(grid.vocab_size, grid.seed + 2 * grid.repeats, cell.output_len)
    gaps = peer.inter_token_times(requests)
    row["itl_ms"] = gaps and percentiles([gap * 1e3 for gap in gaps])
    step = peer.step_times(requests)
    if step is not None:
        parts_s = {"host": step.host_s, "device": step.device_s, "between": step.between_s}
        row["step_ms"] = {name: s and s * 1e3 for name, s in parts_s.items()}
    return row


def add_floors(row: Row, model: Model, ceilings: Ceilings) -> None:
    """Add the floors of TTFT and TPOT, in ms, to the row."""
    spec, batch, input_len = model.spec, row["batch"], row["input_len"]
    ttft = tpot = None
    if spec is not None:
        ttft = 1e3 * time_to_first_token_floor(spec, ceilings, batch, input_len)
    row["ttft_floor_ms"] = against_floor(ttft, row["ttft_ms"]["median"])
    row["tpot_floor_ms"] = None
    if row["tpot_ms"] is not None:
        if spec is not None:
            lengths = (batch, input_len, row["output_len"])
            tpot = 1e3 * time_per_output_token_floor(spec, ceilings, *lengths)
        row["tpot_floor_ms"] = against_floor(tpot, row["tpot_ms"]["median"])
