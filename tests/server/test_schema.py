"""Every route of /openapi.json answers as it says there, to bodies that fit their schema or do not.

schemathesis draws the bodies and judges the answers, of each route and kind a quarter of the
profile's number of examples, as each takes a request. What decides how long an answer takes is made
small, and the model of a body that fits is the one that is served.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from compiledllm.sampling_params import MAX_N

pytestmark = pytest.mark.real_model  # its tokenizer

POSTS = ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"]
POSTS += ["/v1/messages", "/v1/messages/count_tokens", "/v1/responses"]
POOLING = ["/v1/embeddings", "/score", "/rerank"]
POSTS += POOLING
OTHER_NAMES = {"/v1/score": "/score", "/v1/rerank": "/rerank", "/v2/rerank": "/rerank"}
GETS = ["/v1/models", "/v1/models/{model}", "/health", "/ready", "/version", "/metrics", "/config"]
GETS += ["/ping", "/load"]
STORED = "/v1/responses/{response_id}"
OTHERS = [("GET", path) for path in (*GETS, STORED)] + [("DELETE", STORED)]
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]
# By field: how much is asked for here, and the most that the schema allows.
LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
MOST = dict.fromkeys(LIMITS, (4, 2**31 - 1))
MOST |= {"min_tokens": (2, 2**31 - 1), "n": (2, MAX_N), "best_of": (2, MAX_N)}


@pytest.fixture(scope="module")
def api(server: Any) -> Any:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def shorten(body: Any, limit: str) -> None:
    """Few tokens to generate. What the schema does not allow stays as it is."""
    if isinstance(body, dict):
        body.setdefault(limit, 2)
        for name, (most, allowed) in MOST.items():
            if type(value := body.get(name)) is int and most < value <= allowed:
                body[name] = most


def answers(api: Any, method: str, path: str, mode: GenerationMode) -> Counter[int]:
    """How many answers there were of each status, to requests drawn from the route's schema."""
    statuses: Counter[int] = Counter()
    session = requests.Session()

    @settings(
        suppress_health_check=list(HealthCheck),
        max_examples=settings.default.max_examples // 4,
    )
    @given(api[path][method].as_strategy(generation_mode=mode), st.booleans())
    def ask(case: Case, is_streamed: bool) -> None:
        if path.endswith(("completions", "messages", "responses")):
            shorten(case.body, "max_output_tokens" if "responses" in path else "max_tokens")
            if mode.is_positive:
                case.body |= {"stream": is_streamed, "model": "tiny"}
        if path in POOLING and mode.is_positive:
            case.body |= {"stream": False, "model": "tiny", "truncate_prompt_tokens": None}
            if path.endswith("embeddings") and is_streamed:  # few drawn ids are in the vocabulary
                case.body |= {"input": "a", "dimensions": None, "priority": 0}
            if path.endswith("score"):  # the schema does not say that one pair of names is needed
                case.body |= {"queries": "a", "documents": ["b"], "text_1": None, "text_2": None}
        response = case.call(session=session, timeout=60)
        statuses[response.status_code] += 1
        case.validate_response(response, checks=CHECKS)

    ask()
    return statuses


def test_no_route_is_left_out(api: Any) -> None:
    found = [(item.ok().method.upper(), item.ok().path) for item in api.get_all_operations()]
    posts = [("POST", path) for path in (*POSTS, *OTHER_NAMES)]
    assert sorted(found) == sorted(posts + OTHERS)


@pytest.mark.parametrize("path", OTHER_NAMES)
def test_other_names_of_a_route_say_the_same(path: str, api: Any) -> None:
    """tests/server/test_rerank.py shows that they do the same."""
    said, wanted = (
        dict(api.raw_schema["paths"][name]["post"]) for name in (path, OTHER_NAMES[path])
    )
    assert said.pop("operationId") != wanted.pop("operationId")
    assert said == wanted


@pytest.mark.parametrize("path", POSTS)
def test_bodies_that_fit(path: str, api: Any, server: Any) -> None:
    statuses = answers(api, "POST", path, GenerationMode.POSITIVE)
    assert statuses[200] and set(statuses) <= {200, 400, 404}, statuses
    assert server.get("/health")[0] == 200


@pytest.mark.parametrize("path", POSTS)
def test_bodies_that_do_not_fit(path: str, api: Any, server: Any) -> None:
    statuses = answers(api, "POST", path, GenerationMode.NEGATIVE)
    assert statuses[400] and 200 not in statuses, statuses
    assert server.get("/health")[0] == 200


@pytest.mark.parametrize(("method", "path"), OTHERS)
def test_routes_without_a_body(method: str, path: str, api: Any, server: Any) -> None:
    statuses = answers(api, method, path, GenerationMode.POSITIVE)
    allowed = {400, 404} if path == STORED else {200, 404}  # this server keeps no responses
    assert set(statuses) <= allowed, statuses
    assert server.get("/health")[0] == 200
