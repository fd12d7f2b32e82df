"""When copies of states are taken, where they lie, and which of them give way."""

from __future__ import annotations

import random
from collections import deque

import pytest

from compiledllm.sampling_params import SamplingParams
from compiledllm.scheduler.block_pool import BlockPool
from compiledllm.scheduler.scheduler import Scheduler
from compiledllm.scheduler.snapshots import Snapshots
from compiledllm.types import Request, RequestSpec, SchedulerOutput, StepOutput


class Device:
    """Follows states: a row or a slot holds the tokens that the state is the one after.

    ahead: number of steps that are launched before the tokens of a step are known.
    """

    def __init__(self, num_snapshots: int, ahead: int = 0, **options: int) -> None:
        sizes = {"max_num_seqs": 4, "max_num_batched_tokens": 256} | options
        pool = BlockPool(sizes.pop("num_blocks", 200))
        self.scheduler = Scheduler(pool, 16, **sizes, num_snapshots=num_snapshots)
        self.num_saves = self.num_kept = 0
        self.failures = 0.0  # share of logits that are NaN
        self._ahead = ahead
        self._in_flight: deque[tuple[SchedulerOutput, StepOutput]] = deque()
        self._tokens: dict[str, list[int]] = {}  # of each row's request, drawn ones included
        self._rows: dict[str, list[int]] = {}
        self._slots: dict[int, list[int]] = {}

    def add(
        self, request_id: str, prompt: list[int], max_tokens: int, sibling_id: str | None = None
    ) -> Request:
        params = SamplingParams(max_tokens=max_tokens)
        spec = RequestSpec(request_id, prompt, params, max_tokens, sibling_id=sibling_id)
        request = Request(spec)
        self.scheduler.add(request)
        return request

    def step(self) -> SchedulerOutput:
        """Run a step; the token drawn is the request's number of tokens, modulo 100."""
        step = self.scheduler.schedule()
        self._copy_states(step)
        drawn = {}
        kept = {request_id: place for request_id, *place in step.kept_states}
        self.num_kept += len(kept)
        written: set[int] = set()
        for line in step.scheduled:
            tokens, state = self._tokens[line.request_id], self._rows[line.request_id]
            start, end = line.num_computed_tokens, line.num_computed_tokens
            end += line.num_scheduled_tokens
            assert state == tokens[:start], "a state after other tokens"
            if line.request_id in kept:
                slot, count = kept.pop(line.request_id)
                assert 0 < count < line.num_scheduled_tokens and slot not in written
                self._slots[slot] = tokens[: start + count]
                written.add(slot)
            state += tokens[start:end]
            if line.samples:
                is_failing = random.random() < self.failures
                drawn[line.request_id] = -1 if is_failing else len(tokens) % 100
                tokens.append(len(tokens) % 100)
        assert not kept, "a state of a request that is not in the step"
        self._in_flight.append((step, StepOutput(drawn)))
        if len(self._in_flight) > self._ahead:
            self.scheduler.update(*self._in_flight.popleft())
        self.scheduler.check_invariants()
        return step

    def _copy_states(self, step: SchedulerOutput) -> None:
        for request_id in step.freed_request_ids:
            del self._rows[request_id]
        for new in step.new_requests:
            self._tokens[new.spec.request_id] = list(new.token_ids)
            self._rows[new.spec.request_id] = []
        for request_id, slot in step.saved_states:
            self._slots[slot] = list(self._rows[request_id])
            self.num_saves += 1
        for request_id, slot in step.restored_states:
            self._rows[request_id] = list(self._slots[slot])

    def abandon(self) -> None:
        """Lose a step and all that is in flight, as after a failure of the device."""
        step = self.scheduler.schedule()
        self.scheduler.abandon_step(step, failed=False)
        self._in_flight.clear()
        self._rows.clear()
        self.scheduler.check_invariants()

    def run(self) -> None:
        while self.scheduler.has_unfinished():
            self.step()


def prompt_of(count: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(100), k=count)


def test_slots_are_those_of_the_least_recently_used() -> None:
    snapshots = Snapshots(2)
    assert {snapshots.add(b"a"), snapshots.add(b"b")} == {0, 1}
    slot_of_a = snapshots.use(b"a")
    assert snapshots.add(b"c") != slot_of_a and b"b" not in snapshots
    assert snapshots.longest([b"a", b"b", b"c", b"d"]) == 3
    snapshots.forget(b"a")
    snapshots.forget(b"a")
    assert snapshots.add(b"e") == slot_of_a and len(snapshots) == 2
    snapshots.check_invariants()
    snapshots.reset()
    snapshots.check_invariants()


def test_a_prompt_keeps_the_state_behind_its_last_full_block_in_one_step() -> None:
    device = Device(num_snapshots=8)
    device.add("one", prompt_of(200), 2)
    step = device.step()
    assert step.scheduled[0].num_scheduled_tokens == 200 and step.scheduled[0].samples
    assert [(name, count) for name, _, count in step.kept_states] == [("one", 192)]
    device.run()
    assert device.num_saves == 0
    again = device.add("two", prompt_of(200), 2)
    step = device.step()  # in one step, as the state is kept already
    assert step.restored_states and step.scheduled[0].num_scheduled_tokens == 8
    assert again.num_cached_tokens == 192


