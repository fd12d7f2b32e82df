"""The request body of OpenAI's Responses API. The types enforce the bounds of each field."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from compiledllm.server.openai.bodies import Body
from compiledllm.server.openai.field_types import (
    MAX_MESSAGES,
    MAX_PARTS,
    MAX_TOOLS,
    Fraction,
    FunctionName,
    Int64,
    Name,
    Penalty,
    PositiveCount,
    TopLogprobs,
)
from compiledllm.server.openai.protocol import GenerationBase, StreamOptions

MAX_INCLUDED = 16
MAX_METADATA = 16

Kind = Annotated[str, Meta(min_length=1, max_length=64)]
Word = Annotated[str, Meta(max_length=64)]


class ResponsePart(Body, kw_only=True):
    """A part of an item's content. Only text is taken."""

    type: Kind
    text: str | None = None
    refusal: str | None = None


Content = str | Annotated[list[ResponsePart], Meta(max_length=MAX_PARTS)]


class ResponseItem(Body, kw_only=True):
    """An item of the conversation. `type` decides which of the fields count."""

    type: Kind = "message"
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: Content | None = None
    call_id: Name | None = None
    name: Name | None = None
    arguments: str | None = None
    output: Content | None = None
    summary: Annotated[list[ResponsePart], Meta(max_length=MAX_PARTS)] | None = None


class ResponseTool(Body, kw_only=True):
    """A function of the client. Tools of other types run at OpenAI and are skipped."""

    type: Kind
    name: FunctionName | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseToolChoice(Body, kw_only=True):
    """A function, or with the type allowed_tools the tools that may or must be called."""

    type: Kind
    name: FunctionName | None = None
    mode: Literal["auto", "required"] | None = None
    tools: Annotated[list[ResponseTool], Meta(max_length=MAX_TOOLS)] | None = None


class ReasoningOptions(Body, kw_only=True):
    effort: Annotated[str, Meta(max_length=32)] | None = None
    summary: Word | None = None


class TextFormat(Body, kw_only=True):
    """schema goes with the type json_schema, and must be given there."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: Word | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = msgspec.field(default=None, name="schema")
    strict: bool | None = None


class TextOptions(Body, kw_only=True):
    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ResponsesRequest(GenerationBase, kw_only=True):
    """`POST /v1/responses`."""

    prompt_field: ClassVar[str] = "input"

    input: str | Annotated[list[ResponseItem], Meta(min_length=1, max_length=MAX_MESSAGES)]
    instructions: str | None = None
    tools: Annotated[list[ResponseTool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningOptions | None = None
    text: TextOptions | None = None
    max_output_tokens: PositiveCount | None = None
    max_tool_calls: PositiveCount | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_logprobs: TopLogprobs | None = None
    include: Annotated[list[Word], Meta(max_length=MAX_INCLUDED)] | None = None
    stream_options: StreamOptions | None = None
    metadata: (
        Annotated[dict[str, Annotated[str, Meta(max_length=512)]], Meta(max_length=MAX_METADATA)]
        | None
    ) = None
    user: Annotated[str, Meta(max_length=1024)] | None = None
    safety_identifier: Annotated[str, Meta(max_length=1024)] | None = None
    prompt_cache_key: Annotated[str, Meta(max_length=1024)] | None = None
    service_tier: Word | None = None
    truncation: Literal["auto", "disabled"] | None = None
    store: bool = True
    background: bool | None = None
    previous_response_id: Name | None = None
    conversation: Name | dict[str, Any] | None = None
    prompt: dict[str, Any] | None = None

    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Fraction | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] | None = None
    seed: Int64 | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def requested_max_tokens(self) -> tuple[str, int | None]:
        return "max_output_tokens", self.max_output_tokens

    @property
    def structured_field(self) -> str:
        return "tools" if self.tools else "text.format"


BODIES: dict[str, type[Body]] = {"/v1/responses": ResponsesRequest}
