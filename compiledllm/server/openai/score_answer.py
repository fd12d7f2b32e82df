"""Answers of `/score` and `/rerank`."""

from __future__ import annotations

import time
from abc import abstractmethod
from typing import Any, TypeVar

from compiledllm.engine.prompts import Prompt
from compiledllm.engine.request_state import RequestState
from compiledllm.engine.scoring import Pair, make_pairs, make_scorer
from compiledllm.outputs import RequestOutput
from compiledllm.server.openai.answer import Context
from compiledllm.server.openai.errors import ApiError
from compiledllm.server.openai.pooling_answer import PoolingAnswer, pooling_usage
from compiledllm.server.openai.pooling_protocol import PairsBase, RerankRequest, ScoreRequest

BodyT = TypeVar("BodyT", bound=PairsBase)


class PairsAnswer(PoolingAnswer[BodyT]):
    """An answer about pairs of a query and a document."""

    def __init__(self, body: BodyT, context: Context) -> None:
        super().__init__(body, context)
        self._pairs = self._read_pairs(body)
        truncate = body.truncate_prompt_tokens
        self._scorer = make_scorer(context.requests, truncate, body.instruction)

    @abstractmethod
    def _read_pairs(self, body: BodyT) -> list[Pair]:
        """The pairs to score. Raises ApiError."""

    def prompts(self, body: BodyT) -> list[Prompt]:
        return self._scorer.prompts(self._pairs)

    def make_request(
        self, request_id: str, prompt: Prompt, priority: int, cache_salt: str
    ) -> RequestState:
        state = self._scorer.make(request_id, prompt, priority, cache_salt)
        self.states.append(state)
        return state

    def _scores(self) -> list[float]:
        return self._scorer.scores(self._pairs, self.states)


class ScoreAnswer(PairsAnswer[ScoreRequest]):
    """One score for each pair, in vLLM's format."""

    body_type = ScoreRequest
    id_prefix = "score"

    def _read_pairs(self, body: ScoreRequest) -> list[Pair]:
        names = ("queries", "documents") if body.text_1 is body.text_2 is None else _OLD_NAMES
        given = {name: getattr(body, name) for name in (*_NAMES, *_OLD_NAMES)}
        for name in names:
            if given[name] is None:
                raise ApiError(400, f"{name} is missing; it must be text, or a list of texts", name)
        if any(given[name] is not None for name in given if name not in names):
            raise ApiError(400, "queries and text_1 are two names for the same; give one", "text_1")
        try:
            return make_pairs(given[names[0]], given[names[1]])
        except ValueError as error:
            raise ApiError(400, str(error), names[0]) from None

    def whole(self, outputs: list[RequestOutput], num_output_tokens: int) -> dict[str, Any]:
        data = [
            {"index": index, "object": "score", "score": score}
            for index, score in enumerate(self._scores())
        ]
        context, created = self._context, int(time.time())
        head = {"id": context.request_id, "object": "list", "created": created}
        return head | {"model": context.model, "data": data, "usage": pooling_usage(outputs)}


_NAMES, _OLD_NAMES = ("queries", "documents"), ("text_1", "text_2")


class RerankAnswer(PairsAnswer[RerankRequest]):
    """The documents by their score, best first, as Cohere and Jina answer."""

    body_type = RerankRequest
    id_prefix = "rerank"

    def __init__(self, body: RerankRequest, context: Context) -> None:
        super().__init__(body, context)
        self._num_shown = body.top_n or len(self._pairs)
        self._documents = [text for _, text in self._pairs] if body.return_documents else []

    def _read_pairs(self, body: RerankRequest) -> list[Pair]:
        given = body.documents
        texts = (item if isinstance(item, str) else item.text for item in given)
        return [(body.query, text) for text in texts]

    def prompts(self, body: RerankRequest) -> list[Prompt]:
        if limit := body.max_tokens_per_doc:
            self._pairs = [(query, self._beginning(text, limit)) for query, text in self._pairs]
        return super().prompts(body)

    def _beginning(self, text: str, num_tokens: int) -> str:
        """The text of a document's first `num_tokens` tokens."""
        requests = self._context.requests
        tokenizer = requests.require_tokenizer("max_tokens_per_doc")
        token_ids = tokenizer.encode(text, False, requests.max_tokenized(is_truncated=True))
        if len(token_ids) <= num_tokens:
            return text
        return tokenizer.decode(token_ids[:num_tokens], False).rstrip("\ufffd")

    def whole(self, outputs: list[RequestOutput], num_output_tokens: int) -> dict[str, Any]:
        scores = self._scores()
        ranked = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)
        results = [
            {"index": index, "relevance_score": scores[index]} | self._document(index)
            for index in ranked[: self._num_shown]
        ]
        usage = pooling_usage(outputs)
        tokens = {"input_tokens": usage["prompt_tokens"], "output_tokens": 0}
        head = {"id": self._context.request_id, "model": self._context.model}
        return head | {"results": results, "usage": usage, "meta": {"tokens": tokens}}

    def _document(self, index: int) -> dict[str, Any]:
        return {"document": {"text": self._documents[index]}} if self._documents else {}
