"""Answers in parts: what comes of whole texts, and that any chunking gives the same."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from compiledllm.server.openai.answer_parser import AnswerParser
from compiledllm.server.openai.call_scanner import MAX_BUFFERED, MAX_NESTING
from compiledllm.server.openai.reasoning_formats import THINK, Mode, Reasoning
from compiledllm.server.openai.tool_formats import FORMATS, find_format

NAMES = {"f": None, "get": None}


def parse(
    pieces: list[str],
    form: str | None,
    most: int | None = None,
    reasoning: Mode = "off",
    is_whole: bool = True,
) -> tuple[str, str, list[tuple[str, str]]]:
    """Reasoning, content and calls (name, arguments) of a text in pieces."""
    parser = AnswerParser(FORMATS[form] if form else None, NAMES, most, Reasoning(THINK, reasoning))
    thought = content = ""
    calls: dict[int, tuple[str, str]] = {}
    for step in [*pieces, None]:
        parts = parser.finish(is_whole) if step is None else parser.feed(step)
        thought += parts.reasoning
        content += parts.content
        for part in parts.calls:
            assert (part.name is None) == (part.index in calls), "the name comes once, first"
            name, arguments = calls.get(part.index, (part.name or "", ""))
            calls[part.index] = name, arguments + part.arguments
    assert list(calls) == list(range(len(calls)))
    return thought, content, list(calls.values())


def hermes(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


F1 = ("f", '{"a": 1}')
GET = ("get", "{}")


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (hermes(*F1), "", [F1]),
        (f"Let me see.\n{hermes(*F1)}\n{hermes(*GET)}\n", "Let me see.", [F1, GET]),
        (f"{hermes(*F1)} then text", " then text", [F1]),
        ('<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', "", [F1]),
        ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [F1]),
        ('<tool_call>{"name": "f", "parameters": {"a": 1}}</tool_call>', "", [F1]),
        ('<tool_call>{"name": "get"}</tool_call>', "", [GET]),
        ('<tool_call>{"id": [1, "}"], "name": "get", "arguments": null}</tool_call>', "", [GET]),
        (
            hermes("f", '{"a": "}\\"{", "b": [{"c": {}}]}'),
            "",
            [("f", '{"a": "}\\"{", "b": [{"c": {}}]}')],
        ),
        (hermes("f", '{"a":\n"x\n\ty"}'), "", [("f", '{"a":\n"x\\n\\ty"}')]),
        ('<tool_call>{"name": "f", "arguments": {"a": 1', "", [("f", '{"a": 1')]),  # cut off
        # Braces too many, too few, and none at all.
        (hermes("f", '{"a": 1}}') + hermes(*GET), "", [F1, GET]),
        (hermes("f", '{"a": 1}}}}]') + " then", " then", [F1]),
        ('<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call> then', " then", [F1]),
        ('<tool_call>{"name": "f", "arguments": {"a": 1</tool_call> then', " then", [F1]),
        (
            '<tool_call>{"name": "f", "arguments": {"a": [{"b": 2\n</tool_call>',
            "",
            [("f", '{"a": [{"b": 2\n}]}')],
        ),
        ('<tool_call>{"name": "get", "arguments": null</tool_call>', "", [GET]),
        ('<tool_call>{"name": "get"</tool_call> then', " then", [GET]),
        # Text where markers are due, and markers where text is.
        ('<tool_call>{"name": "f", "arguments": {"a": 1}} ok </tool_call> so', " ok  so", [F1]),
        ('<tool_call>{"name": "f", "arguments": {"a": 1}} ok', " ok", [F1]),
        ('<tool_call>{"name": "f", "arguments": {"a": 1}\nok', "ok", [F1]),
        (f"{hermes(*F1)}</tool_call></tool_call>", "", [F1]),
        (f"{hermes(*F1)}<tool_call>", "", [F1]),
        (f"{hermes(*F1)}<tool_call>f()</tool_call> x", "f() x", [F1]),
        (f"<tool_call>\n{hermes(*F1)}", "", [F1]),
        (
            hermes("f", '{"a": "</tool_call><tool_call>}"}'),
            "",
            [("f", '{"a": "</tool_call><tool_call>}"}')],
        ),
        # Arguments that break off: what is left of them is nothing.
        (hermes("f", '{"a": [1}') + " then", " then", [("f", '{"a": [1')]),
        (hermes("f", '{"a": <b>}') + " then", " then", [("f", '{"a": ')]),
        ("text with a <tool_cal", "text with a <tool_cal", []),
        ("plain  \n", "plain  \n", []),
    ],
)
def test_hermes(text: str, content: str, calls: list[Any]) -> None:
    assert parse([text], "hermes") == ("", content, calls)


@pytest.mark.parametrize(
    "text",
    [
        "between <tool_call></tool_call> tags",
        "<tool_call>f()</tool_call>",
        "a <tool_call> is such a {thing}",
        "The tag `<tool_call>` opens one",
        "ends </tool_call>",
    ],
)
def test_a_marker_without_an_object_is_text_to_the_letter(text: str) -> None:
    assert parse([text], "hermes") == ("", text, [])


@pytest.mark.parametrize(
    "call",
    [
        '{"name": "nope", "arguments": {}}',  # no such tool
        '{"name": "f", "arguments": 3}',
        '{"name": ["f"], "arguments": {}}',
        '{"arguments": {}}',
        '{name: "f"}',
        '{"name": "f", "argum',
        '{"name": "f", "x": "y',
        '{"x": "' + "y" * MAX_BUFFERED + '", "name": "f"}',
    ],
)
def test_of_what_is_no_call_after_all_the_markers_are_not_shown(call: str) -> None:
    assert parse([f"So:\n<tool_call>\n{call}</tool_call>\n"], "hermes") == ("", "So:\n" + call, [])


@pytest.mark.parametrize("length", range(1, len("</tool_call>")))
def test_a_marker_across_the_end_of_a_buffer_is_not_shown(length: int) -> None:
    """The buffer of a call whose name is not known yet is full in the middle of a marker."""
    start = '{"x": "'
    text = start + "y" * (MAX_BUFFERED - length - len(start)) + "</tool_call>"
    whole = parse(["<tool_call>" + text + "z"], "hermes")
    assert whole == ("", text.removesuffix("</tool_call>") + "z", [])
    assert parse(["<tool_call>" + text[:-5], text[-5:], "z"], "hermes") == whole


def test_arguments_nested_too_deep_break_off() -> None:
    deep = "[" * MAX_NESTING
    _, content, ((name, arguments),) = parse([hermes("f", f'{{"a": {deep}1')], "hermes")
    assert name == "f" and arguments == '{"a": ' + deep[1:]
    assert content == ""


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ('{"name": "f", "parameters": {"a": 1}}', "", [F1]),
        ('\n {"name": "f", "parameters": {"a": 1}}; {"name": "get"}', "", [F1, GET]),
        ('<|python_tag|>{"name": "f", "parameters": {"a": 1}}', "", [F1]),
        ('Well <|python_tag|>{"name": "get", "parameters": {}}', "Well", [GET]),
        ('{"answer": 42} and so on', '{"answer": 42} and so on', []),
        ('{"answer": "<|python_tag|>"}', '{"answer": "<|python_tag|>"}', []),
        ('{"name": "f", "parameters": {"a": 1}}}; ok', " ok", [F1]),
        ('<|python_tag|>{"x": 1}', '{"x": 1}', []),
        ('{"name": "nope", "parameters": {}}', '{"name": "nope", "parameters": {}}', []),
        ('see {"name": "f", "parameters": {}}', 'see {"name": "f", "parameters": {}}', []),
    ],
)
def test_llama3_json(text: str, content: str, calls: list[Any]) -> None:
    assert parse([text], "llama3_json") == ("", content, calls)


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (
            '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}, {"name": "get", "arguments": {}}]',
            "",
            [F1, GET],
        ),
        ('[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]get{}', "", [F1, GET]),
        ('[TOOL_CALLS]f[CALL_ID]ab12[ARGS]{"a": 1}', "", [F1]),
        ('[TOOL_CALLS]f{"a": 1}} ok', " ok", [F1]),
        ('[TOOL_CALLS]nope{"a": 1}', 'nope{"a": 1}', []),
        ('[TOOL_CALLS]nope[ARGS]{"a": 1}[TOOL_CALLS]get{}', 'nope{"a": 1}', [GET]),
        ("[TOOL_CALLS] begins a call", "[TOOL_CALLS] begins a call", []),
        ("[TOOL_CALLS]" + "f" * 300, "[TOOL_CALLS]" + "f" * 300, []),
        ("[1, 2] [TOOL", "[1, 2] [TOOL", []),
    ],
)
def test_mistral(text: str, content: str, calls: list[Any]) -> None:
    assert parse([text], "mistral") == ("", content, calls)


@pytest.mark.parametrize(
    ("text", "mode", "expected"),
    [
        ("<think>\nHm.\n</think>\n\nYes. ", "leading", ("Hm.", "Yes. ")),
        (" <think>Hm", "leading", ("Hm", "")),
        ("<thin", "leading", ("", "<thin")),
        (" \n ", "leading", ("", " \n ")),
        (" \n no", "leading", ("", " \n no")),
        ("Yes <think>no</think>", "leading", ("", "Yes <think>no</think>")),
        ("Hm. <b </think> Yes", "begun", ("Hm. <b", "Yes")),
        ("<think>Hm</think>", "off", ("", "<think>Hm</think>")),
    ],
)
def test_reasoning(text: str, mode: str, expected: tuple[str, str]) -> None:
    assert parse([text], None, reasoning=mode)[:2] == expected


def test_json_that_is_no_call_is_shown_as_it_comes() -> None:
    """Where calls have no marker, an answer in JSON looks like one at first."""
    parser = AnswerParser(FORMATS["llama3_json"], NAMES)
    assert parser.feed('{"summary": "It').content == '{"summary": "It'


def test_calls_follow_reasoning_and_only_so_many_are_told() -> None:
    text = f"<think>{hermes(*F1)}</think>{hermes(*F1)}{hermes(*GET)}"
    assert parse([text], "hermes", 1, "leading") == (hermes(*F1), "", [F1])


def test_arguments_come_as_they_are_written() -> None:
    """Not when the call is over: a long one is streamed."""
    parser = AnswerParser(FORMATS["hermes"], NAMES)
    parser.feed('<tool_call>{"name": "f", "arguments": {"text": "once')
    (part,) = parser.feed(" upon a time").calls
    assert part.arguments == " upon a time"


PIECES = [
    *("<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "<think>", "</think>"),
    *('{"name": "f", "arguments": {', '"name"', '"arguments"', '"parameters"', '"f"', '"get"'),
    *("{", "}", "[", "]", ":", ",", ";", '"', "\\", " ", "\n", "f", "get", "[ARGS]", "1", "null"),
    *("<", "<tool", "tool_call>", "[TOOL", "é", "text", '{"a": "b"}', '"}}', "}}"),
]


@given(
    text=st.lists(st.sampled_from(PIECES), max_size=30).map("".join),
    cuts=st.lists(st.integers(0, 400), max_size=12),
    form=st.sampled_from([None, *FORMATS]),
    mode=st.sampled_from(["off", "leading", "begun"]),
    most=st.sampled_from([None, 1]),
)
def test_any_chunking_gives_the_same(
    text: str, cuts: list[int], form: str | None, mode: str, most: int | None
) -> None:
    whole = parse([text], form, most, mode)
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in zip(places, places[1:], strict=False)]
    assert parse(pieces, form, most, mode) == whole
    assert parse(list(text), form, most, mode) == whole


MARKERS = {
    "hermes": ["<tool_call>", "</tool_call>"],
    "llama3_json": ["<|python_tag|>"],
    "mistral": ["[TOOL_CALLS]"],
}


def begun_by(text: str, form: str) -> bool:
    """Whether a marker is followed by an object, perhaps behind separators or a name."""
    head = r"[\s,;\[\]]*|[\w.-]+"
    return re.search(re.escape(MARKERS[form][0]) + rf"(?:{head})\{{", text) is not None


@given(
    start=st.sampled_from(["", "Well. ", "\n"]),
    rest=st.lists(st.sampled_from(PIECES), max_size=20).map("".join),
    form=st.sampled_from(list(MARKERS)),
    is_whole=st.booleans(),
)
def test_no_marker_is_shown_behind_the_beginning_of_a_call(
    start: str, rest: str, form: str, is_whole: bool
) -> None:
    key = "parameters" if form == "llama3_json" else "arguments"
    text = f'{start}{MARKERS[form][0]}{{"name": "f", "{key}": {{"a": 1}}{rest}'
    content = parse([text], form, is_whole=is_whole)[1]
    assert not any(marker in content for marker in MARKERS[form])


@given(
    text=st.lists(st.sampled_from(PIECES), max_size=30).map("".join),
    cut=st.integers(0, 400),
    form=st.sampled_from([None, *FORMATS]),
    mode=st.sampled_from(["off", "leading", "begun"]),
)
@example(text='Let me see.\n<tool_call>{"name": "f"}', cut=14, form="hermes", mode="off")
def test_an_answer_that_is_cut_off_shows_the_beginning_of_the_whole(
    text: str, cut: int, form: str | None, mode: str
) -> None:
    """So nothing of a marker or of a call is ever shown as text."""
    whole = parse([text], form, None, mode)
    shown = parse([text[:cut]], form, None, mode, is_whole=False)
    for part, all_of_it in zip(shown[:2], whole[:2], strict=True):
        assert all_of_it.startswith(part) or all_of_it == part.rstrip()
    assert len(shown[2]) <= len(whole[2])
    for (name, arguments), (whole_name, whole_arguments) in zip(shown[2], whole[2], strict=False):
        assert name == whole_name and whole_arguments.startswith(arguments)


ANSWERS = {
    "hermes": f"<think>Hm.</think>Let me see.\n{hermes(*F1)}\n" + hermes("f", '{"b": "<x>"}'),
    "llama3_json": 'Well <|python_tag|>{"name": "f", "parameters": {"a": [1, {"b": 2}]}}',
    "mistral": 'Well [TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}, {"name": "get"}]',
}


@pytest.mark.parametrize("form", ANSWERS)
def test_an_answer_cut_anywhere_shows_no_markup(form: str) -> None:
    text = ANSWERS[form]
    for cut in range(len(text)):
        thought, content, _ = parse([text[:cut]], form, None, "leading", is_whole=False)
        assert "Hm.".startswith(thought.strip())
        assert "Let me see.".startswith(content.strip()) or "Well".startswith(content.strip())


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(
    arguments=st.lists(
        st.dictionaries(st.text(max_size=6), VALUES, max_size=4), min_size=1, max_size=3
    ),
    before=st.sampled_from(["", "Well.", 'a {"b": 1}']),
    is_ascii=st.booleans(),
)
def test_calls_with_any_json_come_out_as_they_went_in(
    arguments: list[dict[str, Any]], before: str, is_ascii: bool
) -> None:
    texts = [json.dumps(value, ensure_ascii=is_ascii) for value in arguments]
    objects = [f'{{"name": "f", "arguments": {text}}}' for text in texts]
    calls = [("f", text) for text in texts]
    blocks = "\n".join(f"<tool_call>\n{one}\n</tool_call>" for one in objects)
    assert parse([before + blocks], "hermes") == ("", before, calls)
    assert parse([f"{before}[TOOL_CALLS][{', '.join(objects)}]"], "mistral") == ("", before, calls)
    assert parse(["; ".join(objects)], "llama3_json") == ("", "", calls)


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("... <tool_call>\n{json}</tool_call>", "hermes"),
        ("<tool_call>\n<function=example_name>\n<parameter=a>", "qwen3_coder"),
        ("<function={name}>{arguments}</function> <|python_tag|>", None),
        ("<tool_calls>[{json}]</tool_calls> <tool_call>", None),
        ("']<]minimax[>[<tool_call>' '<invoke name=\"' + name", None),
        ("<seed:tool_call>\n<function=f>", "seed_oss"),
        ("<tool_call>{name}\n<arg_key>{k}</arg_key>\n<arg_value>{v}</arg_value>", "glm45"),
        ("<tool_call>{name}<arg_key>{k}</arg_key><arg_value>{v}</arg_value>", "glm47"),
        ("{%- set begin = '<minimax:tool_call>' -%}", "minimax_m2"),
        ("'<｜tool▁call▁begin｜>' + type + '<｜tool▁sep｜>' + name + '\\n```json'", "deepseek_v3"),
        ("'<｜tool▁call▁begin｜>' + name + '<｜tool▁sep｜>' + arguments", "deepseek_v31"),
        ("<｜DSML｜function_calls>", "deepseek_v32"),
        ("<｜DSML｜tool_calls>", "deepseek_v4"),
        ("dsml_token = '｜DSML｜' '<' + dsml_token + 'tool_calls>'", "deepseek_v4"),
        ("dsml_token = '｜DSML｜' '<' + dsml_token + 'function_calls>'", "deepseek_v32"),
        ("<|tool_calls_section_begin|><|tool_call_begin|>", "kimi_k2"),
        ("'<|tool_call>call:' + function['name'] + '{'", "gemma4"),
        ("<|start|>assistant<|channel|>analysis<|message|>", "openai"),
        ("<|tool_list_start|>", "lfm2"),
        ('"List of tools: ["', "lfm2"),
        ("[func_name1(params_name1=params_value1), func_name2(params)]", "pythonic"),
        ("Use exact format: [func_name1(param1=value1), func_name2(...)]", "pythonic"),
        ("<|python_tag|>", "llama3_json"),
        ("[AVAILABLE_TOOLS] [TOOL_CALLS]", "mistral"),
        ("{{ messages }}", None),
    ],
)
def test_formats_are_found_by_the_chat_template(template: str, name: str | None) -> None:
    assert find_format("auto", template) is (FORMATS[name] if name else None)
    assert find_format("none", template) is None
    assert find_format("mistral", template) is FORMATS["mistral"]


@pytest.mark.parametrize("cut", ["<think>1 <", "<think>1 </thi", "<think>1 </think"])
def test_reasoning_that_ends_in_half_a_marker_is_kept(cut: str) -> None:
    parser = AnswerParser(None, reasoning=Reasoning(THINK, "leading"))
    shown = parser.feed(cut).reasoning + parser.finish(is_whole=True).reasoning
    assert shown == cut.removeprefix("<think>")
