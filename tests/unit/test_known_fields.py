"""Fields that no body has: named, a bounded number of times."""

from __future__ import annotations

import logging

import pytest

pytest.importorskip("msgspec")

from compiledllm.server.openai.bodies import Body
from compiledllm.server.openai.errors import ApiError
from compiledllm.server.openai.known_fields import MAX_NAMED, KnownFields, ignored_header


def body(*names: str) -> Body:
    return Body(unknown_fields=list(names))


def test_each_name_gets_one_line_up_to_a_number(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("compiledllm"), "propagate", True)
    fields = KnownFields(is_strict=False)
    for _ in range(3):
        assert fields.unknown(body("a\n", "b")) == ["a\n", "b"]
    assert [record.getMessage() for record in caplog.records] == [
        "requests have a field that is ignored: 'a\\n'",
        "requests have a field that is ignored: 'b'",
    ]
    for number in range(1000):
        fields.unknown(body(str(number)))
    assert len(caplog.records) == MAX_NAMED
    assert caplog.records[-1].getMessage().endswith("no more are named")


def test_strict_servers_refuse_the_first_names() -> None:
    with pytest.raises(ApiError, match="unknown fields: a, b") as refused:
        KnownFields(is_strict=True).unknown(body("a", "b"))
    assert refused.value.param == "a"
    assert KnownFields(is_strict=True).unknown(body()) == []


def test_the_header_is_short_and_plain() -> None:
    assert ignored_header([]) == {}
    assert ignored_header(["a", "b\r\nx: y", "ü", "c"]) == {"x-ignored-fields": "a,c"}
    assert len(ignored_header(["x" * 200] * 200)["x-ignored-fields"]) == 1024
