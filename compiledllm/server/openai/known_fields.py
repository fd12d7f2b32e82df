"""Handles fields that no body declares: logs each name once and names the fields in the answer."""

from __future__ import annotations

from compiledllm.log import log
from compiledllm.server.openai.bodies import Body
from compiledllm.server.openai.errors import ApiError

MAX_NAMED = 64  # names with a log line of their own
MAX_HEADER_LENGTH = 1024


class KnownFields:
    """Finds a body's unknown fields. is_strict: whether an unknown field is an error."""

    def __init__(self, is_strict: bool) -> None:
        self._is_strict = is_strict
        self._named: set[str] = set()

    def unknown(self, body: Body) -> list[str]:
        """The names of a body's unknown fields. Raises ApiError if there are any in strict mode."""
        names = body.unknown_fields
        if names and self._is_strict:
            raise ApiError(400, f"unknown fields: {', '.join(names[:16])}", names[0])
        for name in names:
            if name not in self._named and len(self._named) < MAX_NAMED:
                self._named.add(name)
                last = len(self._named) == MAX_NAMED
                more = "; no more are named" if last else ""
                log.warning("requests have a field that is ignored: %.64r%s", name, more)
        return list(names)


def ignored_header(names: list[str]) -> dict[str, str]:
    """A response header that names the fields that had no effect."""
    plain = ",".join(name for name in names if name.isascii() and name.isprintable())
    return {"x-ignored-fields": plain[:MAX_HEADER_LENGTH]} if names else {}
