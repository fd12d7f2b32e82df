"""An engine's process without a model: all requests get a token in each step of a fixed time.

PACED_STEP_S says how long a step takes. The model's folder has a tokenizer.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from compiledllm.config import EngineConfig
from compiledllm.engine.served_model import ServedModel
from compiledllm.remote.engine_process import run
from compiledllm.types import RequestStatus, RequestUpdate, StepNews
from tests.server.fake_engine import FakeCore

STEP_S = float(os.environ.get("PACED_STEP_S", "0.02"))
TEXT = " the quick brown fox jumps over the lazy dog"


class PacedCore(FakeCore):
    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self.model_path = Path(str(config.model.model))
        tokenizer = Tokenizer.from_file(str(self.model_path / "tokenizer.json"))
        self._size = tokenizer.get_vocab_size()
        self._tokens = tokenizer.encode(TEXT, add_special_tokens=False).ids
        self._next_step_at = time.monotonic()

    def served_model(self) -> ServedModel:
        return ServedModel(self.config.requested, 2048, self.model_path, self._size, (2,), 2048)

    def step(self) -> StepNews:
        running, waiting = self.scheduler.running, self.scheduler.waiting
        started = {}
        self.on_start([request.request_id for request in waiting])
        while waiting:
            running.append(request := waiting.pop(0))
            started[request.request_id] = time.monotonic()
        now = time.monotonic()
        self._next_step_at = max(self._next_step_at + STEP_S, now)
        time.sleep(self._next_step_at - now)
        news = StepNews(started=started)
        for request in running:
            token = self._tokens[request.num_output_tokens % len(self._tokens)]
            request.token_ids.append(token)
            is_last = request.num_output_tokens >= request.spec.max_tokens
            if is_last:
                request.status, request.finish_reason = RequestStatus.FINISHED, "length"
            if is_last or request.num_output_tokens == 1:
                news.updates.append(RequestUpdate.of(request, [token]))
            else:
                news.token_ids[request.request_id] = token
        running[:] = [request for request in running if not request.is_finished]
        return news

    def check_when_idle(self) -> Any:
        pass


if __name__ == "__main__":
    run(PacedCore)  # type: ignore[arg-type]
    sys.exit()
