"""Rejects unknown names and suggests the nearest known one."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from typing import Any, TypeVar

T = TypeVar("T")


def reject_unknown(names: Iterable[str], known: Sequence[str], what: str) -> None:
    """Raise ValueError for the first of `names` not in `known`, with the nearest spelling."""
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean '{close[0]}'? " if close else ""
            raise ValueError(f"unknown {what} '{name}'; {hint}known: {', '.join(sorted(known))}")


def strict_fields(
    what: str, known_elsewhere: Callable[[dict[str, Any], list[str]], dict[str, Any]] | None = None
) -> Callable[[type[T]], type[T]]:
    """Class decorator: a keyword argument that is no field raises ValueError with its name.

    known_elsewhere: takes the arguments and the names of fields, returns the arguments to use.
    """

    def decorate(cls: type[T]) -> type[T]:
        generated_init: Callable[..., None] = cls.__init__
        known = [f.name for f in fields(cls)]  # type: ignore[arg-type]

        def __init__(self: T, *args: Any, **kwargs: Any) -> None:
            if known_elsewhere is not None:
                kwargs = known_elsewhere(kwargs, known)
            reject_unknown(kwargs, known, what)
            generated_init(self, *args, **kwargs)

        cls.__init__ = __init__  # type: ignore[method-assign, assignment]
        return cls

    return decorate
