"""Tool calls in the formats of models: recorded answers, in any pieces, give the same calls."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compiledllm.server.openai.answer_parser import AnswerParser
from compiledllm.server.openai.chat_choice import Choice
from compiledllm.server.openai.reasoning_formats import CHANNELS, THINK, Reasoning, find_reasoning
from compiledllm.server.openai.tool_formats import FORMATS, ROWS, ToolFormat, find_format
from compiledllm.server.openai.tools import ToolUse

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "hot": {"type": "boolean"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "more": {"type": "object"},
        "unit": {"anyOf": [{"$ref": "#/$defs/Unit"}, {"type": "null"}]},
        "limit": {"type": ["integer", "string"]},
    },
    "required": ["city"],
    "$defs": {"Unit": {"type": "string", "enum": ["c", "f"]}},
}
NAMES: dict[str, Any] = {"get_weather": SCHEMA, "now": None}
Call = tuple[str, Any]


class Told:
    """What has come of an answer."""

    def __init__(self) -> None:
        self.reasoning = self.content = ""
        self.calls: list[list[str]] = []
        self.ids: list[str | None] = []

    def add(self, parts: Any) -> None:
        self.reasoning += parts.reasoning
        self.content += parts.content
        for part in parts.calls:
            if part.name is not None:
                assert part.index == len(self.calls)
                self.calls.append([part.name, ""])
                self.ids.append(part.call_id)
            self.calls[part.index][1] += part.arguments

    @property
    def all(self) -> Any:
        return self.reasoning, self.content, self.calls, self.ids


def parse(
    pieces: list[str],
    form: str | ToolFormat | None,
    reasoning: Reasoning | None = None,
    is_whole: bool = True,
    most: int | None = None,
) -> Told:
    told = Told()
    row = FORMATS[form] if isinstance(form, str) else form
    parser = AnswerParser(row, NAMES, most, reasoning)
    for piece in pieces:
        told.add(parser.feed(piece))
    told.add(parser.finish(is_whole))
    return told


PARIS = ("get_weather", {"city": "Paris"})
FULL = (
    "get_weather",
    {
        "city": "São Paulo ☃ <b>",
        "days": 3,
        "hot": True,
        "tags": ["a", 'b"c'],
        "more": {"k": [1, None]},
    },
)
NOW = ("now", {})
# Answers as the models' chat templates write them: format, text, content, calls.
ANSWERS: dict[str, tuple[str, str, str, list[Call]]] = {
    "hermes": (
        "hermes",
        'Hm.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call> Done',
        "Hm.\n\n Done",
        [PARIS, NOW],
    ),
    "llama3_json": (
        "llama3_json",
        '{"name": "get_weather", "parameters": {"city": "Paris"}}; '
        '{"name": "now", "parameters": {}}',
        "",
        [PARIS, NOW],
    ),
    "mistral": (
        "mistral",
        'Hm. [TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}}, '
        '{"name": "now", "arguments": {}}]',
        "Hm.",
        [PARIS, NOW],
    ),
    "mistral, with ids": (
        "mistral",
        'Hm.[TOOL_CALLS]get_weather[CALL_ID]ab12cd34e[ARGS]{"city": "Paris"}'
        "[TOOL_CALLS]now[ARGS]{}",
        "Hm.",
        [PARIS, NOW],
    ),
    "qwen3_coder": (
        "qwen3_coder",
        "I look.\n\n<tool_call>\n<function=get_weather>\n<parameter=city>\nSão Paulo ☃ <b>\n"
        "</parameter>\n<parameter=days>\n3\n</parameter>\n<parameter=hot>\nTrue\n</parameter>\n"
        '<parameter=tags>\n["a", "b\\"c"]\n</parameter>\n<parameter=more>\n'
        "{'k': [1, None]}\n</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=now>\n"
        "</function>\n</tool_call>\nDone",
        "I look.\n\n\n\nDone",
        [FULL, NOW],
    ),
    "qwen3_coder, newlines": (
        "qwen3_coder",
        "<tool_call>\n<function=get_weather>\n<parameter=city>\n\n if x:\n\n  y</parameter> <\n\n"
        "</parameter>\n</function>\n</tool_call>",
        "",
        [("get_weather", {"city": "\n if x:\n\n  y"})],
    ),
    "qwen3_coder, forgetful": (
        "qwen3_coder",
        "<function=get_weather>\n<parameter=city>\nParis\n<parameter=days>\n2\n</function>",
        "",
        [("get_weather", {"city": "Paris", "days": 2})],
    ),
    "qwen3_coder, in a line": (
        "qwen3_xml",
        "<tool_call><function=get_weather><parameter=city>5</parameter><parameter=days>5"
        "</parameter></function></tool_call>",
        "",
        [("get_weather", {"city": "5", "days": 5})],
    ),
    "qwen3_coder, ended early": (
        "qwen3_coder",
        "So <tool_call>\n<function=get_weather>\n<parameter=city>\nParis",
        "So",
        [PARIS],
    ),
    "seed_oss": (
        "seed_oss",
        "<seed:tool_call>\n<function=get_weather>\n<parameter=city>Paris</parameter>\n</function>\n"
        "</seed:tool_call>\n<seed:tool_call>\n<function=now>\n</function>\n</seed:tool_call>",
        "",
        [PARIS, NOW],
    ),
    "glm45": (
        "glm45",
        "\nHm.\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>São Paulo ☃ <b>"
        "</arg_value>\n<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n<arg_key>hot</arg_key>\n"
        "<arg_value>true</arg_value>\n<arg_key>tags</arg_key>\n"
        '<arg_value>["a", "b\\"c"]</arg_value>\n<arg_key>more</arg_key>\n'
        '<arg_value>{"k": [1, null]}</arg_value>\n</tool_call>\n<tool_call>now\n</tool_call>',
        "\nHm.",
        [FULL, NOW],
    ),
    "glm47": (
        "glm47",
        "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Paris</arg_value></tool_call>"
        "<tool_call>now</tool_call>ok",
        "ok",
        [PARIS, NOW],
    ),
    "minimax_m2": (
        "minimax_m2",
        'Hm.\n<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">Paris'
        '</parameter>\n<parameter name="days">2</parameter>\n</invoke>\n<invoke name="now">\n'
        "</invoke>\n</minimax:tool_call>",
        "Hm.",
        [("get_weather", {"city": "Paris", "days": 2}), NOW],
    ),
    "deepseek_v3": (
        "deepseek_v3",
        "Hm.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
        '{"city": "Paris"}\n```<｜tool▁call▁end｜>\n'
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```<｜tool▁call▁end｜>"
        "<｜tool▁calls▁end｜> ```py",
        "Hm.\n ```py",
        [PARIS, NOW],
    ),
    "deepseek_v31": (
        "deepseek_v31",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>"
        '{"city": "Paris"}<｜tool▁call▁end｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{}'
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "",
        [PARIS, NOW],
    ),
    "deepseek_v32": (
        "deepseek_v32",
        'Hm.\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="get_weather">\n'
        '<｜DSML｜parameter name="city" string="true">Paris</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="limit" string="true">5</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="days" string="false">5</｜DSML｜parameter>\n'
        '</｜DSML｜invoke>\n<｜DSML｜invoke name="now">\n</｜DSML｜invoke>\n'
        "</｜DSML｜function_calls>",
        "Hm.",
        [("get_weather", {"city": "Paris", "limit": "5", "days": 5}), NOW],
    ),
    "deepseek_v4": (
        "deepseek_v4",
        '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="get_weather">\n'
        '<｜DSML｜parameter name="city" string="true">Paris</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>\n</｜DSML｜tool_calls>",
        "",
        [PARIS],
    ),
    "kimi_k2": (
        "kimi_k2",
        "Hm.<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0"
        '<|tool_call_argument_begin|>{"city": "Paris"}<|tool_call_end|><|tool_call_begin|>'
        "functions.now:1<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>",
        "Hm.",
        [PARIS, NOW],
    ),
    "gemma4": (
        "gemma4",
        'Hm.<|tool_call>call:get_weather{city:<|"|>São Paulo ☃ <b><|"|>,days:3,hot:true,'
        'tags:[<|"|>a<|"|>,<|"|>b"c<|"|>],more:{k:[1,null]}}<tool_call|>'
        "<|tool_call>call:now{}<tool_call|>",
        "Hm.",
        [FULL, NOW],
    ),
    "gemma4, otherwise quoted": (
        "gemma4",
        '<|tool_call>:get_weather{<|"|>city<|"|>: "Pa\\u0072is", "days":2 }<tool_call|>',
        "",
        [("get_weather", {"city": "Paris", "days": 2})],
    ),
    "openai": (
        "openai",
        "<|channel|>analysis<|message|>Think <b>.<|end|><|start|>assistant<|channel|>commentary"
        "<|message|>I look.<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather "
        '<|constrain|>json<|message|>{"city": "Paris"}<|call|><|start|>assistant to=functions.now'
        "<|channel|>commentary json<|message|>{}<|call|>",
        "I look.",
        [PARIS, NOW],
    ),
    "pythonic": (
        "pythonic",
        "[get_weather(city='São Paulo ☃ <b>', days=3, hot=True, tags=['a', \"b\\\"c\"], "
        "more={'k': [1, None]}), now()]",
        "",
        [FULL, NOW],
    ),
    "pythonic, names that Python has not": (
        "pythonic",
        '[get_weather(city="Paris", user-id=1, $if={"a": 2}, a b=3)]',
        "",
        [("get_weather", {"city": "Paris", "user-id": 1, "$if": {"a": 2}, "a b": 3})],
    ),
    "llama4_pythonic": (
        "llama4_pythonic",
        'Hm. <|python_start|>[get_weather(city="Paris")]<|python_end|> ok',
        "Hm.  ok",
        [PARIS],
    ),
    "lfm2": (
        "lfm2",
        '<|tool_call_start|>[get_weather(city="Paris"), now()]<|tool_call_end|>Checking.',
        "Checking.",
        [PARIS, NOW],
    ),
    "olmo3": (
        "olmo3",
        '<function_calls>get_weather(city="Paris")\nnow()</function_calls>',
        "",
        [PARIS, NOW],
    ),
}
CHANNELLED = Reasoning(CHANNELS, "channels")


def reasoning_of(form: str) -> Reasoning | None:
    return CHANNELLED if form == "openai" else None


def test_every_format_has_an_answer_here() -> None:
    assert {name for row in ROWS for name in row.names[:1]} <= {one[0] for one in ANSWERS.values()}


@pytest.mark.parametrize("case", ANSWERS)
def test_recorded_answers_in_any_pieces(case: str) -> None:
    form, text, content, calls = ANSWERS[case]
    whole = parse([text], form, reasoning_of(form))
    assert whole.content == content
    assert [(name, json.loads(arguments)) for name, arguments in whole.calls] == calls
    ways = [[text[:cut], text[cut:]] for cut in range(len(text))]
    ways += [[text[i : i + size] for i in range(0, len(text), size)] for size in (1, 2, 3, 7)]
    for pieces in ways:
        assert parse(pieces, form, reasoning_of(form)).all == whole.all, pieces


@pytest.mark.parametrize("case", ANSWERS)
def test_an_answer_cut_anywhere_shows_the_beginning_of_the_whole(case: str) -> None:
    form, text, _, _ = ANSWERS[case]
    whole = parse([text], form, reasoning_of(form))
    for cut in range(len(text)):
        told = parse([text[:cut]], form, reasoning_of(form), is_whole=False)
        assert whole.content.startswith(told.content.rstrip())
        assert whole.reasoning.startswith(told.reasoning)
        for part, all_of_it in zip(told.calls, whole.calls, strict=False):
            assert part[0] == all_of_it[0] and all_of_it[1].startswith(part[1])


@pytest.mark.parametrize("case", ANSWERS)
def test_calls_beyond_the_limit_are_left_out(case: str) -> None:
    form, text, content, calls = ANSWERS[case]
    told = parse([text], form, reasoning_of(form), most=1)
    assert [name for name, _ in told.calls] == [calls[0][0]]
    assert told.content == content


# -- broken answers -------------------------------------------------------------------------------

MARKUP = re.compile(r"<[^<>]*>?|\[[A-Z_]+\]|[\w.]+|\s+|.", re.DOTALL)


def pieces_of(row: ToolFormat) -> list[str]:
    """What answers in a format are made of, and some things more."""
    texts = [text for form, text, _, _ in ANSWERS.values() if form in row.names]
    found = {piece for text in texts for piece in MARKUP.findall(text)}
    return sorted(found | {"\n", "x", "<", "é", "\\", '"', "'", ",", "1"})


PIECES = {row: pieces_of(row) for row in ROWS}


@st.composite
def broken_answers(draw: st.DrawFn) -> tuple[ToolFormat, list[str], bool]:
    """An answer with pieces of it dropped, doubled and put elsewhere, in pieces."""
    row = draw(st.sampled_from(ROWS))
    texts = [text for form, text, _, _ in ANSWERS.values() if form in row.names]
    pieces = MARKUP.findall(draw(st.sampled_from(texts)))
    for _ in range(draw(st.integers(0, 6))):
        place = draw(st.integers(0, len(pieces)))
        pieces[place : place + draw(st.integers(0, 2))] = draw(
            st.lists(st.sampled_from(PIECES[row]), max_size=2)
        )
    text = "".join(pieces)
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=6)))
    places = [0, *cuts, len(text)]
    return row, [text[a:b] for a, b in itertools.pairwise(places)], draw(st.booleans())


@given(broken_answers())
def test_broken_answers_raise_nothing_and_are_the_same_in_any_pieces(
    answer: tuple[ToolFormat, list[str], bool],
) -> None:
    row, pieces, is_whole = answer
    text = "".join(pieces)
    reasoning = CHANNELLED if row.syntax == "channels" else None
    whole = parse([text], row, reasoning, is_whole)
    assert parse(pieces, row, reasoning, is_whole).all == whole.all
    assert parse(list(text), row, reasoning, is_whole).all == whole.all
    if is_whole and row.syntax in ("tags", "gemma", "python"):
        for _, arguments in whole.calls:
            assert isinstance(json.loads(arguments), dict)


def test_markup_without_end_comes_to_an_end() -> None:
    for row in ROWS:
        for piece in PIECES[row]:
            parse([piece * 600], row, CHANNELLED if row.syntax == "channels" else None)


# -- what is not the models' own fault ------------------------------------------------------------


def test_formats_have_vllms_names() -> None:
    names = {"hermes", "llama3_json", "llama4_json", "llama4_pythonic", "pythonic", "mistral"}
    names |= {"qwen3_coder", "qwen3_xml", "openai", "gemma4", "glm45", "glm47", "seed_oss"}
    names |= {"deepseek_v3", "deepseek_v31", "deepseek_v32", "deepseek_v4", "kimi_k2", "lfm2"}
    assert set(FORMATS) == names | {"minimax_m2", "olmo3"}
    assert find_format("mistral", "{{ '[TOOL_CALLS]' + name + '[ARGS]' }}") is ROWS[-1]
    assert find_format("mistral", "") is FORMATS["mistral"]


def test_calls_keep_the_ids_that_the_template_shows() -> None:
    assert parse([ANSWERS["kimi_k2"][1]], "kimi_k2").ids == [
        "functions.get_weather:0",
        "functions.now:1",
    ]
    assert parse([ANSWERS["glm47"][1]], "glm47").ids == [None, None]


def qwen(key: str, value: str) -> str:
    parameter = f"<parameter={key}>\n{value}\n</parameter>"
    return f"<tool_call>\n<function=get_weather>\n{parameter}\n</function>\n</tool_call>"


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("city", "5", "5"),
        ("city", "null", "null"),
        ("city", '"quoted"', '"quoted"'),
        ("city", "", ""),
        ("days", "5", 5),
        ("days", " 5 ", 5),
        ("days", "5.5", 5.5),
        ("days", "soon", "soon"),
        ("days", "NaN", "NaN"),
        ("hot", "True", True),
        ("hot", "false", False),
        ("tags", "['a', \"it's\", 'b\\'c', u]", "['a', \"it's\", 'b\\'c', u]"),
        ("tags", "['a', \"it's\", 'b\\'c', ('x',), ]", ["a", "it's", "b'c", ["x"]]),
        ("tags", '["</parameter>", "\\n<parameter=x>"]', ["</parameter>", "\n<parameter=x>"]),
        ("more", '{"a": {"b": [1, 2.5, null]}}', {"a": {"b": [1, 2.5, None]}}),
        ("more", "{'a': None, 'b': True, 'c': 'None'}", {"a": None, "b": True, "c": "None"}),
        (
            "more",
            "{'a': '</parameter>\n<parameter=x>', 'b': \"it's\"}",
            {"a": "</parameter>\n<parameter=x>", "b": "it's"},
        ),
        ("more", "{", "{"),
        ("tags", ' ["</parameter>"]', ["</parameter>"]),
        ("tags", "[it's", "[it's"),
        ("unit", "c", "c"),
        ("unit", "null", None),
        ("unit", "5", "5"),
        ("limit", "5", 5),
        ("limit", "none", "none"),
        ("unknown", "5", "5"),
    ],
)
def test_values_in_tags_follow_the_schema(key: str, text: str, value: Any) -> None:
    for pieces in ([qwen(key, text)], list(qwen(key, text))):
        ((_, arguments),) = parse(pieces, "qwen3_coder").calls
        assert json.loads(arguments) == {key: value}


def test_strings_in_tags_are_shown_as_they_are_written() -> None:
    parser = AnswerParser(FORMATS["qwen3_coder"], NAMES)
    parser.feed("<tool_call>\n<function=get_weather>\n<parameter=city>\nSão")
    (part,) = parser.feed(' "Paulo"\n').calls
    assert part.arguments == ' \\"Paulo\\"'


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("qwen3_coder", "Write <function=get_weather> and so on"),
        ("qwen3_coder", "Use `<tool_call>` or <parameter=city>, </function>."),
        ("qwen3_coder", "<function=nope_"),
        ("glm45", "a <tool_call> b c <arg_key>"),
        ("minimax_m2", '<invoke name="get_weather"> is how'),
        ("pythonic", "[now is the time, (said) x]"),
        ("pythonic", "[1, 2]"),
        ("pythonic", "[nope(a=1)] text"),
        ("pythonic", "[get_weather(5)] text"),
        ("pythonic", "See [now()]"),
        ("gemma4", "a <|tool_call> b"),
        ("openai", "no channels, <b>bold</b>"),
        ("kimi_k2", "x <|tool_call_end|> y"),
    ],
)
def test_markup_without_a_call_is_text(form: str, text: str) -> None:
    for pieces in ([text], list(text)):
        told = parse(pieces, form, reasoning_of(form))
        assert (told.content, told.calls) == (text, [])


@pytest.mark.parametrize(
    ("name", "prompt", "text", "expected"),
    [
        ("qwen3", "assistant\n<think>\n", "Hm.\n</think>\n\nYes", ("Hm.", "Yes")),
        ("qwen3", "assistant\n<think>\n", "<think>\nHm.</think>Yes", ("Hm.", "Yes")),
        ("qwen3", "assistant\n<think>\n\n</think>\n\n", "Yes </think>", ("", "Yes </think>")),
        ("glm45", "<|assistant|>\n<think></think>", "Yes", ("", "Yes")),
        ("glm45", "<|assistant|>", "\n<think>Hm</think>\nYes", ("Hm", "Yes")),
        ("deepseek_v3", "<｜Assistant｜></think>", "Yes", ("", "Yes")),
        ("deepseek_r1", "<｜Assistant｜>", "<think>\nHm</think>Yes", ("Hm", "Yes")),
        ("deepseek_r1", "<｜Assistant｜>", "<", ("<", "")),
        ("minimax_m2", "]~b]ai\n<think>\n", "Hm</think>\nYes", ("Hm", "Yes")),
        ("mistral", "[/INST]", "[THINK]Hm[/THINK]Yes", ("Hm", "Yes")),
        ("gemma4", "<|turn>model\n", "<|channel>thought\nHm<channel|>Yes", ("Hm", "Yes")),
        ("gemma4", "model\n<|channel>thought\n<channel|>", "Yes", ("", "Yes")),
        ("seed_oss", "assistant\n", "<seed:think>Hm</seed:think>Yes", ("Hm", "Yes")),
        (
            "openai_gptoss",
            "<|start|>assistant",
            "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant<|channel|>analysis<|message|>"
            "so<|end|><|start|>assistant<|channel|>final<|message|>Yes",
            ("Hm\nso", "Yes"),
        ),
    ],
)
def test_reasoning_forms(name: str, prompt: str, text: str, expected: tuple[str, str]) -> None:
    form = find_reasoning(name, "")
    assert form is not None
    reasoning = Reasoning(form, form.mode(prompt))
    for pieces in ([text], list(text), [text[:7], text[7:]]):
        told = parse(pieces, None, reasoning)
        assert (told.reasoning, told.content) == expected


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("</think>", "qwen3"),
        ("[THINK] [/THINK]", "mistral"),
        ("<|channel>thought\n<channel|>", "gemma4"),
        ("</seed:think>", "seed_oss"),
        ("<|channel|>analysis<|message|>", "openai_gptoss"),
        ("{{ messages }}", "none"),
    ],
)
def test_reasoning_is_found_by_the_chat_template(template: str, name: str) -> None:
    assert find_reasoning("auto", template) is find_reasoning(name, "")


def test_gpt_oss_without_a_parser_of_reasoning_shows_it_as_text() -> None:
    form, text, _, _ = ANSWERS["openai"]
    told = parse([text], form)
    assert (told.reasoning, told.content) == ("", "Think <b>.\nI look.")
    assert len(told.calls) == 2


@pytest.mark.parametrize("case", ["hermes", "qwen3_coder", "deepseek_v3", "lfm2", "openai"])
def test_a_whole_answer_has_the_order_of_its_text(case: str) -> None:
    form, text, content, calls = ANSWERS[case]
    use = ToolUse(FORMATS[form], NAMES, [], None, None)
    for size in (1, 7, 10_000):
        choice, kinds = Choice(use, reasoning_of(form) or Reasoning()), []
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        for i, piece in enumerate(pieces):
            for delta in choice.deltas(piece, i == len(pieces) - 1, is_whole=True):
                kinds += [name for name in ("reasoning", "content") if name in delta]
                kinds += ["call" for call in delta.get("tool_calls", ()) if "id" in call]
        told = [kind for kind, _ in itertools.groupby(kinds)]
        before = [] if text.startswith("<") else ["content"]
        after = [] if content in ("", "Hm.", "I look.") else ["content"]
        before = ["reasoning", "content"] if form == "openai" else before
        assert told == [*before, "call", *after]
        assert kinds.count("call") == len(calls)


@pytest.mark.parametrize(
    "case",
    [
        *("kimi_k2", "minimax_m2", "deepseek_v31", "lfm2", "seed_oss", "mistral"),
        *("qwen3_coder", "gemma4", "glm45", "mistral, with ids"),
    ],
)
def test_what_begins_calls_ends_reasoning_too(case: str) -> None:
    form, text, _, calls = ANSWERS[case]
    row = ROWS[-1] if case == "mistral, with ids" else FORMATS[form]
    text = "Hm </b>" + text[text.index(row.ends_reasoning) :]
    for pieces in ([text], list(text), [text[:9], text[9:]]):
        told = parse(pieces, row, Reasoning(THINK, "begun"))
        assert told.reasoning == "Hm </b>"
        assert [name for name, _ in told.calls] == [name for name, _ in calls]
