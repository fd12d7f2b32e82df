"""Chat templates are rendered as transformers renders them."""

from __future__ import annotations

import enum
import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from jinja2.exceptions import SecurityError, TemplateError
from tokenizers import Tokenizer as Backend
from tokenizers import models

from compiledllm.engine import chat_rendering, plain_tokenizer
from compiledllm.engine.plain_tokenizer import PlainTokenizer, TokenizerFacts
from compiledllm.engine.tokenizer import Tokenizer

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
ALL = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.thinking }}|"
    "{{ m.reasoning_content }}|{{ m.content }}{{ eos_token }}{% endfor %}{{ tools }}"
    "{{ documents }}{% if add_generation_prompt %}<assistant>{% endif %}{{ extra }}"
)
TRIMS = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</s>{% endfor %}"
PARTS = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}</s>{% endfor %}"
)
REASONING = "{% for m in messages %}{{ m.reasoning_content }}/{{ m.content }};{% endfor %}"
FEATURES = {
    "JSON": "{{ messages | tojson }}{{ tools | tojson(indent=2) }}{{ {'b': 1, 'a': 2} | tojson"
    "(sort_keys=true, separators=(',', ':'), ensure_ascii=true) }}",
    "loops": "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}"
    "{% break %}{% endfor %}",
    "generation": "{% set a = 1 %}{% for m in messages %}{% generation %}{% set a = 2 %}"
    "{{ m.content }}{{ a }}{% endgeneration %}{{ a }}{% endfor %}",
    "blocks": "  {% if true %}\n  x\n  {% endif %}\n  {#- none -#}\n y\n",
    "namespaces": "{% set n = namespace(a=1, self=2) %}{% set n.b = n.a + n.self %}{{ n.b }}",
    "dictionaries": "{{ dict(a=1) }}{{ dict([('b', 2)], c=3) }}{{ dict.fromkeys('ab', 0) }}",
    "time": "{{ strftime_now('%Y') }}",
    "undefined": "{{ nothing }}{{ messages[0].nothing }}{{ nothing is defined }}",
    "lists": "{{ messages[::-1] | map(attribute='role') | join(',') }}",
}
FAILING = {
    "its own": "{{ raise_exception('roles!') }}",
    "undefined": "{{ nothing.more }}",
    "syntax": "{% for %}",
    "internals": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "changes": "{{ messages.append(1) }}",
    "namespace": "{% set n = namespace(__class__=1) %}",
    "attribute": "{% set n = namespace() %}{% set n._x = 1 %}",
    "types": "{{ dict.mro() }}",
}


class Color(enum.StrEnum):
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


@dataclass
class Fact:
    name: str
    value: Any


class Pydantic:
    def model_dump(self) -> dict[str, Any]:
        return {"name": "x", "value": (1, None)}


VALUES = [1, 1.5, True, None, "<é&'>", Color.RED, Level.HIGH, np.float64(2.5), np.bool_(False)]
VALUES += [np.int64(4), Fact("a", [Fact("b", 2)]), Pydantic(), object(), {1: (2, "x")}, [[]]]

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"é": "<b>"}}}
TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "be kind", "name": None},
    {"role": "user", "content": " two words \n"},
]
ANSWER = {"role": "assistant", "content": " the ans "}
THINKS = {**ANSWER, "reasoning": "hmm "}
IN_PARTS = {"role": "assistant", "content": [{"type": "text", "text": "a"}, {"text": "b "}, {}]}


@pytest.fixture(scope="module")
def theirs() -> Any:
    from transformers import PreTrainedTokenizerFast

    backend = Backend(models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)


@pytest.fixture(scope="module")
def ours(theirs: Any) -> PlainTokenizer:
    backend = theirs.backend_tokenizer.to_str().encode()
    return PlainTokenizer(backend, TokenizerFacts(1, SPECIAL, [0, 1], None, False))


@pytest.mark.parametrize("template", [ALL, *FEATURES.values()], ids=["all", *FEATURES])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_generation_prompt": True, "tools": [TOOL], "documents": [{"title": "é"}]},
        {"tools": [], "bos_token": "<mine>", "extra": VALUES},
    ],
    ids=["plain", "tools", "variables"],
)
def test_templates_see_what_they_see_in_transformers(
    template: str, options: dict[str, Any], ours: PlainTokenizer, theirs: Any
) -> None:
    options = {**options, "chat_template": template, "tokenize": False}
    text = ours.apply_chat_template([*TALK, THINKS], **options)
    assert text == theirs.apply_chat_template([*TALK, THINKS], **options)


