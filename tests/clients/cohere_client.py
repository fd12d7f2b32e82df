"""Cohere's clients, of both versions of its API, sync and async: documents ranked for a query."""

from __future__ import annotations

import asyncio
import sys

import cohere

QUERY = "What is the capital of China?"
DOCUMENTS = ["Gravity attracts bodies.", QUERY, "The capital of China is Beijing."]


def second_version(url: str) -> None:
    client = cohere.ClientV2(api_key="none", base_url=url)
    found = client.rerank(model="tiny", query=QUERY, documents=DOCUMENTS)
    assert found.results[0].index == 1 and len(found.results) == 3, found
    scores = [result.relevance_score for result in found.results]
    assert scores == sorted(scores, reverse=True) and abs(scores[0] - 1) < 1e-3, scores
    assert found.id and found.meta and found.meta.tokens, found
    assert found.meta.tokens.input_tokens and found.meta.tokens.input_tokens > 0, found
    few = client.rerank(
        model="tiny",
        query=QUERY,
        documents=[QUERY + " Say it." * 5000] * 2,
        top_n=1,
        max_tokens_per_doc=7,
        priority=0,
    )
    assert len(few.results) == 1 and few.results[0].relevance_score > 0.5, few
    for body, kind in (
        ({"model": "other"}, cohere.NotFoundError),
        ({"documents": []}, cohere.BadRequestError),
    ):
        try:
            client.rerank(**({"model": "tiny", "query": QUERY, "documents": ["a"]} | body))
        except kind as error:
            assert error.body["error"]["message"], error
        else:
            raise AssertionError(f"{body} was answered")


def first_version(url: str) -> None:
    client = cohere.Client(api_key="none", base_url=url)
    documents = [{"text": text, "title": "A"} for text in DOCUMENTS]
    found = client.rerank(
        model="tiny", query=QUERY, documents=documents, return_documents=True, top_n=2
    )
    assert [result.index for result in found.results][0] == 1, found
    assert found.results[0].document and found.results[0].document.text == QUERY, found
    plain = client.rerank(query=QUERY, documents=DOCUMENTS, return_documents=False)
    assert len(plain.results) == 3 and plain.results[0].document is None, plain


async def beside(url: str) -> None:
    client = cohere.AsyncClientV2(api_key="none", base_url=url)
    asked = [client.rerank(model="tiny", query=QUERY, documents=DOCUMENTS) for _ in range(4)]
    for found in await asyncio.gather(*asked):
        assert found.results[0].index == 1, found


server_url = sys.argv[1]
second_version(server_url)
first_version(server_url)
asyncio.run(beside(server_url))
