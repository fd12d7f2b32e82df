"""Executes scheduled steps on the device: gather inputs, forward, logits, sample, write back."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor

from compiledllm.graphs.buckets import StepShape
from compiledllm.graphs.compile import BlockCompiler, variants_for
from compiledllm.graphs.cuda_graphs import StepGraphs
from compiledllm.kernels.sampling import draw_tokens
from compiledllm.kernels.step_inputs import advance
from compiledllm.models.cache_groups import CacheGroups
from compiledllm.models.decoder import Decoder, Ends
from compiledllm.platform import single_row_products
from compiledllm.runner.device import to_device
from compiledllm.runner.input_batch import InputBatch, StepLayout, padding_inputs
from compiledllm.runner.pending import (
    MAX_IN_FLIGHT,
    Extras,
    LogprobsOf,
    OutputRing,
    PendingOutput,
)
from compiledllm.runner.request_table import RequestTable
from compiledllm.runner.sampler import Sampler
from compiledllm.types import SchedulerOutput, StepOutput

_LEAST_FOR_ENDS = 1024  # tokens of a step, below which the last block is as cheap for all


class ModelRunner:
    """Owns the device: the model, its KV caches and the request rows.

    groups: which layers share block tables. kv_caches: one for each layer. max_tokens: the most
    tokens of a step. max_blocks: width of the block tables, in blocks.
    """

    def __init__(
        self,
        model: Decoder,
        groups: CacheGroups,
        kv_caches: list[Tensor],
        block_size: int,
        max_num_seqs: int,
        max_tokens: int,
        max_blocks: int,
    ) -> None:
        self.model = model
        self._group_of_layer = [place.group for place in groups.places]
        self._backend = model.backend
        self.kv_caches = kv_caches
        self.block_size = block_size
        self.device = kv_caches[0].device
        vocab_size = model.spec.vocab_size
        num_groups = len(groups.windows)
        self.table = RequestTable(max_num_seqs, max_blocks, vocab_size, self.device, num_groups)
        self.sampler = Sampler(self.table, vocab_size)
        self.outputs = OutputRing(MAX_IN_FLIGHT + 1, max_num_seqs, self.device)
        variants = variants_for(max(max_tokens, max_num_seqs), self.device.type == "cuda")
        self.compiler = BlockCompiler(model, self.run_dummy, variants)
        self.graphs: StepGraphs | None = None
        self.logits: Tensor  # [captured rows, vocab], of the last captured step

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
        table = self.table
        table.apply(step)
        if step.spoilt_block_ids:
            self._zero_blocks(step.spoilt_block_ids)
        if not step.scheduled:
            return self.outputs.send([], table.last_token_ids[:0])
        layout = StepLayout.of(step, table)
        return self._replay(layout) or self._run(layout)

    def collect(self, pending: PendingOutput) -> StepOutput:
        """Wait for a launched step's results; in the order of the launches."""
        output = pending.collect()
        if self.table.rules.are_used:
            for request_id, token_id in output.token_ids.items():
                self.table.record(request_id, token_id)
        return output

    def _run(self, layout: StepLayout) -> PendingOutput:
        """A step without a graph: of any size."""
        shape, rows = layout.shape, layout.sample_rows
        packed = to_device(layout.pack(self.table, shape), self.device)
        num_samples = max(len(rows), 1)  # one that nobody looks at: compiled code takes no less
        batch = InputBatch.unpack(packed, shape, num_samples, self.table, self.block_size)
        self.table.num_computed_tokens[batch.rows] = batch.num_computed_tokens
        self._plan(layout, layout.rows)
        wants_all = bool(self.table.wants_prompt_logprobs[layout.rows].any())
        with self._products_of(shape.num_tokens):
            hidden = self.forward(batch) if wants_all else self._forward_samples(batch)
        prompt_logprobs = self._prompt_logprobs(layout, hidden) if wants_all else []
        if len(rows) == 0:
            return self._send(layout, batch.sample_rows[:0], None, prompt_logprobs)
        if wants_all:
            hidden = hidden[batch.logits_indices]
        with self._products_of(len(rows)):
            logits = self.model.compute_logits(hidden)
        drawn = self.sampler.draw(logits, rows, layout.sample_positions)
        extras = self._finish(drawn, logits, layout, self._last_tokens(layout))
        self.table.last_token_ids[batch.sample_rows] = drawn.clamp(min=0)
        return self._send(layout, drawn, extras, prompt_logprobs)

    def forward(self, batch: InputBatch, ends: Ends | None = None) -> Tensor:
        """Hidden states of a step's tokens, [tokens, hidden], or of its ends, [ends, hidden].

        Stores the keys and values of all of them.
        """
        attn = [batch.attn[group] for group in self._group_of_layer]
        last = () if ends is None else (ends,)
        hidden: Tensor = self.model(batch.input_ids, batch.positions, self.kv_caches, attn, *last)
        return hidden

    def _forward_samples(self, batch: InputBatch) -> Tensor:
        """Hidden states of the tokens that are followed by a draw, [samples, hidden]."""
        num_tokens, num_samples = len(batch.input_ids), len(batch.logits_indices)
        if num_tokens >= max(_LEAST_FOR_ENDS, 4 * num_samples) and self.model.takes_ends:
            ends = batch.ends(self.table, self._group_of_layer[-1], self.block_size)
            return self.forward(batch, ends)
        hidden = self.forward(batch)
        return hidden if num_tokens == num_samples else hidden[batch.logits_indices]

    def _last_tokens(self, layout: StepLayout) -> Tensor | None:
        """int64 [samples], before the step writes new ones; None if nobody will look."""
        rows, table = layout.sample_rows, self.table
        if not table.rules.read_last_tokens(rows):
            return None
        return table.last_token_ids[to_device(rows, self.device)]

    def _finish(
        self, drawn: Tensor, logits: Tensor, layout: StepLayout, last_tokens: Tensor | None
    ) -> Extras | None:
        rows, positions = layout.sample_rows, layout.sample_positions
        request_ids = layout.sample_request_ids
        return self.sampler.finish(drawn, logits, rows, positions, last_tokens, request_ids)

    def _prompt_logprobs(
        self, layout: StepLayout, hidden: Tensor
    ) -> list[tuple[str, int, LogprobsOf]]:
        """Of the requests that want them and have prompt tokens in this step."""
        found: list[tuple[str, int, LogprobsOf]] = []
        ends = np.cumsum(layout.counts)
        for index in np.flatnonzero(self.table.wants_prompt_logprobs[layout.rows]):
            tokens = hidden[ends[index] - layout.counts[index] : ends[index]]
            found += [
                (layout.request_ids[index], position, logprobs)
                for position, logprobs in self.sampler.prompt_logprobs(
                    int(layout.rows[index]),
                    tokens,
                    int(layout.computed[index]) + 1,
                    self.model.compute_logits,
                )
            ]
        return found

    def _send(
        self,
        layout: StepLayout,
        drawn: Tensor,
        extras: Extras | None,
        prompt_logprobs: list[tuple[str, int, LogprobsOf]],
    ) -> PendingOutput:
        if prompt_logprobs:
            extras = extras or Extras()
            extras.prompt_logprobs = prompt_logprobs
        return self.outputs.send(layout.sample_request_ids, drawn, extras)

    def _zero_blocks(self, block_ids: list[int]) -> None:
        """Masked positions are multiplied by zero, which leaves NaN what it is."""
        index = to_device(np.array(block_ids), self.device)
        for kv_cache in {id(c): c for c in self.kv_caches}.values():  # layers may share one
            kv_cache[:, index] = 0

    def _plan(self, layout: StepLayout, rows: np.ndarray, graph: StepShape | None = None) -> None:
        """rows: the request rows of the layout, and behind them the rows of padding."""
        tables = self.table.block_tables
        self._backend.plan(rows, layout.computed, layout.counts, tables, graph)

    # -- captured steps ------------------------------------------------------------------------

    @torch.inference_mode()
    def capture(self, shapes: list[StepShape]) -> StepGraphs:
        """Capture the steps of these shapes. CUDA only."""
        table = self.table
        vocab_size, dtype = self.model.spec.vocab_size, self.kv_caches[0].dtype
        most_rows = max(shape.num_rows for shape in shapes)
        self.logits = torch.empty(most_rows, vocab_size, dtype=dtype, device=self.device)
        inputs = {shape: padding_inputs(shape, table) for shape in shapes}
        for shape in shapes:
            self._plan(StepLayout.empty(), inputs[shape], shape)
        graphs = StepGraphs(self._captured_step, inputs, self.device)
        graphs.capture()
        self.graphs = graphs
        return graphs

    def _replay(self, layout: StepLayout) -> PendingOutput | None:
        """A step that a graph serves; None if none does."""
        table, rows = self.table, layout.sample_rows
        if self.graphs is None or table.wants_prompt_logprobs[layout.rows].any():
            return None
        is_decode = layout.is_decode
        shape = self.graphs.shape_for(layout.shape._replace(is_decode=is_decode))
        if shape is None:
            return None
        if is_decode:
            inputs = padding_inputs(shape, table)
            inputs[: len(rows)] = rows
            self._plan(layout, inputs, shape)
        else:
            inputs = layout.pack(table, shape)
        last_tokens = self._last_tokens(layout)
        drawn = self.graphs.replay(shape, inputs)[: len(rows)]
        extras = self._finish(drawn, self.logits, layout, last_tokens)
        return self.outputs.send(layout.sample_request_ids, drawn, extras)

    def _captured_step(self, shape: StepShape, inputs: Tensor) -> Tensor:
        """The whole step, from the rows' state before to their state after it."""
        table = self.table
        self._backend.select(shape)
        if shape.is_decode:
            batch = InputBatch.decode(inputs, table, self.block_size)
        else:
            batch = InputBatch.unpack(inputs, shape, shape.num_rows, table, self.block_size)
        hidden = self._forward_samples(batch)
        drawn = draw_tokens(
            self.model.compute_logits(hidden, self.logits[: len(hidden)]),
            batch.sample_rows,
            batch.sample_positions,
            table.asked,
        )
        advance(
            batch.rows,
            batch.num_computed_tokens,
            batch.sample_rows,
            drawn,
            table.last_token_ids,
            table.num_computed_tokens,
        )
        return drawn

    def _products_of(self, num_rows: int) -> AbstractContextManager[None]:
        on_cpu = self.device.type == "cpu"
        return single_row_products() if on_cpu and num_rows == 1 else nullcontext()

    def reset(self) -> None:
        """Forget all requests (a step failed half-way); the scheduler sends them again as new."""
        self.table.clear()

    @torch.inference_mode()
    def run_dummy(self, num_tokens: int, num_samples: int = 1) -> None:
        """A step over padding, which touches the null block only, with so many draws."""
        batch = InputBatch.dummy(num_tokens, self.table)
        self._plan(StepLayout.empty(), np.array([self.table.padding_row]))
        hidden = self.forward(batch)
        logits = self.model.compute_logits(hidden[:1].repeat(num_samples, 1))
        index = torch.zeros(num_samples, dtype=torch.int64, device=self.device)
        draw_tokens(logits, index + self.table.padding_row, index, self.table.asked)
