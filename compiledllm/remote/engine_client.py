"""An engine whose process is started, watched, restarted and used by this process alone."""

from __future__ import annotations

import asyncio

from compiledllm.engine.tokenizer_snapshot import warm_up
from compiledllm.remote.engine_life import EngineLife
from compiledllm.remote.engine_requests import EngineRequests
from compiledllm.remote.wire import Ready
from compiledllm.types import StepNews


class EngineClient(EngineLife, EngineRequests):
    """Starts the engine's process and sends it this process's requests."""

    def start(self) -> None:
        super().start()
        if not self._options.get("skip_tokenizer_init"):
            # Runs while the engine loads.
            named = self._options.get("artifact_dir")
            asyncio.get_running_loop().run_in_executor(None, warm_up, named)

    @property
    def num_unread_bytes(self) -> int:
        return 0 if self._child is None else self._child.num_unread_bytes

    @property
    def num_live(self) -> int:
        return len(self.live)

    @property
    def _num_finished(self) -> int:
        return self.live.num_finished

    @property
    def _engine_ids(self) -> list[str]:
        return self.live.engine_ids

    async def _welcome(self, message: Ready) -> None:
        await self._load_texts(message)
        self._become_ready(message)

    def _take_news(self, news: StepNews) -> None:
        self.live.take(news)

    def _on_engine_end(self, cause: str, started: set[str]) -> bool:
        return self.live.on_engine_end(cause, started)

    def _give_requests_away(self) -> None:
        self.on_loss()

    def _end_all(self, error: Exception) -> None:
        self.live.end_all(error)
