"""The scheduler against a fake device that knows what every KV slot must hold.

The fake runner keeps its own rows, as the real one does. Its "KV" of a token stands for the token
and all tokens before it, its model is a pure function of the tokens so far. So a wrong block table,
a stale prefix hit or a lost token is seen in the step where it happens.
"""

from __future__ import annotations

import random
import subprocess
import sys
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compiledllm.sampling_params import RepetitionDetectionParams, SamplingParams
from compiledllm.scheduler.block_pool import NULL_BLOCK, BlockPool
from compiledllm.scheduler.finish_rules import ends_in_repetition
from compiledllm.scheduler.policy import MAX_PASSED_OVER, POLICIES, Pace, WaitingQueue
from compiledllm.scheduler.scheduler import Scheduler
from compiledllm.scheduler.step_builder import StepBuilder
from compiledllm.types import (
    Request,
    RequestStatus,
    RequestUpdate,
    ScheduledRequest,
    SchedulerOutput,
    StepNews,
    StepOutput,
    TokenLogprobs,
)
from tests.support.requests import make_request

VOCAB_SIZE = 11
ROOT_KEY = 0
Slot = tuple[int, int]  # block id, offset


def next_token(token_ids: list[int]) -> int:
    """The fake model."""
    return zlib.crc32(bytes(token_ids)) % VOCAB_SIZE


def extend_key(key: int, token_id: int) -> int:
    """What a slot holds: a token, given what the slot before it holds."""
    return hash((key, token_id))


def expected_output(request: Request) -> list[int]:
    """The tokens a request must end with, whatever happened to it on the way."""
    token_ids = list(request.spec.prompt_token_ids)
    for count in range(1, request.spec.max_tokens + 1):
        token_ids.append(next_token(token_ids))
        min_reached = count >= request.spec.sampling_params.min_tokens
        if min_reached and token_ids[-1] in request.spec.stop_token_ids:
            break
    return token_ids[request.num_prompt_tokens :]


@dataclass
class Row:
    token_ids: list[int]
    num_computed_tokens: int = -1  # unknown until first scheduled: the prefix hit says
    block_tables: list[list[int]] = field(default_factory=list)  # of each group


