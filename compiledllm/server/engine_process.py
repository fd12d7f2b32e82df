"""The engine's process: frames in, steps, frames out. Started by `engine_client`.

It ends when the server does: the socket closes, and the system is asked to tell as well.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path

from compiledllm.config import ConfigError, EngineConfig, all_options
from compiledllm.engine.core import EngineCore
from compiledllm.log import log, show_logs
from compiledllm.server.grammar_thread import Compiled, GrammarThread
from compiledllm.server.wire import (
    Add,
    Failed,
    Finish,
    FromEngine,
    Grown,
    Ready,
    Speak,
    Start,
    Stats,
    Stepped,
    ToEngine,
    frame,
    receive,
    request_of,
)
from compiledllm.types import Request

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """`python -m compiledllm.server.engine_process FD`."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    with contextlib.suppress(OSError, AttributeError):  # Linux
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is the server's business
    show_logs()
    start = receive(connection)
    if not isinstance(start, Start):
        return
    try:
        core = EngineCore(EngineConfig.from_options(**start.options))
    except BaseException as error:
        is_config = isinstance(error, ConfigError)
        if not is_config:
            traceback.print_exc()
        text = str(error) if is_config else f"{type(error).__name__}: {error}"
        connection.sendall(frame(Failed(text, is_config)))
        sys.exit(1)
    gc.collect()
    gc.freeze()  # models, kernels and graphs are here to stay: collections need not walk them
    EngineLoop(core, connection, Path(start.crash_folder)).run()


