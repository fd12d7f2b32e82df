"""Derives the markers of a tool-call format from its `ToolFormat`, for the scanners of answers."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass

from compiledllm.server.openai.tool_formats import ToolFormat

# A marker, or the beginning of one.
MARKER = re.compile(r"<[^<>]*>?|\[[A-Z_]+\]")
_SPACE = " \t\n\r"


@dataclass(frozen=True, slots=True)
class Markers:
    """The markers of a format.

    openers: may begin a call. closers: end a call, or follow it. inner: occur only within calls.
    separators: characters that may stand between markers and calls. junk: characters between a
    call's arguments and its closer. head: matches a head. head_ends: characters that end a head.
    """

    openers: tuple[str, ...]
    closers: tuple[str, ...]
    inner: tuple[str, ...]
    separators: str
    junk: str
    head: re.Pattern[str]
    head_ends: str


@functools.cache
def markers_of(form: ToolFormat) -> Markers:
    head = "{name}" if form.syntax == "object" else form.head
    inner = (
        m for text in re.split(r"\{\w+\}", head + form.parameter) for m in MARKER.findall(text)
    )
    is_python = form.syntax == "python"
    return Markers(
        openers=(*MARKER.findall(form.begin + form.open), *form.extra_openers),
        closers=(*MARKER.findall(form.close + form.end), *form.extra_closers),
        inner=tuple(inner),
        separators=_SPACE + ",;[" + ("" if is_python else "]"),
        junk="" if is_python else "}" + form.close.partition("<")[0].strip(),
        head=_head_pattern(head.partition("{name}")[0]),
        head_ends={"tags": '<>"', "python": "("}.get(form.syntax, "{"),
    )


def _head_pattern(before: str) -> re.Pattern[str]:
    """Matches the text between opener and arguments, more liberally than the format's `head`."""
    call_id = rf"(?P<id>(?:{re.escape(before)})?(?P<name>[\w.-]+?)(?::\d+)?)"
    return re.compile(rf"[\s,;:\[\]]*{call_id}(?:\s*[^\w\s.({{-]\S*)?\s*")


@dataclass(frozen=True, slots=True)
class Tags:
    """An argument in tags: key_open, key, key_close, value_open, value, value_close.

    value_ends: texts that end a value; besides value_close also markers, as models may forget
    value_close. markers: key_open and the texts that end a call. marker, value_start, value_end:
    patterns of markers, of value_open or markers, and of value_ends. trims: whether a newline on
    either side of a value is not part of the value.
    """

    key_open: str
    key_close: str
    value_open: str
    value_close: str
    value_ends: tuple[str, ...]
    markers: tuple[str, ...]
    marker: re.Pattern[str]
    value_start: re.Pattern[str]
    value_end: re.Pattern[str]
    trims: bool


@functools.cache
def tags_of(form: ToolFormat) -> Tags:
    key_open, _, rest = form.parameter.partition("{key}")
    between, _, after = rest.partition("{value}")
    key_close, value_open = MARKER.findall(between) or (">", "")
    (value_close,) = MARKER.findall(after)
    trims, markers = between.endswith("\n"), (key_open, *markers_of(form).closers)
    value_ends = [("\n" if trims else "") + text for text in (value_close, *markers)]
    value_ends += [value_close] if trims else []
    return Tags(
        key_open,
        key_close,
        value_open,
        value_close,
        tuple(value_ends),
        markers,
        any_of(markers),
        any_of([value_open, *markers]),
        any_of(value_ends),
        trims,
    )


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the texts; if there are none, nothing."""
    return re.compile("|".join(map(re.escape, texts)) or r"(?!)")
