"""Translates a body of the Responses API to a chat request."""

from __future__ import annotations

from typing import Any

from compiledllm.server.openai.errors import ApiError
from compiledllm.server.openai.protocol import (
    ChatRequest,
    JsonSchema,
    Message,
    Part,
    ResponseFormat,
)
from compiledllm.server.openai.responses_protocol import (
    Content,
    ResponseItem,
    ResponsesRequest,
    ResponseTool,
)
from compiledllm.server.openai.tool_protocol import (
    CalledFunction,
    Function,
    FunctionChoice,
    NamedTool,
    Tool,
    ToolCall,
)

LOGPROBS = "message.output_text.logprobs"  # the member of `include` that asks for them
_TEXT_PARTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")
# Calls of tools that ran at OpenAI: a model of this server has no use for them.
_HOSTED_CALLS = {"web_search_call", "file_search_call", "code_interpreter_call"}
_HOSTED_CALLS |= {"image_generation_call", "mcp_list_tools", "mcp_call"}
# Fields that chat requests have, too.
_SAME = {"temperature", "top_p", "top_k", "min_p", "seed", "chat_template_kwargs"}
_SAME |= {"frequency_penalty", "presence_penalty", "repetition_penalty", "parallel_tool_calls"}
# Fields that this server cannot follow -> what to do instead.
_REFUSED = {
    "conversation": "send the whole conversation in input",
    "background": "leave it out, and read the answer as a stream if it takes long",
    "prompt": "send the text itself in instructions and input",
}


def input_items(body: ResponsesRequest) -> list[ResponseItem]:
    if isinstance(body.input, str):
        return [ResponseItem(role="user", content=body.input)]
    return body.input


def chat_request(
    body: ResponsesRequest, earlier: list[ResponseItem], ignored: list[str]
) -> ChatRequest:
    """The chat request. Adds the fields that have no effect to `ignored`. Raises ApiError.

    earlier: the items of the conversation before those of the body.
    """
    for name, way_out in _REFUSED.items():
        if getattr(body, name):
            raise ApiError(400, f"{name} is not supported; {way_out}", name)
    ignored += _without_effect(body)
    fields = {name: getattr(body, name) for name in _SAME}
    if LOGPROBS in (body.include or []) or body.top_logprobs:
        fields |= {"logprobs": True, "top_logprobs": body.top_logprobs}
    return ChatRequest(
        model=body.model,
        stream=body.stream,
        messages=_messages(body, earlier),
        max_completion_tokens=body.max_output_tokens,
        reasoning_effort=body.reasoning.effort if body.reasoning else None,
        response_format=_response_format(body),
        **(fields | _tools(body, ignored)),
    )


def _without_effect(body: ResponsesRequest) -> list[str]:
    """The names of the fields that ask for something this server does not do."""
    found = [f"include:{name}" for name in body.include or [] if name != LOGPROBS]
    for i, item in enumerate(input_items(body)):
        if item.type in _HOSTED_CALLS:
            found.append(f"input.{i}:{item.type}")
    if body.text and body.text.verbosity not in (None, "medium"):
        found.append("text.verbosity")
    if body.truncation == "auto":
        found.append("truncation")
    return found + (["max_tool_calls"] if body.max_tool_calls else [])


# -- messages --------------------------------------------------------------------------------------


def _messages(body: ResponsesRequest, earlier: list[ResponseItem]) -> list[Message]:
    made = _Messages()
    if body.instructions:
        made.add_message("system", body.instructions)
    for item in earlier:
        _add_item(made, item, "previous_response_id")
    for i, item in enumerate(input_items(body)):
        _add_item(made, item, f"input.{i}")
    return made.messages


def _add_item(made: _Messages, item: ResponseItem, where: str) -> None:
    if item.type == "message":
        role = _required(item, "role", where)
        content = _content(_required(item, "content", where), f"{where}.content")
        made.add_message("system" if role == "developer" else role, content)
    elif item.type == "reasoning":
        name = "content" if item.content else "summary"
        made.add_reasoning(_joined(_content(getattr(item, name) or "", f"{where}.{name}")))
    elif item.type == "function_call":
        name, arguments = _required(item, "name", where), _required(item, "arguments", where)
        function = CalledFunction(name=name, arguments=arguments)
        made.add_call(ToolCall(id=_required(item, "call_id", where), function=function))
    elif item.type == "function_call_output":
        content = _content(_required(item, "output", where), f"{where}.output")
        call_id = _required(item, "call_id", where)
        made.messages.append(Message(role="tool", content=content, tool_call_id=call_id))
    elif item.type not in _HOSTED_CALLS:
        raise ApiError(
            400,
            f"{where}.type must be message, reasoning, function_call or function_call_output, "
            f"got '{item.type}'; send the item's words as a message, or leave it out",
            f"{where}.type",
        )


