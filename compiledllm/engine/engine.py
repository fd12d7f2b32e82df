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
import operator
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from compiledllm.config import EngineConfig
from compiledllm.engine.core import EngineCore
from compiledllm.engine.detokenizer import Detokenizer
from compiledllm.engine.tokenizer import Message, Tokenizer
from compiledllm.log import show_logs
from compiledllm.models.registry import generation_eos_token_ids
from compiledllm.types import (
    CompletionOutput,
    Request,
    RequestMetrics,
    RequestOutput,
    SamplingParams,
)

# A prompt: text, token ids, {"prompt": text} or {"prompt_token_ids": ids}.
Prompt = str | Sequence[int] | Mapping[str, Any]
T = TypeVar("T")


class Engine:
    """An LLM on this machine.

    Engine(model=None, **options): `model` is a local directory, a .gguf file or a Hugging Face id;
    None is the embedded default, SmolLM2-135M-Instruct. The options are the fields of
    `compiledllm.config` and carry vLLM's names. Raises ConfigError for what cannot be had.

    Not thread-safe: use it from one thread.
    """

    def __init__(self, model: str | Path | None = None, **options: Any) -> None:
        show_logs()
        named = {"model": model, "tokenizer": options.pop("tokenizer", None)}
        paths = {name: str(path) for name, path in named.items() if path is not None}
        self.core = EngineCore(EngineConfig.from_options(**paths, **options))
        self.config = self.core.config
        self.tokenizer: Tokenizer | None = None
        if not self.config.model.skip_tokenizer_init:
            source = self.config.model.tokenizer or self.core.model_path
            self.tokenizer = Tokenizer(source, self.config.model.revision)
        self._eos_token_ids = self._find_eos_token_ids()
        self._states: dict[str, _RequestState] = {}
        self._request_ids = itertools.count()
        self._random = random.Random(self.config.model.seed)

    @property
    def model_path(self) -> Path:
        """The checkpoint directory in use: config.json, safetensors, tokenizer files."""
        return self.core.model_path

    def get_tokenizer(self) -> Any:
        """The transformers tokenizer."""
        return self._require_tokenizer("get_tokenizer()").hf

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
        states = self._add_all(_as_prompts(prompts), sampling_params, priority)
        with self._aborting_on_exit(states), _progress_bar(len(states), use_tqdm) as progress:
            unfinished = states
            while unfinished:
                self.step()
                still = [state for state in unfinished if not state.request.is_finished]
                progress.update(len(unfinished) - len(still))
                unfinished = still
            return [state.output() for state in states]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or many, each a list of {"role": ..., "content": ...}."""
        conversations = _as_conversations(messages)
        tokenizer = self._require_tokenizer("chat()")
        prompts = [
            tokenizer.encode_chat(
                conversation,
                chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **(chat_template_kwargs or {}),
            )
            for conversation in conversations
        ]
        return self.generate(prompts, sampling_params, use_tqdm)

    # -- token by token ------------------------------------------------------------------------

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        priority: Sequence[int] | None = None,
    ) -> Iterator[RequestOutput]:
        """Yield each request's cumulative output whenever it grows, the finished one last.

        Bad prompts raise at once, before the first item is asked for. Closing the iterator aborts
        what is not finished.
        """
        states = self._add_all(_as_prompts(prompts), sampling_params, priority)
        return self._stream(states)

    def stream_chat(
        self, messages: Sequence[Message], sampling_params: SamplingParams | None = None
    ) -> Iterator[RequestOutput]:
        """`stream` for one conversation."""
        tokenizer = self._require_tokenizer("stream_chat()")
        return self.stream(
            tokenizer.encode_chat(messages, add_generation_prompt=True), sampling_params
        )

    def _stream(self, states: list[_RequestState]) -> Iterator[RequestOutput]:
        with self._aborting_on_exit(states):
            shown = [0] * len(states)  # output tokens the caller has seen
            while any(count >= 0 for count in shown):
                self.step()
                for index, state in enumerate(states):
                    count = state.request.num_output_tokens
                    if shown[index] < 0 or (
                        count == shown[index] and not state.request.is_finished
                    ):
                        continue
                    shown[index] = -1 if state.request.is_finished else count
                    yield state.output()

    # -- one step at a time --------------------------------------------------------------------

    def add_request(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        priority: int = 0,
    ) -> str:
        """Queue one request for `step`; returns its id. Raises ValueError for a bad one."""
        state = self._make_state(prompt, sampling_params or SamplingParams(), priority, request_id)
        self._add(state)
        return state.request.request_id

    def abort_request(self, request_id: str) -> None:
        """End a request; its output so far gets finish_reason "abort". Unknown ids are ignored."""
        self.core.finish(request_id, "abort")
        self._states.pop(request_id, None)

    def has_unfinished_requests(self) -> bool:
        return self.core.has_unfinished()

    def step(self) -> list[RequestOutput]:
        """One engine step. Returns the outputs of requests that grew."""
        if not self.core.has_unfinished():
            return []
        advanced = []
        for request in self.core.step():
            state = self._states[request.request_id]
            stop = state.push_last_token()
            if stop is not None:
                self._stop_at_string(request, stop)
            advanced.append(state)
            if request.is_finished:
                del self._states[request.request_id]
        self.core.check_when_idle()
        return [state.output() for state in advanced]

    # -- inside --------------------------------------------------------------------------------

    def _stop_at_string(self, request: Request, stop: str) -> None:
        if request.is_finished:  # by this very token; the string came first in the text
            request.finish_reason, request.stop_reason = "stop", stop
        else:
            self.core.finish(request.request_id, "stop", stop)

    def _add_all(
        self,
        prompts: list[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        priority: Sequence[int] | None,
    ) -> list[_RequestState]:
        params = _one_per_prompt(sampling_params or SamplingParams(), len(prompts), "params")
        priorities = _one_per_prompt(priority or 0, len(prompts), "priority")
        states = [
            self._make_state(*arguments)
            for arguments in zip(prompts, params, priorities, strict=True)
        ]
        added: list[_RequestState] = []
        try:
            for state in states:
                self._add(state)
                added.append(state)
        except ValueError:
            self._abort(added)
            raise
        return states

    def _add(self, state: _RequestState) -> None:
        self.core.add(state.request)
        self._states[state.request.request_id] = state

    def _make_state(
        self,
        prompt: Prompt,
        params: SamplingParams,
        priority: int = 0,
        request_id: str | None = None,
    ) -> _RequestState:
        if not isinstance(params, SamplingParams):
            raise ValueError(f"sampling_params must be SamplingParams, got {params!r}")
        params = dataclasses.replace(params)  # checked again, and no longer the caller's to change
        text, token_ids = self._tokenize(prompt)
        self._check_prompt(token_ids)
        self._check_stop_token_ids(params)
        assert self.config.model.max_model_len is not None
        room = self.config.model.max_model_len - len(token_ids)
        slots = self.core.scheduler.block_pool.num_blocks * self.config.cache.block_size
        fits = max(slots - len(token_ids) + 1, 1)
        request = Request(
            request_id=str(next(self._request_ids)) if request_id is None else request_id,
            prompt_token_ids=token_ids,
            sampling_params=params,
            max_tokens=min(room, params.max_tokens if params.max_tokens is not None else fits),
            stop_token_ids=frozenset(params.stop_token_ids or ())
            | (frozenset() if params.ignore_eos else self._eos_token_ids),
            seed=self._random.getrandbits(63) if params.seed is None else params.seed,
            priority=priority,
            prompt=text,
        )
        return _RequestState(request, self.tokenizer)

    def _tokenize(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, Mapping):
            if "prompt_token_ids" in prompt:
                return prompt.get("prompt"), _as_token_ids(prompt["prompt_token_ids"])
            if "prompt" not in prompt:
                raise ValueError(
                    "a prompt dict needs 'prompt' (text) or 'prompt_token_ids', "
                    f"got keys {sorted(map(str, prompt))}"
                )
            prompt = prompt["prompt"]
        if isinstance(prompt, str):
            return prompt, self._require_tokenizer("a text prompt").encode(prompt)
        return None, _as_token_ids(prompt)

    def _check_prompt(self, token_ids: list[int]) -> None:
        if not token_ids:
            raise ValueError("the prompt is empty; give at least one token")
        vocab_size, max_len = self.core.spec.vocab_size, self.config.model.max_model_len
        for index, token_id in enumerate(token_ids):
            if not 0 <= token_id < vocab_size:
                raise ValueError(
                    f"token id {token_id} at position {index} of the prompt is out of range; "
                    f"the vocabulary has ids 0 to {vocab_size - 1}"
                )
        assert max_len is not None
        if len(token_ids) >= max_len:
            raise ValueError(
                f"the prompt has {len(token_ids)} tokens and max_model_len={max_len} leaves room "
                f"for {max_len - 1} (and one to generate); shorten it or raise max_model_len"
            )

    def _check_stop_token_ids(self, params: SamplingParams) -> None:
        vocab_size = self.core.spec.vocab_size
        for token_id in params.stop_token_ids or ():
            if token_id >= vocab_size:
                raise ValueError(
                    f"stop_token_ids has {token_id}; the vocabulary has ids 0 to {vocab_size - 1}"
                )

    def _find_eos_token_ids(self) -> frozenset[int]:
        """As transformers' generate: generation_config, else config; and the tokenizer's own."""
        ids = generation_eos_token_ids(self.core.model_path) or self.core.spec.eos_token_ids
        own = self.tokenizer.eos_token_id if self.tokenizer else None
        known = frozenset(ids) | (frozenset() if own is None else frozenset((own,)))
        return frozenset(i for i in known if i < self.core.spec.vocab_size)

    def _require_tokenizer(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError(
                f"{what} needs a tokenizer, but skip_tokenizer_init=True; pass "
                '{"prompt_token_ids": [...]} instead'
            )
        return self.tokenizer

    @contextlib.contextmanager
    def _aborting_on_exit(self, states: list[_RequestState]) -> Iterator[None]:
        """Whatever ends the block early (an error, Ctrl-C, a closed iterator) ends its requests."""
        try:
            yield
        finally:
            self._abort(states)

    def _abort(self, states: list[_RequestState]) -> None:
        for state in states:
            if not state.request.is_finished:
                self.abort_request(state.request.request_id)
            self._states.pop(state.request.request_id, None)


LLM = Engine  # vLLM's name for it


class _RequestState:
    """A live request as its caller sees it: the request and its text."""

    def __init__(self, request: Request, tokenizer: Tokenizer | None) -> None:
        self.request = request
        params = request.sampling_params
        stream = None
        if tokenizer is not None and params.detokenize:
            stream = tokenizer.stream(request.prompt_token_ids, params.skip_special_tokens)
        elif params.stop_strings:
            raise ValueError("stop strings need a tokenizer; use stop_token_ids instead")
        self._detokenizer = Detokenizer(stream, params)
        self._last_token_time = request.arrival_time

    def push_last_token(self) -> str | None:
        """Take over the newest token; returns the stop string it completed, if any."""
        request = self.request
        self._last_token_time = time.monotonic()
        if request.first_token_time is None:
            request.first_token_time = self._last_token_time
        token_id = request.token_ids[-1]
        ended_by_token = request.finish_reason == "stop" and token_id in request.stop_token_ids
        hidden = ended_by_token and not request.sampling_params.include_stop_str_in_output
        return self._detokenizer.push(token_id, hidden)

    def output(self) -> RequestOutput:
        """The state now."""
        request = self.request
        completion = CompletionOutput(
            index=0,
            text=self._detokenizer.visible_text(request.is_finished),
            token_ids=request.output_token_ids,
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
        )
        return RequestOutput(
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=request.prompt_token_ids,
            outputs=[completion],
            finished=request.is_finished,
            num_cached_tokens=max(request.num_cached_tokens, 0),
            metrics=RequestMetrics(
                request.arrival_time, request.first_token_time, self._last_token_time
            ),
        )


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many, as a list; a flat list of integers is one prompt."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    items = list(prompts)
    if items and all(hasattr(item, "__index__") for item in items):
        return [items]  # type: ignore[list-item]
    return items  # type: ignore[return-value]


def _as_token_ids(ids: Any) -> list[int]:
    try:
        return [operator.index(token_id) for token_id in ids]
    except TypeError:
        raise ValueError(
            f"a prompt must be text, token ids or a dict of them, got {ids!r:.80}"
        ) from None


def _as_conversations(messages: Sequence[Any]) -> list[Sequence[Message]]:
    conversations = [messages] if messages and isinstance(messages[0], Mapping) else list(messages)
    for conversation in conversations:
        if not conversation or not all(
            isinstance(message, Mapping) and "role" in message for message in conversation
        ):
            raise ValueError(
                "a conversation must be a non-empty list of {'role': ..., 'content': ...}, got "
                f"{conversation!r:.120}"
            )
    return conversations


def _one_per_prompt(value: T | Sequence[T], count: int, what: str) -> list[T]:
    if not isinstance(value, Sequence):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{what} has {len(value)} entries for {count} prompts; give one for each")
    return list(value)


def _progress_bar(total: int, enabled: bool) -> tqdm[Any]:
    disable = not enabled or not sys.stderr.isatty()
    return tqdm(total=total, desc="processed prompts", unit="prompt", disable=disable)
