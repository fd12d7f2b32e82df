"""Checks callers' arguments: unknown names, with the nearest known one, and values of fields."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from operator import attrgetter
from typing import Any, Self, TypeVar

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

    known_elsewhere: called with the arguments and the names of fields; returns the arguments to
    use, without those that are accepted but are not fields.
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


class Rechecked:
    """Base class of a mutable dataclass with slots whose `__post_init__` checks the fields.

    `__post_init__` must end with `note_checked()`.
    """

    __slots__ = ("_checked",)

    def note_checked(self) -> None:
        """Remember the values of all fields, which have just been checked."""
        self._checked = _contents(self)

    def checked_copy(self) -> Self:
        """A copy with lists and dicts of its own.

        All fields are checked again, which takes longer than the copy, if one has changed since the
        last check. Raises what `__post_init__` raises.
        """
        contents = _contents(self)
        if getattr(self, "_checked", None) != contents:
            return replace(self)  # type: ignore[type-var]
        cls: Any = type(self)
        copy: Self = object.__new__(cls)
        for name, value in zip(_field_names(cls), contents[0], strict=True):
            setattr(copy, name, value)
        copy._checked = self._checked
        return copy


def _contents(instance: object) -> tuple[list[Any], list[type]]:
    """The values of all fields, with copies of lists and dicts, and their types, as 1 == True."""
    cls: Any = type(instance)
    found, kinds = _reader(cls)(instance), []
    values = list(found)
    for index, value in enumerate(found):
        kinds.append(kind := type(value))
        if kind is list or kind is dict:
            values[index] = value.copy()
    return values, kinds


@functools.cache
def _field_names(cls: Any) -> tuple[str, ...]:
    return tuple(f.name for f in fields(cls))


@functools.cache
def _reader(cls: Any) -> attrgetter[tuple[Any, ...]]:
    return attrgetter(*_field_names(cls))


def require(ok: bool, name: str, value: object, must: str) -> None:
    """Raise ValueError unless `ok`. must: describes the values that the field `name` may have."""
    if not ok:
        raise ValueError(f"{name} must be {must}, got {value!r:.80}")


def require_int(params: object, name: str, min_value: int, max_value: int) -> None:
    """Raise ValueError unless the field `name` of `params` is an integer in this range."""
    value = getattr(params, name)
    ok = is_int(value) and min_value <= value <= max_value
    require(ok, name, value, f"an integer from {min_value} to {max_value}")


def is_int(value: object) -> bool:
    """Whether this is an integer; False for booleans."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_finite(value: object) -> bool:
    """Whether this is a number that float32 can hold; False for NaN."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and abs(value) <= 1e38  # type: ignore[arg-type]


def plain_number(value: Any) -> Any:
    """A NumPy or torch scalar as a Python number; any other value unchanged."""
    if isinstance(value, (int, float)) or not hasattr(value, "item"):
        return value
    return value.item() if getattr(value, "shape", None) == () else value


def string_list(value: Any, name: str, max_count: int) -> list[str]:
    """A field that takes one string or several as a list without duplicates. None: no string."""
    texts = [value] if isinstance(value, str) else [] if value is None else value
    ok = isinstance(texts, (list, tuple)) and all(isinstance(s, str) and s for s in texts)
    require(ok, name, value, "a non-empty string or a list of non-empty strings")
    require(len(texts) <= max_count, name, f"{len(texts)} strings", f"at most {max_count} strings")
    return list(dict.fromkeys(texts))


def token_id_list(value: Any, name: str, max_count: int) -> list[int]:
    """A field of token ids as a list without duplicates. None: no token id."""
    ids = [] if value is None else value
    ok = isinstance(ids, (list, tuple)) and all(is_int(i) and i >= 0 for i in ids)
    require(ok, name, value, "a list of token ids (integers >= 0)")
    require(len(ids) <= max_count, name, f"{len(ids)} token ids", f"at most {max_count} token ids")
    return list(dict.fromkeys(ids))


def token_biases(value: Any, name: str, max_count: int) -> dict[int, float]:
    """A field of numbers by token id, clamped to -100 to 100. Keys may be strings, as in JSON."""
    require(isinstance(value, Mapping), name, value, "a mapping of token ids to numbers")
    require(len(value) <= max_count, name, f"{len(value)} entries", f"at most {max_count}")
    biases: dict[int, float] = {}
    for key, bias in value.items():
        text = str(key)
        require(text.isdecimal(), name, key, "keyed by token ids (integers >= 0)")
        require(is_finite(bias), name, bias, "of finite numbers")
        biases[int(text)] = min(max(float(bias), -100.0), 100.0)
    return biases