class EngineLoop:
    """Steps while there is work, waits for frames while there is none."""

    def __init__(self, core: EngineCore, connection: socket.socket, crash_folder: Path) -> None:
        self._core = core
        core.isolate_failures()
        self._connection = connection
        self._crash_folder = crash_folder
        self._inbox: queue.SimpleQueue[ToEngine | Compiled | None] = queue.SimpleQueue()
        self._grammars = GrammarThread(self._inbox.put)
        self._alive: dict[str, Request] = {}
        self._sent: dict[str, tuple[int, int]] = {}  # tokens and prompt logprobs that were sent
        self._num_steps = 0
        self._slow_seconds = 1.0 if core.platform.is_cuda else 20.0

    def run(self) -> None:
        """Until the server closes the connection."""
        threading.Thread(target=self._read, name="frames", daemon=True).start()
        self._send(self._ready())
        while self._take_messages():
            if self._core.has_unfinished():
                self._step()

    def _read(self) -> None:
        while True:
            message = receive(self._connection)
            if isinstance(message, Speak):
                self._grammars.speak(message.vocabulary)
            elif isinstance(message, Add) and message.grammar is not None:
                self._grammars.compile(message)
            else:
                self._inbox.put(message)
            if message is None:
                return

    def _take_messages(self) -> bool:
        """All that have come; with nothing to do, wait for one. False at the end."""
        must_wait = not self._core.has_unfinished()
        while True:
            try:
                message = self._inbox.get(block=must_wait)
            except queue.Empty:
                return True
            if message is None:
                return False
            must_wait = False
            if isinstance(message, Add):
                self._add(request_of(message, self._alive))
            elif isinstance(message, Compiled):
                self._add_compiled(message)
            elif isinstance(message, Finish):
                self._finish(message)
            self._core.check_when_idle()

    def _add(self, request: Request) -> None:
        try:
            self._core.add(request)
        except ValueError as error:  # the server has checked; what it could not see ends here
            self._refuse(request.request_id, str(error))
            return
        self._alive[request.request_id] = request
        self._sent[request.request_id] = (0, 0)

    def _add_compiled(self, message: Compiled) -> None:
        if not self._grammars.is_wanted(message):
            return
        if message.error is not None:
            self._refuse(message.add.request_id, message.error)
        else:
            self._add(request_of(message.add, self._alive, message.grammar))

    def _refuse(self, request_id: str, error: str) -> None:
        grown = Grown(request_id, [], "error", error)
        self._send(Stepped({}, [grown], self._stats(0.0, 0)))

    def _finish(self, message: Finish) -> None:
        for request_id in message.request_ids:
            self._core.finish(request_id, message.reason)
            self._grammars.forget(request_id)
            self._forget(request_id)
        if not self._core.has_unfinished():  # no step will tell
            self._send(Stepped({}, [], self._stats(0.0, 0)))

    def _forget(self, request_id: str) -> None:
        self._alive.pop(request_id, None)
        self._sent.pop(request_id, None)

    def _step(self) -> None:
        started = time.perf_counter()
        try:
            advanced = self._core.step()
        except Exception as error:  # those of single requests are isolated by the core
            self._die(error)
            raise
        self._num_steps += 1
        token_ids, grown = self._news_of(advanced)
        seconds = time.perf_counter() - started
        if seconds > self._slow_seconds:
            log.warning(
                "a step took %.1f s; the next one has %d tokens of %d requests",
                *(seconds, self._core.num_step_tokens, len(self._core.scheduler.running)),
            )
        stats = self._stats(seconds, self._core.num_step_tokens)
        self._send(Stepped(token_ids, grown, stats))

    def _news_of(self, advanced: list[Request]) -> tuple[dict[str, int], list[Grown]]:
        """What was not sent yet: single tokens by request, and what is more than that."""
        token_ids: dict[str, int] = {}
        grown: list[Grown] = []
        for request in advanced:
            sent = self._sent.get(request.request_id)
            if sent is None:  # it was ended meanwhile
                continue
            is_plain = sent[0] and not request.is_finished and not request.logprobs
            if is_plain and request.num_output_tokens == sent[0] + 1:
                token_ids[request.request_id] = request.token_ids[-1]
                self._sent[request.request_id] = sent[0] + 1, sent[1]
            else:
                grown.append(self._grown(request, *sent))
        return token_ids, grown

    def _grown(self, request: Request, tokens: int, prompts: int) -> Grown:
        """tokens, prompts: how many tokens and log probabilities of the prompt were sent."""
        grown = Grown(
            request.request_id,
            request.token_ids[request.num_prompt_tokens + tokens :],
            request.finish_reason,
            request.stop_reason,
            max(request.num_cached_tokens, 0),
            request.logprobs[tokens:],
            request.prompt_logprobs[prompts:],
        )
        if request.is_finished:
            self._forget(request.request_id)
        else:
            counts = request.num_output_tokens, len(request.prompt_logprobs)
            self._sent[request.request_id] = counts
        return grown

    def _stats(self, seconds: float, num_tokens: int) -> Stats:
        scheduler = self._core.scheduler
        return Stats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            kv_usage=scheduler.block_pool.usage,
            num_preemptions=scheduler.num_preemptions,
            num_failed_rows=scheduler.num_failed_rows,
            num_recompiles=self._core.runner.compiler.num_recompiles,
            step_seconds=seconds,
            num_tokens=num_tokens,
            prefix_queries=scheduler.num_prefix_queries,
            prefix_hits=scheduler.num_prefix_hits,
        )

    def _ready(self) -> Ready:
        core = self._core
        served = core.served_model()
        groups = {f.name: getattr(core.config, group) for group, f in all_options()}
        return Ready(
            options={name: getattr(group, name) for name, group in groups.items()},
            choices={name: str(choice) for name, choice in core.choices.items()},
            model_path=str(core.model_path),
            vocab_size=served.vocab_size,
            eos_token_ids=list(served.eos_token_ids),
            num_slots=served.num_slots,
            startup_s=core.startup_s,
        )

    def _send(self, message: FromEngine) -> None:
        try:
            self._connection.sendall(frame(message))
        except OSError:
            sys.exit(0)  # the server is gone

    def _die(self, error: Exception) -> None:
        """The device is lost: record what happened, tell the server, end."""
        traceback.print_exc()
        blamed = [request.request_id for request in self._core.scheduler.running]
        text = f"{type(error).__name__}: {error}"
        batch = [
            {"request_id": r.request_id, "tokens": r.num_tokens, "computed": r.num_computed_tokens}
            for r in self._core.scheduler.running
        ]
        record = {"error": text, "step": self._num_steps, "batch": batch}
        record |= {"traceback": traceback.format_exc(), "last_stats": asdict_of(self._stats(0, 0))}
        write_crash_record(self._crash_folder, record)
        self._send(Failed(text, blamed=blamed))
        os._exit(1)


def asdict_of(stats: Stats) -> dict[str, float]:
    return {name: getattr(stats, name) for name in stats.__struct_fields__}


def write_crash_record(folder: Path, record: dict[str, object]) -> Path | None:
    """A JSON file; None, and a line, if it cannot be written."""
    name = f"crash-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / name
        path.write_text(json.dumps(record, indent=1), encoding="utf-8")
    except OSError as problem:
        log.error("the crash record cannot be written to %s (%s)", folder, problem)
        return None
    log.error("crash record: %s", path)
    return path


if __name__ == "__main__":
    main()
