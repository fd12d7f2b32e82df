"""The formats in which models write tool calls, and a grammar of calls in each format."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """A call is `open`, an object with "name" and `arguments_key`, then `close`.

    marks: a chat template that contains one of them, and none of `other_marks`, uses this format.
    is_bare: an answer may also begin with the object itself. id_length: length of a call's id, with
    "call_" in front if it is long; a few templates require nine letters and digits.
    """

    open: str
    close: str
    arguments_key: str
    marks: tuple[str, ...]
    other_marks: tuple[str, ...] = ()
    is_bare: bool = False
    id_length: int = 24


FORMATS = {
    "hermes": ToolFormat(
        "<tool_call>",
        "</tool_call>",
        "arguments",
        marks=("<tool_call>",),
        other_marks=("<function=", "<arg_key>"),  # calls written as XML
    ),
    "llama3_json": ToolFormat(
        "<|python_tag|>",
        "",
        "parameters",
        marks=("<|python_tag|>", '"parameters": dictionary of argument name'),
        is_bare=True,
    ),
    "mistral": ToolFormat("[TOOL_CALLS]", "", "arguments", marks=("[TOOL_CALLS]",), id_length=9),
}
"""Names of `--tool-call-parser`."""


# White space as chat templates and therefore models write it: `{"a": 1, "b": 2}`.
_AS_IN_TEMPLATES = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def find_format(name: str, chat_template: str) -> ToolFormat | None:
    """The format of a name, or for "auto" of the chat template; None if there is none."""
    if name == "none":
        return None
    if name != "auto":
        return FORMATS[name]
    for candidate in FORMATS.values():
        has = any(mark in chat_template for mark in candidate.marks)
        if has and not any(mark in chat_template for mark in candidate.other_marks):
            return candidate
    return None


def call_grammar(
    tool_format: ToolFormat,
    tools: Sequence[dict[str, Any]],
    token_id: Callable[[str], int | None],
    max_calls: int | None,
) -> str:
    """Rules of a Lark grammar in which `calls` is one or more calls of OpenAI's tool objects.

    token_id: the id of a marker that is a single token, else None.
    """
    names = range(len(tools))
    lines = [f"body: {' | '.join(f'tool_{i}' for i in names)}"]
    for i, tool in zip(names, tools, strict=True):
        head = f'{{"name": {json.dumps(tool["name"])}, "{tool_format.arguments_key}": '
        lines.append(f'tool_{i}: {_literal(head)} args_{i} "}}"')
        schema = (tool.get("parameters") or {"type": "object"}) | {"x-guidance": _AS_IN_TEMPLATES}
        lines.append(f"args_{i}: %json {json.dumps(schema)}")
    more = "" if max_calls == 1 else "*"
    return "\n".join([_calls(tool_format, token_id, more), *lines])


def _calls(tool_format: ToolFormat, token_id: Callable[[str], int | None], more: str) -> str:
    def marker(text: str) -> str:
        number = token_id(text)
        return _literal(text) if number is None else f"<[{number}]>"

    if tool_format is FORMATS["hermes"]:
        call = f'call: {marker(tool_format.open)} "\\n" body "\\n" {marker(tool_format.close)}'
        return "calls: call" + (' ("\\n" call)*' if more else "") + "\n" + call
    if tool_format is FORMATS["mistral"]:
        others = ' (", " body)*' if more else ""
        return f'calls: {marker(tool_format.open)} "[" body{others} "]"'
    return "calls: body" + (' ("; " body)*' if more else "")


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
