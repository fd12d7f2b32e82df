"""Readers of one tool call's arguments, for each syntax of `tool_formats`.

A reader turns what the model writes into the text of a JSON object, piece by piece. How the text is
cut into pieces makes no difference, and the time is linear in the text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from compiledllm.server.openai.call_scanner import CallScanner
from compiledllm.server.openai.format_markers import tags_of
from compiledllm.server.openai.held_reader import State
from compiledllm.server.openai.literal_readers import GemmaReader, PythonReader
from compiledllm.server.openai.tag_reader import TagReader
from compiledllm.server.openai.tool_formats import ToolFormat

Names = Mapping[str, Any]
"""The functions that may be called: name -> JSON schema of the arguments, or None."""


class CallReader(Protocol):
    """The interface of all readers.

    state: "open" while the call continues, "done" after its end, "failed" if the text is not a
    call. is_known: whether the text is certainly a call; after that, "failed" means that the call
    breaks off, and `missing_brackets` would complete its arguments. is_tentative: whether the text
    that a new reader has been given may turn out to be no call at all.
    """

    state: State
    is_known: bool
    is_tentative: bool
    name: str | None

    @property
    def missing_brackets(self) -> str: ...

    def feed(self, text: str, position: int) -> int:
        """Read on from `position`, and return the position of the first character not read."""

    def finish(self) -> None:
        """End the text: complete the arguments, if possible."""

    def raw(self) -> str:
        """All text that has been read, as long as the call is not known."""

    def unread(self) -> str:
        """Text from earlier `feed`s that turns out not to belong to the call."""

    def take_arguments(self) -> str:
        """The arguments' text since the last call of this method; "" before the call is known."""


def reader_of(form: ToolFormat, names: Names, name: str) -> CallReader:
    """A reader for a call of this function; its text begins with the character after the head."""
    if form.syntax == "tags":
        return TagReader(tags_of(form), name, names[name])
    if form.syntax == "gemma":
        return GemmaReader(name)
    if form.syntax == "python":
        return PythonReader(name)
    return CallScanner(names, name)
