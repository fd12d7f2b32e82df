"""The paths that answer a body by running the model, with the `Answer` class of each."""

from __future__ import annotations

from typing import Any

from compiledllm.server.anthropic.messages_answer import MessagesAnswer
from compiledllm.server.openai.answer import Answer
from compiledllm.server.openai.chat_answer import ChatAnswer
from compiledllm.server.openai.completion_answer import CompletionAnswer
from compiledllm.server.openai.embedding_answer import EmbeddingAnswer
from compiledllm.server.openai.pooling_protocol import RERANK_PATHS, SCORE_PATHS
from compiledllm.server.openai.responses_answer import ResponsesAnswer
from compiledllm.server.openai.score_answer import RerankAnswer, ScoreAnswer

ENDPOINTS: dict[str, type[Answer[Any]]] = {
    "/v1/chat/completions": ChatAnswer,
    "/v1/completions": CompletionAnswer,
    "/v1/responses": ResponsesAnswer,
    "/v1/messages": MessagesAnswer,
    "/v1/embeddings": EmbeddingAnswer,
    **dict.fromkeys(SCORE_PATHS, ScoreAnswer),
    **dict.fromkeys(RERANK_PATHS, RerankAnswer),
}
