"""A crowd begins a few at a time, and in order; one alone begins at once."""

from __future__ import annotations

import asyncio

from compiledllm.server.turns import Turns


def test_a_crowd_begins_in_order_with_a_pass_of_the_loop_between() -> None:
    async def run() -> None:
        turns = Turns(per_pass=2)
        begun: list[tuple[int, int]] = []
        num_passes = 0

        def count() -> None:
            nonlocal num_passes
            num_passes += 1
            loop.call_soon(count)

        async def begin(number: int) -> None:
            await turns.wait()
            begun.append((number, num_passes))

        loop = asyncio.get_running_loop()
        loop.call_soon(count)
        await asyncio.gather(*(begin(number) for number in range(7)))
        assert [number for number, _ in begun] == list(range(7))
        passes = [when for _, when in begun]
        assert max(map(passes.count, passes)) == 2

    asyncio.run(run())


def test_one_alone_does_not_wait() -> None:
    async def run() -> None:
        turns = Turns(per_pass=1)
        for _ in range(3):
            wait = turns.wait()
            try:
                wait.send(None)
            except StopIteration:
                pass
            else:
                raise AssertionError("it waits")
            await asyncio.sleep(0)
            await asyncio.sleep(0)

    asyncio.run(run())


def test_who_has_left_takes_no_turn() -> None:
    async def run() -> None:
        turns = Turns(per_pass=1)
        first, left, stays = (asyncio.create_task(turns.wait()) for _ in range(3))
        await asyncio.sleep(0)
        left.cancel()
        await stays
        assert first.done() and left.cancelled()

    asyncio.run(run())
