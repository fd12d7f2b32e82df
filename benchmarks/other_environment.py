"""An engine of another Python environment as a peer: an older compiledllm, or vLLM.

The engine runs in a process of the environment's interpreter (`other_engine.py`). That process
measures the engine's own call, so that sending the requests to the process does not count.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compiledllm.benchmarks.profile import StepTimes
from compiledllm.benchmarks.workload import Generated, SampleRequest, check_lengths, ids_of
from compiledllm.config import ConfigError

_PROGRAM = Path(__file__).with_name("other_engine.py")
_MAX_END_S = 30.0  # a process that has not ended by itself after that is killed


class OtherEnvironment:
    """A peer in another environment.

    name: in reports. kind: "compiledllm" or "vllm". python: the environment's interpreter. options:
    of the engine. The constructor starts the process and does not wait for it. Raises ConfigError
    if the interpreter cannot be started.
    """

    def __init__(self, name: str, kind: str, python: str, options: Mapping[str, Any]) -> None:
        self.name = name
        started = time.perf_counter()
        # Python looks for modules in the folder of the program, or where it is started, first: the
        # program is passed as text, and starts in an empty folder that only this user can write.
        self._folder = tempfile.TemporaryDirectory()
        command = [python, "-c", _PROGRAM.read_text("utf-8"), kind, json.dumps(dict(options))]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=self._folder.name,
            )
        except OSError as error:
            raise ConfigError(f"engine '{name}': {python} cannot be started ({error})") from None
        weakref.finalize(self, _end, self._process)
        self._started: float | None = started
        self.startup_s: dict[str, float] = {}

    def wait_until_ready(self) -> None:
        """Wait for the engine. Raises ConfigError if the engine does not start."""
        if self._started is not None:
            self._answer()
            self.startup_s = {"start": time.perf_counter() - self._started}
            self._started = None

    def generate(self, requests: Sequence[SampleRequest]) -> Generated:
        self.wait_until_ready()
        work = [ids_of(r) for r in requests], [r.output_len for r in requests]
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `_answer` raises the error
            self._process.stdin.write(json.dumps(work) + "\n")
            self._process.stdin.flush()
        generated = Generated(*json.loads(self._answer()))
        check_lengths(requests, generated.token_ids)
        return generated

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            raise ConfigError(
                f"engine '{self.name}' has ended with status {status}; the cause is above"
            )
        return line

    def inter_token_times(self, requests: Sequence[SampleRequest]) -> list[float] | None:
        return None  # only whole calls are measured in the other process

    def step_times(self, requests: Sequence[SampleRequest]) -> StepTimes | None:
        return None


def _end(process: subprocess.Popen[str]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
    try:
        process.wait(_MAX_END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
