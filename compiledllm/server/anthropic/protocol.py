"""The request bodies of Anthropic's Messages API. The types enforce the bounds of each field."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from compiledllm.sampling_params import MAX_STOP_STRINGS
from compiledllm.server.openai.bodies import Body
from compiledllm.server.openai.field_types import (
    MAX_MESSAGES,
    MAX_PARTS,
    MAX_TOOLS,
    Count,
    FunctionName,
    Name,
    PositiveCount,
    Text,
)
from compiledllm.server.openai.protocol import GenerationBase

BlockType = Annotated[str, Meta(min_length=1, max_length=64)]


class TextBlock(Body, kw_only=True):
    """A block of a system prompt or of a tool's result. Only text is taken."""

    type: BlockType
    text: str | None = None


class ContentBlock(Body, kw_only=True):
    """A block of a message. `type` decides which of the fields count."""

    type: BlockType
    text: str | None = None
    thinking: str | None = None
    id: Name | None = None
    name: Name | None = None
    input: dict[str, Any] | None = None
    tool_use_id: Name | None = None
    content: str | Annotated[list[TextBlock], Meta(max_length=MAX_PARTS)] | None = None


class InputMessage(Body, kw_only=True):
    role: Literal["user", "assistant", "system"]
    content: str | Annotated[list[ContentBlock], Meta(max_length=MAX_PARTS)]


class InputTool(Body, kw_only=True):
    """A tool of the client. Tools of other types run on Anthropic's servers and are skipped."""

    type: BlockType = "custom"
    name: FunctionName
    description: str | None = None
    input_schema: dict[str, Any] | None = None


class InputToolChoice(Body, kw_only=True):
    type: Literal["auto", "any", "tool", "none"]
    name: Name | None = None
    disable_parallel_tool_use: bool = False


class Thinking(Body, kw_only=True):
    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: Count | None = None


class OutputFormat(Body, kw_only=True):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = msgspec.field(name="schema")


class OutputConfig(Body, kw_only=True):
    effort: Annotated[str, Meta(max_length=32)] | None = None
    format: OutputFormat | None = None


class CountTokensRequest(GenerationBase, kw_only=True):
    """`POST /v1/messages/count_tokens`."""

    prompt_field: ClassVar[str] = "messages"

    messages: Annotated[list[InputMessage], Meta(min_length=1, max_length=MAX_MESSAGES)]
    system: str | Annotated[list[TextBlock], Meta(max_length=MAX_PARTS)] | None = None
    tools: Annotated[list[InputTool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: InputToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None

    @property
    def structured_field(self) -> str:
        return "tools" if self.tools else "output_config.format"


class MessagesRequest(CountTokensRequest, kw_only=True):
    """`POST /v1/messages`."""

    max_tokens: PositiveCount
    stop_sequences: Annotated[list[Text], Meta(max_length=MAX_STOP_STRINGS)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Count | None = None
    metadata: dict[str, Any] | None = None

    @property
    def requested_max_tokens(self) -> tuple[str, int | None]:
        return "max_tokens", self.max_tokens


BODIES: dict[str, type[Body]] = {
    "/v1/messages": MessagesRequest,
    "/v1/messages/count_tokens": CountTokensRequest,
}
