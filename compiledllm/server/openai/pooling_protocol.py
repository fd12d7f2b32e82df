"""The bodies of `/v1/embeddings`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from compiledllm.server.openai.bodies import Body
from compiledllm.server.openai.protocol import GenerationBase, Ids, PositiveCount

MAX_INPUTS = 2048  # OpenAI's limit


class PoolingBase(GenerationBase, kw_only=True):
    """The common fields of bodies about texts to which nothing is added."""

    user: Annotated[str, Meta(max_length=1024)] | None = None
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None

    @property
    def asked_tokens(self) -> tuple[str, int | None]:
        return "max_tokens", None

    @property
    def structured_field(self) -> str:
        return "structured_outputs"


class EmbeddingRequest(PoolingBase, kw_only=True):
    """`POST /v1/embeddings`."""

    prompt_field: ClassVar[str] = "input"

    input: Annotated[
        str
        | Annotated[list[str], Meta(min_length=1, max_length=MAX_INPUTS)]
        | Ids
        | Annotated[list[Ids], Meta(min_length=1, max_length=MAX_INPUTS)],
        Meta(description=f"text, token ids, or a list of 1 to {MAX_INPUTS} texts or lists of ids"),
    ]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: PositiveCount | None = None
    normalize: bool | None = None

    @property
    def has_many_prompts(self) -> bool:
        return isinstance(self.input, list) and not isinstance(self.input[0], int)

    @property
    def num_prompts(self) -> int:
        return len(self.input) if self.has_many_prompts else 1


BODIES: dict[str, type[Body]] = {"/v1/embeddings": EmbeddingRequest}
