"""Executes scheduled steps on the device: gather inputs, forward, logits, sample, write back."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor

from compiledllm.graphs.buckets import StepShape
from compiledllm.graphs.compile import CPU_VARIANTS, GPU_VARIANTS, BlockCompiler
from compiledllm.graphs.cuda_graphs import StepGraphs
from compiledllm.kernels.paged_attention_flashinfer import Planner
from compiledllm.kernels.sampling import draw_tokens
from compiledllm.models.decoder import Decoder
from compiledllm.platform import single_row_products
from compiledllm.runner.attention import pages_of
from compiledllm.runner.input_batch import InputBatch, StepLayout, padding_inputs
from compiledllm.runner.request_table import RequestTable, to_device
from compiledllm.runner.sampler import Sampler, filter_top_k_top_p
from compiledllm.types import SchedulerOutput, StepOutput

MAX_IN_FLIGHT = 2  # steps that are launched and not collected


class PendingOutput:
    """A launched step's tokens, perhaps still on their way to the host."""

    def __init__(
        self, request_ids: list[str], token_ids: Tensor, arrived: torch.cuda.Event | None
    ) -> None:
        self._request_ids = request_ids
        self._token_ids = token_ids
        self._arrived = arrived

    def collect(self) -> StepOutput:
        """Wait for the step and give its tokens."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return StepOutput(dict(zip(self._request_ids, self._token_ids.tolist(), strict=True)))


class OutputRing:
    """Brings drawn tokens to the host: pinned buffers, used in turn, so that nothing waits.

    num_slots: more than the steps that can be launched and not collected.
    """

    def __init__(self, num_slots: int, max_num_seqs: int, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        if self._is_cuda:
            shape = num_slots, max_num_seqs
            self._buffers = torch.empty(shape, dtype=torch.int64, pin_memory=True)
            self._events = [torch.cuda.Event() for _ in range(num_slots)]  # type: ignore[no-untyped-call]
            self._next = 0

    def send(self, request_ids: list[str], drawn: Tensor) -> PendingOutput:
        """drawn: token ids [request_ids] on the device; they may be overwritten after this."""
        if not self._is_cuda:
            return PendingOutput(request_ids, drawn, None)
        buffer, arrived = self._buffers[self._next, : len(drawn)], self._events[self._next]
        self._next = (self._next + 1) % len(self._events)
        buffer.copy_(drawn, non_blocking=True)
        arrived.record()
        return PendingOutput(request_ids, buffer, arrived)


class ModelRunner:
    """Owns the device: the model, its KV caches and the request rows.

    max_blocks: width of the block tables, in blocks. planner: told of each step before it runs.
    """

    def __init__(
        self,
        model: Decoder,
        kv_caches: list[Tensor],
        block_size: int,
        max_num_seqs: int,
        max_blocks: int,
        planner: Planner | None = None,
    ) -> None:
        self.model = model
        self.planner = planner
        self.kv_caches = kv_caches
        self.block_size = block_size
        self.device = kv_caches[0].device
        self.table = RequestTable(max_num_seqs, max_blocks, self.device)
        self.sampler = Sampler()
        self.outputs = OutputRing(MAX_IN_FLIGHT + 1, max_num_seqs, self.device)
        variants = GPU_VARIANTS if self.device.type == "cuda" else CPU_VARIANTS
        self.compiler = BlockCompiler(model, self.run_dummy, variants)
        self.graphs: StepGraphs | None = None
        self.logits: Tensor  # [max_num_seqs, vocab], of the last captured step

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
        if not step.scheduled:
            return self.outputs.send([], table.last_token_ids[:0])
        layout = StepLayout.of(step, table)
        drawn = self._replay(layout)
        if drawn is None:
            drawn = self._run(layout)
        return self.outputs.send(layout.sample_request_ids, drawn)

    def _run(self, layout: StepLayout) -> Tensor:
        """A step without a graph: any size, any sampling. Token ids int64 [samples]."""
        shape, rows = layout.shape, layout.sample_rows
        packed = to_device(layout.pack(self.table, shape), self.device)
        batch = InputBatch.unpack(packed, shape, len(rows), self.table, self.block_size)
        self.table.num_computed_tokens[batch.rows] = batch.num_computed_tokens
        self._plan(layout, layout.rows)
        with self._products_of(shape.num_tokens):
            hidden = self.model(batch.input_ids, batch.positions, self.kv_caches, batch.attn)
        if len(rows) == 0:
            return batch.sample_rows
        with self._products_of(len(rows)):
            logits = self.model.compute_logits(hidden[batch.logits_indices])
        drawn = self.sampler.sample(logits, self.table, rows, layout.sample_positions)
        self.table.last_token_ids[batch.sample_rows] = drawn
        return drawn

    def _plan(self, layout: StepLayout, rows: np.ndarray, graph: StepShape | None = None) -> None:
        """Tell the attention of a step, where it wants to know.

        rows: request rows of the layout, and then of padding: one token each.
        """
        if self.planner is not None:
            padding = np.ones(len(rows) - len(layout.rows), np.int64)
            counts = np.append(layout.counts, padding)
            lengths = np.append(layout.computed, padding * 0) + counts
            pages = pages_of(self.table, rows, lengths, self.block_size)
            self.planner.plan(counts, lengths, pages, graph)

    # -- captured steps ------------------------------------------------------------------------

    @torch.inference_mode()
    def capture(self, shapes: list[StepShape]) -> StepGraphs:
        """Capture the steps of these shapes. CUDA only."""
        table = self.table
        vocab_size, dtype = self.model.spec.vocab_size, self.kv_caches[0].dtype
        self.logits = torch.empty(table.padding_row, vocab_size, dtype=dtype, device=self.device)
        inputs = {shape: padding_inputs(shape, table) for shape in shapes}
        for shape in shapes:
            self._plan(StepLayout.empty(), inputs[shape], shape)
        graphs = StepGraphs(self._captured_step, inputs, self.device)
        graphs.capture()
        self.graphs = graphs
        return graphs

    def _replay(self, layout: StepLayout) -> Tensor | None:
        """Token ids int64 [samples] of a step that a graph serves; None if none does."""
        table, rows = self.table, layout.sample_rows
        if self.graphs is None:
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
        drawn = self.graphs.replay(shape, inputs)[: len(rows)]
        self._draw_again(drawn, rows, layout.sample_positions)
        return drawn

    def _draw_again(self, drawn: Tensor, rows: np.ndarray, positions: np.ndarray) -> None:
        """Replace tokens of rows that ask for more than a captured step does; it left its logits.

        The others keep what they have, and so does the step keep its graph.
        """
        asking = np.flatnonzero(self.sampler.asks(self.table, rows, positions))
        if len(asking):
            index = to_device(asking, self.device)
            rows, positions = rows[asking], positions[asking]
            again = self.sampler.sample(self.logits[index], self.table, rows, positions)
            drawn[index] = again
            self.table.last_token_ids[to_device(rows, self.device)] = again

    def _captured_step(self, shape: StepShape, inputs: Tensor) -> Tensor:
        """The whole step, from the rows' state before to their state after it."""
        table = self.table
        if self.planner is not None:
            self.planner.select(shape)
        if shape.is_decode:
            batch = InputBatch.decode(inputs, table, self.block_size)
        else:
            batch = InputBatch.unpack(inputs, shape, shape.num_rows, table, self.block_size)
        hidden = self.model(batch.input_ids, batch.positions, self.kv_caches, batch.attn)
        if not shape.is_decode:
            hidden = hidden[batch.logits_indices]
        drawn = draw_tokens(
            self.model.compute_logits(hidden, self.logits[: len(hidden)]),
            table.temperatures[batch.sample_rows],
            table.seeds[batch.sample_rows],
            batch.sample_positions,
        )
        table.last_token_ids[batch.sample_rows] = drawn
        table.num_computed_tokens[batch.rows] = batch.num_computed_tokens
        table.num_computed_tokens[table.padding_row :].zero_()  # it would outgrow its block table
        return drawn

    def _products_of(self, num_rows: int) -> AbstractContextManager[None]:
        on_cpu = self.device.type == "cpu"
        return single_row_products() if on_cpu and num_rows == 1 else nullcontext()

    def reset(self) -> None:
        """Forget all requests (a step failed half-way); the scheduler sends them again as new."""
        self.table.clear()

    @torch.inference_mode()
    def run_dummy(self, num_tokens: int, num_samples: int = 1) -> None:
        """A step over padding, which touches the null block only; `num_samples` tokens are drawn.

        With several, from all that can be asked for: this is the most memory a step can take.
        """
        batch = InputBatch.dummy(num_tokens, self.table)
        self._plan(StepLayout.empty(), np.array([self.table.padding_row]))
        hidden = self.model(batch.input_ids, batch.positions, self.kv_caches, batch.attn)
        logits = self.model.compute_logits(hidden[:1].repeat(num_samples, 1))
        if num_samples > 1:
            ones = torch.ones(num_samples, device=self.device)
            filter_top_k_top_p(logits.float(), ones.long(), ones)
