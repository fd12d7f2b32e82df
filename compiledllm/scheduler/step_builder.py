"""One step while it is assembled: which requests get how many tokens, and the blocks for them.

The scheduler chooses the next request; the builder knows how many tokens the step can still take,
in all and of prompts, and writes the lines that the runner executes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from compiledllm.scheduler.kv_manager import KVManager
from compiledllm.scheduler.policy import Pace, WaitingQueue
from compiledllm.scheduler.prompt_budget import PromptBudget
from compiledllm.types import Request, RequestStatus, ScheduledRequest

_NO_BLOCKS: list[list[int]] = []  # shared by many lines, so it must never be modified


def _decodes(request: Request) -> bool:
    """Whether the request has an output token, or one in flight that is not its last."""
    left = request.max_tokens_total - len(request.token_ids)
    return request.num_output_tokens > 0 or 0 < request.num_tokens_in_flight < left


@dataclass(slots=True)
class StepBuilder:
    """Grants tokens to requests until the step is full.

    running, waiting: the scheduler's requests. budget: number of tokens that the step can still
    take. prompt_budget: how many of these tokens prompts may take; made for the first prompt.
    lines: the step so far. saved_states, restored_states, kept_states: see `SchedulerOutput`.
    """

    kv: KVManager
    pace: Pace
    running: list[Request]
    waiting: WaitingQueue
    budget: int
    prompt_budget: PromptBudget | None = None
    lines: list[ScheduledRequest] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)  # the request of each line
    saved_states: list[tuple[str, int]] = field(default_factory=list)
    restored_states: list[tuple[str, int]] = field(default_factory=list)
    kept_states: list[tuple[str, int, int]] = field(default_factory=list)

    def room_for(self, request: Request, position: int) -> int:
        """Number of prompt tokens that the step can grant to a request after `position` tokens.

        Must be called for the best-ranked prompt first.
        """
        if self.prompt_budget is None:
            self.prompt_budget = self._prompt_budget(request)
        if self.prompt_budget.is_exempt(request):
            return self.budget
        return min(self.budget, self.prompt_budget.room(position))

    def _take_prompt_tokens(self, position: int, count: int) -> None:
        assert self.prompt_budget is not None
        self.prompt_budget.take(position, count)

    def _prompt_budget(self, prompt: Request) -> PromptBudget:
        """The prompts' budget in this step; if no request decodes, the whole budget of the step."""
        if not any(map(_decodes, self.running)):
            return PromptBudget(self.budget)
        num_waiting = len(self.waiting) + (prompt.status is RequestStatus.RUNNING)
        return self.pace.prompt_budget(prompt, self.running, num_waiting)

    def grant_next_token(self, request: Request) -> bool:
        """Fast path of `grant_running`, with the same effect: one token, in an allocated block.

        Blocks outside a window are freed later, once the request needs its next block. Returns
        False, with no effect, for a request in any other state.
        """
        known, in_flight = len(request.token_ids), request.num_tokens_in_flight
        num_tokens, computed = known + in_flight, request.num_computed_tokens
        if (
            num_tokens - computed != 1
            or num_tokens >= request.max_tokens_total
            or computed >= request.next_kv_check
            or (in_flight and request.needs_last_token)
        ):
            return False
        request.num_computed_tokens = num_tokens
        request.num_tokens_in_flight = in_flight + 1
        if known // self.kv.block_size > request.num_registered_blocks:
            self.kv.register_full_blocks(request)
        self.lines.append(ScheduledRequest(request.request_id, computed, 1, _NO_BLOCKS, True))
        self.requests.append(request)
        self.budget -= 1
        return True

    def grant_running(self, request: Request) -> bool:
        """Grant a running request the tokens it needs, or as many as fit; False without blocks."""
        kv, wanted = self.kv, request.num_tokens_to_compute
        computed = request.num_computed_tokens
        count = min(wanted, self.budget if wanted <= 1 else self.room_for(request, computed))
        if count == 0:  # the request waits for a token in flight, or the prompt budget is used up
            return True
        kv.trim(request)
        count = kv.max_chunk(computed, count)
        if wanted > 1:
            count = kv.max_with_one_snapshot(request, computed, count)
        missing = kv.num_missing_blocks(request.block_tables, computed + count)
        if missing > kv.pool.num_free_blocks:
            count = min(count, kv.room_at_hand(request))
            if count == 0:
                return False
            missing = kv.num_missing_blocks(request.block_tables, computed + count)
        if wanted > 1:
            self._take_prompt_tokens(computed, count)
        slot = kv.slot_to_save(request, len(self.running))
        if slot is not None:
            self.saved_states.append((request.request_id, slot))
        self._grant(request, count, count == wanted, missing)
        return True

    def grant_new(self, request: Request, count: int, samples: bool, missing: int) -> None:
        """Grant `count` tokens, which need `missing` blocks, to a request just admitted."""
        self._take_prompt_tokens(request.num_computed_tokens, count)
        self._grant(request, count, samples, missing, is_new=True)

    def _grant(
        self, request: Request, count: int, samples: bool, missing: int, is_new: bool = False
    ) -> None:
        """Allocate `missing` blocks for `count` more tokens; add the request's line to the step.

        Blocks that this step fills are registered now: within a step each layer stores all KV
        before it reads any, so a later request of the same step may already share these blocks.
        """
        new_block_ids = self.kv.extend(request, count, missing)
        if count > 1 and self.kv.states is not None:
            kept = self.kv.states.slot_to_keep(request, request.num_computed_tokens, count)
            if kept is not None:
                self.kept_states.append((request.request_id, *kept))
        if is_new:  # the device does not know the blocks of the prefix yet
            new_block_ids = [list(table) for table in request.block_tables]
        num_computed = request.num_computed_tokens
        request.num_computed_tokens += count
        request.num_tokens_in_flight += samples
        self.kv.register_full_blocks(request)
        line = ScheduledRequest(request.request_id, num_computed, count, new_block_ids, samples)
        self.lines.append(line)
        self.requests.append(request)
        self.budget -= count