class FakeRunner:
    """Rows and a KV cache. All of a step's writes come before its reads, as on the device.

    windows: of each group of layers; 0: all is seen.
    """

    def __init__(self, block_size: int, max_num_seqs: int, windows: tuple[int, ...] = (0,)) -> None:
        self.block_size = block_size
        self.max_num_seqs = max_num_seqs
        self.windows = windows
        self.rows: dict[str, Row] = {}
        self.kv: dict[Slot, tuple[int, int]] = {}  # the group it was written for, and the key

    def execute(self, step: SchedulerOutput) -> StepOutput:
        self.apply(step)
        self.write(step.scheduled)
        return StepOutput({line.request_id: self.sample(line) for line in self.read(step)})

    def apply(self, step: SchedulerOutput) -> None:
        for request_id in step.freed_request_ids:
            del self.rows[request_id]
        for request in step.new_requests:
            name = request.spec.request_id
            assert name not in self.rows, "a live row was filled a second time"
            tables: list[list[int]] = [[] for _ in self.windows]
            self.rows[name] = Row(list(request.token_ids), block_tables=tables)
        assert len(self.rows) <= self.max_num_seqs, "more rows than the device has"
        for line in step.scheduled:
            row = self.rows[line.request_id]
            if line.new_block_ids:
                for table, block_ids in zip(row.block_tables, line.new_block_ids, strict=True):
                    table += block_ids
            assert row.num_computed_tokens in (-1, line.num_computed_tokens)
            row.num_computed_tokens = line.num_computed_tokens + line.num_scheduled_tokens

    def write(self, lines: Iterable[ScheduledRequest]) -> None:
        written: set[Slot] = set()
        for line in lines:
            row, first = self.rows[line.request_id], line.num_computed_tokens
            keys = self.keys(row)
            for position in range(first, first + line.num_scheduled_tokens):
                for group, table in enumerate(row.block_tables):
                    slot = self.slot(table, position)
                    assert slot[0] != NULL_BLOCK, "a token was sent to the null block"
                    assert slot not in written, "two tokens of a step share a slot"
                    written.add(slot)
                    self.kv[slot] = group, keys[position]

    def read(self, step: SchedulerOutput) -> list[ScheduledRequest]:
        """Check every context; the lines that sample."""
        for line in step.scheduled:
            row = self.rows[line.request_id]
            keys = self.keys(row)
            for group, window in enumerate(self.windows):
                first = max(line.num_computed_tokens - window + 1, 0) if window else 0
                for position in range(first, row.num_computed_tokens):
                    held = self.kv.get(self.slot(row.block_tables[group], position))
                    assert held == (group, keys[position]), (line.request_id, group, position)
            assert line.samples == (row.num_computed_tokens == len(row.token_ids))
        return [line for line in step.scheduled if line.samples]

    def sample(self, line: ScheduledRequest) -> int:
        row = self.rows[line.request_id]
        row.token_ids.append(next_token(row.token_ids))
        return row.token_ids[-1]

    def slot(self, table: list[int], position: int) -> Slot:
        return table[position // self.block_size], position % self.block_size

    def keys(self, row: Row) -> list[int]:
        keys = [ROOT_KEY]
        for token_id in row.token_ids:
            keys.append(extend_key(keys[-1], token_id))
        return keys[1:]

    def reset(self) -> None:
        self.rows = {}


class Bench:
    """A scheduler and its fake runner; every step is checked from all sides."""

    def __init__(
        self,
        num_blocks: int = 64,
        block_size: int = 4,
        max_num_seqs: int = 8,
        budget: int = 64,
        policy: str = "fcfs",
        enable_prefix_caching: bool = True,
        mixed: int | None = None,
        balanced: int | None = None,
        windows: tuple[int, ...] = (0,),
    ) -> None:
        self.pool = BlockPool(num_blocks, enable_prefix_caching)
        sizes = block_size, max_num_seqs, budget
        pace = Pace(balanced or budget, None if balanced else mixed or budget)
        self.scheduler = Scheduler(self.pool, *sizes, policy, pace, windows)
        self.runner = FakeRunner(block_size, max_num_seqs, windows)
        self.policy = policy
        self.requests: dict[str, Request] = {}
        self.steps: list[SchedulerOutput] = []

    def add(
        self,
        prompt: list[int],
        max_tokens: int = 4,
        name: str | None = None,
        priority: int = 0,
        arrival_time: float | None = None,
        stop_token_ids: Iterable[int] = (),
        eos_token_ids: Iterable[int] = (),
        min_tokens: int = 0,
        in_batch: bool = False,
    ) -> Request:
        index = len(self.requests)
        stops = list(stop_token_ids)
        request = make_request(
            request_id=name or f"r{index}",
            prompt_token_ids=prompt,
            params=SamplingParams(
                stop_token_ids=stops, min_tokens=min_tokens, max_tokens=max_tokens + min_tokens
            ),
            max_tokens=max_tokens,
            stop_token_ids=frozenset(stops) | frozenset(eos_token_ids),
            priority=priority,
            arrival_time=float(index) if arrival_time is None else arrival_time,
            waits_for_batch=in_batch,
        )
        self.scheduler.add(request)
        self.requests[request.request_id] = request
        return request

    def schedule(self, may_be_empty: bool = False) -> SchedulerOutput:
        """may_be_empty: all requests may be waiting for tokens in flight."""
        leaders = self.leaders()
        preemptions_before = [request.num_preemptions for request in leaders]
        step = self.scheduler.schedule()
        self.steps.append(step)
        self.scheduler.check_invariants()
        preemptions = [request.num_preemptions for request in leaders]
        assert preemptions == preemptions_before, "a top-ranked request was preempted"
        names = [line.request_id for line in step.scheduled]
        assert len(set(names)) == len(names)
        assert all(line.num_scheduled_tokens >= 1 for line in step.scheduled)
        assert step.num_scheduled_tokens <= self.scheduler.max_num_batched_tokens
        idle = not step.scheduled and self.scheduler.has_unfinished()
        assert may_be_empty or not idle, "a step without progress"
        return step

    def leaders(self) -> list[Request]:
        """The best-ranked of all live requests, and the best-ranked of the running ones."""
        rank = self.scheduler.waiting.rank
        live = self.scheduler.requests.values()
        running = [request for request in live if request.status is RequestStatus.RUNNING]
        return [min(group, key=rank) for group in (live, running) if group]

    def step(self) -> SchedulerOutput:
        step = self.schedule()
        self.scheduler.update(step, self.runner.execute(step))
        self.scheduler.check_invariants()
        return step

    def run(self, max_steps: int = 1000) -> list[SchedulerOutput]:
        """To the end of all requests; the steps it took."""
        steps: list[SchedulerOutput] = []
        while self.scheduler.has_unfinished():
            assert len(steps) < max_steps, "the requests do not come to an end"
            steps.append(self.step())
        self.check_all_finished()
        return steps

    def check_all_finished(self) -> None:
        """Nothing is held any more, and every request that was not ended from outside is whole."""
        last = self.scheduler.schedule()  # delivers the last freed rows
        self.scheduler.update(last, self.runner.execute(last))
        assert not self.runner.rows
        assert self.pool.num_free_blocks == self.pool.num_blocks
        for request in self.requests.values():
            from_outside = isinstance(request.stop_reason, str)
            if request.finish_reason in ("stop", "length") and not from_outside:
                assert request.output_token_ids == expected_output(request)


def set_params(request: Request, params: SamplingParams) -> None:
    request.spec = replace(request.spec, sampling_params=params)


def counts(step: SchedulerOutput) -> dict[str, int]:
    return {line.request_id: line.num_scheduled_tokens for line in step.scheduled}


def tokens(count: int, start: int = 0) -> list[int]:
    return [(start + n) % 251 for n in range(count)]


# -- the token budget ---------------------------------------------------------------------------


def test_one_request_is_computed_and_finishes() -> None:
    bench = Bench()
    request = bench.add(tokens(6), max_tokens=3)
    steps = bench.run()
    assert [counts(step) for step in steps] == [{"r0": 6}, {"r0": 1}, {"r0": 1}]
    assert request.finish_reason == "length"
    assert request.num_output_tokens == 3


def test_prompts_take_smaller_steps_beside_those_that_decode() -> None:
    bench = Bench(num_blocks=200, budget=64, mixed=10)
    bench.add(tokens(80), max_tokens=30, name="first")
    assert counts(bench.step()) == {"first": 64}  # nobody decodes yet
    assert counts(bench.step()) == {"first": 16}
    bench.add(tokens(25, start=90), name="second")
    bench.add(tokens(7, start=130), name="third")
    assert counts(bench.step()) == {"first": 1, "second": 10}
    assert counts(bench.step()) == {"first": 1, "second": 10}
    assert counts(bench.step()) == {"first": 1, "second": 5, "third": 5}
    assert counts(bench.step()) == {"first": 1, "second": 1, "third": 2}
    bench.run()


def beside(num_decoding: int, num_waiting: int) -> int:
    """Tokens of the first step in which prompts of 600 tokens share it with those that decode."""
    bench = Bench(num_blocks=9000, budget=5000, balanced=64, max_num_seqs=200)
    for n in range(num_decoding):
        bench.add(tokens(2, start=3 * n), max_tokens=90)
    bench.step()
    for n in range(num_waiting):
        bench.add(tokens(600, start=1000 * (n + 1)), max_tokens=2)
    num_tokens = bench.step().num_scheduled_tokens
    bench.run()
    return num_tokens


@pytest.mark.parametrize(
    ("num_decoding", "num_waiting", "times_the_balance"),
    [
        (4, 4, 4),  # as many wait as decode
        (4, 1, 2),  # a quarter of them: half of that
        (8, 1, 2),  # 1.41: up to a power of two
        (1, 4, 8),  # four times as many: twice
        (1, 40, 8),  # it grows no further
        (17, 1, 4),  # eight tokens for each make 2.1
    ],
)
def test_a_step_grows_with_the_root_of_those_that_wait_for_each_that_decodes(
    num_decoding: int, num_waiting: int, times_the_balance: int
) -> None:
    assert beside(num_decoding, num_waiting) == min(
        64 * times_the_balance, num_decoding + 600 * num_waiting
    )


def test_a_prompt_goes_on_beside_those_that_decode() -> None:
    bench = Bench(num_blocks=200, budget=64, balanced=4)
    bench.add(tokens(64), max_tokens=30, name="first")
    assert counts(bench.step()) == {"first": 64}  # nobody decodes yet
    bench.add(tokens(40, start=90), max_tokens=9, name="second")
    assert counts(bench.step()) == {"first": 1, "second": 15}
    assert counts(bench.step()) == {"first": 1, "second": 14}  # one waits, two run: 16 in all
    assert counts(bench.step()) == {"first": 1, "second": 11}
    assert counts(bench.step()) == {"first": 1, "second": 1}
    bench.run()


@pytest.mark.parametrize(
    ("max_tokens", "next_step"),
    [(9, {"first": 1, "second": 15}), (1, {"second": 60})],  # it needs another token, or none
)
def test_who_waits_for_a_first_token_in_flight_decodes_if_it_is_not_the_last(
    max_tokens: int, next_step: dict[str, int]
) -> None:
    bench = Bench(num_blocks=200, budget=64, balanced=4)
    bench.add(tokens(20), max_tokens=max_tokens, name="first")
    ahead = bench.schedule()
    bench.add(tokens(60, start=90), max_tokens=max_tokens, name="second")
    step = bench.schedule()
    assert counts(step) == next_step
    for launched in (ahead, step):
        bench.scheduler.update(launched, bench.runner.execute(launched))
    bench.run()


def batch_of(bench: Bench, *requests: tuple[int, int]) -> list[Request]:
    """Requests of a batch: length of the prompt, most tokens."""
    return [
        bench.add(tokens(length, start=100 * n), max_tokens=most, in_batch=True, arrival_time=0)
        for n, (length, most) in enumerate(requests)
    ]


def test_prompts_of_a_batch_fill_steps_while_the_longest_request_decodes() -> None:
    bench = Bench(num_blocks=200, budget=24, balanced=8)
    batch_of(bench, (24, 30), (30, 5), (9, 4))
    steps = [counts(step) for step in bench.run()]
    assert steps[0] == {"r0": 24}
    assert steps[1] == {"r0": 1, "r1": 7}  # up to the balance, not the budget
    assert all(sum(step.values()) <= 8 for step in steps[1:])
    assert len(steps) == 30  # as many as without the others


def test_a_request_of_a_batch_that_would_end_last_does_not_wait() -> None:
    bench = Bench(num_blocks=200, budget=24, balanced=8)
    batch_of(bench, (20, 10), (40, 10), (20, 3))
    steps = [counts(step) for step in bench.run()]
    assert steps[:2] == [{"r0": 20, "r1": 4}, {"r0": 1, "r1": 23}]
    assert steps[2]["r1"] == 13
    assert "r2" not in steps[2]


def test_prompts_of_a_batch_wait_for_nobody_once_a_request_ended_early() -> None:
    bench = Bench(num_blocks=200, budget=24, balanced=8)
    first, *_ = batch_of(bench, (20, 30), (4, 30), (60, 5))
    bench.step()
    assert counts(bench.step()) == {"r0": 1, "r1": 1, "r2": 6}
    bench.scheduler.finish(first.request_id, "stop", "text")
    assert counts(bench.step()) == {"r1": 1, "r2": 23}
    bench.run()


def test_prompts_of_a_batch_wait_for_nobody_where_lengths_are_not_given() -> None:
    bench = Bench(num_blocks=200, budget=24, balanced=8)
    for request in batch_of(bench, (20, 30), (60, 5)):
        set_params(request, SamplingParams(max_tokens=None))
    bench.step()
    assert counts(bench.step()) == {"r0": 1, "r1": 23}
    bench.run()


@pytest.mark.parametrize("is_known", [True, False])
def test_a_request_that_computes_again_is_not_left_out_beside_a_batch(is_known: bool) -> None:
    bench = Bench(
        num_blocks=20, budget=16, balanced=64, max_num_seqs=4, enable_prefix_caching=False
    )
    bench.add(tokens(40), max_tokens=9)
    again = bench.add(tokens(30, start=100), max_tokens=30)
    while not again.num_preemptions:
        bench.step()
    last = bench.add(tokens(60, start=160), max_tokens=20, in_batch=True)
    if not is_known:
        set_params(last, SamplingParams(max_tokens=None))
    bench.run()


def test_long_prompt_is_computed_in_chunks_under_the_budget() -> None:
    bench = Bench(budget=5)
    bench.add(tokens(13), max_tokens=2)
    steps = bench.run()
    assert [step.scheduled[0].num_scheduled_tokens for step in steps] == [5, 5, 3, 1]
    assert [step.scheduled[0].samples for step in steps] == [False, False, True, True]


def test_running_requests_get_tokens_before_waiting_ones() -> None:
    bench = Bench(budget=6)
    bench.add(tokens(4), name="runs")
    bench.step()
    bench.add(tokens(10, start=50), name="waits")
    assert counts(bench.step()) == {"runs": 1, "waits": 5}


def test_request_that_gets_no_tokens_in_a_step_goes_on_later() -> None:
    bench = Bench(budget=2)
    for n in range(4):
        bench.add(tokens(1, start=10 * n), max_tokens=3)
    steps = bench.run()
    assert counts(steps[1]) == {"r0": 1, "r1": 1}
    assert all(request.num_preemptions == 0 for request in bench.requests.values())


def test_no_more_than_max_num_seqs_requests_run() -> None:
    bench = Bench(max_num_seqs=2)
    for n in range(5):
        bench.add(tokens(3, start=20 * n), max_tokens=2)
    steps = bench.run()
    assert max(len(step.scheduled) for step in steps) == 2
    assert counts(steps[0]) == {"r0": 3, "r1": 3}


# -- order --------------------------------------------------------------------------------------


def test_first_come_is_first_served() -> None:
    bench = Bench(max_num_seqs=1)
    for name, arrival in (("late", 2.0), ("early", 1.0), ("last", 3.0)):
        bench.add(tokens(3), max_tokens=1, name=name, arrival_time=arrival, priority=-arrival)
    assert [list(counts(step)) for step in bench.run()] == [["early"], ["late"], ["last"]]


def test_equal_arrival_times_are_served_in_order_of_adding() -> None:
    bench = Bench(max_num_seqs=1)
    for name in "cab":
        bench.add(tokens(3), max_tokens=1, name=name, arrival_time=0.0)
    assert [list(counts(step)) for step in bench.run()] == [["c"], ["a"], ["b"]]


def test_lower_priority_number_goes_first_then_arrival() -> None:
    bench = Bench(max_num_seqs=1, policy="priority")
    for name, priority, arrival in (("b2", 5, 9), ("a2", -1, 8), ("b1", 5, 7), ("a1", -1, 6)):
        bench.add(tokens(3), max_tokens=1, name=name, priority=priority, arrival_time=arrival)
    assert [list(counts(step)) for step in bench.run()] == [["a1"], ["a2"], ["b1"], ["b2"]]


def test_request_id_used_again_queues_behind_those_who_wait() -> None:
    bench = Bench(max_num_seqs=1)
    for name in ("again", "b"):
        bench.add(tokens(3), max_tokens=1, name=name, arrival_time=0.0)
    bench.step()
    bench.add(tokens(3), max_tokens=1, name="again", arrival_time=0.0)
    assert [list(counts(step)) for step in bench.run()] == [["b"], ["again"]]


@given(st.lists(st.integers(0, 5), max_size=12), st.data())
def test_waiting_queue_stays_in_order_when_requests_leave_it(
    arrival_times: list[int], data: st.DataObject
) -> None:
    queue = WaitingQueue(POLICIES["fcfs"])
    requests = [make_request(f"r{n}", arrival_time=time) for n, time in enumerate(arrival_times)]
    for request in requests:
        queue.push(request)
    if requests:
        for request in data.draw(st.lists(st.sampled_from(requests), unique=True)):
            queue.remove(request)
            requests.remove(request)
    expected = sorted(requests, key=lambda request: request.arrival_time)
    assert list(queue) == expected
    assert len(queue) == len(expected)
    assert [queue.pop() for _ in expected] == expected


@given(st.integers(0, 60), st.integers(0, 2**32))
def test_every_request_is_let_in_whatever_priorities_keep_coming(num_first: int, seed: int) -> None:
    """The eldest of those that wait is passed over a bounded number of times; equals keep order."""
    rng = random.Random(seed)
    queue, alive, popped = WaitingQueue(POLICIES["priority"]), [], []

    def push(arrival: float, priority: int) -> None:
        name = f"r{len(popped) + len(alive)}-{rng.random()}"
        request = make_request(name, arrival_time=arrival, priority=priority)
        queue.push(request)
        alive.append(request)

    for _ in range(num_first):
        push(rng.randrange(4), rng.randrange(-3, 4))
    passed_over = 0
    for step in range(300):
        push(10.0 + step, rng.randrange(-3, 4))
        if rng.random() < 0.1:
            queue.remove(gone := rng.choice(alive))
            if gone is min(alive, key=lambda r: r.arrival_time):
                passed_over = 0  # the next one has its own patience
            alive.remove(gone)
            queue.forget(gone)
        if not alive:
            continue
        assert len(queue) == len(alive) and list(queue)[0] is queue.peek()
        eldest = min(alive, key=lambda r: r.arrival_time)
        request = queue.pop()
        alive.remove(request)
        equals = [r for r in alive if r.spec.priority == request.spec.priority]
        assert all(r.arrival_time >= request.arrival_time for r in equals)
        passed_over = 0 if request.arrival_time == eldest.arrival_time else passed_over + 1
        assert passed_over <= MAX_PASSED_OVER
        popped.append(request)


def test_priorities_are_kept_where_nobody_waits_for_long() -> None:
    queue = WaitingQueue(POLICIES["priority"])
    for n in range(MAX_PASSED_OVER):
        queue.push(make_request(f"r{n}", priority=-n, arrival_time=n))
    popped = [-queue.pop().spec.priority for _ in range(len(queue))]
    assert popped == list(range(MAX_PASSED_OVER))[::-1]


def test_an_aged_request_is_not_preempted_for_those_it_waited_for() -> None:
    bench = Bench(num_blocks=6, block_size=2, max_num_seqs=2, policy="priority")
    worst = bench.add(tokens(5), max_tokens=6, name="worst", priority=9)
    for n in range(200):
        bench.add(tokens(5, start=3 * n + 20), max_tokens=6, priority=0)
    while worst.num_output_tokens == 0:
        bench.step()
    preemptions, queued = worst.num_preemptions, len(bench.scheduler.waiting)
    assert queued > 150, "it waited for nearly all"
    while not worst.is_finished:
        bench.step()
    assert worst.num_preemptions == preemptions
    bench.run()


def test_a_crowd_that_leaves_the_queue_is_forgotten() -> None:
    queue = WaitingQueue(POLICIES["priority"])
    crowd = [make_request(f"r{n}", priority=n % 7) for n in range(5000)]
    for request in crowd:
        queue.push(request)
    for request in crowd[1:]:
        queue.remove(request)
        queue.forget(request)
    assert list(queue) == crowd[:1]
    assert max(len(queue._by_rank), len(queue._by_age)) < 200


def test_request_that_does_not_fit_holds_up_those_behind_it() -> None:
    bench = Bench(num_blocks=4, block_size=4, enable_prefix_caching=False)
    bench.add(tokens(8), name="runs", max_tokens=4)
    bench.step()
    bench.add(tokens(12), name="large", max_tokens=1)
    bench.add(tokens(2), name="small", max_tokens=1)
    assert list(counts(bench.step())) == ["runs"]
    bench.run()


def test_more_important_arrival_takes_blocks_from_a_less_important_running_request() -> None:
    bench = Bench(num_blocks=4, block_size=2, policy="priority")
    bench.add(tokens(3), max_tokens=4, name="minor", priority=1)
    bench.step()
    bench.add(tokens(3, start=50), max_tokens=4, name="major", priority=0)
    bench.run()
    assert bench.requests["minor"].num_preemptions == 1
    assert bench.requests["major"].num_preemptions == 0


# -- admission ----------------------------------------------------------------------------------


def test_request_that_can_never_fit_is_refused_with_the_number_that_would() -> None:
    bench = Bench(num_blocks=3, block_size=4)
    with pytest.raises(ValueError, match=r"max_tokens=9 needs 4 KV blocks.*max_tokens <= 8 would"):
        bench.add(tokens(5), max_tokens=9)
    assert not bench.scheduler.has_unfinished()
    bench.add(tokens(5), max_tokens=8)
    bench.run()


def test_prompt_that_can_never_fit_is_refused() -> None:
    bench = Bench(num_blocks=3, block_size=4)
    with pytest.raises(ValueError, match="shorten the prompt.*num_kv_blocks"):
        bench.add(tokens(13), max_tokens=1)


def test_prompt_that_fills_the_whole_cache_has_room_for_one_token() -> None:
    bench = Bench(num_blocks=3, block_size=4)
    request = bench.add(tokens(12), max_tokens=1)
    bench.run()
    assert request.num_output_tokens == 1


def test_request_id_in_use_is_refused_and_free_again_after_the_end() -> None:
    bench = Bench()
    bench.add(tokens(3), name="a")
    with pytest.raises(ValueError, match="request_id 'a' is already in use"):
        bench.add(tokens(3), name="a")
    bench.run()
    bench.add(tokens(5), name="a")
    bench.run()


# -- preemption ---------------------------------------------------------------------------------


def test_preempted_request_resumes_with_same_tokens() -> None:
    bench = Bench(num_blocks=6, block_size=2)
    first = bench.add(tokens(3), max_tokens=8)
    second = bench.add(tokens(3, start=50), max_tokens=8)
    bench.run()
    assert second.num_preemptions > 0
    assert first.num_preemptions == 0
    assert bench.scheduler.num_preemptions == second.num_preemptions
    assert second.output_token_ids == expected_output(second)


def test_latest_request_is_preempted_first() -> None:
    bench = Bench(num_blocks=6, block_size=2, enable_prefix_caching=False)
    for n in range(3):
        bench.add(tokens(3, start=50 * n), max_tokens=6)
    bench.step()
    bench.step()
    bench.step()
    statuses = [bench.requests[f"r{n}"].status for n in range(3)]
    assert statuses == [RequestStatus.RUNNING, RequestStatus.RUNNING, RequestStatus.PREEMPTED]
    bench.run()


def test_preempted_row_is_released_in_the_same_step() -> None:
    bench = Bench(num_blocks=4, block_size=2)
    bench.add(tokens(3), max_tokens=4)
    bench.add(tokens(3, start=50), max_tokens=4)
    while not bench.scheduler.num_preemptions:
        step = bench.step()
    assert step.freed_request_ids == ["r1"]
    assert step.new_requests == []
    bench.run()


def test_step_that_preempts_admits_nobody() -> None:
    bench = Bench(num_blocks=6, block_size=2, max_num_seqs=2, policy="priority")
    bench.add(tokens(4), max_tokens=4)
    yields = bench.add(tokens(6, start=50), max_tokens=4, priority=1)
    bench.step()
    bench.add([200], max_tokens=1, name="waits")
    step = bench.step()
    assert yields.status is RequestStatus.PREEMPTED
    assert yields.num_computed_tokens == 0
    assert step.new_requests == []
    assert "waits" in counts(bench.step())
    bench.run()


def test_resumed_request_is_sent_with_its_outputs_so_far() -> None:
    bench = Bench(num_blocks=6, block_size=2)
    bench.add(tokens(3), max_tokens=8)
    second = bench.add(tokens(3, start=50), max_tokens=8)
    resumed = [new for step in bench.run() for new in step.new_requests][2:]
    assert resumed
    for new in resumed:
        assert new.spec.request_id == "r1"
        assert new.spec.num_prompt_tokens == 3
        assert new.token_ids == second.token_ids[: len(new.token_ids)]
        assert len(new.token_ids) > 3


def test_resumption_reuses_what_is_left_in_the_prefix_cache() -> None:
    bench = Bench(num_blocks=8, block_size=2)
    first = bench.add(tokens(3), max_tokens=9)
    bench.add(tokens(8, start=50), max_tokens=4)
    while not bench.scheduler.num_preemptions:
        bench.step()
    bench.scheduler.finish(first.request_id, "abort")
    line = bench.step().scheduled[0]
    assert line.request_id == "r1"
    assert line.num_computed_tokens >= 6
    bench.run()


# -- prefix caching -----------------------------------------------------------------------------


def test_prefix_hit_is_counted_and_not_computed_again() -> None:
    bench = Bench(block_size=4)
    first = bench.add(tokens(10), max_tokens=1)
    bench.run()
    second = bench.add(tokens(10), max_tokens=1)
    steps = bench.run()
    assert first.num_cached_tokens == 0
    assert second.num_cached_tokens == 8
    assert counts(steps[0]) == {"r1": 2}


def test_hit_ends_where_the_tokens_differ() -> None:
    bench = Bench(block_size=4)
    bench.add(tokens(12), max_tokens=1)
    bench.run()
    other = bench.add([*tokens(6), 200, *tokens(5, start=7)], max_tokens=1)
    bench.run()
    assert other.num_cached_tokens == 4


def test_prefix_is_shared_within_the_step_that_computes_it() -> None:
    bench = Bench(block_size=4)
    bench.add(tokens(10), max_tokens=2)
    twin = bench.add(tokens(10), max_tokens=2)
    step = bench.step()
    assert counts(step) == {"r0": 10, "r1": 2}
    assert twin.num_cached_tokens == 8
    assert bench.pool.num_blocks - bench.pool.num_free_blocks == 2 + 1 + 1
    bench.run()


def test_at_least_one_token_is_always_computed() -> None:
    bench = Bench(block_size=4)
    bench.add(tokens(8), max_tokens=1)
    bench.run()
    again = bench.add(tokens(8), max_tokens=1)
    steps = bench.run()
    assert again.num_cached_tokens == 4
    assert counts(steps[0]) == {"r1": 4}


def test_generated_tokens_are_a_prefix_for_later_prompts() -> None:
    bench = Bench(block_size=4)
    first = bench.add(tokens(6), max_tokens=7)
    bench.run()
    follow_up = bench.add([*first.token_ids, 200], max_tokens=1)
    bench.run()
    assert follow_up.num_cached_tokens == 12  # 13 tokens, the last one's KV was never computed


def test_first_hit_is_what_is_reported_also_after_a_preemption() -> None:
    bench = Bench(num_blocks=6, block_size=2)
    bench.add(tokens(3), max_tokens=8)
    second = bench.add(tokens(3, start=50), max_tokens=8)
    bench.run()
    assert second.num_preemptions > 0
    assert second.num_cached_tokens == 0


def test_without_prefix_caching_everything_is_computed() -> None:
    bench = Bench(enable_prefix_caching=False)
    bench.add(tokens(10), max_tokens=1)
    bench.run()
    again = bench.add(tokens(10), max_tokens=1)
    assert counts(bench.run()[0]) == {"r1": 10}
    assert again.num_cached_tokens == 0


def test_evicted_prefix_is_computed_again() -> None:
    bench = Bench(num_blocks=3, block_size=4)
    bench.add(tokens(9), max_tokens=1)
    bench.run()
    bench.add(tokens(12, start=100), max_tokens=1)
    bench.run()
    again = bench.add(tokens(9), max_tokens=1)
    bench.run()
    assert again.num_cached_tokens == 0


# -- ends ---------------------------------------------------------------------------------------


def test_explicit_stop_token_ends_the_request_and_is_reported() -> None:
    bench = Bench()
    whole = expected_output(bench.add(tokens(5), max_tokens=6))
    request = bench.add(tokens(5), max_tokens=6, stop_token_ids=[whole[2]])
    bench.run()
    assert request.output_token_ids == whole[: whole.index(whole[2]) + 1]
    assert (request.finish_reason, request.stop_reason) == ("stop", whole[2])


def test_end_of_sequence_ends_the_request_without_a_stop_reason() -> None:
    bench = Bench()
    whole = expected_output(bench.add(tokens(5), max_tokens=6))
    request = bench.add(tokens(5), max_tokens=6, eos_token_ids=[whole[0]])
    bench.run()
    assert request.output_token_ids == whole[:1]
    assert (request.finish_reason, request.stop_reason) == ("stop", None)


def test_stop_token_as_the_last_allowed_token_is_a_stop() -> None:
    bench = Bench()
    whole = expected_output(bench.add(tokens(5), max_tokens=1))
    request = bench.add(tokens(5), max_tokens=1, stop_token_ids=whole)
    bench.run()
    assert request.finish_reason == "stop"


def test_stop_tokens_before_min_tokens_do_not_end_the_request() -> None:
    bench = Bench()
    request = bench.add(tokens(5), 6, stop_token_ids=range(VOCAB_SIZE), min_tokens=3)
    bench.run()
    assert request.num_output_tokens == 3
    assert request.finish_reason == "stop"


def test_max_tokens_ends_the_request() -> None:
    bench = Bench()
    request = bench.add(tokens(5), max_tokens=1)
    assert len(bench.run()) == 1
    assert (request.finish_reason, request.stop_reason) == ("length", None)


def test_finished_request_gives_its_blocks_and_its_row_back() -> None:
    bench = Bench()
    bench.add(tokens(9), max_tokens=1)
    bench.step()
    assert bench.pool.num_free_blocks == bench.pool.num_blocks
    assert bench.schedule().freed_request_ids == ["r0"]
    assert bench.schedule().freed_request_ids == []


# -- rows of logits that no token can be drawn from ------------------------------------------------


def fail_row(bench: Bench, name: str, error: str | None = None) -> SchedulerOutput:
    """A step in which one request gets no token."""
    step = bench.schedule()
    output = bench.runner.execute(step)
    bench.runner.rows[name].token_ids.pop()
    output.token_ids[name] = -1
    if error is not None:
        output.errors[name] = error
    bench.scheduler.update(step, output)
    bench.scheduler.check_invariants()
    return step


def test_a_row_without_a_token_is_computed_again_by_itself() -> None:
    bench = Bench()
    request, other = bench.add(tokens(9)), bench.add(tokens(9))
    bench.step()
    fail_row(bench, "r0")
    assert not request.is_finished and request.is_second_try
    steps = bench.run()
    assert counts(steps[0])["r0"] == 10  # nothing of it was found in the prefix index
    assert request.finish_reason == other.finish_reason == "length"
    assert bench.scheduler.num_failed_rows == 0


def test_the_second_time_it_ends_and_its_blocks_are_zeroed() -> None:
    bench = Bench()
    request = bench.add(tokens(9))
    bench.step()
    fail_row(bench, "r0")
    first = bench.schedule()
    assert len(first.spoilt_block_ids) == 3
    bench.scheduler.update(first, bench.runner.execute(first))
    (held,) = map(list, request.block_tables)
    fail_row(bench, "r0")
    assert (request.finish_reason, request.num_output_tokens) == ("error", 2)
    assert "NaN" in str(request.stop_reason) and bench.scheduler.num_failed_rows == 1
    last = bench.scheduler.schedule()
    assert sorted(last.spoilt_block_ids) == sorted(held)
    assert bench.pool.num_cached_blocks == 0
    assert bench.pool.num_free_blocks == bench.pool.num_blocks


def test_blocks_of_others_are_not_zeroed() -> None:
    bench = Bench()
    bench.add(tokens(9))
    sharer = bench.add([*tokens(8), 77])
    step = bench.step()
    shared = step.scheduled[1].new_block_ids[0][:2]
    fail_row(bench, "r0")
    assert set(bench.scheduler._spoilt_block_ids).isdisjoint(sharer.block_tables[0])
    assert sharer.block_tables[0][:2] == shared
    bench.run()


def test_a_callers_own_error_is_not_tried_again() -> None:
    bench = Bench()
    request = bench.add(tokens(9))
    fail_row(bench, "r0", "logits processor: it broke")
    assert (request.finish_reason, request.stop_reason) == ("error", "logits processor: it broke")


def test_tokens_in_flight_of_a_failed_row_are_dropped() -> None:
    bench = Bench()
    request = bench.add(tokens(5), max_tokens=4)
    first = bench.schedule()
    first_output = bench.runner.execute(first)
    second = bench.schedule()
    second_output = bench.runner.execute(second)
    bench.scheduler.update(first, StepOutput({"r0": -1}))
    assert request.num_tokens_to_drop == request.num_tokens_in_flight == 1
    third = bench.schedule(may_be_empty=True)
    assert not third.scheduled  # it waits for what is in flight
    bench.runner.apply(third)
    assert not bench.scheduler.update(second, second_output).request_ids
    bench.scheduler.update(third, StepOutput({}))
    assert (request.num_tokens_in_flight, request.num_output_tokens) == (0, 0)
    bench.run()
    assert first_output.token_ids["r0"] == request.output_token_ids[0]


def test_blocks_of_a_request_preempted_before_its_row_failed_are_not_found_again() -> None:
    bench = Bench()
    request = bench.add(tokens(9))
    step = bench.schedule()
    bench.scheduler._preempt(request)
    bench.scheduler.running.remove(request)
    assert bench.pool.num_cached_blocks == 2
    bench.scheduler.update(step, StepOutput({"r0": -1}))
    assert bench.pool.num_cached_blocks == 0
    bench.scheduler.check_invariants()


def test_what_a_request_did_to_itself_spoils_nobodys_prefix() -> None:
    bench = Bench(block_size=4)
    request = bench.add(tokens(9), max_tokens=5)
    step = bench.schedule()
    cached = bench.pool.num_cached_blocks
    bench.scheduler.update(step, StepOutput({"r0": -1}, errors={"r0": "a rule of its own"}))
    assert (request.finish_reason, request.stop_reason) == ("error", "a rule of its own")
    assert bench.pool.num_cached_blocks == cached == 2
    assert not bench.scheduler._spoilt_block_ids


def test_a_request_that_needs_its_last_token_is_held_back_until_it_is_known() -> None:
    bench = Bench()
    request, other = bench.add(tokens(5)), bench.add(tokens(5, start=50))
    request.needs_last_token = True
    first = bench.schedule()
    second = bench.schedule()
    assert counts(second) == {"r1": 1}
    bench.scheduler.update(first, bench.runner.execute(first))
    third = bench.schedule()
    assert counts(third) == {"r0": 1, "r1": 1}
    for step in (second, third):
        bench.scheduler.update(step, bench.runner.execute(step))
    bench.run()
    assert request.num_output_tokens == other.num_output_tokens == 4


def test_siblings_share_full_blocks_without_a_prefix_cache() -> None:
    bench = Bench(enable_prefix_caching=False)
    first = bench.add(tokens(11))
    second = make_request("s", tokens(11), max_tokens=4, sibling_id="r0", arrival_time=9.0)
    bench.scheduler.add(second)
    bench.requests["s"] = second
    step = bench.step()
    assert counts(step) == {"r0": 11, "s": 3}
    (ours,), (theirs,) = first.block_tables, second.block_tables
    assert ours[:2] == theirs[:2]
    assert ours[2] != theirs[2]
    bench.run()


@pytest.mark.parametrize(
    ("output", "rule", "ends"),
    [
        ([5, 5, 5], {"max_pattern_size": 1, "min_count": 3}, True),
        ([5, 5], {"max_pattern_size": 1, "min_count": 3}, False),
        ([1, 2, 1, 2], {"max_pattern_size": 2, "min_count": 2}, True),
        ([1, 2, 1, 2], {"max_pattern_size": 1, "min_count": 2}, False),
        ([2, 2, 2, 2], {"max_pattern_size": 3, "min_pattern_size": 2, "min_count": 2}, True),
        ([2, 2, 2], {"max_pattern_size": 3, "min_pattern_size": 2, "min_count": 2}, False),
        ([1, 2, 3, 1, 2], {"max_pattern_size": 3, "min_count": 2}, False),
        ([5, 5, 5], {"max_pattern_size": 0, "min_count": 0}, False),
    ],
)
def test_circles_are_seen_in_the_output_alone(
    output: list[int], rule: dict[str, int], ends: bool
) -> None:
    params = SamplingParams(repetition_detection=RepetitionDetectionParams(**rule))
    request = make_request("r", [1, 2, 2, 5, 5, 5], params)
    request.token_ids += output
    assert ends_in_repetition(request) is ends


def test_update_returns_the_requests_that_got_a_token() -> None:
    bench = Bench(budget=8)
    ends = bench.add(tokens(3), max_tokens=1, name="ends")
    goes_on = bench.add(tokens(3), name="goes on")
    bench.add(tokens(20, start=90), name="prefilling")
    step = bench.schedule()
    news = bench.scheduler.update(step, bench.runner.execute(step))
    assert news.request_ids == [ends.request_id, goes_on.request_id]
    assert ends.is_finished


def test_news_of_single_tokens_are_told_apart_from_all_that_is_more() -> None:
    bench = Bench()
    for name in ("plain", "rich", "ending"):
        bench.add(tokens(3), max_tokens=3 if name == "ending" else 9, name=name)
    logprobs: TokenLogprobs = ((5, 6), (-0.5, -1.5), 1, 1)
    found = []
    for token_id in (90, 91, 92):
        step = bench.schedule()
        drawn = dict.fromkeys(counts(step), token_id)
        prompt_logprobs = {"rich": (1, [logprobs] * 2)} if token_id == 90 else {}
        output = StepOutput(drawn, {"rich": logprobs}, prompt_logprobs)
        found.append(bench.scheduler.update(step, output))
    # The first of each says how much of the prompt was cached, and brings its log probabilities.
    assert found[0] == StepNews(
        updates=[
            RequestUpdate("plain", [90]),
            RequestUpdate("rich", [90], logprobs=[logprobs], prompt_logprobs=[logprobs] * 2),
            RequestUpdate("ending", [90]),
        ]
    )
    assert found[1] == StepNews(
        {"plain": 91, "rich": 91, "ending": 91}, logprobs={"rich": logprobs}
    )
    assert found[2] == StepNews(
        {"plain": 92, "rich": 92},
        logprobs={"rich": logprobs},
        updates=[RequestUpdate("ending", [92], "length")],
    )
    assert [news.num_tokens for news in found] == [3, 3, 3]


# -- ends from outside --------------------------------------------------------------------------


def test_waiting_request_is_aborted() -> None:
    bench = Bench(max_num_seqs=1)
    bench.add(tokens(3))
    waiting = bench.add(tokens(3, start=50))
    bench.step()
    assert bench.scheduler.finish("r1", "abort") is waiting
    assert waiting.finish_reason == "abort"
    steps = bench.run()
    assert all("r1" not in step.freed_request_ids for step in steps)  # it never had a row


def test_running_request_is_aborted_and_its_blocks_are_free_at_once() -> None:
    bench = Bench()
    running = bench.add(tokens(9))
    bench.step()
    bench.scheduler.finish("r0", "stop", stop_reason="END")
    bench.scheduler.check_invariants()
    assert (running.finish_reason, running.stop_reason) == ("stop", "END")
    assert bench.pool.num_free_blocks == bench.pool.num_blocks
    bench.check_all_finished()


def test_preempted_request_is_aborted_and_its_row_is_released_once() -> None:
    bench = Bench(num_blocks=4, block_size=2)
    bench.add(tokens(3), max_tokens=4)
    preempted = bench.add(tokens(3, start=50), max_tokens=4)
    while preempted.status is not RequestStatus.PREEMPTED:
        bench.step()
    bench.scheduler.finish("r1", "abort")
    bench.scheduler.check_invariants()
    bench.run()
    assert preempted.finish_reason == "abort"


def test_request_aborted_while_the_step_runs_gets_no_token() -> None:
    bench = Bench()
    aborted = bench.add(tokens(3))
    bench.add(tokens(3, start=50))
    step = bench.schedule()
    output = bench.runner.execute(step)
    bench.scheduler.finish("r0", "abort")
    assert bench.scheduler.update(step, output).request_ids == ["r1"]
    assert aborted.num_output_tokens == 0
    bench.run()


def test_request_id_may_be_used_again_before_its_old_row_is_released() -> None:
    bench = Bench()
    bench.add(tokens(3), name="a")
    bench.step()
    bench.scheduler.finish("a", "abort")
    bench.add(tokens(7, start=50), name="a")
    step = bench.step()
    assert step.freed_request_ids == ["a"]
    assert [new.spec.request_id for new in step.new_requests] == ["a"]
    bench.run()


def test_ending_a_request_that_is_over_or_unknown_does_nothing() -> None:
    bench = Bench()
    request = bench.add(tokens(3), max_tokens=1)
    bench.run()
    assert bench.scheduler.finish("r0", "abort") is None
    assert bench.scheduler.finish("never seen", "abort") is None
    assert request.finish_reason == "length"


# -- steps that fail ----------------------------------------------------------------------------


def test_interrupted_step_costs_no_request_a_token() -> None:
    bench = Bench()
    requests = [bench.add(tokens(6, start=10 * n), max_tokens=5) for n in range(3)]
    bench.step()
    bench.step()
    step = bench.schedule()
    bench.runner.apply(step)
    bench.scheduler.abandon_step(step, failed=False)
    bench.runner.reset()
    bench.scheduler.check_invariants()
    bench.run()
    assert all(request.finish_reason == "length" for request in requests)


def test_failed_step_ends_its_requests_and_only_those() -> None:
    bench = Bench(max_num_seqs=4, budget=2)
    in_step = [bench.add(tokens(1, start=10 * n), max_tokens=5) for n in range(2)]
    bench.step()
    outside = bench.add(tokens(2, start=50), max_tokens=5)
    step = bench.schedule()
    bench.scheduler.abandon_step(step, failed=True)
    bench.runner.reset()
    bench.scheduler.check_invariants()
    assert [request.finish_reason for request in in_step] == ["error", "error"]
    bench.run()
    assert outside.finish_reason == "length"


def test_what_an_abandoned_step_may_have_written_is_not_shared() -> None:
    bench = Bench(block_size=4)
    bench.add(tokens(9), max_tokens=1)
    step = bench.schedule()  # registers two blocks; nothing is written
    bench.scheduler.abandon_step(step, failed=True)
    bench.runner.reset()
    again = bench.add(tokens(9), max_tokens=1)
    bench.run()
    assert again.num_cached_tokens == 0


# -- layers that see unequally far -------------------------------------------------------------


def num_held(bench: Bench) -> int:
    return bench.pool.num_blocks - bench.pool.num_free_blocks


@given(
    window=st.integers(1, 20),
    block_size=st.integers(1, 5),
    budget=st.integers(1, 30),
    prompt=st.integers(1, 90),
)
def test_a_windowed_request_holds_no_more_than_its_window_and_chunk(
    window: int, block_size: int, budget: int, prompt: int
) -> None:
    bench = Bench(200, block_size, budget=budget, windows=(window,))
    bench.add(tokens(prompt), max_tokens=60)
    while bench.scheduler.has_unfinished():
        step = bench.step()
        chunk = step.num_scheduled_tokens
        if bench.scheduler.has_unfinished() and chunk > 1:
            assert num_held(bench) <= -(-(window - 1 + chunk) // block_size) + 1
        elif bench.scheduler.has_unfinished():
            assert num_held(bench) <= -(-(window - 1) // block_size) + 1
    bench.check_all_finished()


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
def test_a_request_of_any_length_fits_in_a_small_pool(enable_prefix_caching: bool) -> None:
    bench = Bench(6, 4, windows=(8,), enable_prefix_caching=enable_prefix_caching)
    bench.add(tokens(150), max_tokens=90)
    steps = bench.run()
    assert steps[0].num_scheduled_tokens == 24  # of a budget of 64: what the pool has room for
    assert sum(step.num_scheduled_tokens for step in steps) == 239


def test_a_small_pool_serves_many_long_windowed_requests() -> None:
    bench = Bench(12, 4, windows=(8, 5))
    for n in range(5):
        bench.add(tokens(30, start=30 * n), max_tokens=40)
    bench.run()


def test_a_long_prompt_takes_smaller_steps_rather_than_begin_again() -> None:
    bench = Bench(12, 4, budget=24, windows=(8,))
    for start in (0, 20):
        bench.add(tokens(5, start=start), max_tokens=90)
    bench.step()
    bench.add(tokens(100, start=40), max_tokens=5)
    steps = bench.run()
    assert bench.scheduler.num_preemptions <= 1  # 8 if it took its full share or nothing
    shares = [counts(step).get("r2", 0) for step in steps]
    assert 4 <= min(share for share in shares if share > 1) < max(shares)


def test_layers_that_see_all_limit_a_request_as_before() -> None:
    bench = Bench(num_blocks=9, block_size=4, windows=(0, 5))
    with pytest.raises(ValueError, match=r"needs 10 KV blocks.*has 9; max_tokens <= 24 would fit"):
        bench.add(tokens(5), max_tokens=25)
    bench.add(tokens(5), max_tokens=24)  # 7 blocks of all tokens, 2 of the window
    bench.run()


def test_blocks_out_of_the_window_stay_findable() -> None:
    bench = Bench(block_size=4, windows=(0, 6))
    first = bench.add(tokens(30), max_tokens=11)
    bench.run()
    early = bench.add([*tokens(13), 200], max_tokens=3)  # long since out of the window
    late = bench.add([*first.token_ids, 200], max_tokens=3)
    assert counts(bench.step()) == {early.request_id: 2, late.request_id: 2}
    bench.run()
    assert (early.num_cached_tokens, late.num_cached_tokens) == (12, 40)


def test_a_prefix_needs_only_the_end_of_its_windowed_blocks() -> None:
    bench = Bench(block_size=4, windows=(0, 6))
    first = bench.add(tokens(24), max_tokens=1)
    step = bench.schedule()
    full, windowed = (list(table) for table in first.block_tables)
    bench.scheduler.update(step, bench.runner.execute(step))
    bench.pool.forget(windowed[:2])
    second = bench.add([*tokens(23), 99], max_tokens=1)
    (line,) = bench.step().scheduled
    assert line.new_block_ids[0][:5] == full[:5]
    assert line.new_block_ids[1][:5] == [NULL_BLOCK] * 3 + windowed[3:5]
    assert second.num_cached_tokens == 20
    bench.pool.forget(windowed[3:4])
    third = bench.add([*tokens(23), 98], max_tokens=1)
    bench.step()
    assert third.num_cached_tokens == 0  # 12 would need blocks 1 and 2 of the window


def test_what_a_long_chunk_leaves_behind_is_free_with_the_next_token() -> None:
    bench = Bench(block_size=4, windows=(5,))
    bench.add(tokens(50), max_tokens=9)
    bench.step()
    assert num_held(bench) == 13
    bench.step()
    assert num_held(bench) == 2
    bench.run()


def test_siblings_share_what_is_still_seen_without_a_prefix_cache() -> None:
    bench = Bench(enable_prefix_caching=False, windows=(0, 6))
    first = bench.add(tokens(19), max_tokens=30)
    second = make_request("s", tokens(19), max_tokens=4, sibling_id="r0", arrival_time=9.0)
    bench.scheduler.add(second)
    bench.requests["s"] = second
    assert counts(bench.step()) == {"r0": 19, "s": 3}
    full, windowed = second.block_tables
    assert full[:4] == first.block_tables[0][:4]
    assert windowed[:4] == [NULL_BLOCK] * 2 + first.block_tables[1][2:4]
    for _ in range(8):
        bench.step()
    late = make_request("t", tokens(19), max_tokens=4, sibling_id="r0", arrival_time=9.0)
    bench.scheduler.add(late)
    bench.requests["t"] = late
    assert counts(bench.step())["t"] == 19  # the first one has given its blocks away
    bench.run()


def test_blocks_that_a_failed_row_gave_back_are_zeroed_and_forgotten() -> None:
    bench = Bench(block_size=4, budget=12, windows=(6,))
    bench.add(tokens(40), max_tokens=9)
    for _ in range(4):
        bench.step()
    request = bench.requests["r0"]
    (table,), (first,) = request.block_tables, request.first_owned_blocks
    assert first == 7 and bench.pool.num_cached_blocks == 10
    fail_row(bench, "r0")
    assert bench.pool.num_cached_blocks == 0
    assert set(table) <= set(bench.schedule().spoilt_block_ids)


# -- any mix ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arrival:
    """A request of a random scenario, and when it comes and goes."""

    step: int
    prefix: int  # which shared beginning
    prefix_length: int
    own_length: int
    max_tokens: int
    priority: int
    stop_token_ids: tuple[int, ...]
    min_tokens: int
    abort_after: int | None  # steps
    abort_in_flight: bool  # while the step runs, or between two steps
    in_batch: bool
    is_length_known: bool

    def prompt(self, index: int) -> list[int]:
        shared = [VOCAB_SIZE + self.prefix] * self.prefix_length
        return shared + [100 + index] * self.own_length


arrivals = st.builds(
    Arrival,
    step=st.integers(0, 6),
    prefix=st.integers(0, 1),
    prefix_length=st.sampled_from([0, 3, 4, 6, 8]),
    own_length=st.integers(0, 4),
    max_tokens=st.integers(0, 9),
    priority=st.integers(-1, 1),
    stop_token_ids=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=1).map(tuple),
    min_tokens=st.integers(0, 3),
    abort_after=st.sampled_from([None] * 6 + [0, 1, 4, 8]),
    abort_in_flight=st.booleans(),
    in_batch=st.booleans(),
    is_length_known=st.booleans(),
).filter(lambda arrival: arrival.prefix_length + arrival.own_length > 0)


def max_held(bench: Bench, num_tokens: int) -> int:
    """Blocks that the tokens which are seen from one position lie in, of all groups, at most."""
    size = bench.runner.block_size

    def held(position: int, window: int) -> int:
        first = max(position - window + 1, 0) if window else 0
        return len({p // size for p in range(first, position + 1)})

    return max(sum(held(p, w) for w in bench.runner.windows) for p in range(num_tokens))


class Scenario:
    """Random arrivals and aborts on one bench, step by step."""

    def __init__(self, bench: Bench, arrivals: list[Arrival]) -> None:
        self.bench = bench
        self.arrivals = arrivals
        self.fits = [
            max_held(bench, len(a.prompt(index)) + max(a.max_tokens, 1) - 1)
            <= bench.pool.num_blocks
            for index, a in enumerate(arrivals)
        ]

    def max_steps(self) -> int:
        """A top-ranked request gets a token each step, once those running let it in."""
        work = sum(a.prefix_length + a.own_length + a.max_tokens for a in self.arrivals)
        return 20 + work * (len(self.arrivals) + 1)

    def run(self, interrupted_steps: frozenset[int] = frozenset(), run_ahead: bool = False) -> None:
        """run_ahead: schedule and execute each step before the last one's tokens are known."""
        bench, now = self.bench, 0
        in_flight: list[tuple[SchedulerOutput, StepOutput]] = []
        last_arrival = max(arrival.step for arrival in self.arrivals)
        while now <= last_arrival or bench.scheduler.has_unfinished():
            assert now <= self.max_steps() + len(interrupted_steps), "livelock"
            self.add_those_arriving(now)
            self.abort_those_due(now, in_flight=False)
            step = bench.schedule(may_be_empty=bool(in_flight))
            if now in interrupted_steps:
                in_flight.clear()
                bench.runner.apply(step)
                bench.runner.write(step.scheduled[: len(step.scheduled) // 2])
                bench.scheduler.abandon_step(step, failed=False)
                bench.runner.reset()
            else:
                in_flight.append((step, bench.runner.execute(step)))
                self.abort_those_due(now, in_flight=True)
                if len(in_flight) > run_ahead:
                    bench.scheduler.update(*in_flight.pop(0))
            bench.scheduler.check_invariants()
            now += 1
        for late in in_flight:  # the overshoot of requests that ended
            assert not bench.scheduler.update(*late).request_ids
        bench.check_all_finished()
        self.check_reasons()

    def add_those_arriving(self, now: int) -> None:
        for index, arrival in enumerate(self.arrivals):
            if arrival.step == now:
                self.add(index, arrival)

    def add(self, index: int, arrival: Arrival) -> None:
        try:
            request = self.bench.add(
                arrival.prompt(index),
                arrival.max_tokens,
                name=f"r{index}",
                priority=arrival.priority,
                arrival_time=float(arrival.step),
                stop_token_ids=arrival.stop_token_ids,
                min_tokens=arrival.min_tokens,
                in_batch=arrival.in_batch,
            )
        except ValueError:
            assert not self.fits[index]
        else:
            assert self.fits[index]
            if not arrival.is_length_known:
                set_params(request, replace(request.spec.sampling_params, max_tokens=None))

    def abort_those_due(self, now: int, in_flight: bool) -> None:
        for index, arrival in enumerate(self.arrivals):
            due = arrival.abort_after is not None and arrival.step + arrival.abort_after == now
            if due and arrival.abort_in_flight == in_flight:
                self.bench.scheduler.finish(f"r{index}", "abort")

    def check_reasons(self) -> None:
        for index, arrival in enumerate(self.arrivals):
            if self.fits[index]:
                request = self.bench.requests[f"r{index}"]
                may_abort = arrival.abort_after is not None
                assert request.finish_reason in ("stop", "length", "abort")[: 2 + may_abort]


scheduler_options = st.fixed_dictionaries(
    {
        "num_blocks": st.integers(5, 10),
        "block_size": st.integers(1, 3),
        "max_num_seqs": st.integers(1, 5),
        "budget": st.integers(1, 12),
        "mixed": st.sampled_from([None, None, 1, 3]),
        "balanced": st.sampled_from([None, None, 1, 2, 8]),
        "policy": st.sampled_from(["fcfs", "priority"]),
        "enable_prefix_caching": st.sampled_from([True, True, False]),
    }
)
windows = st.lists(st.sampled_from([0, 1, 2, 3, 5, 9]), min_size=1, max_size=3).map(tuple)
hybrid_options = st.builds(
    lambda options, windows: (
        options | {"windows": windows, "num_blocks": len(windows) * options["num_blocks"]}
    ),
    scheduler_options,
    windows,
)


@given(scheduler_options, st.lists(arrivals, min_size=3, max_size=9), st.booleans())
def test_any_mix_of_requests_finishes_with_its_own_tokens(
    options: dict[str, int | str | bool], arrivals: list[Arrival], run_ahead: bool
) -> None:
    Scenario(Bench(**options), arrivals).run(run_ahead=run_ahead)  # type: ignore[arg-type]


@given(hybrid_options, st.lists(arrivals, min_size=3, max_size=9), st.booleans())
def test_any_mix_finishes_where_layers_see_unequally_far(
    options: dict[str, Any], arrivals: list[Arrival], run_ahead: bool
) -> None:
    """The fake device would see a block that was freed and that a later token sees."""
    Scenario(Bench(**options), arrivals).run(run_ahead=run_ahead)


@given(
    scheduler_options | hybrid_options, st.lists(arrivals, min_size=3, max_size=7), st.booleans()
)
def test_the_fast_path_of_a_next_token_schedules_what_the_slow_one_does(
    options: dict[str, Any], arrivals: list[Arrival], run_ahead: bool
) -> None:
    """To the block. With windows, the slow path gives blocks back sooner: the tokens are equal."""
    taken = []
    for has_fast_path in (True, False):
        bench = Bench(**options)
        with pytest.MonkeyPatch.context() as patch:
            if not has_fast_path:
                patch.setattr(StepBuilder, "grant_next_token", lambda *_: False)
            Scenario(bench, arrivals).run(run_ahead=run_ahead)
        lines = [(step.scheduled, step.freed_request_ids) for step in bench.steps]
        taken.append((lines, bench.pool.num_cached_blocks))
    assert "windows" in options or taken[0] == taken[1]


@given(
    scheduler_options | hybrid_options,
    st.lists(arrivals, min_size=3, max_size=7),
    st.frozensets(st.integers(0, 20), min_size=1, max_size=4),
    st.booleans(),
)
def test_any_mix_survives_interrupted_steps(
    options: dict[str, int | str | bool],
    arrivals: list[Arrival],
    interrupted_steps: frozenset[int],
    run_ahead: bool,
) -> None:
    scenario = Scenario(Bench(**options), arrivals)  # type: ignore[arg-type]
    scenario.run(interrupted_steps, run_ahead)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(2, 6))
def test_crowd_in_the_smallest_possible_pool_finishes(
    block_size: int, budget: int, num_requests: int
) -> None:
    """Each request alone fills the pool; all run at once as far as blocks allow."""
    bench = Bench(4, block_size, max_num_seqs=num_requests, budget=budget)
    for n in range(num_requests):
        bench.add(tokens(4 * block_size - 3, start=40 * n), max_tokens=4)
    bench.run(max_steps=num_requests * 16 * num_requests)
    assert all(r.finish_reason == "length" for r in bench.requests.values())


# -- what it must not know ----------------------------------------------------------------------


def test_scheduler_types_and_config_load_no_torch() -> None:
    program = (
        "import sys, compiledllm.scheduler.scheduler, compiledllm.types, compiledllm.config\n"
        "print(*sorted({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert loaded.stdout.strip() == ""
