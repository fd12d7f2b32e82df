"""Renders chat templates by the rules of transformers' `apply_chat_template`, without transformers.

Templates are untrusted code: they run in Jinja's sandbox, on copies of the data that consist of
plain types only. Rendering needs no tokenizer.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

_MAX_COMPILED = 128  # templates
# Names under which messages hold an answer's reasoning; the first one found is used.
_REASONING = ("reasoning_content", "thinking", "reasoning")


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    variables: Mapping[str, Any],
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool | str = False,
) -> str:
    """The prompt of a conversation.

    variables: further variables of the template. continue_final_message: True if the prompt must
    end with the last message's content; or the name of another field of this message, with whose
    text the prompt must end. Raises ValueError for arguments that cannot be rendered, and whatever
    the template raises.
    """
    if not messages:
        raise ValueError("the conversation is empty; give at least one message")
    if continue_final_message and add_generation_prompt:
        raise ValueError(
            "continue_final_message and add_generation_prompt exclude each other: the prompt ends "
            "in the last message, or begins another one; leave one of them out"
        )
    for name, values in (("tools", tools), ("documents", documents)):
        if not all(isinstance(value, dict) for value in values or ()):
            raise ValueError(f"{name} must be a list of objects, got {values!r:.80}")
    chat = [_message(message) for message in messages]
    mark = text_to_continue = ""
    if continue_final_message:
        # The mark is appended to the text to continue, so that the end of this text can be found in
        # the rendered prompt. The space at the end of the mark shows whether the template trims the
        # text. The random number makes the mark unique.
        mark = f"END_{secrets.token_hex(16)} "
        field = continue_final_message if isinstance(continue_final_message, str) else "content"
        text_to_continue = _mark_end(chat[-1], field, template, mark)
    text = _compiled(template).render(
        messages=chat,
        tools=_plain(tools),
        documents=_plain(documents),
        add_generation_prompt=add_generation_prompt,
        **_plain(variables),
    )
    return _up_to_end(text, text_to_continue, mark) if continue_final_message else text


# -- data ------------------------------------------------------------------------------------------


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A plain copy without null fields, with the reasoning under all names that templates read."""
    plain = {name: value for name, value in _plain(message).items() if value is not None}
    found = next((plain[name] for name in _REASONING if name in plain), None)
    return plain if found is None else {"thinking": found, **plain, "reasoning_content": found}


def _plain(value: Any) -> Any:
    """A copy made of JSON's types; any other object becomes the name of its type."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    for kind in (str, int, float):  # enums and the like, which have methods of their own
        if isinstance(value, kind):
            return getattr(kind, f"__{kind.__name__}__")(value)
    if isinstance(value, Mapping):
        return {_plain(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return (list if isinstance(value, list) else tuple)(map(_plain, value))
    numpy = sys.modules.get("numpy")  # without it, no value is NumPy's
    if numpy is not None and isinstance(value, numpy.generic):
        return _plain(value.item())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {field.name: _plain(getattr(value, field.name)) for field in fields}
    if callable(getattr(value, "model_dump", None)):  # pydantic
        return _plain(value.model_dump())
    return f"<{type(value).__name__}>"


# -- the last message continued --------------------------------------------------------------------


def _mark_end(message: dict[str, Any], field: str, template: str, mark: str) -> str:
    """Mark the end of the text to continue, in the message. Returns the text without the mark."""
    value = message.get(field)
    if value is None:
        raise ValueError(f"continue_final_message: the last message has no '{field}'")
    fields = [field]
    if field in _REASONING:
        fields = [name for name in _REASONING if message.get(name) == value]
    if not any(name in template for name in fields):
        raise ValueError(f"continue_final_message: the chat template does not read '{field}'")
    if isinstance(value, str):
        message |= dict.fromkeys(fields, value + mark)
        return value
    parts = value if isinstance(value, list | tuple) else ()
    for part in reversed(parts):
        if isinstance(part, dict) and isinstance(text := part.get("text"), str):
            part["text"] = text + mark
            return text
    raise ValueError(f"continue_final_message: '{field}' of the last message has no text")


def _up_to_end(text: str, text_to_continue: str, mark: str) -> str:
    """The rendered text up to the mark, trimmed at its end if the template trims the message.

    If the template shows the message several times, the last mark counts.
    """
    trimmed = mark.strip()
    if trimmed not in text or text_to_continue.strip() not in text:
        raise ValueError(
            "continue_final_message: the chat template does not show the last message unchanged"
        )
    end = text.rindex(trimmed)
    shown = text[:end] if text.startswith(mark, end) else text[:end].rstrip()
    return shown.replace(mark, "").replace(trimmed, "")


# -- the environment -------------------------------------------------------------------------------


class _GenerationBlock(Extension):
    """{% generation %}...{% endgeneration %}, which mark the model's own text; no effect here."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Namespace(Namespace):
    """Jinja's namespace, without names with "_", through which Python's internals are reached."""

    def __init__(*args: Any, **attributes: Any) -> None:  # a template may name an attribute "self"
        self, *others = args
        found = dict(*others, **attributes)
        for name in found:
            _check_name(name)
        Namespace.__init__(self, found)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a chat template may not set the attribute {name!r} of a namespace")


class _Dict:
    """The function `dict` of templates, without the attributes of Python's type `dict`."""

    def __call__(self, *args: Any, **items: Any) -> dict[Any, Any]:
        return dict(*args, **items)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter `tojson`. Unlike Jinja's own filter, it does not escape HTML's characters."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


@lru_cache(_MAX_COMPILED)
def _compiled(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment.from_string(template)
