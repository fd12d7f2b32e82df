"""Runs jobs: passes the engine's outputs of all prompts to the job's answer."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator

from compiledllm.outputs import CompletionOutput, RequestOutput
from compiledllm.remote.errors import EngineError
from compiledllm.remote.replicas import ServedEngine
from compiledllm.server.metrics import Metrics
from compiledllm.server.openai.errors import ApiError, as_api_error
from compiledllm.server.openai.jobs import Job


class Serving:
    """Follows the requests of jobs. This class knows no endpoint."""

    def __init__(self, engine: ServedEngine, metrics: Metrics) -> None:
        self.engine = engine
        self.metrics = metrics

    def release(self, job: Job) -> None:
        """Abort a job's unfinished requests, because nobody waits for the answer."""
        self.engine.release(job.live_requests)

    async def encoded(self, job: Job) -> bytes:
        """The JSON of the complete answer. Raises the error that ended a request."""
        outputs, answer = await self._last_outputs(job), job.answer
        total = sum(len(c.token_ids) for state in job.states for c in state.completions)
        if answer.takes_long_to_encode:
            return await asyncio.to_thread(answer.encoded, outputs, total)
        return answer.encoded(outputs, total)

    async def _last_outputs(self, job: Job) -> list[RequestOutput]:
        """The last output of each prompt. Raises the error that ended a request."""
        count = len(job.live_requests)
        tasks = [asyncio.create_task(self._last_output(job, i)) for i in range(count)]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def stream(self, job: Job) -> AsyncIterator[bytes]:
        """Yield server-sent events. An error on the way becomes an event of its own."""
        answer = job.answer
        try:
            if events := answer.begin():
                yield events
            async with contextlib.aclosing(self._merged(job)) as merged:
                async for prompt_index, output in merged:
                    for completion in output.outputs:
                        if failure := failure_of(completion):
                            raise failure
                        yield answer.grow(prompt_index, output, completion)
            if events := answer.end():
                yield events
        except Exception as error:
            yield answer.fail(as_api_error(error))
        if answer.last_event:
            yield answer.last_event

    # -- outputs -------------------------------------------------------------------------------

    async def _outputs(
        self, job: Job, prompt_index: int
    ) -> AsyncGenerator[tuple[int, RequestOutput]]:
        """Yield the outputs of one prompt of a job, each with the index of the prompt."""
        live_request = job.live_requests[prompt_index]
        timing = self.metrics.begin(live_request.state.params)
        with self.engine.following(live_request):
            while not live_request.state.is_over:
                output = await live_request.take()
                self.metrics.grow(timing, output)
                if output.finished:
                    self.metrics.end(timing, output)
                yield prompt_index, output

    async def _last_output(self, job: Job, prompt_index: int) -> RequestOutput:
        outputs = [output async for _, output in self._outputs(job, prompt_index)]
        for completion in outputs[-1].outputs:
            if failure := failure_of(completion):
                raise failure
        return outputs[-1]

    def _merged(self, job: Job) -> AsyncGenerator[tuple[int, RequestOutput]]:
        """The outputs of all prompts as they arrive, each with the index of its prompt."""
        return self._outputs(job, 0) if len(job.live_requests) == 1 else self._all_outputs(job)

    async def _all_outputs(self, job: Job) -> AsyncGenerator[tuple[int, RequestOutput]]:
        queue: asyncio.Queue[tuple[int, RequestOutput] | Exception | None] = asyncio.Queue()

        async def feed(prompt_index: int) -> None:
            try:
                async for item in self._outputs(job, prompt_index):
                    queue.put_nowait(item)
                queue.put_nowait(None)
            except Exception as error:
                queue.put_nowait(error)

        tasks = [asyncio.create_task(feed(i)) for i in range(len(job.live_requests))]
        try:
            unfinished = len(tasks)
            while unfinished:
                item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    unfinished -= 1
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def failure_of(completion: CompletionOutput) -> Exception | None:
    """The error that ended a completion, if any: of the request's own grammar, or of the engine."""
    if completion.finish_reason != "error":
        return None
    cause = str(completion.stop_reason)
    if cause.startswith("structured_outputs"):
        return ApiError(400, cause)
    return EngineError(cause)
