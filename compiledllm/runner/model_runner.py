"""Executes scheduled steps on the device: gather inputs, forward, logits, sample, write back."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from compiledllm.graphs.compile import BlockCompiler
from compiledllm.models.decoder import Decoder
from compiledllm.platform import single_row_products
from compiledllm.runner.input_batch import InputBatch
from compiledllm.runner.request_table import RequestTable
from compiledllm.runner.sampler import Sampler
from compiledllm.types import SchedulerOutput, StepOutput


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

    def execute(self, step: SchedulerOutput) -> StepOutput:
        """Run one step. The row of every request that samples ends up with its new token."""
        started = time.perf_counter()
        output = self._execute(step)
        self.compiler.count_work(time.perf_counter() - started)
        return output

    @torch.inference_mode()
    def _execute(self, step: SchedulerOutput) -> StepOutput:
        self.table.apply(step)
        if not step.scheduled:
            return StepOutput({})
        batch = InputBatch.gather(step, self.table, self.block_size)
        with self._products_of(len(batch.input_ids)):
            hidden = self.model(batch.input_ids, batch.positions, self.kv_caches, batch.attn)
        if not batch.sample_request_ids:
            return StepOutput({})
        with self._products_of(len(batch.logits_indices)):
            logits = self.model.compute_logits(hidden[batch.logits_indices])
        sampled = self.sampler.sample(logits, self.table, batch.sample_rows, batch.sample_positions)
        self.table.last_token_ids[torch.from_numpy(batch.sample_rows).to(self.device)] = sampled
        return StepOutput(dict(zip(batch.sample_request_ids, sampled.tolist(), strict=True)))

    def _products_of(self, num_rows: int) -> AbstractContextManager[None]:
        on_cpu = self.device.type == "cpu"
        return single_row_products() if on_cpu and num_rows == 1 else nullcontext()

    def reset(self) -> None:
        """Forget all requests (a step failed half-way); the scheduler sends them again as new."""
        max_num_seqs, max_blocks = self.table.block_tables.shape
        self.table = RequestTable(max_num_seqs, max_blocks, self.device)

    @torch.inference_mode()
    def run_dummy(self, num_tokens: int) -> None:
        """A forward pass over padding: touches the null block only."""
        batch = InputBatch.dummy(num_tokens, self.table.block_tables.shape[1], self.device)
        hidden = self.model(batch.input_ids, batch.positions, self.kv_caches, batch.attn)
        self.model.compute_logits(hidden[batch.logits_indices])
