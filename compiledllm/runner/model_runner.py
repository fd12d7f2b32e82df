"""Executes scheduled steps on the device: gather inputs, forward, logits, sample, write back."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor

from compiledllm.graphs.compile import BlockCompiler
from compiledllm.graphs.cuda_graphs import DecodeGraphs
from compiledllm.models.decoder import Decoder
from compiledllm.platform import single_row_products
from compiledllm.runner.input_batch import InputBatch
from compiledllm.runner.request_table import RequestTable, to_device
from compiledllm.runner.sampler import Sampler
from compiledllm.types import SchedulerOutput, StepOutput


class PendingOutput:
    """A launched step's tokens on their way to the host."""

    def __init__(self, request_ids: list[str], sampled: Tensor | None) -> None:
        """sampled: token ids [request_ids] on the device, read at once: it may be overwritten."""
        self._request_ids = request_ids
        self._arrived: torch.cuda.Event | None = None
        self._token_ids = sampled
        if sampled is not None and sampled.is_cuda:
            self._token_ids = torch.empty(sampled.shape, dtype=sampled.dtype, pin_memory=True)
            self._token_ids.copy_(sampled, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def collect(self) -> StepOutput:
        """Wait for the step and give its tokens."""
        if self._arrived is not None:
            self._arrived.synchronize()
        tokens = [] if self._token_ids is None else self._token_ids.tolist()
        return StepOutput(dict(zip(self._request_ids, tokens, strict=True)))


class ModelRunner:
    """Owns the device: the model, its KV caches and the request rows.

    max_blocks: width of the block tables, in blocks.
    """

    def __init__(
        self,
        model: Decoder,
        kv_caches: list[Tensor],
        block_size: int,
        max_num_seqs: int,
        max_blocks: int,
    ) -> None:
        self.model = model
        self.kv_caches = kv_caches
        self.block_size = block_size
        self.device = kv_caches[0].device
        self.table = RequestTable(max_num_seqs, max_blocks, self.device)
        self.sampler = Sampler()
        self.compiler = BlockCompiler(model, self.run_dummy)
        self.graphs: DecodeGraphs | None = None

    def launch(self, step: SchedulerOutput) -> PendingOutput:
        """Start one step; on a GPU it may still run when this returns.

        The row of every request that samples ends up with its new token, so the next step can be
        launched before this one's output is collected.
        """
        started = time.perf_counter()
        output = self._launch(step)
        self.compiler.count_work(time.perf_counter() - started)
        return output

    @torch.inference_mode()
    def _launch(self, step: SchedulerOutput) -> PendingOutput:
        self.table.apply(step)
        if not step.scheduled:
            return PendingOutput([], None)
        sampled = self._replay(step)
        if sampled is not None:
            return PendingOutput([line.request_id for line in step.scheduled], sampled)
        batch = InputBatch.gather(step, self.table, self.block_size)
        self.table.num_computed_tokens[batch.rows] = batch.attn.seq_lens[:-1].long()
        with self._products_of(len(batch.input_ids)):
            hidden = self.model(batch.input_ids, batch.positions, self.kv_caches, batch.attn)
        if not batch.sample_request_ids:
            return PendingOutput([], None)
        with self._products_of(len(batch.logits_indices)):
            logits = self.model.compute_logits(hidden[batch.logits_indices])
        sampled = self.sampler.sample(logits, self.table, batch.sample_rows, batch.sample_positions)
        self.table.last_token_ids[to_device(batch.sample_rows, self.device)] = sampled
        return PendingOutput(batch.sample_request_ids, sampled)

    # -- captured decode steps -----------------------------------------------------------------

    @torch.inference_mode()
    def capture(self) -> DecodeGraphs:
        """Capture greedy decode steps for every batch size. CUDA only."""
        table = self.table
        graphs = DecodeGraphs(self._decode, table.padding_row, table.padding_row, self.device)
        graphs.capture()
        self.graphs = graphs
        return graphs

    def _replay(self, step: SchedulerOutput) -> Tensor | None:
        """Token ids of a step in which every request decodes greedily; None if there is no graph.

        int64 [scheduled], on the device.
        """
        lines, table = step.scheduled, self.table
        if self.graphs is None or not all(
            line.num_scheduled_tokens == 1 and line.samples for line in lines
        ):
            return None
        rows = np.array([table.row_of(line.request_id) for line in lines])
        positions = np.array([line.num_computed_tokens + 1 for line in lines])
        if table.temperature[rows].any() or (positions < table.first_stop_position[rows]).any():
            return None
        return self.graphs.replay(rows)

    def _decode(self, rows: Tensor) -> Tensor:
        """The captured step: from the rows' last tokens to their next ones, greedily."""
        table = self.table
        batch = InputBatch.decode(rows, table, self.block_size)
        hidden = self.model(batch.input_ids, batch.positions, self.kv_caches, batch.attn)
        sampled = self.model.compute_logits(hidden).argmax(dim=-1)
        table.last_token_ids[rows] = sampled
        table.num_computed_tokens[rows] = batch.positions + 1
        table.num_computed_tokens[table.padding_row :].zero_()  # it would outgrow its block table
        return sampled

    def _products_of(self, num_rows: int) -> AbstractContextManager[None]:
        on_cpu = self.device.type == "cpu"
        return single_row_products() if on_cpu and num_rows == 1 else nullcontext()

    def reset(self) -> None:
        """Forget all requests (a step failed half-way); the scheduler sends them again as new."""
        self.table.clear()

    @torch.inference_mode()
    def run_dummy(self, num_tokens: int) -> None:
        """A forward pass over padding: touches the null block only."""
        batch = InputBatch.dummy(num_tokens, self.table.block_tables.shape[1], self.device)
        hidden = self.model(batch.input_ids, batch.positions, self.kv_caches, batch.attn)
        self.model.compute_logits(hidden[batch.logits_indices])
