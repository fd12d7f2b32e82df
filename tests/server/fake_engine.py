"""An engine's process in which all is real but the engine: it has no model and starts at once.

Each step gives every request the token 65. The first token of a prompt may be one of `DEEDS`. What
happens while it loads is said by the environment: FAKE_LOAD_S, FAKE_DEED, FAKE_CHILD; how long a
step takes, by FAKE_STEP_S. While there is a file FAKE_HOLD, no request for more than 9
tokens gets its last one.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from compiledllm.config import ConfigError, EngineConfig
from compiledllm.engine.served_model import ServedModel
from compiledllm.remote.engine_process import run
from compiledllm.resolved_config import resolve
from compiledllm.types import Request, RequestSpec, RequestStatus, RequestUpdate, StepNews

DEEDS = {"kill": 901, "hang": 902, "raise": 903, "slow": 904}
STEP_S = float(os.environ.get("FAKE_STEP_S", "0.005"))
HOLD = Path(os.environ.get("FAKE_HOLD", "/nonexistent"))


def do(deed: str) -> None:
    if deed == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif deed == "hang":
        time.sleep(1000)
    elif deed == "raise":
        raise RuntimeError("the device is lost")
    elif deed == "slow":
        time.sleep(0.1)
    elif deed == "config":
        raise ConfigError("there is no such model")


def is_held(request: Request) -> bool:
    max_tokens = request.spec.max_tokens
    return max_tokens > 9 and request.num_output_tokens == max_tokens - 1


class FakeCore:
    max_model_len = 2048

    def __init__(self, config: EngineConfig) -> None:
        if os.environ.get("FAKE_CHILD"):  # as a compiler that the engine has started
            subprocess.Popen(["sleep", "1000"])
        time.sleep(float(os.environ.get("FAKE_LOAD_S", "0")))
        do(os.environ.get("FAKE_DEED", ""))
        self.config, self.report = resolve(config, False, self.max_model_len, 2**30)
        self.options = self.config.options
        self.model_path, self.startup_s = Path("fake"), {"total": 0.0}
        self.platform = SimpleNamespace(is_cuda=True)  # so that a hanging step is not waited for
        self.worker = SimpleNamespace(
            stats=lambda: SimpleNamespace(num_recompiles=0), use_idle_time=lambda: False
        )
        self.num_step_tokens = 0
        self.on_start: Any = None
        self.scheduler = SimpleNamespace(
            running=[],
            waiting=[],
            block_pool=SimpleNamespace(usage=0.0),
            num_preemptions=0,
            num_failed_rows=0,
            num_prefix_queries=0,
            num_prefix_hits=0,
            num_prefix_misses_of_state=0,
            kv=SimpleNamespace(num_snapshot_hits=0),
        )
        self.snapshot_bytes = 0

    def isolate_failures(self) -> None:
        pass

    def check_when_idle(self) -> None:
        do(os.environ.get("FAKE_IDLE_DEED", ""))

    def served_model(self) -> ServedModel:
        return ServedModel(self.config.requested, 2048, self.model_path, 1000, (2,), 2048)

    def has_unfinished(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting)

    def add(self, spec: RequestSpec, grammar: Any = None) -> None:
        self.scheduler.waiting.append(Request(spec, grammar))

    def finish(self, request_id: str, reason: str, stop_reason: Any = None) -> None:
        for queue in (self.scheduler.running, self.scheduler.waiting):
            queue[:] = [request for request in queue if request.request_id != request_id]

    def step(self) -> StepNews:
        running, waiting = self.scheduler.running, self.scheduler.waiting
        limit, started = self.config.limits.max_num_seqs, {}
        while waiting and len(running) < limit:
            running.append(waiting.pop(0))
            self.on_start([running[-1].request_id])
            started[running[-1].request_id] = time.monotonic()
        time.sleep(STEP_S)
        names = {token: deed for deed, token in DEEDS.items()}
        stepped = [r for r in running if not is_held(r)] if HOLD.exists() else list(running)
        for request in stepped:
            do(names.get(request.spec.prompt_token_ids[0], ""))
            request.token_ids.append(65)
            if request.num_output_tokens >= request.spec.max_tokens:
                request.status, request.finish_reason = RequestStatus.FINISHED, "length"
        news = StepNews(started=started)
        for request in stepped:
            if request.is_finished or request.num_output_tokens == 1:
                news.updates.append(RequestUpdate.of(request, [65]))
            else:
                news.token_ids[request.request_id] = 65
        running[:] = [request for request in running if not request.is_finished]
        return news


if __name__ == "__main__":
    run(FakeCore)  # type: ignore[arg-type]
    sys.exit()
