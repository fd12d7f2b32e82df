"""An engine for asyncio programs: many callers, one engine in a process of its own.

engine = AsyncEngine()
async for output in engine.generate("The capital of France is", SamplingParams(temperature=0)):
    print(output.outputs[0].text)
engine.shutdown()
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Self

from compiledllm.caches import cache_dir
from compiledllm.config import ConfigError, EngineConfig, own_options
from compiledllm.engine.pooling import embedding_output
from compiledllm.engine.prompts import Prompt, as_prompts, one_per_prompt
from compiledllm.engine.request_state import RequestState
from compiledllm.engine.requests import RequestFactory
from compiledllm.engine.scoring import make_pairs, make_scorer, scoring_outputs
from compiledllm.log import show_logs
from compiledllm.outputs import EmbeddingRequestOutput, RequestOutput, ScoringRequestOutput
from compiledllm.pooling_params import PoolingParams
from compiledllm.remote.engine_client import EngineClient
from compiledllm.remote.errors import EngineError, Unavailable
from compiledllm.remote.limits import Limits
from compiledllm.remote.live_request import LiveRequest
from compiledllm.sampling_params import SamplingParams
from compiledllm.vllm_options import check_arguments

_UNLIMITED = Limits(queued_requests=2**62, queued_tokens=2**62)


class AsyncEngine:
    """An LLM for one event loop. Names are those of vLLM's `AsyncLLM`.

    AsyncEngine(model=None, **options) takes what `Engine` takes, and raises ConfigError at once for
    an unknown option. The engine's process starts with the first request, or with `start` or
    `async with`. A configuration that turns out to be impossible once the model is known raises
    ConfigError then. Needs the extra `server` (msgspec).

    An engine that ends is started again. A request of which nothing was shown yet is given to the
    new engine; all others raise EngineError. An engine that cannot be started again is `errored`.
    """

    def __init__(self, model: str | Path | None = None, **options: Any) -> None:
        show_logs()
        self._client = EngineClient(
            _plain({"model": model, **options}), _UNLIMITED, cache_dir() / "crashes"
        )
        self._is_started = self._is_closed = False
        self._request_ids = itertools.count()

    @classmethod
    def from_engine_args(cls, engine_args: Any, **others: Any) -> Self:
        """An engine from options as a mapping, or as an object with the options as attributes."""
        check_arguments("from_engine_args", others)
        from compiledllm.engine_args import options_from  # makes two classes of 500 fields

        return cls(**options_from(engine_args))

    # -- requests ------------------------------------------------------------------------------

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        **others: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Iterate over a request's output whenever it grows, the finished one last.

        `SamplingParams.output_kind` says what an output holds; a slow reader gets fewer outputs
        with more tokens. Leaving or cancelling the iteration aborts the request. Raises ValueError
        for a bad prompt, bad parameters or a request_id in use, and EngineError if the engine ends.
        """
        check_arguments("generate", others)
        live = await self._submit(prompt, sampling_params, request_id, priority)
        with self._client.following(live):
            while not live.state.is_over:
                yield await live.take()

    async def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        *,
        priority: int = 0,
    ) -> list[EmbeddingRequestOutput]:
        """The vector of each prompt, in the order of the prompts, as `Engine.embed` gives them.

        Raises ValueError for a bad prompt, which starts nothing, ConfigError for a checkpoint whose
        pooling is not supported, and EngineError if the engine ends.
        """
        listed, factory = as_prompts(prompts), await self._factory()
        given = PoolingParams() if pooling_params is None else pooling_params
        params = one_per_prompt(given, len(listed), "pooling_params")

        def make() -> list[RequestState]:
            return [
                factory.make_pooling(f"embed-{next(self._request_ids)}", *arguments, priority)
                for arguments in zip(listed, params, strict=True)
            ]

        def show(states: list[RequestState]) -> list[EmbeddingRequestOutput]:
            return [
                embedding_output(state, factory.pooling, used)
                for state, used in zip(states, params, strict=True)
            ]

        return await asyncio.to_thread(show, await self._finished(factory, make))

    async def score(
        self,
        queries: str | Sequence[str],
        documents: str | Sequence[str],
        *,
        instruction: str | None = None,
        truncate_prompt_tokens: int | None = None,
        priority: int = 0,
    ) -> list[ScoringRequestOutput]:
        """How well documents answer queries, as `Engine.score` tells it.

        Raises ValueError for texts that cannot be scored, which starts nothing, and EngineError if
        the engine ends.
        """
        pairs, factory = make_pairs(queries, documents), await self._factory()
        scorer = await asyncio.to_thread(make_scorer, factory, truncate_prompt_tokens, instruction)

        def make() -> list[RequestState]:
            return [
                scorer.make(f"score-{next(self._request_ids)}", prompt, priority)
                for prompt in scorer.prompts(pairs)
            ]

        states = await self._finished(factory, make)
        return await asyncio.to_thread(scoring_outputs, scorer, pairs, states)

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """End requests; their last output has finish_reason "abort". Unknown ids are ignored."""
        for name in [request_id] if isinstance(request_id, str) else request_id:
            live = self._client.live.get(name)
            if live is not None:
                self._client.live.end_as_aborted(live)

    async def get_tokenizer(self) -> Any:
        """The transformers tokenizer; see `Engine.get_tokenizer`."""
        tokenizer = (await self._factory()).require_tokenizer("get_tokenizer()")
        return await asyncio.to_thread(lambda: tokenizer.hf)

    async def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes; returns True. Requests in progress keep their blocks."""
        await self.start()
        self._client.reset_prefix_cache()
        return True

    # -- life ----------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the engine's process, if need be, and wait until it takes requests.

        Raises ConfigError if the configuration is impossible, and EngineError if the engine ends.
        """
        if not self._is_started and not self._is_closed:
            self._is_started = True
            self._client.start()
        if not self._is_closed:
            await self._client.wait_until_settled()
        failure = self._client.failure
        if self.errored and failure is not None and failure.is_config:
            raise ConfigError(failure.error)
        if self.errored or self._is_closed:
            raise self.dead_error

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        self.shutdown()
        await self._client.stop()

    def shutdown(self) -> None:
        """End the engine's process at once; requests in progress raise EngineError."""
        self._is_closed = True
        self._client.kill("the engine was shut down")

    @property
    def is_running(self) -> bool:
        """Whether the engine has been started and neither shut down nor lost."""
        return self._is_started and not self._is_closed and not self.errored

    @property
    def errored(self) -> bool:
        """Whether the engine has ended for good, other than by `shutdown`."""
        return self._client.state == "dead"

    @property
    def dead_error(self) -> EngineError:
        """The error that requests to an ended engine raise."""
        failure = self._client.failure
        if self.errored and failure is not None:
            return EngineError(failure.error)
        return EngineError("the engine was shut down" if self._is_closed else "the engine ended")

    async def check_health(self) -> None:
        """Raise EngineError if the engine has ended or shows no sign of life."""
        if self.errored or self._is_closed:
            raise self.dead_error
        if self._is_started and (reason := self._client.why_unhealthy()):
            raise EngineError(reason)

    # -- inside --------------------------------------------------------------------------------

    async def _factory(self) -> RequestFactory:
        await self.start()
        assert self._client.requests is not None
        return self._client.requests

    async def _submit(
        self, prompt: Prompt, params: SamplingParams | None, request_id: str | None, priority: int
    ) -> LiveRequest:
        factory = await self._factory()
        params = factory.defaults if params is None else params
        request_id = f"async-{next(self._request_ids)}" if request_id is None else request_id
        # The id in the engine is never used twice, because news of an aborted request may still be
        # under way when the caller uses the request's id again. The request is made in a thread,
        # since long texts and grammars take long.
        core_id = f"{next(self._request_ids)}-{request_id}"
        state = await asyncio.to_thread(_make, factory, prompt, params, core_id, priority)
        state.request_id = request_id
        (live,) = await self._admit([state])
        return live

    async def _admit(self, states: list[RequestState]) -> list[LiveRequest]:
        """Send requests to the engine. Raises EngineError if the engine has ended meanwhile."""
        await self.start()
        try:
            return self._client.admit(states)
        except Unavailable as error:
            raise EngineError(str(error)) from None

    async def _finished(
        self, factory: RequestFactory, make: Callable[[], list[RequestState]]
    ) -> list[RequestState]:
        """Make requests in a thread, and return them once all are finished.

        Cancelling aborts them.
        """
        states = await asyncio.to_thread(make)
        for state in states:
            factory.check_room(state.completions[0].spec)
        live_requests = await self._admit(states)
        try:
            for live in live_requests:
                while not live.state.is_over:
                    await live.take()
        finally:
            self._client.release(live_requests)
        return states


AsyncLLM = AsyncLLMEngine = AsyncEngine  # vLLM's names


def _make(
    factory: RequestFactory,
    prompt: Prompt,
    params: SamplingParams,
    request_id: str,
    priority: int,
) -> RequestState:
    state = factory.make(request_id, prompt, params, priority)
    if params.logits_processors is not None:
        raise ValueError(
            "logits_processors cannot be sent to the process of an AsyncEngine; use Engine"
        )
    factory.check_room(state.completions[0].spec)
    return state


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    """Checked options as plain data, so that they can be sent. Raises ConfigError."""
    EngineConfig.from_options(**options)
    return own_options(options)
