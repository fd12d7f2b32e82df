"""Runs scheduled steps: gathers inputs, runs the model, draws tokens, updates request rows."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from compiledllm.graphs.buckets import StepShape
from compiledllm.graphs.compile import BlockCompiler
from compiledllm.graphs.cuda_graphs import StepGraphs
from compiledllm.graphs.few_blocks import few_blocks
from compiledllm.graphs.variants import variants_for
from compiledllm.kernels import compile_ahead
from compiledllm.kernels.decode_step import DecodeStep
from compiledllm.kernels.sampling import draw_tokens
from compiledllm.kernels.step_inputs import advance
from compiledllm.models.decoder import Decoder, SampledTokens
from compiledllm.platform import single_row_products
from compiledllm.resolved_config import StepLimits
from compiledllm.runner.device import to_device
from compiledllm.runner.input_batch import InputBatch, StepLayout
from compiledllm.runner.kv_cache import zero_blocks
from compiledllm.runner.kv_layout import KVLayout
from compiledllm.runner.pending import (
    MAX_IN_FLIGHT,
    Extras,
    OutputRing,
    PendingOutput,
)
from compiledllm.runner.request_table import RequestTable
from compiledllm.runner.sampler import Sampler
from compiledllm.runner.state_caches import StateCaches
from compiledllm.types import SchedulerOutput, StepOutput

# Below this many tokens per step, running the last block for sampled tokens only saves no time.
_MIN_TOKENS_FOR_SAMPLED_ONLY = 1024


class StepResult(NamedTuple):
    """The results of a step, apart from the new state of the request rows."""

    drawn: Tensor  # int64 [samples], token ids
    logits: Tensor  # [samples, vocab]
    hidden: Tensor | None  # [tokens, hidden] if the step `keeps_all`
    # [samples, hidden], last tokens' hidden states; a captured decode step does not keep them.
    sampled: Tensor | None


class ModelRunner:
    """Owns the device's state: the model, its KV caches and the request rows.

    kv_layout: which layers share block tables. kv_caches: one per layer that has KV. max_blocks:
    width of the block tables, in blocks. num_snapshots: copies of states to make room for.
    """

    def __init__(
        self,
        model: Decoder,
        kv_layout: KVLayout,
        kv_caches: list[Tensor],
        limits: StepLimits,
        max_blocks: int,
        num_snapshots: int = 0,
    ) -> None:
        self.model = model
        self._layout = kv_layout
        self._backend = model.backend
        self.kv_caches = kv_caches
        self.block_sizes = kv_layout.block_sizes(limits.block_size)
        self.num_block_tables = len(kv_layout.windows_of_tables)
        self.device = kv_caches[0].device
        vocab_size, max_rows = model.spec.vocab_size, limits.max_num_seqs
        self.states = StateCaches(kv_layout, max_rows, self.device, num_snapshots)
        self._caches = kv_layout.in_layer_order(kv_caches, self.states.tensors)
        self.table = RequestTable(max_rows, max_blocks, vocab_size, self.device, kv_layout.splits)
        self.sampler = Sampler(self.table, vocab_size, model.spec.num_ranks)
        self.outputs = OutputRing(MAX_IN_FLIGHT + 1, max_rows, self.device)
        max_tokens = max(limits.max_num_batched_tokens, max_rows)
        variants = variants_for(max_tokens, self.device.type == "cuda")
        self.compiler = BlockCompiler(model, self.run_dummy, variants)
        self.graphs: StepGraphs | None = None
        self.logits: Tensor  # [captured rows, vocab], written by every captured step
        self.hidden: Tensor  # [captured rows, hidden], written by captured steps with prompts

    def use_decode_step(self, decode_step: DecodeStep) -> None:
        """Run all layers of small decode steps by one call. Raises CudaError."""
        decode_step.bind(self.kv_caches)
        self.model.decode_step = decode_step

    def launch(self, step: SchedulerOutput) -> PendingOutput:
        """Launch one step. A GPU may still be running the step when the method returns.

        The step writes each drawn token to its request row, so the next step can be launched before
        the output of this step is collected.
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
            zero_blocks(self.kv_caches, step.spoilt_block_ids)
        self._copy_states(step)
        if not step.scheduled:
            return self.outputs.send([], table.last_token_ids[:0])
        layout = StepLayout.of(step, table, self.states.first_slot)
        rows, positions = layout.sample_rows, layout.sample_positions
        request_ids = layout.sample_request_ids
        keeps_all = bool(table.wants_prompt_logprobs[layout.rows].any())
        pools = None
        if table.pooling.are_used:
            pools = table.pooling.of(rows)
            keeps_all |= bool(table.pooling.means[layout.rows].any())
        last_tokens = self._last_tokens(rows)
        result = self._run(layout, len(rows), keeps_all, pools)
        drawn, logits, hidden, sampled = result
        extras = self.sampler.finish(drawn, logits, rows, positions, last_tokens, request_ids)
        if hidden is not None:
            prompts = self.sampler.prompt_logprobs(layout, hidden, self.model.compute_logits)
            if prompts:
                extras = extras or Extras()
                extras.prompt_logprobs = prompts
        if pools is not None:
            extras = self._pool(layout, result, pools, extras)
        return self.outputs.send(request_ids, drawn, extras)

    def _copy_states(self, step: SchedulerOutput) -> None:
        """Copy states to snapshots, and snapshots to the rows of requests that start from them."""
        for request_id, slot in step.saved_states:
            self.states.save(self.table.row_of(request_id), slot)
        for request_id, slot in step.restored_states:
            self.states.restore(self.table.row_of(request_id), slot)

    def collect(self, pending: PendingOutput) -> StepOutput:
        """Wait for the results of a launched step. Steps must be collected in launch order."""
        output = pending.collect()
        if self.table.rules.are_used:
            for request_id, token_id in output.token_ids.items():
                self.table.record(request_id, token_id)
        return output

    # -- a step, replayed, run or recorded -----------------------------------------------------

    def _run(
        self, layout: StepLayout, num_samples: int, keeps_all: bool, pools: np.ndarray | None
    ) -> StepResult:
        """Replay the captured graph that fits the step, or else run the step at its exact size.

        pools: bool [samples], the samples whose hidden states are needed; None: no request pools.
        """
        shape, captured = layout.shape, None
        needs_hidden = pools is not None and bool(pools.any())
        graphs = None if keeps_all or (needs_hidden and shape.is_decode) else self.graphs
        if graphs is not None:
            captured = graphs.shape_for(shape)
        inputs = layout.inputs(self.table, captured or shape)
        self._plan(layout, inputs if shape.is_decode else layout.rows, captured)
        if graphs is not None and captured is not None:
            drawn = graphs.replay(captured, inputs)[:num_samples]
            return StepResult(drawn, self.logits, None, self.hidden[:num_samples])
        on_device = to_device(inputs, self.device)
        # Compiled code does not accept size 0, so a step without samples has one that is ignored.
        size = max(num_samples, 1)
        batch = InputBatch.of(shape, on_device, size, self.table, self.block_sizes)
        draw_rows = self.sampler.rows_to_draw(layout.sample_rows, layout.sample_positions)
        draws = pools is None or not pools.all()
        return self._step(batch, num_samples, draw_rows, keeps_all=keeps_all, draws=draws)

    def _step(
        self,
        batch: InputBatch,
        num_samples: int,
        draw_rows: Tensor | None = None,
        logits: Tensor | None = None,
        hidden_out: Tensor | None = None,
        keeps_all: bool = False,
        draws: bool = True,
    ) -> StepResult:
        """Run one step, from reading the request rows to updating them.

        Draws tokens for the first `num_samples` samples of the batch. draw_rows: int64
        [num_samples], the request rows whose sampling parameters apply; None: the sampled rows
        themselves. logits: [num_samples, vocab], hidden_out: [num_samples, hidden], output buffers.
        keeps_all: return the hidden states of all tokens. draws: False if every sample pools.
        """
        table, num_tokens = self.table, len(batch.input_ids)
        with self._products_of(num_tokens):
            hidden = self.forward(batch) if keeps_all else self._forward_samples(batch, hidden_out)
        sample_rows = drawn = batch.sample_rows[:num_samples]
        sampled = hidden[batch.logits_indices] if keeps_all else hidden
        if num_samples and draws:
            with self._products_of(num_samples):
                logits = self.model.compute_logits(sampled, logits)
            rows = sample_rows if draw_rows is None else draw_rows
            drawn = draw_tokens(logits, rows, batch.sample_positions, table.sampling)
        advance(
            batch.rows,
            batch.num_computed_tokens,
            sample_rows,
            drawn,
            table.last_token_ids,
            table.num_computed_tokens,
        )
        logits = hidden[:0] if logits is None else logits
        return StepResult(drawn, logits, hidden if keeps_all else None, sampled)

    def _captured_step(self, shape: StepShape, inputs: Tensor) -> Tensor:
        """The step that `StepGraphs` records. Returns token ids int64 [rows]; writes `self.logits`.

        A step with prompts also writes `self.hidden`, where it gathers the last tokens' hidden
        states anyway. A decode step would need a copy for it, which every drawn token would pay.
        No other tensor outlives the step, because it would take memory of its own in every graph.
        """
        self._backend.select(shape)
        batch = InputBatch.of(shape, inputs, shape.num_rows, self.table, self.block_sizes)
        logits = self.logits[: shape.num_rows]
        hidden = None if shape.is_decode else self.hidden[: shape.num_rows]
        return self._step(batch, shape.num_rows, logits=logits, hidden_out=hidden).drawn

    @torch.inference_mode()
    def run_dummy(self, num_tokens: int, num_samples: int = 1) -> None:
        """Run a step of padding tokens, with `num_samples` draws. Only the null block is touched.

        The step keeps the hidden states of all tokens, so no step of this size takes more memory.
        """
        batch = InputBatch.dummy(num_tokens, self.table, num_samples)
        self._plan(StepLayout.empty(), np.array([self.table.padding_row]))
        self._step(batch, num_samples, keeps_all=True)

    @torch.inference_mode()
    def capture(
        self, shapes: list[StepShape], first: Callable[[StepShape], bool] | None = None
    ) -> StepGraphs:
        """Capture a CUDA graph of a step for each shape. CUDA only.

        first: which shapes to capture now; the others follow when idle or needed. None: all.
        """
        graphs = self._step_graphs(shapes)
        graphs.capture(first)
        self.graphs = graphs
        return graphs

    @torch.inference_mode()
    def rehearse(self, shapes: list[StepShape]) -> None:
        """Request the kernels of a step of each shape, for other threads to compile. CUDA only."""
        with compile_ahead.asking():
            self._step_graphs(shapes).rehearse(self._rehearsed_step)

    def _rehearsed_step(self, shape: StepShape, inputs: Tensor) -> Tensor:
        """A step that has the kernels of `_captured_step`, and those of rows with rules."""
        with few_blocks(self.model):
            drawn = self._captured_step(shape, inputs)
        self.sampler.rehearse(self.logits[: shape.num_rows])
        return drawn

    def _step_graphs(self, shapes: list[StepShape]) -> StepGraphs:
        """Graphs to be captured. Allocates `self.logits` and `self.hidden` for their results."""
        spec, max_rows = self.model.spec, max(shape.num_rows for shape in shapes)
        sizes = spec.vocab_size, spec.hidden_size
        self.logits, self.hidden = (
            torch.empty(max_rows, size, dtype=spec.torch_dtype, device=self.device)
            for size in sizes
        )
        padding = StepLayout.empty()
        inputs = {shape: padding.inputs(self.table, shape) for shape in shapes}
        for shape in shapes:
            self._plan(padding, inputs[shape], shape)
        return StepGraphs(self._captured_step, inputs, self.device)

    def forward(self, batch: InputBatch, sampled: SampledTokens | None = None) -> Tensor:
        """Hidden states of all tokens, [tokens, hidden], or of `sampled` only, [samples, hidden].

        Stores the keys and values of all tokens either way.
        """
        paged = (batch.attn[place.group] for place in self._layout.places)
        states = self.states.metadata(batch.rows, batch.attn[0], batch.snapshots)
        attn = self._layout.in_layer_order(paged, states)
        last = () if sampled is None else (sampled,)
        hidden: Tensor = self.model(batch.input_ids, batch.positions, self._caches, attn, *last)
        return hidden

    def _forward_samples(self, batch: InputBatch, out: Tensor | None = None) -> Tensor:
        """Hidden states of the sampled tokens, [samples, hidden], written to `out` if given."""
        num_tokens, num_samples = len(batch.input_ids), len(batch.logits_indices)
        is_large = num_tokens >= max(_MIN_TOKENS_FOR_SAMPLED_ONLY, 4 * num_samples)
        if is_large and self.model.takes_sampled_tokens:
            places = self._layout.places[-self.model.num_sampled_layers :]
            groups = [place.group for place in places]
            sampled = batch.sampled_tokens(self.table, groups, self.block_sizes)
            hidden = self.forward(batch, sampled)
            return hidden if out is None else out.copy_(hidden)
        hidden = self.forward(batch)
        if out is None and num_tokens == num_samples:
            return hidden
        return torch.index_select(hidden, 0, batch.logits_indices, out=out)

    def _plan(self, layout: StepLayout, rows: np.ndarray, graph: StepShape | None = None) -> None:
        """Let the backend plan the step. rows: the layout's request rows, then padding rows.

        graph: the shape whose captured graph will run the step; None: the step runs uncaptured.
        """
        tables = self.table.block_tables
        self._backend.plan(rows, layout.computed, layout.counts, tables, graph)

    def _products_of(self, num_rows: int) -> AbstractContextManager[None]:
        on_cpu = self.device.type == "cpu"
        return single_row_products() if on_cpu and num_rows == 1 else nullcontext()

    # -- what requests ask for besides tokens --------------------------------------------------

    def _last_tokens(self, rows: np.ndarray) -> Tensor | None:
        """Last tokens before the step overwrites them, int64 [rows]; None if no rule reads them."""
        table = self.table
        if not table.rules.need_last_tokens(rows):
            return None
        return table.last_token_ids[to_device(rows, self.device)]

    def _pool(
        self, layout: StepLayout, result: StepResult, pools: np.ndarray, extras: Extras | None
    ) -> Extras | None:
        """Add the vectors of requests whose prompts end in this step to the step's extras."""
        pooling = self.table.pooling
        if result.hidden is not None and pooling.means[layout.rows].any():
            pooling.add_to_sums(layout, result.hidden)
        if not pools.any():
            return extras
        assert result.sampled is not None
        extras = extras or Extras()
        extras.pooled = pooling.pool(layout, result.sampled)
        return extras

    # -- after a failure -----------------------------------------------------------------------

    def reset(self) -> None:
        """Forget all requests after a failed step; the scheduler sends them again as new ones."""
        self.table.clear()
