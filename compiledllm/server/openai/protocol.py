"""OpenAI's request bodies with common extensions. The types enforce the bounds of each field.

An optional field has a default, and null means the default. Unknown fields are reported instead of
refused, because load generators and clients send fields of their own (`Body.unknown_fields`).
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from compiledllm.sampling_params import (
    MAX_ALLOWED_TOKEN_IDS,
    MAX_BAD_WORDS,
    MAX_LOGIT_BIAS,
    MAX_LOGPROB_TOKEN_IDS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
)
from compiledllm.server.openai.bodies import Body
from compiledllm.server.openai.field_types import (
    MAX_MESSAGES,
    MAX_PARTS,
    MAX_PROMPTS,
    MAX_TOOLS,
    Count,
    Fraction,
    Ids,
    Int32,
    Int64,
    N,
    Name,
    PatternSize,
    Penalty,
    PositiveCount,
    RequestId,
    Text,
    TokenId,
    TopLogprobs,
)
from compiledllm.server.openai.tool_protocol import NamedTool, Tool, ToolCall
from compiledllm.structured_outputs import MAX_CHOICES

MAX_IDS_AT_ONCE = 8192  # token ids of a prompt, whose check takes about a millisecond


class StreamOptions(Body, kw_only=True):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class JsonSchema(Body, kw_only=True):
    name: Annotated[str, Meta(max_length=64)] = ""
    description: str | None = None
    strict: bool | None = None
    schema_: dict[str, Any] = msgspec.field(name="schema")


class ResponseFormat(Body, kw_only=True):
    """json_schema goes with the type json_schema; structures and triggers with structural_tag."""

    type: Literal["text", "json_object", "json_schema", "structural_tag"] = "text"
    json_schema: JsonSchema | None = None
    structures: Annotated[list[dict[str, Any]], Meta(max_length=MAX_CHOICES)] | None = None
    triggers: Annotated[list[Text], Meta(max_length=MAX_CHOICES)] | None = None


class StructuredOutputs(Body, kw_only=True):
    """The fields of `StructuredOutputsParams`."""

    json_: str | dict[str, Any] | None = msgspec.field(default=None, name="json")
    regex: str | None = None
    choice: Annotated[list[str], Meta(max_length=MAX_CHOICES)] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | dict[str, Any] | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None


class RepetitionDetection(Body, kw_only=True):
    max_pattern_size: PatternSize = 0
    min_pattern_size: PatternSize = 0
    min_count: Annotated[int, Meta(ge=0, le=2**20)] = 0


class GenerationBase(Body, kw_only=True):
    """The fields that a job reads of every API's bodies. None: the server's default.

    prompt_field: the name of the field that has the prompt.
    """

    prompt_field: ClassVar[str]

    model: Annotated[str, Meta(max_length=1024)] | None = None
    stream: bool = False
    priority: Int32 = 0
    request_id: RequestId | None = None
    cache_salt: Name | None = None

    @property
    def requested_max_tokens(self) -> tuple[str, int | None]:
        """The name and value of the field that limits the number of tokens to generate."""
        raise NotImplementedError

    @property
    def num_prompts(self) -> int:
        return 1

    @property
    def structured_field(self) -> str:
        """The field that asks for structured output, if any does."""
        raise NotImplementedError

    @property
    def is_made_at_once(self) -> bool:
        """Whether making the request takes less time than handing it to a thread."""
        return False


class Generation(GenerationBase, kw_only=True):
    """The common fields of OpenAI's bodies that ask for generated tokens."""

    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: (
        Annotated[
            dict[str, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=MAX_LOGIT_BIAS)
        ]
        | None
    ) = None
    n: N | None = None
    seed: Int64 | None = None
    stop: Text | Annotated[list[Text], Meta(max_length=MAX_STOP_STRINGS)] | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    user: Annotated[str, Meta(max_length=1024)] | None = None

    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Fraction | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: Count = 0
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    prompt_logprobs: Annotated[int, Meta(ge=-1, le=2**20)] | None = None
    allowed_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_ALLOWED_TOKEN_IDS)] | None = (
        None
    )
    bad_words: Annotated[list[Text], Meta(max_length=MAX_BAD_WORDS)] | None = None
    logprob_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_LOGPROB_TOKEN_IDS)] | None = (
        None
    )
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    repetition_detection: RepetitionDetection | None = None
    return_token_ids: bool = False

    @property
    def structured_field(self) -> str:
        return "response_format" if self.structured_outputs is None else "structured_outputs"