@pytest.mark.parametrize(("num_running", "distance"), [(4, 16), (10, 64)])
def test_the_latest_copy_moves_in_strides_that_grow_with_the_batch(
    num_running: int, distance: int
) -> None:
    device = Device(num_snapshots=40, max_num_seqs=16)
    for index in range(num_running):
        device.add(str(index), prompt_of(20, index), 140)
    device.run()
    borders = range(distance, 20 + 140, distance)  # of which the prompt is past 16
    assert device.num_saves == num_running * len([border for border in borders if border > 20])
    states = device.scheduler.kv.states
    assert states is not None and len(states.snapshots) == num_running


@pytest.mark.parametrize(("num_chats", "most"), [(1, 16), (12, 64)])
def test_a_long_chat_computes_its_new_tokens_and_few_more(num_chats: int, most: int) -> None:
    sizes = {"num_blocks": 1300 * num_chats, "max_num_seqs": 16, "max_num_batched_tokens": 2048}
    device = Device(num_snapshots=40, **sizes)
    prompts = [prompt_of(20_000 // num_chats, index) for index in range(num_chats)]
    for turn in range(3):
        chats = [device.add(f"{turn}.{i}", prompt, 150) for i, prompt in enumerate(prompts)]
        device.run()
        for chat in chats if turn else ():
            assert 30 < chat.num_prompt_tokens - chat.num_cached_tokens <= 30 + most
        prompts = [chat.token_ids + prompt_of(30, turn) for chat in chats]


def test_a_request_moves_its_own_copy_and_not_that_of_another() -> None:
    device = Device(num_snapshots=8)
    short = device.add("short", prompt_of(100), 50)
    device.run()
    device.add("long", prompt_of(100), 90)  # draws the same tokens, and more
    device.run()
    turn = device.add("turn", short.token_ids + prompt_of(40, 1), 1)
    device.run()
    assert turn.num_cached_tokens == 144


def test_requests_that_run_do_not_take_slots_from_each_other() -> None:
    device = Device(num_snapshots=4, max_num_seqs=8)
    for index in range(8):
        device.add(str(index), prompt_of(20, index), 100)
    for _ in range(60):
        device.step()
    assert device.num_saves == 0


def test_a_state_that_a_step_keeps_is_found_from_the_next_step_on() -> None:
    device = Device(num_snapshots=2)
    first, same = (device.add(name, prompt_of(200), 2) for name in ("first", "same"))
    device.step()
    later = device.add("later", prompt_of(200), 2)
    step = device.step()
    assert (first.num_cached_tokens, same.num_cached_tokens) == (0, 0)
    assert later.num_cached_tokens == 192 and len(step.restored_states) == 1


def test_of_two_points_in_a_step_the_first_ends_the_step() -> None:
    device = Device(num_snapshots=8, max_num_batched_tokens=512)
    device.add("one", prompt_of(150) + prompt_of(100, 1), 1)
    device.run()
    device.add("two", prompt_of(150) + prompt_of(200, 2), 1)
    steps = [device.step() for _ in range(2)]
    assert [step.scheduled[0].num_scheduled_tokens for step in steps] == [144, 350 - 144]
    assert [count for step in steps for _, _, count in step.kept_states] == [336 - 144]
    three = device.add("three", prompt_of(150) + prompt_of(60, 3), 1)
    device.run()
    assert three.num_cached_tokens == 144


def test_slots_that_a_step_writes_are_not_written_twice_in_it() -> None:
    device = Device(num_snapshots=2, max_num_batched_tokens=2048)
    for index in range(4):
        device.add(str(index), prompt_of(200, index), 2)
    assert len(device.step().kept_states) == 2
    device.run()


def test_a_request_waits_for_a_sibling_that_computes_the_same_prompt() -> None:
    device = Device(num_snapshots=8)
    device.add("first", prompt_of(300), 4)
    sibling = device.add("second", prompt_of(300), 4, sibling_id="first")
    device.run()
    assert sibling.num_cached_tokens == 288


@pytest.mark.parametrize("ahead", [0, 1])
def test_states_are_those_after_the_tokens_whatever_happens(ahead: int) -> None:
    num_hits = num_preemptions = num_kept = 0
    for seed in range(20):
        rng, known = random.Random(seed), [prompt_of(150)]
        random.seed(seed)
        sizes = {"num_blocks": rng.choice([40, 200])}
        sizes["max_num_batched_tokens"] = rng.choice([96, 256])
        device = Device(rng.randint(1, 8), ahead, **sizes)
        scheduler = device.scheduler
        for index in range(40):
            base = rng.choice(known)[: rng.randint(1, 150)]
            prompt = base + prompt_of(rng.randint(1, 120), rng.randrange(10**6))
            known.append(prompt)
            device.add(str(index), prompt[:250], rng.randint(1, 80))
            if rng.random() < 0.2:  # n = 2
                device.add(f"{index}'", prompt[:250], rng.randint(1, 80), sibling_id=str(index))
            device.failures = 0.01 if seed % 4 == 3 else 0.0
            for _ in range(rng.randint(0, 8)):
                if scheduler.has_unfinished():
                    device.step()
            if rng.random() < 0.2 and scheduler.requests:
                scheduler.finish(rng.choice(list(scheduler.requests)), "abort")
            if rng.random() < 0.01:
                device.abandon()
        device.run()
        assert scheduler.block_pool.num_free_blocks == scheduler.block_pool.num_blocks
        num_hits += scheduler.kv.num_snapshot_hits
        num_preemptions += scheduler.num_preemptions
        num_kept += device.num_kept
    assert num_hits > 20 and num_preemptions > 20 and num_kept > 100
