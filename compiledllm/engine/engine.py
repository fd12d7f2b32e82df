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
import random
import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from compiledllm.config import EngineConfig
from compiledllm.engine.core import EngineCore
from compiledllm.engine.interrupts import deferred_interrupt
from compiledllm.engine.prompts import (
    Prompt,
    as_conversations,
    as_prompts,
    as_token_ids,
    one_per_prompt,
)
from compiledllm.engine.request_state import OutputStream, RequestState
from compiledllm.engine.tokenizer import Message, Tokenizer
from compiledllm.log import show_logs
from compiledllm.models.registry import generation_eos_token_ids
from compiledllm.models.source import resolve_checkpoint
from compiledllm.types import (
    Request,
    RequestOutput,
    SamplingParams,
)


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
            other = self.config.model.tokenizer
            self.tokenizer = Tokenizer(
                resolve_checkpoint(other, weights=False) if other else self.core.model_path
            )
        self._eos_token_ids = self._find_eos_token_ids()
        self._states: dict[str, RequestState] = {}
        self._unseen: dict[str, RequestState] = {}  # grew for `step`, in somebody else's step
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
        states = self._add_all(as_prompts(prompts), sampling_params, priority)
        with self._aborting_on_exit(states), _progress_bar(len(states), use_tqdm) as progress:
            unfinished = states
            while unfinished:
                self._advance()
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
        conversations = as_conversations(messages)
        tokenizer = self._require_tokenizer("chat()")
        prompts = []
        for conversation in conversations:
            text, token_ids = tokenizer.encode_chat(
                conversation,
                chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **(chat_template_kwargs or {}),
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
        """Iterate over each request's cumulative output whenever it grows, the finished one last.

        Bad prompts raise at once, before the first item is asked for. Closing the iterator aborts
        what is not finished.
        """
        states = self._add_all(as_prompts(prompts), sampling_params, priority)
        return OutputStream(self._stream(states), lambda: self._abort(states))

    def stream_chat(
        self, messages: Sequence[Message], sampling_params: SamplingParams | None = None
    ) -> OutputStream:
        """`stream` for one conversation."""
        tokenizer = self._require_tokenizer("stream_chat()")
        (conversation,) = as_conversations(messages)
        text, token_ids = tokenizer.encode_chat(conversation, add_generation_prompt=True)
        return self.stream({"prompt": text, "prompt_token_ids": token_ids}, sampling_params)

    def _stream(self, states: list[RequestState]) -> Generator[RequestOutput]:
        with self._aborting_on_exit(states):
            shown = [0] * len(states)  # output tokens the caller has seen
            while any(count >= 0 for count in shown):
                self._advance()
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
        params = SamplingParams() if sampling_params is None else sampling_params
        state = self._make_state(prompt, params, priority, request_id)
        state.is_for_step = True
        self._add(state)
        return state.request.request_id

    def abort_request(self, request_id: str) -> None:
        """End a request added by `add_request`. Unknown ids are ignored."""
        with deferred_interrupt():
            self.core.finish(request_id, "abort")
            self._states.pop(request_id, None)
            self._unseen.pop(request_id, None)

    def has_unfinished_requests(self) -> bool:
        """Whether `step` has more to return."""
        return self.core.has_unfinished() or bool(self._unseen)

    def step(self) -> list[RequestOutput]:
        """One engine step. Returns the outputs of `add_request`'s requests that grew."""
        if self.core.has_unfinished():
            self._advance()
        unseen, self._unseen = self._unseen, {}
        return [state.output() for state in unseen.values()]

    def get_default_sampling_params(self) -> SamplingParams:
        """The parameters of a request that names none."""
        return SamplingParams()

    # -- inside --------------------------------------------------------------------------------

    def _advance(self) -> None:
        """One engine step, its texts included."""
        with deferred_interrupt():
            try:
                advanced = self.core.step()
            except Exception:
                self._book([s for s in self._states.values() if s.request.is_finished])
                raise
            states = [self._states[request.request_id] for request in advanced]
            for state in states:
                stop = state.push_last_token()
                if stop is not None:
                    self._stop_at_string(state.request, stop)
            self._book(states)
            self.core.check_when_idle()

    def _book(self, states: list[RequestState]) -> None:
        """Remember what `step` has to show, and forget who is finished."""
        for state in states:
            request_id = state.request.request_id
            if state.is_for_step:
                self._unseen[request_id] = state
            if state.request.is_finished:
                del self._states[request_id]

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
    ) -> list[RequestState]:
        if sampling_params is None:
            sampling_params = SamplingParams()
        params = one_per_prompt(sampling_params, len(prompts), "sampling_params")
        priorities = one_per_prompt(0 if priority is None else priority, len(prompts), "priority")
        states = [
            self._make_state(*arguments)
            for arguments in zip(prompts, params, priorities, strict=True)
        ]
        try:
            for state in states:
                self._add(state)
        except BaseException:
            self._abort(states)
            raise
        return states

    def _add(self, state: RequestState) -> None:
        with deferred_interrupt():
            self.core.add(state.request)
            self._states[state.request.request_id] = state

    def _make_state(
        self,
        prompt: Prompt,
        params: SamplingParams,
        priority: int = 0,
        request_id: str | None = None,
    ) -> RequestState:
        if not isinstance(params, SamplingParams):
            raise ValueError(f"sampling_params must be SamplingParams, got {params!r}")
        self._check_priority(priority)
        params = dataclasses.replace(params)  # checked again, and no longer the caller's to change
        text, token_ids = self._tokenize(prompt)
        self._check_prompt(token_ids)
        self._check_stop_token_ids(params)
        assert self.config.model.max_model_len is not None
        room = self.config.model.max_model_len - len(token_ids)
        slots = self.core.scheduler.block_pool.num_blocks * self.config.cache.block_size
        fits = max(slots - len(token_ids) + 1, 1)
        request = Request(
            request_id=self._next_request_id() if request_id is None else request_id,
            prompt_token_ids=token_ids,
            sampling_params=params,
            max_tokens=min(room, params.max_tokens if params.max_tokens is not None else fits),
            stop_token_ids=frozenset(params.stop_token_ids or ())
            | (frozenset() if params.ignore_eos else self._eos_token_ids),
            seed=self._random.getrandbits(63) if params.seed is None else params.seed,
            priority=priority,
            prompt=text,
        )
        return RequestState(request, self.tokenizer)

    def _next_request_id(self) -> str:
        ids = map(str, self._request_ids)
        return next(request_id for request_id in ids if request_id not in self._states)

    def _check_priority(self, priority: int) -> None:
        if not isinstance(priority, int) or isinstance(priority, bool):
            raise ValueError(f"priority must be an integer, got {priority!r}")
        if priority and self.config.scheduler.scheduling_policy != "priority":
            raise ValueError(
                f"priority={priority} has no effect with scheduling_policy="
                f"'{self.config.scheduler.scheduling_policy}'; use scheduling_policy='priority'"
            )

    def _tokenize(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, Mapping):
            if not prompt or set(prompt) - {"prompt", "prompt_token_ids"}:
                raise ValueError(
                    "a prompt dict takes 'prompt' (text) or 'prompt_token_ids', "
                    f"got keys {sorted(map(str, prompt))}"
                )
            if "prompt_token_ids" in prompt:
                return prompt.get("prompt"), as_token_ids(prompt["prompt_token_ids"])
            prompt = prompt["prompt"]
        if isinstance(prompt, str):
            return prompt, self._require_tokenizer("a text prompt").encode(prompt)
        return None, as_token_ids(prompt)

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
    def _aborting_on_exit(self, states: list[RequestState]) -> Iterator[None]:
        """Whatever ends the block early (an error, Ctrl-C, a closed iterator) ends its requests."""
        try:
            yield
        finally:
            self._abort(states)

    def _abort(self, states: list[RequestState]) -> None:
        for state in states:
            if self._states.get(state.request.request_id) is state:
                self.abort_request(state.request.request_id)


LLM = Engine  # vLLM's name for it


def _progress_bar(total: int, enabled: bool) -> tqdm[Any]:
    disable = not enabled or not sys.stderr.isatty()
    return tqdm(total=total, desc="processed prompts", unit="prompt", disable=disable)
