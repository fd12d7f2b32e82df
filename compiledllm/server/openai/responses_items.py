"""The items of a response, and the events by which a stream shows how they grow."""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import msgspec

_ENCODE = msgspec.json.Encoder().encode


class EventWriter:
    """Numbers a stream's events. An event's name stands before its data and in its data."""

    def __init__(self) -> None:
        self._number = -1

    def event(self, name: str, /, **fields: Any) -> bytes:
        return self.fill(self.head(name, **fields), b"}\n\n")

    def head(self, name: str, /, **fields: Any) -> bytes:
        """An event up to its sequence number; events that differ only after it share a head."""
        name = f"response.{name}"
        data = _ENCODE({"type": name} | fields)[:-1]
        return b'event: %s\ndata: %s,"sequence_number":' % (name.encode(), data)

    def fill(self, head: bytes, rest: bytes) -> bytes:
        self._number += 1
        return b"%s%d%s" % (head, self._number, rest)


class Item(ABC):
    """An item that grows.

    text_event, part_event: prefixes of the names of the events about its text and about its part.
    pieces: its text so far, where the text of a call is its arguments. place: the fields that all
    its events have.
    """

    prefix: ClassVar[str]
    text_event: ClassVar[str]
    part_event: ClassVar[str] = "content_part"
    part_index: ClassVar[dict[str, int]] = {"content_index": 0}

    def __init__(self, index: int) -> None:
        self.id = f"{self.prefix}_{uuid.uuid4().hex}"
        self.index = index
        self.pieces: list[str] = []
        self.logprobs: list[Any] = []
        self.place = {"item_id": self.id, "output_index": index} | self.part_index

    @abstractmethod
    def part(self, text: str) -> dict[str, Any] | None:
        """The item's only part, with this text; None if the item has no parts."""

    @abstractmethod
    def shown(self, status: str, text: str, parts: list[dict[str, Any]]) -> dict[str, Any]:
        """The item as an answer has it. parts: the part, or nothing before it is added."""

    def done(self, text: str) -> dict[str, Any]:
        """The fields of the event that ends the text."""
        return {"text": text}


class TextItem(Item):
    prefix, text_event = "msg", "output_text"

    def part(self, text: str) -> dict[str, Any]:
        logprobs = self.logprobs if text else []
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def shown(self, status: str, text: str, parts: list[dict[str, Any]]) -> dict[str, Any]:
        head = {"id": self.id, "type": "message", "status": status}
        return head | {"role": "assistant", "content": parts}

    def done(self, text: str) -> dict[str, Any]:
        return {"text": text, "logprobs": self.logprobs}


class ReasoningItem(Item):
    prefix, text_event = "rs", "reasoning_text"

    def part(self, text: str) -> dict[str, Any]:
        return {"type": "reasoning_text", "text": text}

    def shown(self, status: str, text: str, parts: list[dict[str, Any]]) -> dict[str, Any]:
        head = {"id": self.id, "type": "reasoning", "status": status}
        return head | {"summary": [], "content": parts}


class SummaryItem(Item):
    """The reasoning, shown where clients look for its summary."""

    prefix, text_event, part_event = "rs", "reasoning_summary_text", "reasoning_summary_part"
    part_index: ClassVar[dict[str, int]] = {"summary_index": 0}

    def part(self, text: str) -> dict[str, Any]:
        return {"type": "summary_text", "text": text}

    def shown(self, status: str, text: str, parts: list[dict[str, Any]]) -> dict[str, Any]:
        head = {"id": self.id, "type": "reasoning", "status": status}
        return head | {"summary": parts}


class CallItem(Item):
    prefix, text_event = "fc", "function_call_arguments"
    part_index: ClassVar[dict[str, int]] = {}

    def __init__(self, index: int, call_id: str, name: str) -> None:
        super().__init__(index)
        self.call_id, self.name = call_id, name

    def part(self, text: str) -> None:
        return None

    def shown(self, status: str, text: str, parts: list[dict[str, Any]]) -> dict[str, Any]:
        head = {"id": self.id, "type": "function_call", "status": status}
        return head | {"call_id": self.call_id, "name": self.name, "arguments": text}

    def done(self, text: str) -> dict[str, Any]:
        return {"arguments": text, "name": self.name}