class _Messages:
    """Joins items to messages. An answer's reasoning, text and calls are one message; so are
    instructions at the beginning, because many chat templates take only one system message.
    """

    def __init__(self) -> None:
        self.messages: list[Message] = []

    def add_message(self, role: str, content: str | list[str | Part]) -> None:
        if role == "assistant":
            self._answer(joins=not self._has_words).content = content
        elif role == "system" and len(self.messages) == 1 and self.messages[0].role == "system":
            first = self.messages[0]
            first.content = f"{_joined(first.content or '')}\n\n{_joined(content)}"
        else:
            self.messages.append(Message(role=role, content=content))

    def add_reasoning(self, text: str) -> None:
        if text:
            answer = self._answer(joins=not self._has_words)
            earlier = answer.more.get("reasoning_content")
            answer.more = {"reasoning_content": f"{earlier}\n{text}" if earlier else text}

    def add_call(self, call: ToolCall) -> None:
        answer = self._answer(joins=True)
        answer.tool_calls = [*(answer.tool_calls or []), call]

    @property
    def _has_words(self) -> bool:
        last = self.messages[-1] if self.messages else None
        return last is not None and bool(last.content or last.tool_calls)

    def _answer(self, joins: bool) -> Message:
        """The assistant's message that the next item belongs to."""
        if not (joins and self.messages and self.messages[-1].role == "assistant"):
            self.messages.append(Message(role="assistant"))
        return self.messages[-1]


def _content(content: Content, where: str) -> str | list[str | Part]:
    if isinstance(content, str):
        return content
    texts: list[str] = []
    for i, part in enumerate(content):
        path = f"{where}.{i}"
        if part.type in _TEXT_PARTS:
            texts.append(_required(part, "text", path))
        elif part.type == "refusal":
            texts.append(_required(part, "refusal", path))
        else:
            raise ApiError(
                400,
                f"{path}.type must be input_text or output_text, as only text is taken, "
                f"got '{part.type}'",
                f"{path}.type",
            )
    return texts[0] if len(texts) == 1 else [Part(text=text) for text in texts]


def _joined(content: str | list[str | Part]) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(part if isinstance(part, str) else part.text or "" for part in content)


def _required(item: Any, name: str, where: str) -> Any:
    value = getattr(item, name)
    if value is None:
        path = f"{where}.{name}"
        raise ApiError(400, f"{path} is missing; type '{item.type}' needs it", path)
    return value


# -- tools and formats -----------------------------------------------------------------------------


def _tools(body: ResponsesRequest, ignored: list[str]) -> dict[str, Any]:
    """The chat request's fields about tools."""
    tools, choice = [], body.tool_choice
    for i, tool in enumerate(body.tools or []):
        if tool.type == "function":
            tools.append(_tool(tool, f"tools.{i}"))
        else:
            ignored.append(f"tools.{i}:{tool.type}")
    if choice is None or isinstance(choice, str):
        return {"tools": tools or None, "tool_choice": choice}
    if choice.type == "function":
        name = _required(choice, "name", "tool_choice")
        return {
            "tools": tools or None,
            "tool_choice": NamedTool(function=FunctionChoice(name=name)),
        }
    if choice.type == "allowed_tools":
        allowed = {tool.name for tool in choice.tools or []}
        chosen = [tool for tool in tools if tool.function.name in allowed]
        return {"tools": chosen or None, "tool_choice": choice.mode or "auto"}
    raise ApiError(
        400,
        f"tool_choice.type must be function or allowed_tools, got '{choice.type}'; tools of other "
        "types are skipped",
        "tool_choice.type",
    )


def _tool(tool: ResponseTool, where: str) -> Tool:
    function = Function(
        name=_required(tool, "name", where),
        description=tool.description,
        parameters=tool.parameters,
        strict=tool.strict,
    )
    return Tool(function=function)


def _response_format(body: ResponsesRequest) -> ResponseFormat | None:
    form = body.text.format if body.text else None
    if form is None or form.type != "json_schema":
        return None if form is None else ResponseFormat(type=form.type)
    if form.schema_ is None:
        path = "text.format.schema"
        raise ApiError(400, f"{path} is missing; type 'json_schema' needs it", path)
    return ResponseFormat(type=form.type, json_schema=JsonSchema(schema_=form.schema_))
