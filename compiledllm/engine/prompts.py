"""The forms in which callers give prompts, conversations and per-prompt arguments."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NotRequired, TypedDict, TypeVar

from compiledllm.engine.conversation import Message


class TextPrompt(TypedDict):
    """A prompt as text. cache_salt: only requests with the same salt share cached prefixes."""

    prompt: str
    cache_salt: NotRequired[str]


class TokensPrompt(TypedDict):
    """A prompt as token ids; prompt: its text, which is only shown."""

    prompt_token_ids: list[int]
    prompt: NotRequired[str]
    cache_salt: NotRequired[str]


# A prompt: text, token ids, {"prompt": text} or {"prompt_token_ids": ids}.
Prompt = str | Sequence[int] | Mapping[str, Any]
PROMPT_KEYS = ("prompt", "prompt_token_ids", "cache_salt")  # of a dict
T = TypeVar("T")


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many, as a list; a flat list of integers is one prompt."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if isinstance(prompts, (bytes, set, frozenset)) or not isinstance(prompts, Iterable):
        raise ValueError(f"prompts must be text, token ids, a dict or a list of them: {prompts!r}")
    items = list(prompts)
    if items and all(hasattr(item, "__index__") for item in items):
        return [items]  # type: ignore[list-item]
    return items  # type: ignore[return-value]


def as_token_ids(ids: Any) -> list[int]:
    try:
        if isinstance(ids, (bytes, set, frozenset, Mapping)):
            raise TypeError
        return list(map(operator.index, ids))
    except TypeError:
        raise ValueError(
            f"a prompt must be text, token ids or a dict of them, got {ids!r:.80}"
        ) from None


def as_conversations(messages: Any) -> list[Sequence[Message]]:
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise ValueError(f"messages must be a list of {{'role', 'content'}}, got {messages!r:.80}")
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


def one_per_prompt(value: T | Sequence[T], count: int, what: str) -> list[T]:
    if not isinstance(value, Sequence):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{what} has {len(value)} entries for {count} prompts; give one for each")
    return list(value)