def has_many(prompts: str | list[str] | Ids | list[Ids]) -> bool:
    """Whether these are several prompts, rather than one text or the ids of one prompt."""
    return isinstance(prompts, list) and not isinstance(prompts[0], int)


class CompletionRequest(Generation, kw_only=True):
    """`POST /v1/completions`."""

    prompt_field: ClassVar[str] = "prompt"

    prompt: Annotated[
        str
        | Annotated[list[str], Meta(min_length=1, max_length=MAX_PROMPTS)]
        | Ids
        | Annotated[list[Ids], Meta(min_length=1, max_length=MAX_PROMPTS)],
        Meta(description=f"text, token ids, or a list of 1 to {MAX_PROMPTS} texts or lists of ids"),
    ]
    max_tokens: Count | None = None  # None: 16
    logprobs: TopLogprobs | None = None
    echo: bool = False
    best_of: N | None = None
    suffix: str | None = None
    add_special_tokens: bool = True

    @property
    def requested_max_tokens(self) -> tuple[str, int | None]:
        return "max_tokens", self.max_tokens

    @property
    def has_many_prompts(self) -> bool:
        return has_many(self.prompt)

    @property
    def num_prompts(self) -> int:
        return len(self.prompt) if self.has_many_prompts else 1

    @property
    def is_made_at_once(self) -> bool:
        """Whether there is one short prompt of token ids: nothing to tokenise or to compile."""
        if isinstance(self.prompt, str) or self.has_many_prompts:
            return False
        if (self.n or 1) > 1 or (self.best_of or 1) > 1:  # several engine requests take longer
            return False
        more = (self.response_format, self.structured_outputs, self.bad_words)
        return len(self.prompt) <= MAX_IDS_AT_ONCE and all(asked is None for asked in more)


class Part(msgspec.Struct, kw_only=True):
    """A part of a message's content. Parts other than text are refused when rendering."""

    type: str | None = "text"
    text: str | None = None
    refusal: str | None = None
    thinking: str | None = None


class Message(Body, kw_only=True):
    """A message: text, or a list of text parts; an assistant's message may be tool calls."""

    keeps_more: ClassVar[bool] = True  # chat templates use fields that no standard has

    role: Annotated[str, Meta(min_length=1, max_length=64)]
    content: str | Annotated[list[str | Part], Meta(max_length=MAX_PARTS)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Meta(max_length=MAX_TOOLS)] | None = None
    tool_call_id: str | None = None

    @property
    def num_characters(self) -> int:
        """The length of the content, in characters."""
        if not isinstance(self.content, list):
            return len(self.content or "")
        texts = (part if isinstance(part, str) else part.text or "" for part in self.content)
        return sum(map(len, texts))


Messages = Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)]


class ChatRequest(Generation, kw_only=True):
    """`POST /v1/chat/completions`."""

    prompt_field: ClassVar[str] = "messages"

    messages: Messages
    max_completion_tokens: PositiveCount | None = None
    max_tokens: PositiveCount | None = None
    logprobs: bool = False
    top_logprobs: TopLogprobs | None = None
    tools: Annotated[list[Tool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Annotated[str, Meta(max_length=32)] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def requested_max_tokens(self) -> tuple[str, int | None]:
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return "max_tokens", self.max_tokens

    @property
    def structured_field(self) -> str:
        is_of_tools = self.structured_outputs is None and self.tools
        return "tools" if is_of_tools else super().structured_field


class TokenizeRequest(Body, kw_only=True):
    """`POST /tokenize`: a text, or a conversation."""

    model: Annotated[str, Meta(max_length=1024)] | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool = False


class DetokenizeRequest(Body, kw_only=True):
    """`POST /detokenize`."""

    model: Annotated[str, Meta(max_length=1024)] | None = None
    tokens: Annotated[list[int], Meta(max_length=2**20)]


BODIES: dict[str, type[Body]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
