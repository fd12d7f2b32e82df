"""The offline engine: prompts in, outputs out, continuous batching in between.

from compiledllm import Engine, SamplingParams
engine = Engine()
for output in engine.generate(["The capital of France is"], SamplingParams(temperature=0)):
    print(output.outputs[0].text)
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from compiledllm import bytecode
from compiledllm.beam_search_params import BeamSearchParams
from compiledllm.config import EngineConfig
from compiledllm.engine import cuda_context
from compiledllm.engine.conversation import Message
from compiledllm.engine.prompts import (
    Prompt,
    as_conversations,
    as_prompts,
    one_per_prompt,
)
from compiledllm.engine.request_state import OutputStream
from compiledllm.engine.tokenizer import load
from compiledllm.ledger import Ledger
from compiledllm.log import show_logs
from compiledllm.outputs import (
    BeamSearchOutput,
    EmbeddingRequestOutput,
    Metric,
    PositionLogprobs,
    RequestOutput,
    ScoringRequestOutput,
)
from compiledllm.pooling_params import PoolingParams
from compiledllm.sampling_params import ALL_TOKENS, SamplingParams
from compiledllm.vllm_options import check_arguments

if TYPE_CHECKING:
    from tqdm import tqdm

    from compiledllm.engine.llm_engine import LLMEngine


class Engine:
    """An LLM on this machine.

    Engine(model=None, **options): `model` is a local directory, a .gguf file or a Hugging Face id;
    None is the embedded default, SmolLM2-135M-Instruct. The options are the fields of
    `compiledllm.config` and have vLLM's names. Raises ConfigError for an impossible configuration.

    Threads may share an engine: calls take turns step by step, and their requests run in one batch.
    Each call gets the outputs of its own requests; outputs of `add_request`'s requests go to the
    caller of `step`. Every step advances the requests of all calls, so a stream that is read late
    shows more at once. A failing step raises in the calls whose requests it has ended.
    """

    def __init__(self, model: str | Path | None = None, **options: Any) -> None:
        show_logs()
        with bytecode.kept(options.get("artifact_dir")):
            self._start(model, options)

    def _start(self, model: str | Path | None, options: Mapping[str, Any]) -> None:
        ledger = Ledger()
        with ledger.phase("import"):
            cuda_context.make_in_thread(options.get("device", "auto"))
            # These modules import torch, which takes seconds: importing the class must not.
            from compiledllm.engine.calls import Calls
            from compiledllm.engine.core import EngineCore
            from compiledllm.engine.requests import RequestFactory
            from compiledllm.engine.shared_core import SharedCore
            from compiledllm.engine.startup import plan

        with ledger.phase("plan"):
            planned = plan(EngineConfig.from_options(model=model, **options))
        self.core = EngineCore(planned, ledger)
        self.config = self.core.config
        with ledger.phase("tokenizer"):
            self.tokenizer = load(self.config.requested, self.core.model_path)
        self._requests = RequestFactory(self.core.served_model(), self.tokenizer)
        self._shared = SharedCore(self.core)
        # On a CPU an answer without a limit takes minutes.
        self._calls = Calls(self._requests, self._shared, not self.core.platform.is_cuda)

    @classmethod
    def from_engine_args(cls, engine_args: Any) -> Self:
        """An engine from options as a mapping, or as an object with the options as attributes."""
        from compiledllm.engine_args import options_from  # makes two classes of 500 fields

        return cls(**options_from(engine_args))

    @property
    def num_requests_for_step(self) -> int:
        """Number of requests of `add_request` that have not ended."""
        return sum(state.is_for_step for state in list(self._shared.states.values()))

    @property
    def model_path(self) -> Path:
        """The checkpoint directory in use: config.json, safetensors, tokenizer files."""
        return self.core.model_path

    def get_tokenizer(self) -> Any:
        """The transformers tokenizer, loaded by the first call, which takes seconds.

        Changes of the object do not change the engine's own tokenizer. Raises ConfigError if the
        tokenizer's files are gone.
        """
        return self._requests.require_tokenizer("get_tokenizer()").hf

    # -- whole answers -------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool | Callable[..., tqdm[Any]] = True,
        priority: Sequence[int] | None = None,
        **others: Any,
    ) -> list[RequestOutput]:
        """Complete one or many prompts; the outputs are in the order of the prompts.

        sampling_params: one for all, or one per prompt. use_tqdm: whether to show the progress in a
        terminal, or what makes the progress bar. priority: one per prompt, lower first, with
        scheduling_policy="priority". others: vLLM's other arguments, which must ask for nothing.
        All prompts are checked before any is run: a bad one raises ValueError and starts nothing.
        """
        check_arguments("generate", others)
        listed = as_prompts(prompts)
        states = self._calls.make(listed, sampling_params, priority, waits_for_batch=True)
        return self._calls.run(states, use_tqdm, is_batch=True)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool | Callable[..., tqdm[Any]] = True,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        priority: Sequence[int] | None = None,
        **others: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation or many, each a list of {"role": ..., "content": ...}.

        tools: passed to the chat template, in OpenAI's format; tool calls stay in the output's text
        as the model writes them. priority, others: as in `generate`.
        """
        check_arguments("chat", others)
        conversations = as_conversations(messages)
        tokenizer = self._requests.require_tokenizer("chat()")
        prompts = []
        for conversation in conversations:
            text, token_ids = tokenizer.encode_chat(
                conversation,
                chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **({"tools": list(tools)} if tools else {}) | dict(chat_template_kwargs or {}),
            )
            prompts.append({"prompt": text, "prompt_token_ids": token_ids})
        return self.generate(prompts, sampling_params, use_tqdm, priority)

    # -- token by token ------------------------------------------------------------------------

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        priority: Sequence[int] | None = None,
    ) -> OutputStream:
        """Iterate over each request's output whenever it grows, the finished one last.

        `SamplingParams.output_kind` says what an output holds: by default everything so far. Bad
        prompts raise at once, before the first item is requested. Closing the iterator aborts the
        unfinished requests.
        """
        states = self._calls.make(as_prompts(prompts), sampling_params, priority)
        self._shared.add(states)
        return OutputStream(self._calls.stream(states), lambda: self._shared.abort(states))

    def stream_chat(
        self, messages: Sequence[Message], sampling_params: SamplingParams | None = None
    ) -> OutputStream:
        """`stream` for one conversation."""
        tokenizer = self._requests.require_tokenizer("stream_chat()")
        (conversation,) = as_conversations(messages)
        text, token_ids = tokenizer.encode_chat(conversation, add_generation_prompt=True)
        return self.stream({"prompt": text, "prompt_token_ids": token_ids}, sampling_params)

    # -- one step at a time --------------------------------------------------------------------

    def add_request(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        priority: int = 0,
    ) -> str:
        """Queue one request for `step`; returns its id. Raises ValueError for a bad one."""
        params = self._requests.defaults if sampling_params is None else sampling_params
        request_id = self._calls.next_request_id() if request_id is None else request_id
        state = self._requests.make(request_id, prompt, params, priority)
        state.is_for_step = True
        self._shared.add([state])
        return state.request_id

    def abort_request(self, request_id: str) -> None:
        """End a request added by `add_request`. Unknown ids are ignored."""
        self._shared.abort_id(request_id)

    def has_unfinished_requests(self) -> bool:
        """Whether `step` has more to return."""
        return self._shared.has_more_for_step()

    def step(self) -> list[RequestOutput]:
        """One engine step. Returns the outputs of `add_request`'s requests that grew."""
        return self._shared.step()

    def get_default_sampling_params(self) -> SamplingParams:
        """The sampling parameters of a request without any."""
        return dataclasses.replace(self._requests.defaults)

    # -- vectors -------------------------------------------------------------------------------

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
    ) -> list[EmbeddingRequestOutput]:
        """The vector of each prompt, in the order of the prompts, from any decoder.

        Without pooling_params, pooled as the checkpoint says, else by the normalised last token.
        Raises ValueError for a bad prompt, which starts nothing, and ConfigError for a checkpoint
        whose pooling is not supported.
        """
        from compiledllm.engine.pooling import embedding_output

        listed, factory = as_prompts(prompts), self._requests
        given = PoolingParams() if pooling_params is None else pooling_params
        params = one_per_prompt(given, len(listed), "pooling_params")
        priorities = one_per_prompt(0 if priority is None else priority, len(listed), "priority")
        states = [
            factory.make_pooling(self._calls.next_request_id(), *arguments)
            for arguments in zip(listed, params, priorities, strict=True)
        ]
        self._calls.run(states, use_tqdm)
        return [
            embedding_output(state, factory.pooling, given)
            for state, given in zip(states, params, strict=True)
        ]

    def score(
        self,
        queries: str | Sequence[str],
        documents: str | Sequence[str],
        use_tqdm: bool = True,
        *,
        instruction: str | None = None,
        truncate_prompt_tokens: int | None = None,
    ) -> list[ScoringRequestOutput]:
        """How well documents answer queries: one query with each document, or pair by pair.

        Rerankers give the probability that a document answers the query, 0 to 1; their prompt is
        applied here, with `instruction` as the task. All other models give the cosine of the two
        vectors. Raises ValueError for texts that cannot be scored, which starts nothing.
        """
        from compiledllm.engine.scoring import make_pairs, make_scorer, scoring_outputs

        pairs = make_pairs(queries, documents)
        scorer = make_scorer(self._requests, truncate_prompt_tokens, instruction)
        prompts = scorer.prompts(pairs)
        states = [scorer.make(self._calls.next_request_id(), prompt) for prompt in prompts]
        self._calls.run(states, use_tqdm)
        return scoring_outputs(scorer, pairs, states)

    # -- state ---------------------------------------------------------------------------------

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes; returns True. Requests in progress keep their blocks."""
        self._shared.reset_prefix_cache()
        return True

    def get_metrics(self) -> list[Metric]:
        """What the engine has counted since it started, by vLLM's names."""
        return self._shared.metrics(self.core.config.requested.model.model or "default")

    @property
    def llm_engine(self) -> LLMEngine:
        """vLLM's view of this engine, for scripts that add and step requests themselves."""
        from compiledllm.engine.llm_engine import LLMEngine

        return LLMEngine(self)

    def shutdown(self) -> None:
        """End all requests and let go of the model, so that its memory can be used again.

        Calls in other threads raise, and so does every later call.
        """
        self._shared.shut_down()
        del self.core, self._calls, self._shared, self._requests
        self.tokenizer = None
        gc.collect()

    def __getattr__(self, name: str) -> Any:
        if name in ("core", "_calls", "_shared", "_requests"):
            raise ValueError("the engine was shut down; make a new one")
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")

    # -- searching -----------------------------------------------------------------------------

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams,
        use_tqdm: bool = False,
        **others: Any,
    ) -> list[BeamSearchOutput]:
        """The likeliest continuations of each prompt, best first. use_tqdm: has no effect."""
        check_arguments("beam_search", others)
        from compiledllm.engine.beam_search import beam_search

        return beam_search(self._requests, self.next_token_logprobs, as_prompts(prompts), params)

    def next_token_logprobs(
        self, prompts: list[list[int]], params: SamplingParams
    ) -> list[PositionLogprobs]:
        """Log probabilities of the first token after each prompt, not limited by `max_logprobs`."""
        next_id, make = self._calls.next_request_id, self._requests.make
        states = [make(next_id(), prompt, params, max_logprobs=ALL_TOKENS) for prompt in prompts]
        outputs = [output.outputs[0] for output in self._calls.run(states, use_tqdm=False)]
        return [output.logprobs[0] if output.logprobs else {} for output in outputs]


LLM = Engine  # vLLM's name
