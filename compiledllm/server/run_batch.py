"""`compiledllm run-batch`: options, files, signals and the exit status of a batch."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

from prometheus_client import start_http_server

from compiledllm.arguments import engine_options
from compiledllm.caches import cache_dir
from compiledllm.config import ConfigError, EngineConfig
from compiledllm.log import log, show_logs
from compiledllm.remote.engine_client import EngineClient
from compiledllm.remote.errors import EngineError
from compiledllm.remote.limits import Limits
from compiledllm.server.batch import Batch
from compiledllm.server.batch_answers import STANDARD_STREAM, AnswerFile, open_input
from compiledllm.server.batch_lines import Lines, count_lines
from compiledllm.server.batch_progress import BatchProgress
from compiledllm.server.metrics import Metrics
from compiledllm.server.openai.answer import AnswerSettings
from compiledllm.server.openai.jobs import JobMaker
from compiledllm.server.openai.known_fields import KnownFields
from compiledllm.server.openai.serving import Serving
from compiledllm.server.options import served_names
from compiledllm.server.process import (
    end_threads,
    loop_factory,
    return_large_blocks,
    spare_collector,
)

# Exit statuses. STOPPED: an error ended the batch. WRONG: a wrong option or file. NO_READER: nobody
# reads the output any more. After signal N: 128 + N.
ALL_ANSWERED, STOPPED, WRONG, SOME_FAILED, NO_READER = 0, 1, 2, 3, 141
# The engine's limits are far above the batch's own bounds, so only lines with many prompts reach
# them, and wait.
MAX_QUEUED_REQUESTS, MAX_QUEUED_TOKENS = 2**16, 2**24


def run_batch(arguments: argparse.Namespace) -> int:
    """Answer a batch file; return the exit status. Raises ConfigError for options and files."""
    show_logs(logging.getLevelNamesMapping()[arguments.log_level.upper()])
    return_large_blocks()
    options = engine_options(arguments)
    EngineConfig.from_options(**options)  # reports wrong options before anything is started
    source, output = arguments.input_file, arguments.output_file
    if source is None or output is None:
        raise ConfigError("a batch needs -i INPUT and -o OUTPUT; '-' is standard input or output")
    with open_input(source, output) as file:
        answers = AnswerFile(output, arguments.overwrite)
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            return runner.run(_run(arguments, options, Lines(file), answers))


async def _run(
    arguments: argparse.Namespace, options: dict[str, Any], lines: Lines, answers: AnswerFile
) -> int:
    """Do the work, or end it when told to; return the exit status."""
    limits = Limits(
        MAX_QUEUED_REQUESTS,
        MAX_QUEUED_TOKENS,
        stuck_s=arguments.stuck_timeout,
        load_s=arguments.load_timeout,
    )
    engine = EngineClient(options, limits, cache_dir() / "crashes")
    engine.on_loaded = spare_collector
    names = served_names(arguments, options)
    metrics, progress = Metrics("compiledllm:", names[0], engine), BatchProgress()
    jobs = _job_maker(arguments, engine, names)
    batch = Batch(engine, jobs, Serving(engine, metrics), answers, progress, names[0])
    work = asyncio.create_task(batch.run(lines))
    beside = [
        asyncio.create_task(progress.log_lines(metrics.log_line)),
        asyncio.create_task(_count(arguments.input_file, progress)),
    ]
    told = _on_signals(work)
    with _serving_metrics(arguments, metrics):
        await asyncio.wait({work})
    for task in beside:
        task.cancel()
    progress.close()
    await engine.stop()
    jobs.lanes.close()
    answers.close()
    status = _status(work, told, progress, answers)
    await end_threads(status)
    return status


def _job_maker(arguments: argparse.Namespace, engine: EngineClient, names: list[str]) -> JobMaker:
    settings = AnswerSettings(
        arguments.tool_call_parser,
        arguments.reasoning_parser,
        shows_cached_tokens=arguments.enable_prompt_tokens_details,
    )
    fields = KnownFields(arguments.strict_fields)
    return JobMaker(engine, names, fields, arguments.enable_log_requests, settings)


def _on_signals(work: asyncio.Task[None]) -> list[int]:
    """Let the first signal cancel the work, and a second signal end the process.

    Returns a list that will hold the first signal.
    """
    told: list[int] = []

    def stop(number: int) -> None:
        if told:
            os._exit(128 + number)
        told.append(number)
        work.cancel()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop, number)
    return told


@contextlib.contextmanager
def _serving_metrics(arguments: argparse.Namespace, metrics: Metrics) -> Iterator[None]:
    """Serve the metrics over HTTP, if asked to. A port in use is no reason to stop."""
    if not arguments.enable_metrics:
        yield
        return
    try:
        server, _ = start_http_server(arguments.port, arguments.host, metrics.registry)
    except OSError as error:
        log.warning("no metrics: port %d: %s", arguments.port, error.strerror)
        yield
        return
    log.info("metrics at http://%s:%d/metrics", arguments.host, arguments.port)
    yield
    server.shutdown()
    server.server_close()


async def _count(path: str, progress: BatchProgress) -> None:
    if path != STANDARD_STREAM and os.path.isfile(path):
        progress.set_total(await asyncio.to_thread(count_lines, path))


def _status(
    work: asyncio.Task[None], told: list[int], progress: BatchProgress, answers: AnswerFile
) -> int:
    """The exit status of finished work; says what happened."""
    if told and work.cancelled():
        log.warning("stopped by %s: %s", signal.Signals(told[0]).name, _go_on(progress))
        return 128 + told[0]
    if (error := work.exception()) is not None:
        return _status_of(error, progress, answers.path)
    log.info("%s", progress)
    if answers.earlier:
        log.warning("%s also answers %d other requests", answers.path, len(answers.earlier))
    return SOME_FAILED if progress.num_failed else ALL_ANSWERED


def _status_of(error: BaseException, progress: BatchProgress, path: str) -> int:
    """The exit status after an error that ended the work; says what happened."""
    if isinstance(error, BrokenPipeError):
        return NO_READER
    message = str(error)
    if isinstance(error, OSError):
        message = f"{path} cannot be written: {error.strerror}"
    elif not isinstance(error, (ConfigError, EngineError)):
        log.error("the batch itself failed", exc_info=error)
    if not isinstance(error, ConfigError):
        message += f"; {_go_on(progress)}"
    print(f"error: {message}", file=sys.stderr, flush=True)
    return WRONG if isinstance(error, ConfigError) else STOPPED


def _go_on(progress: BatchProgress) -> str:
    return f"{progress}; the same command continues from there"
