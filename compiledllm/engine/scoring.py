"""Scores documents for queries: by the cosine of their vectors, or by a reranker's judgement."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from compiledllm.engine.pooling import vector_of
from compiledllm.engine.prompts import Prompt
from compiledllm.engine.request_state import RequestState
from compiledllm.engine.requests import RequestFactory
from compiledllm.models.reranker import StoredReranker
from compiledllm.outputs import ScoringOutput, ScoringRequestOutput
from compiledllm.pooling_params import PoolingParams
from compiledllm.sampling_params import RequestOutputKind, SamplingParams

Pair = tuple[str, str]  # query, document
MAX_CHARACTERS = 2**24  # in all prompts of a call, in which each pair repeats its query

# Qwen3-Reranker's prompt, as its model card gives it.
_BEGINNING = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and "
    'the Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
    "<|im_start|>user\n"
)
_PAIR = "<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}"
_END = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"


class Scorer(Protocol):
    """From pairs to prompts, and from the prompts' finished requests to the pairs' scores."""

    def prompts(self, pairs: Sequence[Pair]) -> list[Prompt]:
        """The prompts to compute, which may be more or fewer than the pairs."""

    def make(
        self, request_id: str, prompt: Prompt, priority: int = 0, cache_salt: str = ""
    ) -> RequestState:
        """The request for one of these prompts."""

    def scores(self, pairs: Sequence[Pair], states: Sequence[RequestState]) -> list[float]:
        """One score per pair; higher is better. Raises RuntimeError for a failed request.

        states: the finished requests, in the order of `prompts`.
        """


def make_scorer(
    requests: RequestFactory, truncate: int | None = None, instruction: str | None = None
) -> Scorer:
    """The scorer of a model. truncate: `truncate_prompt_tokens`. instruction: the task, in words.

    Raises ConfigError for models whose scores are not supported, and ValueError for an instruction
    to a model that reads none.
    """
    stored = requests.reranker
    if stored is not None:
        return RerankScorer(requests, stored, truncate, instruction or _INSTRUCTION)
    if instruction is not None:
        raise ValueError("instruction is for rerankers; put it in front of the query instead")
    return CosineScorer(requests, truncate)


def make_pairs(queries: str | Sequence[str], documents: str | Sequence[str]) -> list[Pair]:
    """One query with each document, or as many queries as documents, one by one."""
    many = [[texts] if isinstance(texts, str) else list(texts) for texts in (queries, documents)]
    if not many[0] or not many[1]:
        raise ValueError("a score needs at least one query and one document")
    if len(many[0]) == 1:
        many[0] *= len(many[1])
    if len(many[0]) != len(many[1]):
        raise ValueError(
            f"{len(many[0])} queries and {len(many[1])} documents make no pairs; give one query, "
            "or as many queries as documents"
        )
    return list(zip(*many, strict=True))


def scoring_outputs(
    scorer: Scorer, pairs: Sequence[Pair], states: Sequence[RequestState]
) -> list[ScoringRequestOutput]:
    """The scores of finished requests as the caller gets them, numbered in the order of pairs."""
    return [
        ScoringRequestOutput(f"score-{index}", ScoringOutput(score))
        for index, score in enumerate(scorer.scores(pairs, states))
    ]


class CosineScorer:
    """The cosine of the vectors of query and document, -1 to 1. Each text is computed once."""

    def __init__(self, requests: RequestFactory, truncate: int | None) -> None:
        self._requests = requests
        self._params = PoolingParams(normalize=True, truncate_prompt_tokens=truncate)

    def prompts(self, pairs: Sequence[Pair]) -> list[Prompt]:
        return list(_distinct(pairs))

    def make(
        self, request_id: str, prompt: Prompt, priority: int = 0, cache_salt: str = ""
    ) -> RequestState:
        return self._requests.make_pooling(request_id, prompt, self._params, priority, cache_salt)

    def scores(self, pairs: Sequence[Pair], states: Sequence[RequestState]) -> list[float]:
        stored = self._requests.pooling
        vectors = {
            text: vector_of(state, stored, self._params)
            for text, state in zip(_distinct(pairs), states, strict=True)
        }
        return [float(vectors[query] @ vectors[document]) for query, document in pairs]


class RerankScorer:
    """The probability, 0 to 1, that a reranker says yes to a document. A pair is one prompt."""

    def __init__(
        self,
        requests: RequestFactory,
        stored: StoredReranker,
        truncate: int | None,
        instruction: str,
    ) -> None:
        self._requests, self._head = requests, stored.head
        self._truncate, self._instruction = truncate, instruction
        self._tokenizer = requests.require_tokenizer("a reranker's prompt")
        self._no, self._yes = (self._single_token(text) for text in stored.no_and_yes)
        self._judging = SamplingParams(
            temperature=0,
            max_tokens=1,
            logprob_token_ids=[self._no, self._yes],
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self._beginning, self._end = self._encode(_BEGINNING), self._encode(_END)

    def prompts(self, pairs: Sequence[Pair]) -> list[Prompt]:
        """Token ids of the model's prompt. A query that begins a chat already has the prompt."""
        num_characters = sum(len(query) + len(document) for query, document in pairs)
        if num_characters > MAX_CHARACTERS:
            raise ValueError(
                f"the prompts of all pairs have {num_characters} characters, and at most "
                f"{MAX_CHARACTERS} are tokenised at once; score fewer pairs, or shorter texts"
            )
        found: list[Prompt] = []
        for query, document in pairs:
            if query.startswith("<|im_start|>"):
                found.append({"prompt_token_ids": self._encode(query + document)})
                continue
            text = _PAIR.format(instruction=self._instruction, query=query, document=document)
            ids = self._beginning + self._encode(text)[: self._room()] + self._end
            found.append({"prompt_token_ids": ids})
        return found

    def make(
        self, request_id: str, prompt: Prompt, priority: int = 0, cache_salt: str = ""
    ) -> RequestState:
        requests = self._requests
        if self._head is not None:
            params = PoolingParams(kind="last", normalize=False)
            return requests.make_pooling(request_id, prompt, params, priority, cache_salt)
        return requests.make(
            request_id, prompt, self._judging, priority, cache_salt=cache_salt, compiles=False
        )

    def scores(self, pairs: Sequence[Pair], states: Sequence[RequestState]) -> list[float]:
        return [self._score(state) for state in states]

    def _score(self, state: RequestState) -> float:
        if self._head is not None:
            params = PoolingParams(normalize=False)
            hidden = vector_of(state, self._requests.pooling, params)
            return _sigmoid(float(np.dot(self._head, hidden)))
        (completion,) = state.completions
        if not completion.logprobs:
            raise RuntimeError(f"request '{state.request_id}' failed: {completion.stop_reason}")
        token_ids, values, _, _ = completion.logprobs[0]
        by_id = dict(zip(token_ids, values, strict=True))
        return _sigmoid(by_id[self._yes] - by_id[self._no])

    def _room(self) -> int | None:
        """Number of tokens that a pair may have between the prompt's beginning and end."""
        if self._truncate is None:
            return None
        limit = self._requests.max_model_len - 1
        whole = limit if self._truncate == -1 else min(self._truncate, limit)
        return max(whole - len(self._beginning) - len(self._end), 1)

    def _encode(self, text: str) -> list[int]:
        max_tokens = self._requests.max_tokenized(self._truncate is not None)
        return self._tokenizer.encode(text, False, max_tokens)

    def _single_token(self, text: str) -> int:
        token_ids = self._encode(text)
        if len(token_ids) != 1:
            raise ValueError(f"'{text}' is {len(token_ids)} tokens; a reranker's answer is one")
        return token_ids[0]


def _distinct(pairs: Sequence[Pair]) -> dict[str, None]:
    return dict.fromkeys(text for pair in pairs for text in pair)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0
