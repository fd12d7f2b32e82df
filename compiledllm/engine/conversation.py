"""Brings conversations into a form in which a chat template shows every word.

Clients send content as a string or as a list of text parts; chat templates read strings, lists, or
both, and content in an unexpected form often vanishes without an error. Rendering marked words
reveals which forms a template shows. Knows no tokenizer, only a function `render`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compiledllm.log import log

Message = dict[str, Any]
Part = dict[str, str]
Render = Callable[[list[Message]], str]

# Type of a content part -> key of its text. Every part reaches the template with type "text".
_TEXT_KEYS = {"text": "text", "input_text": "text", "output_text": "text"}
_TEXT_KEYS |= {"refusal": "refusal", "thinking": "thinking"}
# Fields of an answer that clients send back and no template reads.
_FIELDS_OF_ANSWERS = {"refusal", "audio", "annotations", "function_call"}
_CALL_ID = "function1"  # id for calls without one; some templates demand nine letters and digits


# -- messages --------------------------------------------------------------------------------------


def plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Messages as chat templates expect them, whichever client wrote them.

    Null fields and empty lists of tool calls are removed. Content becomes a string or a list of its
    parts' texts; null becomes "". The arguments of a tool call become an object. Raises ValueError
    for a malformed message.
    """
    return [_plain_message(message) for message in messages]


def _plain_message(message: Mapping[str, Any]) -> Message:
    role = message.get("role")
    if not isinstance(role, str):
        raise ValueError(f"a message's role must be a string, got {role!r:.80}")
    plain = {
        name: value
        for name, value in message.items()
        if value is not None and name not in _FIELDS_OF_ANSWERS
    }
    plain["content"] = _plain_content(message)
    calls = message.get("tool_calls") or _legacy_calls(message)
    plain.pop("tool_calls", None)
    if calls:
        plain["tool_calls"] = _plain_calls(calls)
    if role == "assistant":
        plain |= _reasoning(plain)
    if role == "function":  # the result of a legacy function_call
        plain |= {"role": "tool", "tool_call_id": _CALL_ID}
    return plain


def _plain_content(message: Mapping[str, Any]) -> str | list[str]:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return [_text(part) for part in content]
    if content is None and ("content" in message or message["role"] == "assistant"):
        refusal = message.get("refusal")
        return refusal if isinstance(refusal, str) else ""
    raise ValueError(
        f"a message's content must be a string or a list of text parts, got {content!r:.80}"
    )


def _text(part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, Mapping) else None
    key = _TEXT_KEYS.get(kind) if isinstance(kind, str) else None
    text = part.get(key) if key else None
    if not isinstance(text, str):
        raise ValueError(
            "a message's content must be a string or a list of text parts "
            f'{{"type": "text", "text": "..."}}, got the part {part!r:.80}'
        )
    return text


