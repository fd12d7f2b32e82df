"""Splits each step's token budget among the requests, without prefill and decode phases.

Every request's `num_computed_tokens` catches up with its number of tokens. A step gives tokens to
running requests first, then to waiting requests. Chunked prefill, prefix caching and preemption by
recomputation all follow from this rule. The scheduler knows no tensors, models or text.

    scheduler.add(request)
    step = scheduler.schedule()                 # -> SchedulerOutput
    news = scheduler.update(step, sampled)      # after the runner executed the step

The next step may be scheduled before the tokens of the last step are known: a request's tokens in
flight count as tokens, and `update` drops the tokens of a request that has ended meanwhile.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

from compiledllm.log import log
from compiledllm.outputs import FinishReason
from compiledllm.scheduler.block_pool import BlockPool
from compiledllm.scheduler.finish_rules import reason_to_finish
from compiledllm.scheduler.kv_manager import KVManager
from compiledllm.scheduler.policy import POLICIES, Pace, WaitingQueue
from compiledllm.scheduler.step_builder import StepBuilder
from compiledllm.types import (
    NewRequest,
    Request,
    RequestStatus,
    RequestUpdate,
    SchedulerOutput,
    StepNews,
    StepOutput,
)

NO_TOKEN = "no token could be drawn: the logits are NaN or infinite, or every token is banned"


class Scheduler:
    """Continuous batching over a block pool.

    max_num_seqs: largest number of requests in a step; max_num_batched_tokens: largest number of
    tokens in a step; pace: how much of a step prompts get while other requests decode, by default
    all of it; windows, num_snapshots: see `KVManager`.
    """

    def __init__(
        self,
        block_pool: BlockPool,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        policy: str = "fcfs",
        pace: Pace | None = None,
        windows: Sequence[int] = (0,),
        num_snapshots: int | None = None,
    ) -> None:
        self.pace = pace or Pace(max_num_batched_tokens, max_num_batched_tokens)
        self.block_pool = block_pool
        self.kv = KVManager(block_pool, block_size, windows, num_snapshots)
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.requests: dict[str, Request] = {}
        self.running: list[Request] = []
        self.waiting = WaitingQueue(POLICIES[policy])
        self.num_preemptions = 0
        self._held: dict[str, Request] = {}  # waiting requests that must not be scheduled
        self._is_sorted = True  # whether `running` is in order of rank
        self.num_prefix_queries = self.num_prefix_hits = 0  # prompt tokens looked up, tokens found
        # Prompt tokens whose KV was found without a snapshot of the state after them.
        self.num_prefix_misses_of_state = 0
        self.num_failed_rows = 0  # rows of logits from which no token could be drawn
        self._freed_request_ids: list[str] = []
        self._spoilt_block_ids: list[int] = []  # blocks of requests whose logits were NaN
        # The requests of each scheduled step whose results `update` has not seen yet.
        self._in_flight: deque[list[Request]] = deque()

    # -- requests in and out -------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a request. Raises ValueError, saying what would fit, if it could never fit."""
        if request.request_id in self.requests:
            raise ValueError(f"request_id '{request.request_id}' is already in use")
        self.kv.check_fits(request)
        if not self.requests:
            self.pace.lengths_are_known = True
        request.sibling = self.requests.get(request.spec.sibling_id or "")
        self.requests[request.request_id] = request
        self.waiting.push(request)

    def finish(
        self, request_id: str, reason: FinishReason, stop_reason: int | str | None = None
    ) -> Request | None:
        """End a request from outside (abort, stop string). None if it has already ended."""
        request = self.requests.get(request_id)
        if request is None:
            return None
        if request.status is RequestStatus.RUNNING:
            self.running.remove(request)
        self._end(request, reason, stop_reason)
        return request

    def hold(self, request_ids: Iterable[str]) -> None:
        """Keep waiting requests from being scheduled until `release`."""
        for request_id in request_ids:
            request = self.requests[request_id]
            self.waiting.remove(request)
            self._held[request_id] = request

    def release(self, request_ids: Iterable[str]) -> None:
        """Put held requests back in the waiting queue; requests that have ended are skipped."""
        for request_id in request_ids:
            request = self._held.pop(request_id, None)
            if request is not None and not request.is_finished:
                self.waiting.push(request)

    def has_unfinished(self) -> bool:
        return bool(self.requests)

    # -- a step --------------------------------------------------------------------------------

    def schedule(self) -> SchedulerOutput:
        """Choose this step's work, allocate its blocks, and list the changes since the last."""
        if self.kv.states is not None:
            self.kv.states.snapshots.settle()
        builder = StepBuilder(
            self.kv, self.pace, self.running, self.waiting, self.max_num_batched_tokens
        )
        has_preempted = self._schedule_running(builder)
        new_requests: list[NewRequest] = []
        # A step that preempts admits no request, which would take the freed blocks right back.
        while not has_preempted and self.waiting:
            request = self.waiting.peek()
            admitted = self._admit(request, builder) if builder.room_for(request, 0) else None
            if admitted is None:
                break
            new_requests.append(admitted)
        freed, self._freed_request_ids = self._freed_request_ids, []
        spoilt, self._spoilt_block_ids = self._spoilt_block_ids, []
        self._in_flight.append(builder.requests)
        states = builder.saved_states, builder.restored_states, builder.kept_states
        return SchedulerOutput(new_requests, builder.lines, freed, spoilt, *states)

    def _schedule_running(self, builder: StepBuilder) -> bool:
        """Give every running request tokens, best-ranked first; preempt from the other end.

        Returns whether a request was preempted.
        """
        if not self._is_sorted:
            self.running.sort(key=self.waiting.rank)
            self._is_sorted = True
        index, has_preempted = 0, False
        while index < len(self.running) and builder.budget > 0:
            request = self.running[index]
            if builder.grant_next_token(request) or builder.grant_running(request):
                index += 1
            else:  # the lowest-ranked request loses its blocks; it may be this request itself
                self._preempt(self.running.pop())
                has_preempted = True
        return has_preempted

    def _admit(self, request: Request, builder: StepBuilder) -> NewRequest | None:
        """Start or resume a waiting request, reusing cached blocks; None if it must wait."""
        if len(self.running) >= self.max_num_seqs or request.num_tokens_in_flight:
            return None
        kv, pool, states = self.kv, self.block_pool, self.kv.states
        if states is not None and states.waits_for_sibling(request):
            return None
        prefix = kv.lookup_prefix(request)
        num_cached = len(prefix[0]) * kv.block_size
        wanted = request.num_tokens - num_cached
        count = min(wanted, builder.room_for(request, num_cached))
        count = kv.max_chunk(num_cached, count)
        if states is not None:
            states.begin(request, num_cached)
            count = kv.max_with_one_snapshot(request, num_cached, count)
        if count < 1:  # the budget has room for the request, but not after so long a prefix
            return None
        missing = kv.num_missing_blocks(prefix, num_cached + count)
        if missing + pool.num_free_among(kv.seen_blocks(prefix)) > pool.num_free_blocks:
            return None
        self.waiting.pop()
        kv.adopt_prefix(request, prefix)
        request.num_computed_tokens = num_cached
        slot = states.slot_to_restore(request) if states is not None else None
        if slot is not None:
            builder.restored_states.append((request.request_id, slot))
        if request.num_cached_tokens < 0:
            request.num_cached_tokens = num_cached
            self.num_prefix_queries += request.num_tokens
            self.num_prefix_hits += num_cached
            self.num_prefix_misses_of_state += max(request.diverges_at - num_cached, 0)
        request.status = RequestStatus.RUNNING
        self.running.append(request)
        self._is_sorted = False
        builder.grant_new(request, count, count == wanted, missing)
        return NewRequest(request.spec, list(request.token_ids), request.grammar)

    def update(self, step: SchedulerOutput, output: StepOutput) -> StepNews:
        """Record a step's results. Steps are updated in the order in which they were scheduled.

        Returns the news of requests that got a token or failed, finished ones included. Requests
        that ended while the step ran (by an earlier token or an abort) get none.
        """
        news = StepNews()
        has_ended = False
        finished, running = RequestStatus.FINISHED, RequestStatus.RUNNING
        for line, request in zip(step.scheduled, self._in_flight.popleft(), strict=True):
            if request.status is finished:
                continue
            if output.prompt_logprobs:
                self._keep_prompt_logprobs(request, output)
            if not line.samples:
                continue
            request.num_tokens_in_flight -= 1
            if request.num_tokens_to_drop:
                request.num_tokens_to_drop -= 1
            else:
                self._take(request, output, news)
            has_ended |= request.status is not running
        if has_ended:
            self.running = [r for r in self.running if r.status is RequestStatus.RUNNING]
        return news

    def _keep_prompt_logprobs(self, request: Request, output: StepOutput) -> None:
        """Append prompt log probabilities, without positions recomputed after a preemption."""
        position, found = output.prompt_logprobs.get(request.request_id, (0, []))
        request.prompt_logprobs += found[len(request.prompt_logprobs) - (position - 1) :]

    def _take(self, request: Request, output: StepOutput, news: StepNews) -> None:
        """Append a request's next token; without a token, start the request over or end it."""
        request_id = request.request_id
        token_id = output.token_ids[request_id]
        if token_id < 0:
            self._retry_or_fail(request, output.errors.get(request_id), news)
            return
        spec, tokens = request.spec, request.token_ids
        is_first = len(tokens) == request.num_prompt_tokens
        if is_first and spec.max_tokens == 0:
            self._end_without_tokens(request, output.pooled.get(request_id), news)
            return
        tokens.append(token_id)
        if (
            token_id in spec.stop_token_ids
            or len(tokens) >= request.max_tokens_total
            or spec.sampling_params.repetition_detection
        ):
            reason = reason_to_finish(request, token_id)
            if reason is not None:
                self._end(request, *reason)
        found = output.logprobs.get(request_id) if output.logprobs else None
        if is_first or request.finish_reason is not None:
            logprobs = [] if found is None else [found]
            news.updates.append(RequestUpdate.of(request, [token_id], logprobs))
            return
        news.token_ids[request_id] = token_id
        if found is not None:
            news.logprobs[request_id] = found

    def _end_without_tokens(self, request: Request, pooled: bytes | None, news: StepNews) -> None:
        """End a request that asks for no token, now that its prompt is computed."""
        self._end(request, "length" if request.spec.pooling is None else "stop")
        news.updates.append(RequestUpdate.of(request, [], pooled=pooled))

    def _retry_or_fail(self, request: Request, error: str | None, news: StepNews) -> None:
        """Start a request that got no token over, or end it.

        The request ends if it fails for the second time, or if one of its own rules failed.
        error: the failure of a rule of the request, such as a logits processor; None: there was no
        such failure.
        """
        if error is None:  # no rule of the request failed, so its KV may hold NaN
            self._spoilt_block_ids += self.kv.forget_blocks(request)
            if request.status is not RequestStatus.RUNNING:  # preempted: its blocks are unknown
                self.kv.reset_prefixes()
        if error is None and not request.is_second_try:
            self._try_again(request)
            return
        self.num_failed_rows += 1
        log.warning("request '%s' failed: %s", request.request_id, error or NO_TOKEN)
        self._end(request, "error", error or NO_TOKEN)
        news.updates.append(RequestUpdate.of(request, []))

    def _try_again(self, request: Request) -> None:
        """Compute a request from scratch without shared blocks, one of which may hold NaN.

        The tokens of steps in flight are dropped on arrival.
        """
        request.is_second_try = True
        request.num_tokens_to_drop = request.num_tokens_in_flight
        request.prompt_logprobs = []
        if request.status is RequestStatus.RUNNING:
            self._preempt(request)

    def abandon_step(self, step: SchedulerOutput, failed: bool) -> None:
        """Drop a step that was not executed completely, and all tokens in flight.

        The runner has lost its rows, so every running request starts over from its known tokens;
        with `failed`, the requests of the step end with "error" instead. The prefix cache is
        emptied, since blocks may have been written only in part.
        """
        self.kv.reset_prefixes()
        self._in_flight.clear()
        for request in self.requests.values():
            request.num_tokens_in_flight = request.num_tokens_to_drop = 0
        self.running = [request for request in self.running if not request.is_finished]
        while self.running:
            self._preempt(self.running.pop())
        for line in step.scheduled if failed else ():
            self.finish(line.request_id, "error")
        self._freed_request_ids = []

    def _preempt(self, request: Request) -> None:
        """Take a running request's blocks. It is recomputed later, often from the prefix cache."""
        self.kv.release(request)
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        request.status = RequestStatus.PREEMPTED
        self.num_preemptions += 1
        self.waiting.push(request)
        self._freed_request_ids.append(request.request_id)

    def _end(
        self, request: Request, reason: FinishReason, stop_reason: int | str | None = None
    ) -> None:
        """End a request. The caller removes a running request from `running`."""
        was_running = request.status is RequestStatus.RUNNING
        if not was_running:
            self.waiting.remove(request)
        self.kv.release(request)
        self.pace.note_end(request, reason)
        request.status = RequestStatus.FINISHED
        request.finish_reason = reason
        request.stop_reason = stop_reason
        self.waiting.forget(request)
        del self.requests[request.request_id]
        if was_running:
            self._freed_request_ids.append(request.request_id)

    def check_invariants(self) -> None:
        """Raise AssertionError if blocks, queues and requests contradict each other."""
        alive = list(self.requests.values())
        self.kv.check_invariants(alive)
        running = {r.request_id for r in alive if r.status is RequestStatus.RUNNING}
        assert running == {r.request_id for r in self.running}, "running list and statuses differ"
        waiting = {r.request_id for r in alive if r.status is not RequestStatus.RUNNING}
        queued = {r.request_id for r in self.waiting} | {i for i in self._held if i in waiting}
        assert waiting == queued, "waiting queue and statuses differ"
        assert len(self.running) <= self.max_num_seqs, "more requests run than max_num_seqs"