class OutputItems:
    """Turns the deltas of a chat into items, one after the other.

    reasoning_kind: the kind of item that shows reasoning. finished: the items that have ended, as
    an answer has them.
    """

    def __init__(self, writer: EventWriter, reasoning_kind: type[Item] = ReasoningItem) -> None:
        self.finished: list[dict[str, Any]] = []
        self._writer = writer
        self._reasoning_kind = reasoning_kind
        self._open: Item | None = None
        self._delta_head = b""  # of the open item
        self._early_logprobs: list[Any] = []  # of tokens whose text is still held back

    @property
    def is_in_text(self) -> bool:
        return type(self._open) is TextItem

    def grow(self, deltas: list[dict[str, Any]], logprobs: list[Any]) -> bytes:
        """The events of a chat's deltas. logprobs: of the tokens after the reasoning.

        If one piece has content and calls, the log probabilities of all its tokens go to the first
        content.
        """
        deltas = deltas or [{}]
        first = next((delta for delta in deltas if delta.get("content")), deltas[0])
        events = b""
        for delta in deltas:
            self._early_logprobs += logprobs if delta is first else []
            events += self._grow(delta)
        return events

    def _grow(self, delta: dict[str, Any]) -> bytes:
        events = []
        calls = delta.get("tool_calls", [])
        if calls and "name" not in calls[0]["function"]:  # the rest of the open call
            events.append(self.add(calls[0]["function"]["arguments"]))
            calls = calls[1:]
        if reasoning := delta.get("reasoning"):
            events += [self._enter(self._reasoning_kind), self.add(reasoning)]
        if content := delta.get("content"):
            events += [self._enter(TextItem), self._add_content(content)]
        for call in calls:
            function = call["function"]
            events.append(self.close("completed"))
            item = CallItem(len(self.finished), call["id"], function["name"])
            events.append(self._begin(item))
            if function["arguments"]:
                events.append(self.add(function["arguments"]))
            self._early_logprobs = []
        return b"".join(events)

    def add(self, text: str) -> bytes:
        """The event of more text of the open item."""
        assert self._open is not None
        self._open.pieces.append(text)
        return self._writer.fill(self._delta_head, b',"delta":%s}\n\n' % _ENCODE(text))

    def _add_content(self, text: str) -> bytes:
        """The event of more text of the open message, with the tokens' log probabilities."""
        item, logprobs, self._early_logprobs = self._open, self._early_logprobs, []
        if not logprobs:
            return self.add(text)
        assert item is not None
        item.pieces.append(text)
        item.logprobs += logprobs
        place = item.place | {"delta": text, "logprobs": logprobs}
        return self._writer.event("output_text.delta", **place)

    def end(self, status: str) -> bytes:
        """The events that end the last item; an answer without any has an empty message."""
        events = b"" if self._open or self.finished else self._enter(TextItem)
        return events + self.close(status)

    def close(self, status: str) -> bytes:
        """The events that end the open item, if there is one."""
        item = self._open
        if item is None:
            return b""
        self._open = None
        text = "".join(item.pieces)
        part, event = item.part(text), self._writer.event
        shown = item.shown(status, text, [] if part is None else [part])
        self.finished.append(shown)
        events = event(f"{item.text_event}.done", **item.place, **item.done(text))
        if part is not None:
            events += event(f"{item.part_event}.done", **item.place, part=part)
        return events + event("output_item.done", output_index=item.index, item=shown)

    def _enter(self, kind: type[Item]) -> bytes:
        """The events that make an item of this kind the open one."""
        if type(self._open) is kind:
            return b""
        closed = self.close("completed")
        return closed + self._begin(kind(len(self.finished)))

    def _begin(self, item: Item) -> bytes:
        self._open, writer = item, self._writer
        same = item.place | ({"logprobs": []} if type(item) is TextItem else {})
        self._delta_head = writer.head(f"{item.text_event}.delta", **same)
        shown = item.shown("in_progress", "", [])
        events = writer.event("output_item.added", output_index=item.index, item=shown)
        if (part := item.part("")) is not None:
            events += writer.event(f"{item.part_event}.added", **item.place, part=part)
        return events
