"""Translates a body of the Messages API to a chat request."""

from __future__ import annotations

from typing import Any, Literal

from compiledllm.server.anthropic.protocol import (
    ContentBlock,
    CountTokensRequest,
    InputMessage,
    InputTool,
    MessagesRequest,
    OutputConfig,
    TextBlock,
)
from compiledllm.server.openai.errors import ApiError
from compiledllm.server.openai.protocol import (
    ChatRequest,
    JsonSchema,
    Message,
    Part,
    ResponseFormat,
)
from compiledllm.server.openai.tool_protocol import (
    CalledFunction,
    Function,
    FunctionChoice,
    NamedTool,
    Tool,
    ToolCall,
)

_CHOICES: dict[str, Literal["none", "auto", "required"]] = {
    "auto": "auto",
    "any": "required",
    "none": "none",
}


def chat_request(body: CountTokensRequest, chat_template: str, ignored: list[str]) -> ChatRequest:
    """The chat request. Adds the fields that have no effect to `ignored`. Raises ApiError."""
    fields: dict[str, Any] = {"model": body.model, "messages": _messages(body)}
    if body.messages[-1].role == "assistant" and not fields["messages"][-1].tool_calls:
        fields |= {"add_generation_prompt": False, "continue_final_message": True}
    fields |= _tools(body, ignored) | _thinking(body, chat_template, ignored)
    if body.output_config is not None:
        fields |= _output(body.output_config)
    if isinstance(body, MessagesRequest):
        fields |= {"max_tokens": body.max_tokens, "stop": body.stop_sequences}
        fields |= {name: getattr(body, name) for name in ("temperature", "top_p", "top_k")}
        fields["stream"] = body.stream
    return ChatRequest(**fields)


# -- messages --------------------------------------------------------------------------------------


def _messages(body: CountTokensRequest) -> list[Message]:
    messages = []
    if body.system:
        messages.append(Message(role="system", content=_text_of(body.system, "system")))
    for i, message in enumerate(body.messages):
        messages += _converted(message, f"messages.{i}.content")
    return messages


def _converted(message: InputMessage, where: str) -> list[Message]:
    if isinstance(message.content, str):
        return [Message(role=message.role, content=message.content)]
    blocks = [(block, f"{where}.{i}") for i, block in enumerate(message.content)]
    if message.role == "assistant":
        return [_of_assistant(blocks)]
    return _of_others(message.role, blocks)


def _of_others(role: str, blocks: list[tuple[ContentBlock, str]]) -> list[Message]:
    """A message for each tool's result, and one for the text after them."""
    messages, texts = [], []
    for block, where in blocks:
        if block.type == "tool_result" and role == "user":
            content = _text_of(block.content or "", f"{where}.content")
            call_id = _required(block, "tool_use_id", where)
            messages.append(Message(role="tool", content=content, tool_call_id=call_id))
        elif block.type == "text":
            texts.append(_required(block, "text", where))
        else:
            raise _not_taken(block.type, "text or a user's tool_result", where)
    if texts or not messages:
        messages.append(Message(role=role, content=_content(texts)))
    return messages


def _of_assistant(blocks: list[tuple[ContentBlock, str]]) -> Message:
    texts, thoughts, calls = [], [], []
    for block, where in blocks:
        if block.type == "text":
            texts.append(_required(block, "text", where))
        elif block.type == "thinking":
            thoughts.append(_required(block, "thinking", where))
        elif block.type == "tool_use":
            name = _required(block, "name", where)
            function = CalledFunction(name=name, arguments=block.input or {})
            calls.append(ToolCall(id=_required(block, "id", where), function=function))
        elif block.type != "redacted_thinking":  # holds nothing that a model could read
            raise _not_taken(block.type, "text, thinking or tool_use", where)
    more = {"reasoning_content": "\n".join(thoughts)} if thoughts else {}
    return Message(role="assistant", content=_content(texts), tool_calls=calls or None, more=more)


def _content(texts: list[str]) -> str | list[str | Part]:
    return "".join(texts) if len(texts) < 2 else [Part(text=text) for text in texts]


def _text_of(content: str | list[TextBlock], where: str) -> str:
    if isinstance(content, str):
        return content
    for i, block in enumerate(content):
        if block.type != "text":
            raise _not_taken(block.type, "text", f"{where}.{i}")
        if block.text is None:
            raise _missing("text", block.type, f"{where}.{i}")
    return "\n".join(block.text or "" for block in content)


def _required(block: ContentBlock, name: str, where: str) -> str:
    value: str | None = getattr(block, name)
    if value is None:
        raise _missing(name, block.type, where)
    return value


def _missing(name: str, kind: str, where: str) -> ApiError:
    path = f"{where}.{name}"
    return ApiError(400, f"{path} is missing; a block of type '{kind}' needs it", path)


def _not_taken(kind: str, taken: str, where: str) -> ApiError:
    return ApiError(400, f"{where}.type must be {taken} here, got '{kind}'", f"{where}.type")


# -- tools and thinking ----------------------------------------------------------------------------


def _tools(body: CountTokensRequest, ignored: list[str]) -> dict[str, Any]:
    tools = []
    for i, tool in enumerate(body.tools or []):
        if tool.type == "custom":
            tools.append(_tool(tool, f"tools.{i}"))
        else:
            ignored.append(f"tools.{i}:{tool.type}")
    choice = body.tool_choice
    if choice is None:
        return {"tools": tools or None}
    fields: dict[str, Any] = {"tools": tools or None, "tool_choice": _CHOICES.get(choice.type)}
    if choice.type == "tool":
        if choice.name is None:
            raise _missing("name", "tool", "tool_choice")
        fields["tool_choice"] = NamedTool(function=FunctionChoice(name=choice.name))
    return fields | {"parallel_tool_calls": not choice.disable_parallel_tool_use}


def _tool(tool: InputTool, where: str) -> Tool:
    if tool.input_schema is None:
        path = f"{where}.input_schema"
        raise ApiError(400, f"{path} is missing; it must be a JSON schema of type object", path)
    function = Function(name=tool.name, description=tool.description, parameters=tool.input_schema)
    return Tool(function=function)


def _thinking(body: CountTokensRequest, chat_template: str, ignored: list[str]) -> dict[str, Any]:
    """Fields that switch reasoning on or off, if the template has a switch.

    A budget for reasoning has no effect.
    """
    if body.thinking is None:
        return {}
    if "enable_thinking" not in chat_template:
        ignored.append("thinking")
        return {}
    if body.thinking.budget_tokens is not None:
        ignored.append("thinking.budget_tokens")
    return {"chat_template_kwargs": {"enable_thinking": body.thinking.type != "disabled"}}


def _output(config: OutputConfig) -> dict[str, Any]:
    """The fields of the chat request about the answer's effort and form."""
    fields: dict[str, Any] = {"reasoning_effort": config.effort}
    if config.format is not None:
        schema = JsonSchema(schema_=config.format.schema_)
        fields["response_format"] = ResponseFormat(type="json_schema", json_schema=schema)
    return fields
