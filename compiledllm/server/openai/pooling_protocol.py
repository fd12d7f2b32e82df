"""The bodies of `/v1/embeddings`, `/score` and `/rerank`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import msgspec
from msgspec import Meta

from compiledllm.server.openai.bodies import Body
from compiledllm.server.openai.field_types import Ids, PositiveCount
from compiledllm.server.openai.protocol import GenerationBase, has_many

MAX_INPUTS = 2048  # OpenAI's limit
MAX_INSTRUCTION = 10_000  # characters


class PoolingBase(GenerationBase, kw_only=True):
    """The common fields of bodies about texts after which no token is generated."""

    user: Annotated[str, Meta(max_length=1024)] | None = None
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None

    @property
    def requested_max_tokens(self) -> tuple[str, int | None]:
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
        return has_many(self.input)

    @property
    def num_prompts(self) -> int:
        return len(self.input) if self.has_many_prompts else 1


class PairsBase(PoolingBase, kw_only=True):
    """The common fields of bodies about queries and documents. instruction: a reranker's task."""

    prompt_field: ClassVar[str] = "documents"

    instruction: Annotated[str, Meta(max_length=MAX_INSTRUCTION)] | None = None


Texts = str | Annotated[list[str], Meta(min_length=1, max_length=MAX_INPUTS)]


class ScoreRequest(PairsBase, kw_only=True):
    """`POST /score`: one query with each document, or as many queries as documents, pair by pair.

    As in vLLM, a body has either queries and documents, or text_1 and text_2.
    """

    queries: Texts | None = None
    documents: Texts | None = None
    text_1: Texts | None = None
    text_2: Texts | None = None

    @property
    def num_prompts(self) -> int:
        counts = (len(texts) for texts in (self.documents, self.text_2) if isinstance(texts, list))
        return max(counts, default=1)


class Document(msgspec.Struct, kw_only=True):
    """A document as an object, whose other fields have no effect."""

    text: str


class RerankRequest(PairsBase, kw_only=True):
    """`POST /rerank`, with the fields of Cohere and Jina."""

    query: str
    documents: Annotated[list[str | Document], Meta(min_length=1, max_length=MAX_INPUTS)]
    top_n: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    max_tokens_per_doc: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None  # 0: no limit
    return_documents: bool = True

    @property
    def num_prompts(self) -> int:
        return len(self.documents)


RERANK_PATHS = ("/rerank", "/v1/rerank", "/v2/rerank")
SCORE_PATHS = ("/score", "/v1/score")
BODIES: dict[str, type[Body]] = {"/v1/embeddings": EmbeddingRequest}
BODIES |= dict.fromkeys(SCORE_PATHS, ScoreRequest) | dict.fromkeys(RERANK_PATHS, RerankRequest)