@pytest.mark.parametrize("template", FAILING.values(), ids=FAILING)
def test_templates_fail_where_they_fail_in_transformers(
    template: str, ours: PlainTokenizer, theirs: Any
) -> None:
    errors = []
    for tokenizer in (ours, theirs):
        with pytest.raises((TemplateError, SecurityError)) as caught:
            tokenizer.apply_chat_template(TALK, chat_template=template, tokenize=False)
        errors.append(caught.type)
    assert errors[0] is errors[1]


@pytest.mark.parametrize("template", [ALL, TRIMS, PARTS, REASONING])
@pytest.mark.parametrize(
    ("last", "field"),
    [
        (ANSWER, True),
        (IN_PARTS, True),
        (THINKS, True),
        (THINKS, "reasoning_content"),
        (THINKS, "thinking"),
        (THINKS, "reasoning"),
        (ANSWER, "reasoning_content"),
        ({"role": "assistant", "content": [{}]}, True),
        ({"role": "assistant", "content": None}, True),
        ({"role": "assistant", "content": ""}, True),
    ],
)
def test_a_message_is_continued_where_transformers_continues_it(
    template: str, last: dict[str, Any], field: bool | str, ours: PlainTokenizer, theirs: Any
) -> None:
    def render(tokenizer: Any, **options: Any) -> str | None:
        try:
            text: str = tokenizer.apply_chat_template(
                [*TALK, last], chat_template=template, tokenize=False, **options
            )
        except ValueError:
            return None
        return text.replace("CONTINUE_FINAL_MESSAGE_TAG ", "")  # of templates that show it twice

    options = {"continue_final_message": field}
    assert render(ours, **options) == render(theirs, **options)
    assert render(ours, add_generation_prompt=True, **options) is None


@pytest.mark.parametrize(
    "own", [None, "one", {"default": "d", "tool_use": "t"}, {"default": "d"}, {"x": "y", "z": "w"}]
)
@pytest.mark.parametrize("named", [None, "x", "{{ 1 }}"])
@pytest.mark.parametrize("tools", [None, [], [TOOL]])
def test_template_is_chosen_as_transformers_chooses(
    own: Any, named: str | None, tools: Any, ours: PlainTokenizer, theirs: Any
) -> None:
    def choose(tokenizer: Any) -> str | None:
        tokenizer.chat_template = own
        try:
            template: str = tokenizer.get_chat_template(named, tools)
        except ValueError:
            return None
        return template

    assert choose(ours) == choose(theirs)


@pytest.mark.parametrize(
    ("messages", "options", "message"),
    [
        ([], {}, "the conversation is empty"),
        (TALK, {"tools": ["f"]}, r"tools must be a list of objects, got \['f'\]"),
        (TALK, {"documents": [None]}, "documents must be a list of objects"),
    ],
)
def test_what_cannot_be_rendered_is_refused(
    messages: Any, options: dict[str, Any], message: str, ours: PlainTokenizer, theirs: Any
) -> None:
    with pytest.raises(ValueError, match=message):
        ours.apply_chat_template(messages, ALL, tokenize=False, **options)
    with pytest.raises((ValueError, TypeError)):
        theirs.apply_chat_template(messages, chat_template=ALL, tokenize=False, **options)


def add(a: int) -> int:
    """Adds.

    Args:
        a: a number
    """
    return a


@pytest.mark.parametrize("options", [{"tools": [add]}, {"padding": True}])
def test_rare_options_are_left_to_transformers(
    options: dict[str, Any], ours: PlainTokenizer, theirs: Any
) -> None:
    tokenizer = Tokenizer.__new__(Tokenizer)
    tokenizer.inner, tokenizer.hf, tokenizer._template_forms = ours, theirs, {}
    tokenizer._template_defaults = {}
    template = "{{ padding }}{% for m in messages %}{{ m.content }}{% endfor %}{{ tools }}"
    text, _ = tokenizer.encode_chat(TALK, template, **options)
    assert text == theirs.apply_chat_template(
        TALK, chat_template=template, tokenize=False, **options
    )


def test_no_parameter_of_transformers_is_taken_for_a_variable() -> None:
    from transformers import PreTrainedTokenizerFast

    parameters = inspect.signature(PreTrainedTokenizerFast.apply_chat_template).parameters
    own = inspect.signature(PlainTokenizer.apply_chat_template).parameters
    known = own.keys() | plain_tokenizer._RARE_OPTIONS
    assert parameters.keys() - {"conversation", "kwargs"} <= known


def test_words_that_look_like_a_mark_stay() -> None:
    words = "say END_OF_TEXT_TO_CONTINUE and END_0123456789abcdef0123456789abcdef now"
    messages = [{"role": "user", "content": words}, {"role": "assistant", "content": words}]
    template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    found = chat_rendering.render(template, messages, {}, continue_final_message=True)
    assert found == f"[{words}][{words}"