def _legacy_calls(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The call of OpenAI's deprecated `function_call` field."""
    function = message.get("function_call")
    if not isinstance(function, Mapping):
        return []
    return [{"id": _CALL_ID, "type": "function", "function": function}]


def _plain_calls(calls: Any) -> list[dict[str, Any]]:
    if not isinstance(calls, Sequence) or not all(isinstance(call, Mapping) for call in calls):
        raise ValueError(f"a message's tool_calls must be a list of objects, got {calls!r:.80}")
    plain = []
    for call in calls:
        function = call.get("function")
        if isinstance(function, Mapping):
            arguments = plain_arguments(function.get("arguments"))
            function = {**function, "arguments": arguments}
            call = {"type": "function", **call, "function": function}
        plain.append(dict(call))
    return plain


def plain_arguments(arguments: Any) -> dict[str, Any]:
    """The arguments of an earlier call as an object; {} for anything else, as in vLLM.

    Templates iterate over arguments, and a call that was cut off must not fail all later turns.
    """
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return {}
    return dict(arguments) if isinstance(arguments, Mapping) else {}


def _reasoning(message: Message) -> Message:
    """An answer's reasoning, under both names that templates read."""
    found = message.get("reasoning_content", message.get("reasoning"))
    return {"reasoning": found, "reasoning_content": found} if isinstance(found, str) else {}


# -- the form of content ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ContentForms:
    """Which forms of content a template shows in full: a string, one text part, several parts."""

    text: bool
    part: bool
    parts: bool

    @property
    def shows_none(self) -> bool:
        return not (self.text or self.part or self.parts)

    def fit(self, content: str | list[str]) -> str | list[Part]:
        """The content as given if the template shows its form, else in a form that it shows.

        Several parts that become one string are joined by line breaks.
        """
        if isinstance(content, list):
            if self.part if len(content) == 1 else self.parts:
                return [_part(text) for text in content]
            content = "\n".join(content)
        return content if self.text or not self.part else [_part(content)]


class TemplateForms:
    """The forms of content that one chat template shows, for each role."""

    def __init__(self, render: Render) -> None:
        self._render = render
        self._by_role: dict[str, ContentForms] = {}

    def fit(self, messages: list[Message]) -> list[Message]:
        """`plain_messages` with content in forms that the template shows."""
        return [
            {**message, "content": self.of(message["role"]).fit(message["content"])}
            for message in messages
        ]

    def of(self, role: str) -> ContentForms:
        """The forms for a role; a role that is unknown or fails in the template uses "user"'s."""
        if role not in _CONVERSATIONS:
            role = "user"
        if role not in self._by_role:
            self._by_role[role] = self._find(role)
        return self._by_role[role]

    def _find(self, role: str) -> ContentForms:
        shown = [self._shows(role, content) for content in (_MARKS[0], _MARKS[:1], _MARKS)]
        if shown == [None, None, None]:
            return ContentForms(True, False, False) if role == "user" else self.of("user")
        forms = ContentForms(*map(bool, shown))
        if forms.shows_none and role != "user":
            log.warning("the chat template leaves out what messages of role '%s' say", role)
        return forms

    def _shows(self, role: str, content: str | list[str]) -> bool | None:
        """Whether the template shows the words of `content` unchanged; None if it fails."""
        marked = content if isinstance(content, str) else [_part(text) for text in content]
        other = "x" if role == "user" else self.of("user").fit("x")
        try:
            text = self._render(_CONVERSATIONS[role](marked, other))
        except Exception:  # a template may raise any kind of error
            return None
        marks = [content] if isinstance(content, str) else content
        return all(mark in text for mark in marks) and not _AS_DATA.search(text)


def _part(text: str) -> Part:
    return {"type": "text", "text": text}


_MARKS = ["markedwordone", "markedwordtwo"]
# A list of parts printed as data, in Python's or JSON's notation.
_AS_DATA = re.compile(rf"""text\\?["']\s*:\s*\\?["'](?:{"|".join(_MARKS)})""")

_CALL = {"id": _CALL_ID, "type": "function", "function": {"name": "f", "arguments": {}}}


def _user(content: Any) -> Message:
    return {"role": "user", "content": content}


# Short conversations that most templates accept, by the role of the message with the marked words.
_CONVERSATIONS: dict[str, Callable[[Any, Any], list[Message]]] = {
    "user": lambda marked, other: [_user(marked)],
    "system": lambda marked, other: [{"role": "system", "content": marked}, _user(other)],
    "developer": lambda marked, other: [{"role": "developer", "content": marked}, _user(other)],
    "assistant": lambda marked, other: [
        _user(other),
        {"role": "assistant", "content": marked},
        _user(other),
    ],
    "tool": lambda marked, other: [
        _user(other),
        {"role": "assistant", "content": "", "tool_calls": [_CALL]},
        {"role": "tool", "content": marked, "name": "f", "tool_call_id": _CALL_ID},
    ],
}
