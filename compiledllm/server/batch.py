"""Answers the requests of a batch file, many at once, within bounds.

Bodies, answers and errors are made as in the server, but without HTTP. A line that fails gets an
error of its own.
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from msgspec import Raw

from compiledllm.config import ConfigError
from compiledllm.grammars.compiler import CompilersBusy
from compiledllm.log import log
from compiledllm.remote.engine_client import EngineClient
from compiledllm.remote.errors import EngineError, Overloaded, Unavailable
from compiledllm.server.anthropic.errors import error_body_for
from compiledllm.server.batch_answers import (
    AnswerFile,
    Record,
    Refusal,
    Response,
    digest,
    record_id,
)
from compiledllm.server.batch_lines import BatchRequest, Line, LineError, Lines, read_request
from compiledllm.server.batch_progress import BatchProgress
from compiledllm.server.endpoints import ENDPOINTS
from compiledllm.server.openai.errors import RAISED, ApiError, as_api_error
from compiledllm.server.openai.jobs import Job, JobMaker
from compiledllm.server.openai.serving import Serving

LINES_PER_SEQUENCE = 2  # lines in flight / max_num_seqs, so that lines are ready when others end
MAX_BYTES_IN_FLIGHT = 2**26  # of bodies, unless one alone is larger
MAX_MAKING = 4  # bodies that are rendered and tokenised, or wait for room, at a time
RETRY_S = 0.25  # interval of attempts while the engine takes no requests


class Window:
    """Bounds what is in flight, by number and by bytes. One item may always enter."""

    def __init__(self, max_bytes: int) -> None:
        self.max_items = 1
        self._max_bytes = max_bytes
        self._num_items = self._num_bytes = 0
        self._left = asyncio.Event()

    async def enter(self, num_bytes: int) -> None:
        while self._num_items and (
            self._num_items >= self.max_items or self._num_bytes + num_bytes > self._max_bytes
        ):
            self._left.clear()
            await self._left.wait()
        self._num_items += 1
        self._num_bytes += num_bytes

    def leave(self, num_bytes: int) -> None:
        self._num_items -= 1
        self._num_bytes -= num_bytes
        self._left.set()


class Batch:
    """One pass over a batch file.

    model: part of the fingerprint of each request, so that answers of another model are not taken
    for this model's.
    """

    def __init__(
        self,
        engine: EngineClient,
        jobs: JobMaker,
        serving: Serving,
        answers: AnswerFile,
        progress: BatchProgress,
        model: str,
    ) -> None:
        self._engine, self._jobs, self._serving = engine, jobs, serving
        self._answers, self._progress = answers, progress
        self._model = model.encode()
        self._custom_ids: set[bytes] = set()  # digests of the ids that the input had so far
        self._window = Window(MAX_BYTES_IN_FLIGHT)
        self._making = asyncio.Semaphore(MAX_MAKING)
        self._has_started = False

    async def run(self, lines: Lines) -> None:
        """Answer every line that has no answer yet.

        Raises EngineError if the engine is lost, OSError if an answer cannot be written, and
        ConfigError for an output that belongs to other requests. What was written by then stays.
        """
        try:
            async with asyncio.TaskGroup() as tasks:
                async for line in lines:
                    if (found := await self._accept(line)) is None:
                        continue
                    request, request_id = found
                    await self._start_engine()
                    await self._window.enter(len(request.body))
                    tasks.create_task(self._answer(request, request_id))
        except ExceptionGroup as group:
            raise _first(group) from None

    async def _accept(self, line: Line) -> tuple[BatchRequest, bytes] | None:
        """The line's request and its fingerprint; None if the line needs no answer (any more)."""
        try:
            request = read_request(line)
            key = self._claim(request.custom_id)
        except LineError as error:
            if error.custom_id is not None:
                self._custom_ids.add(digest(error.custom_id.encode()))
            await self._refuse(line, error)
            return None
        request_id = digest(self._model, line.data)
        earlier = self._answers.earlier.pop(key, None)
        if earlier is None:
            return request, request_id
        if earlier != request_id:
            raise ConfigError(
                f"{self._answers.path} answers another request, or another model's, with custom_id "
                f"'{request.custom_id[:80]}' (line {line.number}); give another output file, or "
                "--overwrite"
            )
        self._progress.add(key not in self._answers.failed, is_new=False)
        return None

    def _claim(self, custom_id: str) -> bytes:
        """Reserve an id. Returns its digest. Raises LineError if an earlier line has the id."""
        key = digest(custom_id.encode())
        if key in self._custom_ids:
            message = f"custom_id '{custom_id[:80]}' was on an earlier line"
            raise LineError("duplicate_custom_id", message, "custom_id", custom_id)
        self._custom_ids.add(key)
        return key

    async def _refuse(self, line: Line, error: LineError) -> None:
        is_new = line.number not in self._answers.refused
        if is_new:
            refusal = Refusal(error.code, f"{error}", error.param, line.number)
            name = record_id(digest(str(line.number).encode(), line.data))
            await self._answers.write(Record(name, error.custom_id, None, refusal))
        self._progress.add(False, is_new)

    # -- the engine ----------------------------------------------------------------------------

    async def _start_engine(self) -> None:
        """Start the engine with the first request that needs it, and wait until it is ready."""
        if not self._has_started:
            self._has_started = True
            self._engine.start()
        await self._engine.wait_until_settled()
        self._check_alive()
        if self._engine.ready is not None:
            num_seqs = int(self._engine.ready.options["max_num_seqs"] or 1)
            self._window.max_items = LINES_PER_SEQUENCE * num_seqs

    def _check_alive(self) -> None:
        """Raise EngineError, or ConfigError, if the engine has ended for good."""
        failure = self._engine.failure
        if self._engine.state == "dead" and failure is not None:
            raise ConfigError(failure.error) if failure.is_config else EngineError(failure.error)

    async def _answer(self, request: BatchRequest, request_id: bytes) -> None:
        try:
            response = await self._respond(request, request_id.hex())
            record = Record(record_id(request_id), request.custom_id, response, None)
            await self._answers.write(record)
            self._progress.add(response.status_code == 200)
        finally:
            self._window.leave(len(request.body))

    async def _respond(self, request: BatchRequest, name: str) -> Response:
        """The answer, or the error as the server would send it. Raises if the engine is lost."""
        try:
            async with self._making:
                job = await self._job(request, name)
            try:
                if job.is_streamed:
                    raise ApiError(400, "stream must be false in a batch", "stream")
                return Response(200, name, Raw(await self._serving.encoded(job)))
            finally:
                self._serving.release(job)
        except Exception as error:
            self._check_alive()
            if not isinstance(error, (ApiError, ValueError, *RAISED)):
                log.error("line %d failed", request.line_number, exc_info=error)
            known = as_api_error(error)
            body = msgspec.json.encode(error_body_for(known, request.url))
            return Response(known.status, name, Raw(body))

    async def _job(self, request: BatchRequest, name: str) -> Job:
        """The request's job. Waits for as long as the engine takes no requests."""
        kind = ENDPOINTS[request.url]
        while True:
            try:
                return await self._jobs.job(kind, request.body, name, _stays)
            except (Overloaded, Unavailable, CompilersBusy):
                self._check_alive()
                await asyncio.sleep(RETRY_S)


async def _stays() -> Any:
    """The `receive` of a client that never leaves, for `JobMaker`."""
    await asyncio.Event().wait()


def _first(group: BaseExceptionGroup[Any]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
