"""Checks a chat request's tools and derives the call format, the grammar and the call limit."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from compiledllm.engine.tokenizer import Tokenizer
from compiledllm.server.openai.call_grammars import answer_rule, call_grammar
from compiledllm.server.openai.errors import ApiError
from compiledllm.server.openai.protocol import ChatRequest, Message
from compiledllm.server.openai.tool_formats import FORMATS, ToolFormat, find_format
from compiledllm.server.openai.tool_protocol import NamedTool, Tool
from compiledllm.structured_outputs import (
    MAX_NESTING,
    StructuredOutputsParams,
    is_nested_deeper,
)

MAX_TOOLS_BYTES = 2**18  # of the JSON of all tools together


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools that an answer may or must call.

    names: the functions' names, each with the schema of its arguments or None. tools: as the chat
    template gets them. structured_outputs: the grammar of the answer; None: free text. max_calls:
    None: any number.
    """

    format: ToolFormat
    names: dict[str, Any]
    tools: list[dict[str, Any]]
    structured_outputs: StructuredOutputsParams | None
    max_calls: int | None

    def new_call_id(self) -> str:
        number, length = uuid.uuid4().hex, self.format.id_length
        return number[:length] if length < len(number) // 2 else f"call_{number[:length]}"


def tool_use(
    body: ChatRequest, parser: str, tokenizer: Tokenizer, schema: dict[str, Any] | None = None
) -> ToolUse | None:
    """The request's use of tools; None if there are no tools to call. Raises ApiError.

    parser: the value of `--tool-call-parser`. schema: of an answer without calls; None: any text.
    """
    choice = body.tool_choice
    if not body.tools:
        if choice not in (None, "none", "auto"):
            raise ApiError(400, "tool_choice needs tools: give some or leave it out", "tool_choice")
        return None
    _check(body.tools)
    if choice == "none":
        return None
    chosen = _chosen(body.tools, choice)
    plain = [tool.plain() for tool in body.tools]
    functions = [tool["function"] for tool in plain if tool["function"]["name"] in chosen]
    is_named = isinstance(choice, NamedTool)
    tool_format = _find_format(parser, tokenizer)
    max_calls = 1 if is_named or body.parallel_tool_calls is False else None
    start = None
    if is_named or choice == "required":
        start = "start: calls"
    elif schema is not None:
        before = "final " if tool_format.syntax == "channels" else ""
        start = f"start: calls | {before}answer\n{answer_rule(schema)}"
    structured_outputs = None
    if start is not None:
        structured_outputs = _grammar_params(
            lambda: (
                f"{start}\n" + call_grammar(tool_format, functions, tokenizer.token_id, max_calls)
            )
        )
    names = {tool.function.name: tool.function.parameters for tool in body.tools}
    return ToolUse(tool_format, names, plain, structured_outputs, max_calls)


def _chosen(tools: list[Tool], choice: object) -> list[str]:
    """The names of the tools that may be called."""
    names = [tool.function.name for tool in tools]
    if not isinstance(choice, NamedTool):
        return names
    name = choice.function.name
    if name not in names:
        raise ApiError(
            400, f"tool_choice names '{name}'; the tools are {', '.join(names)}", "tool_choice"
        )
    return [name]


def _check(tools: list[Tool]) -> None:
    names = [tool.function.name for tool in tools]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ApiError(400, f"tools has '{twice}' twice; give each a name of its own", "tools")
    size = 0
    for tool in tools:
        if is_nested_deeper(tool.function.parameters, MAX_NESTING):
            raise ApiError(
                400,
                f"the parameters of '{tool.function.name}' must be nested at most {MAX_NESTING} "
                "deep; use $ref",
                "tools",
            )
        size += len(json.dumps(tool.plain()).encode())
    if size > MAX_TOOLS_BYTES:
        raise ApiError(
            400, f"tools must be at most {MAX_TOOLS_BYTES} bytes of JSON, got {size}", "tools"
        )


def _find_format(parser: str, tokenizer: Tokenizer) -> ToolFormat:
    template = tokenizer.chat_template_text
    if "tools" not in template:
        raise ApiError(
            400,
            "this model's chat template knows no tools; leave them out, or set tool_choice to "
            "'none'",
            "tools",
        )
    found = find_format(parser, template)
    if found is None:
        raise ApiError(
            400,
            "the format of this model's tool calls is not known; start the server with "
            f"--tool-call-parser and one of {', '.join(FORMATS)}",
            "tools",
        )
    return found


def _grammar_params(make: Callable[[], str]) -> StructuredOutputsParams:
    try:
        return StructuredOutputsParams(grammar=make())
    except ValueError as error:
        raise ApiError(400, f"tools with this tool_choice: {error}", "tools") from None


def plain_message(message: Message) -> dict[str, Any]:
    """A message as the client sent it; `Tokenizer.encode_chat` adapts it to chat templates."""
    plain = message.plain()
    plain.setdefault("content", None)  # null and a missing field are the same here
    return plain
