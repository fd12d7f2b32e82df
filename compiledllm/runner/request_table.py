"""Device-resident state of running requests. A request keeps its row until finish or preemption.

A step gathers its inputs from the rows. The host sends only changes: the parameters of new requests
and new block ids. A step writes each drawn token into its row on the device, where the next step
reads the token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from compiledllm.kernels.sampling import SamplingRows
from compiledllm.runner.device import to_device
from compiledllm.runner.logits_rules import LogitsRules
from compiledllm.runner.pooling import PoolingRows
from compiledllm.sampling_params import ALL_TOKENS, SamplingParams
from compiledllm.types import NewRequest, SchedulerOutput


class RequestTable:
    """Rows of request state, in tensors whose addresses never change.

    On the device there are `max_num_seqs` + 1 rows; the last row is for padding. splits: per group
    of layers, see `KVLayout`. block_tables: per group, int32 [rows, split * max_blocks], in which
    the entries of the group's tables alternate. last_token_ids, num_computed_tokens: int64 [rows].
    sampling: the sampling parameters, a tensor [rows] each.
    On the host, per row: the tokens known at admission, the log probabilities to return, the rules
    for logits, and how the row pools.
    """

    def __init__(
        self,
        max_num_seqs: int,
        max_blocks: int,
        vocab_size: int,
        device: torch.device,
        splits: Sequence[int] = (1,),
    ) -> None:
        self.device = device
        self.padding_row = max_num_seqs
        self._vocab_size = vocab_size
        num_rows = max_num_seqs + 1
        widths = [split * max_blocks for split in splits]
        sizes = [num_rows * width for width in widths]
        self._block_ids = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
        self.block_tables = [
            entries.view(num_rows, width)
            for entries, width in zip(torch.split(self._block_ids, sizes), widths, strict=True)
        ]
        # Per block table: index of its first entry in `_block_ids`, width of a row, and the split.
        self._tables = [
            (sum(sizes[:group]) + turn, widths[group], split)
            for group, split in enumerate(splits)
            for turn in range(split)
        ]
        self.last_token_ids = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.num_computed_tokens = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.sampling = SamplingRows.zeros(num_rows, device)
        self.rules = LogitsRules(max_num_seqs, vocab_size, device)
        self.pooling = PoolingRows(max_num_seqs, device)
        self.token_ids: list[np.ndarray] = [np.empty(0, np.int64)] * max_num_seqs
        self.params: list[SamplingParams | None] = [None] * max_num_seqs
        self.num_logprobs = np.zeros(max_num_seqs, np.int64)  # number of most likely tokens
        self.named_logprobs: list[list[int]] = [[]] * max_num_seqs  # further token ids
        self.num_prompt_tokens = np.zeros(max_num_seqs, np.int64)
        self.wants_logprobs = np.zeros(max_num_seqs, bool)
        self.wants_prompt_logprobs = np.zeros(max_num_seqs, bool)
        # Grammars and logits processors are known to a model's first rank only.
        self.draws_on_first_rank = np.zeros(max_num_seqs, bool)
        self._num_blocks = [0] * max_num_seqs
        self._row_of: dict[str, int] = {}
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))

    def row_of(self, request_id: str) -> int:
        return self._row_of[request_id]

    def rows_of(self, request_ids: Sequence[str]) -> np.ndarray:
        """The rows of these requests, int64 [request_ids]."""
        return np.array(list(map(self._row_of.__getitem__, request_ids)), np.int64)

    def apply(self, step: SchedulerOutput) -> None:
        """Release rows, fill rows and append blocks as the scheduler says."""
        for request_id in step.freed_request_ids:
            self._release(request_id)
        if step.new_requests:
            self._fill_all(step)
        self._append_blocks(step)

    def clear(self) -> None:
        """Release every row."""
        for request_id in list(self._row_of):
            self._release(request_id)

    def record(self, request_id: str, token_id: int) -> None:
        """Tell the request's rules of a drawn token, once the token has reached the host."""
        row = self._row_of.get(request_id)
        if row is not None:
            self.rules.record(row, token_id)

    def _release(self, request_id: str) -> None:
        row = self._row_of.pop(request_id)
        self.rules.release(row)
        self.pooling.release(row)
        self._free_rows.append(row)

    def _fill_all(self, step: SchedulerOutput) -> None:
        computed = {line.request_id: line.num_computed_tokens for line in step.scheduled}
        new = step.new_requests
        rows = [self._fill(request) for request in new]
        params = [request.spec.sampling_params for request in new]
        integers = [
            rows,
            [request.token_ids[-1] for request in new],
            [computed[request.spec.request_id] for request in new],
            [request.spec.seed for request in new],
            [min(max(p.top_k, 0), 2**31 - 1) for p in params],
        ]
        # Floats are copied as the bits of float64, so that one copy has all parameters.
        fractions = [
            [0.0 if p.is_greedy else p.temperature for p in params],
            [p.top_p for p in params],
            [p.min_p for p in params],
        ]
        bits = np.array(fractions, np.float64).view(np.int64)
        packed = to_device(np.concatenate((np.array(integers, np.int64), bits)), self.device)
        index, floats = packed[0], packed[5:].view(torch.float64).float()
        self.last_token_ids[index] = packed[1]
        self.num_computed_tokens[index] = packed[2]
        self.sampling.seeds[index] = packed[3]
        self.sampling.top_k[index] = packed[4].int()
        self.sampling.temperature[index] = floats[0]
        self.sampling.top_p[index] = floats[1]
        self.sampling.min_p[index] = floats[2]

    def _fill(self, request: NewRequest) -> int:
        row = self._free_rows.pop()
        self._row_of[request.spec.request_id] = row
        params = request.spec.sampling_params
        ids = request.token_ids
        self.token_ids[row] = np.fromiter(ids, np.int64, len(ids))  # twice as fast as asarray
        self.params[row] = params
        self.num_prompt_tokens[row] = request.spec.num_prompt_tokens
        self.wants_logprobs[row] = params.wants_logprobs
        self.num_logprobs[row] = num_best(params.logprobs, self._vocab_size)
        self.named_logprobs[row] = params.logprob_token_ids or []
        self.wants_prompt_logprobs[row] = params.prompt_logprobs is not None
        self.draws_on_first_rank[row] = (
            request.spec.grammar is not None or params.logits_processors is not None
        )
        self.rules.fill(row, request)
        self.pooling.fill(row, request.spec.pooling)
        self._num_blocks[row] = 0
        return row

    def _append_blocks(self, step: SchedulerOutput) -> None:
        entries: list[int] = []  # indices into `_block_ids`
        block_ids: list[int] = []
        for line in step.scheduled:
            if line.new_block_ids:
                row, count = self._row_of[line.request_id], len(line.new_block_ids[0])
                first = self._num_blocks[row]
                tables = zip(self._tables, line.new_block_ids, strict=True)
                for (start, width, split), new in tables:
                    begin = start + row * width + first * split
                    entries += range(begin, begin + count * split, split)
                    block_ids += new
                self._num_blocks[row] += count
        if entries:
            packed = to_device(np.array([entries, block_ids]), self.device)
            self._block_ids[packed[0]] = packed[1].int()


def num_best(requested: int | None, vocab_size: int) -> int:
    """The number of most likely tokens to return for a value of `logprobs` or `prompt_logprobs`."""
    return vocab_size if requested == ALL_TOKENS else min(requested or 0, vocab_size)
