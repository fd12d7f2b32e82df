"""`/score` and `/rerank`: the bodies of vLLM, Cohere and Jina, and what comes back."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.real_model  # its tokenizer

QUERY = "What is the capital of China?"
DOCUMENTS = ["Gravity attracts bodies.", "The capital of China is Beijing.", "Hello"]


@pytest.mark.parametrize("path", ["/score", "/v1/score"])
@pytest.mark.parametrize("names", [("queries", "documents"), ("text_1", "text_2")])
def test_pairs_are_scored_in_order(path: str, names: tuple[str, str], server: Any) -> None:
    def ask(first: Any, second: Any) -> Any:
        status, answer = server.post(path, dict(zip(names, (first, second), strict=True)))
        assert status == 200, answer
        assert [item["index"] for item in answer["data"]] == list(range(len(answer["data"])))
        return [item["score"] for item in answer["data"]]

    (same,) = ask(QUERY, QUERY)
    assert same == pytest.approx(1, abs=1e-3)
    many = ask(QUERY, DOCUMENTS)
    assert ask([QUERY] * 3, DOCUMENTS) == pytest.approx(many, abs=1e-3)
    assert ask(QUERY, DOCUMENTS[1]) == pytest.approx(many[1:2], abs=1e-3)


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_documents_come_back_best_first(path: str, server: Any) -> None:
    body = {"model": "tiny", "query": QUERY, "documents": [DOCUMENTS[0], {"text": QUERY}, "Hello"]}
    status, answer = server.post(path, body)
    assert status == 200, answer
    results = answer["results"]
    assert sorted(item["index"] for item in results) == [0, 1, 2]
    assert results[0]["index"] == 1 and results[0]["document"] == {"text": QUERY}
    found = [item["relevance_score"] for item in results]
    assert found == sorted(found, reverse=True)
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] > 0
    more = {"top_n": 2, "return_documents": False}
    assert server.post(path, body | more)[1]["results"] == [
        {
            "index": item["index"],
            "relevance_score": pytest.approx(item["relevance_score"], abs=1e-3),
        }
        for item in results[:2]
    ]
    assert len(server.post(path, body | {"top_n": 9})[1]["results"]) == 3
    assert answer["meta"]["tokens"]["input_tokens"] == answer["usage"]["prompt_tokens"]


def test_documents_are_cut_where_the_body_says_so(server: Any) -> None:
    def ask(documents: list[str], **more: Any) -> list[Any]:
        body = {"query": QUERY, "documents": documents, **more}
        status, answer = server.post("/v2/rerank", body)
        assert status == 200, answer
        return sorted(answer["results"], key=lambda item: int(item["index"]))

    long = [text + " and so on" * 3000 for text in (QUERY, DOCUMENTS[0])]
    assert server.post("/v2/rerank", {"query": QUERY, "documents": long})[0] == 400
    num_tokens = len(server.post("/tokenize", {"prompt": QUERY})[1]["tokens"])
    first, second = ask(long, max_tokens_per_doc=num_tokens)
    assert first["relevance_score"] == pytest.approx(1, abs=1e-3)
    assert second["relevance_score"] < 0.9
    assert first["document"]["text"] == long[0], "as it was sent"
    scores = [
        [item["relevance_score"] for item in ask(DOCUMENTS, max_tokens_per_doc=limit)]
        for limit in (0, 100)
    ]
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        ("/score", {"queries": "a"}, "documents", "documents is missing"),
        ("/score", {"text_1": "a"}, "text_2", "text_2 is missing"),
        ("/score", {"queries": "a", "text_1": "a", "text_2": "b"}, "text_1", "give one"),
        ("/score", {"queries": ["a"] * 2, "documents": ["b"] * 3}, "queries", "make no pairs"),
        ("/score", {"queries": "a", "documents": ""}, "documents", "the prompt is empty"),
        ("/rerank", {"query": "a", "documents": []}, "documents", "at least 1 item"),
        ("/rerank", {"query": "a", "documents": [{"t": 1}]}, "documents.0.text", "text"),
        ("/rerank", {"query": "a", "documents": ["b"], "stream": True}, "stream", "must be false"),
        (
            "/rerank",
            {"query": "a", "documents": ["b"], "instruction": "x"},
            "instruction",
            "is for rerankers",
        ),
    ],
)
def test_bad_pairs_are_named(path: str, body: Any, param: str, message: str, server: Any) -> None:
    status, answer = server.post(path, body)
    assert status == 400
    assert message in answer["error"]["message"]
    assert answer["error"]["param"] in (param, param.split(".")[0], "documents.0")
