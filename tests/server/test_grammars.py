"""Grammars of strangers, sent to a server: it lives on, and serves others meanwhile."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

from tests.support.grammars import references, rules


def ask(server: Any, **fields: Any) -> tuple[int | None, Any]:
    status, answer = server.post("/v1/completions", {"prompt": "x", "max_tokens": 8} | fields)
    return status, answer


def chat(server: Any, schema: dict[str, Any]) -> tuple[int | None, Any]:
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    body = {"messages": [{"role": "user", "content": "hi"}], "response_format": wanted}
    found: tuple[int | None, Any] = server.post("/v1/chat/completions", body | {"max_tokens": 8})
    return found


def test_deep_grammars_are_a_400_and_both_processes_live_on(server: Any) -> None:
    before = server.process.pid, server.engine_pid()
    attacks = [
        (ask(server, structured_outputs={"grammar": rules(6000)}), "structured_outputs"),
        (chat(server, references(1800)), "response_format"),
    ]
    for (status, answer), param in attacks:
        assert status == 400 and answer["error"]["param"] == param, answer
        assert answer["error"]["message"] == (
            f"{param} cannot be compiled: it is nested too deep; make it simpler"
        )
    assert server.process.poll() is None and (server.process.pid, server.engine_pid()) == before
    assert ask(server, structured_outputs={"regex": "[ab]{4}"})[0] == 200


def test_grammars_that_take_long_hold_up_no_other_request(server: Any) -> None:
    slow = {"oneOf": [{"pattern": f"a{i}"} for i in range(300)]}
    statuses: list[int | None] = []
    attacks = [
        threading.Thread(
            target=lambda i=i: statuses.append(chat(server, slow | {"title": str(i)})[0])
        )
        for i in range(8)
    ]
    for thread in attacks:
        thread.start()
    longest, count = 0.0, 0
    while any(thread.is_alive() for thread in attacks):
        begun = time.monotonic()
        assert ask(server, max_tokens=1)[0] == 200
        longest, count = max(longest, time.monotonic() - begun), count + 1
    assert count > 3 and longest < 10  # they end after seconds; these wait for none of them
    assert set(statuses) <= {400, 503}
    status, answer = chat(server, {"enum": ["a"]})
    assert status == 200 and json.loads(answer["choices"][0]["message"]["content"]) == "a"


def test_refusals_name_the_place_and_a_way_out(server: Any) -> None:
    schema = {"type": "object", "properties": {"a": {"uniqueItems": True, "items": {}}}}
    status, answer = chat(server, schema)
    assert status == 400 and answer["error"]["param"] == "response_format"
    message = answer["error"]["message"]
    assert "the schema at #/properties/a: uniqueItems true" in message and "leave it out" in message
