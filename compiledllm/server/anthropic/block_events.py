"""Server-sent events of a message's content blocks, made from the deltas of a chat's choice."""

from __future__ import annotations

from typing import Any

import msgspec

_ENCODE = msgspec.json.Encoder().encode
# By type of block: the delta's type and the name of its text.
_DELTAS = {
    "text": (b"text_delta", b"text"),
    "thinking": (b"thinking_delta", b"thinking"),
    "tool_use": (b"input_json_delta", b"partial_json"),
}


def named_event(body: dict[str, Any]) -> bytes:
    """An event whose name is the body's type."""
    name: str = body["type"]
    return b"event: " + name.encode() + b"\ndata: " + _ENCODE(body) + b"\n\n"


class BlockEvents:
    """Opens and closes the blocks as parts come; at most one block is open."""

    def __init__(self) -> None:
        self._index = -1
        self._open: str | None = None  # the type of the open block
        self._head = b""  # of a delta of the open block, up to its text

    def add(self, delta: dict[str, Any]) -> bytes:
        """The events of a delta of `Choice`."""
        events = b""
        calls = delta.get("tool_calls", [])
        if calls and "id" not in calls[0]:  # the rest of the open call
            events += self._delta(calls[0]["function"]["arguments"])
            calls = calls[1:]
        if reasoning := delta.get("reasoning"):
            events += self.text("thinking", reasoning)
        if content := delta.get("content"):
            events += self.text("text", content)
        for call in calls:
            function = call["function"]
            block = {"id": call["id"], "name": function["name"], "input": {}}
            events += self.close() + self._begin("tool_use", block)
            if function["arguments"]:
                events += self._delta(function["arguments"])
        return events

    def text(self, kind: str, text: str) -> bytes:
        """The events of more text, in the open block if it is of this kind: text or thinking."""
        if kind == self._open:
            return self._delta(text)
        block = {"text": ""} if kind == "text" else {"thinking": "", "signature": ""}
        return self.close() + self._begin(kind, block) + self._delta(text)

    def close(self) -> bytes:
        """End the open block, if there is one."""
        if self._open is None:
            return b""
        self._open = None
        return named_event({"type": "content_block_stop", "index": self._index})

    def _begin(self, kind: str, block: dict[str, Any]) -> bytes:
        self._index, self._open = self._index + 1, kind
        self._head = (
            b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,'
            b'"delta":{"type":"%s","%s":' % (self._index, *_DELTAS[kind])
        )
        block = {"type": kind} | block
        return named_event(
            {"type": "content_block_start", "index": self._index, "content_block": block}
        )

    def _delta(self, text: str) -> bytes:
        return self._head + _ENCODE(text) + b"}}\n\n"
