"""vLLM's `LLMEngine`: requests are added and stepped one by one. A view of an `Engine`."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, Self

import torch

from compiledllm.engine.engine import Engine
from compiledllm.engine.prompts import Prompt
from compiledllm.outputs import Metric, RequestOutput
from compiledllm.sampling_params import SamplingParams
from compiledllm.vllm_options import check_arguments


class LLMEngine:
    """`add_request`, `step` and what vLLM's scripts ask of `llm.llm_engine`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @classmethod
    def from_engine_args(cls, engine_args: Any, **others: Any) -> Self:
        """An engine from options as a mapping, or as an object with the options as attributes."""
        check_arguments("from_engine_args", others)
        return cls(Engine.from_engine_args(engine_args))

    def add_request(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        arrival_time: float | None = None,
        *,
        priority: int = 0,
        **others: Any,
    ) -> str:
        """Queue one request for `step`. arrival_time is not used: requests arrive when added."""
        check_arguments("add_request", others)
        return self._engine.add_request(prompt, params, request_id, priority)

    def abort_request(self, request_id: str | Iterable[str]) -> None:
        """End requests. Unknown ids are ignored."""
        for name in [request_id] if isinstance(request_id, str) else request_id:
            self._engine.abort_request(name)

    def step(self) -> list[RequestOutput]:
        """One engine step. Returns the outputs of the requests that grew."""
        return self._engine.step()

    def has_unfinished_requests(self) -> bool:
        return self._engine.has_unfinished_requests()

    def get_num_unfinished_requests(self) -> int:
        """Number of requests that were added and have not ended."""
        return self._engine.num_requests_for_step

    def get_tokenizer(self) -> Any:
        """The transformers tokenizer; see `Engine.get_tokenizer`."""
        return self._engine.get_tokenizer()

    def reset_prefix_cache(self, **others: Any) -> bool:
        """Forget all cached prefixes."""
        check_arguments("reset_prefix_cache", others)
        return self._engine.reset_prefix_cache()

    def get_metrics(self) -> list[Metric]:
        """See `Engine.get_metrics`."""
        return self._engine.get_metrics()

    @property
    def model_config(self) -> ModelConfigView:
        """`max_model_len`, `dtype`, `model` and `get_vocab_size()`, as resolved."""
        return ModelConfigView(self._engine)

    @property
    def vllm_config(self) -> SimpleNamespace:
        """`model_config`, and what scripts read of `cache_config` and `scheduler_config`."""
        options = self._engine.core.options()
        names = ("max_num_seqs", "max_num_batched_tokens", "scheduling_policy")
        cache = {"block_size": options["block_size"], "num_gpu_blocks": options["num_kv_blocks"]}
        return SimpleNamespace(
            model_config=self.model_config,
            cache_config=SimpleNamespace(**cache),
            scheduler_config=SimpleNamespace(**{name: options[name] for name in names}),
        )


class ModelConfigView:
    """The facts of `llm.llm_engine.model_config` that scripts read."""

    def __init__(self, engine: Engine) -> None:
        core, requested = engine.core, engine.config.requested.model
        self.model = requested.model or str(engine.model_path)
        self.tokenizer = requested.tokenizer or self.model
        self.max_model_len = core.max_model_len
        self.dtype = getattr(torch, core.spec.dtype)
        self._vocab_size = core.spec.vocab_size

    def get_vocab_size(self) -> int:
        return self._vocab_size
