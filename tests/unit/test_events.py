"""Events made from a template are, to the byte, those made from a body."""

from __future__ import annotations

from typing import Any

import pytest

from compiledllm.outputs import FinishReason
from compiledllm.server.openai import events
from compiledllm.server.openai.events import Template, event, hole


def body(created: Any, index: Any, text: Any, reason: Any, stop: Any) -> dict[str, Any]:
    ending = {"finish_reason": reason, "stop_reason": stop}
    choice = {"index": index, "delta": {"content": text}} | ending
    return {"id": '100%(text)b "\0', "created": created, "choices": [choice], "usage": None}


@pytest.mark.parametrize(
    ("text", "reason", "stop"),
    [
        (" word", None, None),
        ('"\\\n\0%(index)b\u2028 é \U0001f600', "length", None),
        ("", "stop", 17),
        ("%s", "stop", 'E"ND'),
    ],
)
def test_a_filled_template_is_the_event(
    text: str, reason: FinishReason | None, stop: int | str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events.time, "time", lambda: 1700000000.9)
    names = ("created", "index", "text", "finish_reason", "stop_reason")
    template = Template(body(*map(hole, names)))
    assert template.fill(3, text, reason, stop) == event(body(1700000000, 3, text, reason, stop))
