"""Device-resident state of live requests: one stable row each, until finish or preemption.

A step gathers its inputs from rows. Only small diffs go to the device: a new request's parameters,
new block ids. The last sampled token stays where the sampler wrote it.
"""

from __future__ import annotations

import numpy as np
import torch

from compiledllm.types import NewRequest, SchedulerOutput


class RequestTable:
    """Rows of request state, at addresses that never change.

    On the device, one row more than `max_num_seqs` (the last is for padding): block_tables int32
    [rows, max_blocks]; last_token_ids, num_computed_tokens and seeds int64 [rows]; temperatures
    float32 [rows]. On the host: the tokens known at admission and the sampling parameters.
    """

    def __init__(self, max_num_seqs: int, max_blocks: int, device: torch.device) -> None:
        self.device = device
        self.padding_row = max_num_seqs
        num_rows = max_num_seqs + 1
        self.block_tables = torch.zeros(num_rows, max_blocks, dtype=torch.int32, device=device)
        self.last_token_ids = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.num_computed_tokens = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.seeds = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.temperatures = torch.zeros(num_rows, dtype=torch.float32, device=device)
        self.token_ids: list[np.ndarray] = [np.empty(0, np.int64)] * max_num_seqs
        self.temperature = np.zeros(max_num_seqs, np.float32)  # 0: greedy
        self.top_k = np.zeros(max_num_seqs, np.int64)  # 0: all
        self.top_p = np.ones(max_num_seqs, np.float32)
        self.filters = np.zeros(max_num_seqs, bool)  # samples, and not from all tokens
        self.seed = np.zeros(max_num_seqs, np.int64)
        self.first_stop_position = np.zeros(max_num_seqs, np.int64)  # from min_tokens
        self.stop_token_ids: list[list[int]] = [[]] * max_num_seqs
        self._num_blocks = [0] * max_num_seqs
        self._row_of: dict[str, int] = {}
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))

    def rows_of(self, request_ids: list[str]) -> np.ndarray:
        """int64 [request_ids]."""
        return np.array([self._row_of[request_id] for request_id in request_ids], np.int64)

    def apply(self, step: SchedulerOutput) -> None:
        """Release, fill and extend rows as the scheduler says."""
        for request_id in step.freed_request_ids:
            self._release(request_id)
        if step.new_requests:
            self._fill_all(step)
        self._append_blocks(step)

    def clear(self) -> None:
        """Release every row."""
        for request_id in list(self._row_of):
            self._release(request_id)

    def _release(self, request_id: str) -> None:
        self._free_rows.append(self._row_of.pop(request_id))

    def _fill_all(self, step: SchedulerOutput) -> None:
        computed = {line.request_id: line.num_computed_tokens for line in step.scheduled}
        rows = [self._fill(request) for request in step.new_requests]
        last = [request.token_ids[-1] for request in step.new_requests]
        counts = [computed[request.request_id] for request in step.new_requests]
        # Temperatures travel as the bits of a float64: all of a request in one copy.
        heat = self.temperature[rows].astype(np.float64).view(np.int64)
        packed = to_device(np.array([rows, last, counts, self.seed[rows], heat]), self.device)
        self.last_token_ids[packed[0]] = packed[1]
        self.num_computed_tokens[packed[0]] = packed[2]
        self.seeds[packed[0]] = packed[3]
        self.temperatures[packed[0]] = packed[4].view(torch.float64).float()

    def _fill(self, request: NewRequest) -> int:
        row = self._free_rows.pop()
        self._row_of[request.request_id] = row
        self.token_ids[row] = np.asarray(request.token_ids, np.int64)
        params = request.sampling_params
        self.temperature[row] = 0.0 if params.is_greedy else params.temperature
        self.top_k[row] = max(params.top_k, 0)
        self.top_p[row] = params.top_p
        restricted = self.top_k[row] > 0 or params.top_p < 1
        self.filters[row] = restricted and not params.is_greedy
        self.seed[row] = request.seed
        self.first_stop_position[row] = request.num_prompt_tokens + params.min_tokens
        self.stop_token_ids[row] = list(request.stop_token_ids)
        self._num_blocks[row] = 0
        return row

    def _append_blocks(self, step: SchedulerOutput) -> None:
        rows: list[int] = []
        columns: list[int] = []
        block_ids: list[int] = []
        for line in step.scheduled:
            if line.new_block_ids:
                row, count = self._row_of[line.request_id], len(line.new_block_ids)
                rows += [row] * count
                columns += range(self._num_blocks[row], self._num_blocks[row] + count)
                block_ids += line.new_block_ids
                self._num_blocks[row] += count
        if rows:
            packed = to_device(np.array([rows, columns, block_ids]), self.device)
            self.block_tables[packed[0], packed[1]] = packed[2].int()


def to_device(
    values: np.ndarray, device: torch.device, dtype: torch.dtype = torch.int64
) -> torch.Tensor:
    """A copy on the device that does not wait for the work queued there.

    Pageable memory would: its copy starts only once the device has caught up.
    """
    tensor = torch.from_numpy(values).to(dtype)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
