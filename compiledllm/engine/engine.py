"""The offline engine: prompts in, outputs out, continuous batching in between.

from compiledllm import Engine, SamplingParams
engine = Engine()
for output in engine.generate(["The capital of France is"], SamplingParams(temperature=0)):
    print(output.outputs[0].text)
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compiledllm.config import EngineConfig
from compiledllm.engine.conversation import Message
from compiledllm.engine.prompts import (
    Prompt,
    as_conversations,
    as_prompts,
    one_per_prompt,
)
from compiledllm.engine.request_state import OutputStream, RequestState
from compiledllm.engine.tokenizer import Tokenizer
from compiledllm.log import show_logs
from compiledllm.models.source import resolve_checkpoint
from compiledllm.outputs import (
    BeamSearchOutput,
    EmbeddingRequestOutput,
    PositionLogprobs,
    RequestOutput,
    ScoringRequestOutput,
)
from compiledllm.pooling_params import PoolingParams
from compiledllm.sampling_params import ALL_TOKENS, BeamSearchParams, SamplingParams

if TYPE_CHECKING:
    from tqdm import tqdm


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
        # These modules import torch, which takes seconds: importing the class must not.
        from compiledllm.engine.core import EngineCore
        from compiledllm.engine.requests import RequestFactory
        from compiledllm.engine.shared_core import SharedCore
        from compiledllm.engine.startup import plan

        show_logs()
        self.core = EngineCore(plan(EngineConfig.from_options(model=model, **options)))
        self.config = self.core.config
        self.tokenizer: Tokenizer | None = None
        if not self.config.requested.model.skip_tokenizer_init:
            other = self.config.requested.model.tokenizer
            self.tokenizer = Tokenizer(
                resolve_checkpoint(other, weights=False) if other else self.core.model_path
            )
        self._requests = RequestFactory(self.core.served_model(), self.tokenizer)
        self._shared = SharedCore(self.core)
        self._request_ids = itertools.count()

    @property
    def model_path(self) -> Path:
        """The checkpoint directory in use: config.json, safetensors, tokenizer files."""
        return self.core.model_path

    def get_tokenizer(self) -> Any:
        """The transformers tokenizer."""
        return self._requests.require_tokenizer("get_tokenizer()").hf

    # -- whole answers -------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Complete one or many prompts; the outputs are in the order of the prompts.

        sampling_params: one for all, or one per prompt. priority: one per prompt, lower first, with
        scheduling_policy="priority". All prompts are checked before any is run: a bad one raises
        ValueError and starts nothing.
        """
        states = self._make_states(
            as_prompts(prompts), sampling_params, priority, waits_for_batch=True
        )
        return self._run(states, _as_batch(states), use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or many, each a list of {"role": ..., "content": ...}.

        tools: passed to the chat template, in OpenAI's format; tool calls stay in the output's text
        as the model writes them.
        """
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
        return self.generate(prompts, sampling_params, use_tqdm)

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
        states = self._make_states(as_prompts(prompts), sampling_params, priority)
        self._shared.add(states)
        return OutputStream(self._stream(states), lambda: self._shared.abort(states))

    def stream_chat(
        self, messages: Sequence[Message], sampling_params: SamplingParams | None = None
    ) -> OutputStream:
        """`stream` for one conversation."""
        tokenizer = self._requests.require_tokenizer("stream_chat()")
        (conversation,) = as_conversations(messages)
        text, token_ids = tokenizer.encode_chat(conversation, add_generation_prompt=True)
        return self.stream({"prompt": text, "prompt_token_ids": token_ids}, sampling_params)

    def _stream(self, states: list[RequestState]) -> Generator[RequestOutput]:
        with self._aborting_on_exit(states):
            yield from self._shared.stream(states)

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
        request_id = self._next_request_id() if request_id is None else request_id
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
            factory.make_pooling(self._next_request_id(), *arguments)
            for arguments in zip(listed, params, priorities, strict=True)
        ]
        self._run(states, states, use_tqdm)
        return [
            embedding_output(state, factory.pooling, asked)
            for state, asked in zip(states, params, strict=True)
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
        states = [scorer.make(self._next_request_id(), prompt) for prompt in prompts]
        self._run(states, states, use_tqdm)
        return scoring_outputs(scorer, pairs, states)

    # -- searching -----------------------------------------------------------------------------

    def beam_search(
        self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams
    ) -> list[BeamSearchOutput]:
        """The likeliest continuations of each prompt, best first."""
        from compiledllm.engine.beam_search import beam_search

        return beam_search(self._requests, self.next_token_logprobs, as_prompts(prompts), params)

    def next_token_logprobs(
        self, prompts: list[list[int]], params: SamplingParams
    ) -> list[PositionLogprobs]:
        """Log probabilities of the first token after each prompt, not limited by `max_logprobs`."""
        states = [
            self._requests.make(self._next_request_id(), prompt, params, max_logprobs=ALL_TOKENS)
            for prompt in prompts
        ]
        outputs = [output.outputs[0] for output in self._run(states, states, use_tqdm=False)]
        return [output.logprobs[0] if output.logprobs else {} for output in outputs]

    # -- inside --------------------------------------------------------------------------------

    def _run(
        self, states: list[RequestState], queue: list[RequestState], use_tqdm: bool
    ) -> list[RequestOutput]:
        """Step until `states` are finished. queue: the same states, in the order to begin in."""
        with self._aborting_on_exit(states), _progress_bar(len(states), use_tqdm) as progress:
            self._shared.add(queue)
            self._shared.run_until_finished(states, progress.update)
            return [state.output() for state in states]

    def _make_states(
        self,
        prompts: list[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        priority: Sequence[int] | None,
        waits_for_batch: bool = False,
    ) -> list[RequestState]:
        if sampling_params is None:
            sampling_params = self._requests.defaults
        params = one_per_prompt(sampling_params, len(prompts), "sampling_params")
        priorities = one_per_prompt(0 if priority is None else priority, len(prompts), "priority")
        return [
            self._requests.make(
                self._next_request_id(), *arguments, waits_for_batch=waits_for_batch
            )
            for arguments in zip(prompts, params, priorities, strict=True)
        ]

    def _next_request_id(self) -> str:
        ids = map(str, self._request_ids)
        return next(request_id for request_id in ids if request_id not in self._shared.states)

    @contextlib.contextmanager
    def _aborting_on_exit(self, states: list[RequestState]) -> Iterator[None]:
        """End the requests if the block ends early (an error, Ctrl-C, a closed iterator)."""
        try:
            yield
        finally:
            self._shared.abort(states)


LLM = Engine  # vLLM's name


def _as_batch(states: list[RequestState]) -> list[RequestState]:
    """Let requests arrive together. Returns them, those with the most tokens to generate first."""
    arrival = min((state.arrival_time for state in states), default=0.0)
    for state in states:
        state.arrival_time = arrival

    def max_tokens(state: RequestState) -> float:
        is_open = state.params.max_tokens is None
        return math.inf if is_open else state.completions[0].spec.max_tokens

    return sorted(states, key=max_tokens, reverse=True)


def _progress_bar(total: int, enabled: bool) -> tqdm[Any]:
    from tqdm import tqdm

    disable = not enabled or not sys.stderr.isatty()
    return tqdm(total=total, desc="processed prompts", unit="prompt", disable=disable)
