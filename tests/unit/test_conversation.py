"""Conversations through chat templates: no word is lost, whichever form either side uses.

The templates are short, each with the trait of the real one that it is named after.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from compiledllm.engine.conversation import plain_arguments, plain_messages
from compiledllm.engine.tokenizer import MAX_TEMPLATES, Tokenizer
from compiledllm.server.openai.bodies import parse
from compiledllm.server.openai.protocol import Message
from compiledllm.server.openai.tools import plain_message

STRING = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
LLAMA_GUARD = (
    "{% for m in messages %}<{{ m['role'] }}>{% for content in m['content'] %}"
    "{% if content['type'] == 'text' %}{{ content['text'] | trim }}{% endif %}{% endfor %}"
    "{% endfor %}"
)
FIRST_PART = "{% for m in messages %}<{{ m.role }}>{{ m.content[0].text }}{% endfor %}"
SMOL_VLM = (
    "{% for m in messages %}<{{ m['role'] | capitalize }}>"
    "{% if m['content'][0]['type'] == 'image' %}:{% else %}: {% endif %}"
    "{% for line in m['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}<image>{% endif %}{% endfor %}\n{% endfor %}"
)
LLAVA = (
    "{% for m in messages %}<{{ m['role'] }}>"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] }} "
    "{% endfor %}{% endfor %}"
)
QWEN2_VL = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for c in m['content'] %}{% if c['type'] == 'image' or 'image' in c %}<img>"
    "{% elif 'text' in c %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
)
GEMMA3 = (  # of a system message's parts it takes the first
    "{% if messages[0]['role'] == 'system' %}{% if messages[0]['content'] is string %}"
    "{% set first = messages[0]['content'] %}{% else %}"
    "{% set first = messages[0]['content'][0]['text'] %}{% endif %}{% set rest = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}<{{ m['role'] }}>{{ first if loop.first }}"
    "{% if m['content'] is string %}{{ m['content'] | trim }}"
    "{% elif m['content'] is iterable %}{% for item in m['content'] %}"
    "{% if item['type'] == 'image' %}<img>{% elif item['type'] == 'text' %}"
    "{{ item['text'] | trim }}{% endif %}{% endfor %}"
    "{% else %}{{ raise_exception('Invalid content type') }}{% endif %}"
    "{% endfor %}"
)
PIXTRAL = (  # a system message must be a string
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}"
    "{% endif %}{% for m in rest %}{% if m['role'] == 'user' %}"
    "{{ '[INST]' + (system if loop.last else '') }}"
    "{% if m['content'] is not string %}{% for chunk in m['content'] %}"
    "{% if chunk['type'] == 'text' %}{{ chunk['text'] }}{% else %}"
    "{{ raise_exception('Unrecognized content type!') }}{% endif %}{% endfor %}"
    "{% else %}{{ m['content'] }}{% endif %}[/INST]{% else %}{{ m['content'] + '</s>' }}{% endif %}"
    "{% endfor %}"
)
LIST_SYSTEM = (  # the reverse: only a list will do for a system message
    "{% if messages[0]['role'] == 'system' %}{{ '<system>' + messages[0]['content'][0]['text'] }}"
    "{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}<{{ m.role }}>{{ m.content | trim }}{% endfor %}"
)
LLAMA32 = (  # of tools' results it shows JSON
    "{% for m in messages %}{% if 'tool_calls' in m %}<call>{{ m.tool_calls[0].function.name }}"
    "{{ m.tool_calls[0].function.arguments | tojson }}{% elif m.role == 'tool' %}<ipython>"
    "{% if m.content is mapping or m.content is iterable %}{{ m.content | tojson }}"
    "{% else %}{{ m.content }}{% endif %}{% else %}<{{ m.role }}>{% if m['content'] is string %}"
    "{{ m['content'] }}{% else %}{% for c in m['content'] %}{% if c['type'] == 'text' %}"
    "{{ c['text'] }}{% endif %}{% endfor %}{% endif %}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Of single bytes."""
    from transformers import PreTrainedTokenizerFast

    names = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({name: i for i, name in enumerate(names)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    folder: Path = tmp_path_factory.mktemp("bytes")
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder)
    return Tokenizer(folder)


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def said(*contents: Any, first: str = "user") -> list[dict[str, Any]]:
    """A conversation of these contents, the roles in turn."""
    roles = ["system", "user", "assistant"] if first == "system" else ["user", "assistant"]
    return [
        {"role": roles[i] if i < len(roles) else ("assistant", "user")[i % 2], "content": content}
        for i, content in enumerate(contents)
    ]


TEXTS = ("be kind", "hello world")
BOTH_FORMS = [said(*TEXTS, first="system"), said(*map(parts, TEXTS), first="system")]


@pytest.mark.parametrize("given", BOTH_FORMS, ids=["strings", "parts"])
@pytest.mark.parametrize(
    ("template", "made_for"),
    [
        (STRING, TEXTS),
        (LLAMA_GUARD, [parts(text) for text in TEXTS]),
        (FIRST_PART, [parts(text) for text in TEXTS]),
        (SMOL_VLM, [parts(text) for text in TEXTS]),
        (LLAVA, [parts(text) for text in TEXTS]),
        (QWEN2_VL, TEXTS),
        (GEMMA3, TEXTS),
        (PIXTRAL, TEXTS),
        (LIST_SYSTEM, [parts(TEXTS[0]), TEXTS[1]]),
        (LLAMA32, TEXTS),
    ],
)
def test_prompt_is_as_transformers_renders_the_form_a_template_is_made_for(
    tokenizer: Tokenizer, template: str, made_for: Any, given: Any
) -> None:
    text, ids = tokenizer.encode_chat(given, template)
    expected = tokenizer.hf.apply_chat_template(
        said(*made_for, first="system"), chat_template=template, tokenize=False
    )
    assert text == expected == tokenizer.decode(ids)
    assert all(word in text for word in TEXTS) and "type" not in text


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (STRING, "<system>a\nb<user>c\nd"),
        (LLAMA_GUARD, "<system>ab<user>cd"),
        (FIRST_PART, "<system>a\nb<user>c\nd"),
        (QWEN2_VL, "<system>ab<user>cd"),
        (GEMMA3, "<user>a\nbcd"),
        (PIXTRAL, "[INST]a\nbcd[/INST]"),
        (LIST_SYSTEM, "<system>a\nb<user>c\nd"),
    ],
)
def test_several_parts_stay_parts_where_all_are_shown_and_else_are_lines(
    tokenizer: Tokenizer, template: str, expected: str
) -> None:
    messages = said(parts("a", "b"), parts("c", "d"), first="system")
    assert tokenizer.encode_chat(messages, template)[0] == expected


@pytest.mark.parametrize("content", ["noon", parts("noon")])
def test_results_of_tools_are_shown_as_the_template_shows_strings(
    tokenizer: Tokenizer, content: Any
) -> None:
    call = {"id": "a", "type": "function", "function": {"name": "clock", "arguments": '{"u": 1}'}}
    messages = [
        *said(parts("hi")),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": content, "tool_call_id": "a"},
    ]
    text, _ = tokenizer.encode_chat(messages, LLAMA32)
    assert text == '<user>hi<call>clock{"u": 1}<ipython>"noon"'


def test_every_kind_of_text_part_is_text(tokenizer: Tokenizer) -> None:
    content = [
        "a",
        {"text": "b"},
        {"type": "input_text", "text": "c"},
        {"type": "output_text", "text": "d", "annotations": []},
        {"type": "refusal", "refusal": "e"},
        {"type": "text", "text": "f", "cache_control": {"type": "ephemeral"}},
    ]
    for template in (LLAMA_GUARD, QWEN2_VL):
        assert tokenizer.encode_chat(said(content), template)[0] == "<user>abcdef"
    assert tokenizer.encode_chat(said(content), STRING)[0] == "<user>a\nb\nc\nd\ne\nf"


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "data:"}},
        {"type": "image_url", "text": "x"},
        {"type": "text"},
        {"type": ["text"], "text": "x"},
        5,
        None,
    ],
)
def test_parts_that_are_no_text_are_refused(tokenizer: Tokenizer, part: Any) -> None:
    with pytest.raises(ValueError, match=r"list of text parts .*got the part"):
        tokenizer.encode_chat(said([part]), LLAMA_GUARD)


@pytest.mark.parametrize("content", ["hello", parts("hello")])
def test_a_template_that_drops_what_the_user_says_is_refused(
    tokenizer: Tokenizer, content: Any
) -> None:
    template = "{% for m in messages %}<{{ m.role }}>{{ m.text }}{% endfor %}"
    with pytest.raises(ValueError, match="drops what the user says"):
        tokenizer.encode_chat(said(content), template)


def test_a_template_that_shows_the_user_only_when_told_to_is_asked_so(
    tokenizer: Tokenizer,
) -> None:
    template = "{% if guard %}{% for m in messages %}{{ m.content[0].text }}{% endfor %}{% endif %}"
    assert tokenizer.encode_chat(said("hello"), template, guard=True)[0] == "hello"
    with pytest.raises(ValueError, match="drops what the user says"):
        tokenizer.encode_chat(said("hello"), template)


def test_a_role_that_a_template_leaves_out_is_no_error_but_logged(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers renders it so, too."""
    template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    messages = said("be kind", "hello", first="system")
    with caplog.at_level("WARNING", "compiledllm"):
        assert tokenizer.encode_chat(messages, template)[0] == "hello"
        assert tokenizer.encode_chat(messages, template)[0] == "hello"
    assert len(caplog.records) == 1 and "role 'system'" in caplog.records[0].getMessage()


def test_a_template_speaks_for_itself_when_it_refuses(tokenizer: Tokenizer) -> None:
    for content in ("hello", parts("hello")):
        twice = said(content) * 2
        with pytest.raises(ValueError, match="chat template failed: roles must alternate"):
            tokenizer.encode_chat(twice, MISTRAL)
        assert tokenizer.encode_chat(said(content, "yes"), MISTRAL)[0].endswith("<assistant>yes")


def test_an_answer_is_continued_in_either_form(tokenizer: Tokenizer) -> None:
    for template in (STRING, LLAMA_GUARD, QWEN2_VL):
        for content in ("the ans", parts("the ans")):
            text, _ = tokenizer.encode_chat(
                said("hi", content), template, continue_final_message=True
            )
            assert text == "<user>hi<assistant>the ans"


def test_forms_are_found_once_for_each_template_and_few_are_kept(tokenizer: Tokenizer) -> None:
    renders = 0
    render = tokenizer._render

    def counted(*arguments: Any) -> str:
        nonlocal renders
        renders += 1
        return render(*arguments)

    tokenizer._render = counted  # type: ignore[method-assign]
    try:
        for i in range(MAX_TEMPLATES + 2):
            tokenizer.encode_chat(said("hello"), STRING + str(i))
        renders = 0
        tokenizer.encode_chat(said("hello"), STRING + str(i), tools=[])
    finally:
        tokenizer._render = render  # type: ignore[method-assign]
    assert renders == 1
    assert len(tokenizer._template_forms) <= MAX_TEMPLATES


# -- what clients send back ------------------------------------------------------------------------


def sent(**fields: Any) -> dict[str, Any]:
    """An assistant's message in the history: the same from Engine.chat and from HTTP."""
    message = {"role": "assistant", **fields}
    (plain,) = plain_messages([message])
    assert plain_messages([plain_message(parse(Message, json.dumps(message).encode()))]) == [plain]
    return plain


def test_fields_that_say_nothing_are_absent() -> None:
    answer = {
        "content": "yes",
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": None,
        "name": None,
        "reasoning_content": None,
    }
    expected = {"role": "assistant", "content": "yes"}
    assert sent(**answer) == expected
    assert sent(**answer | {"tool_calls": []}) == expected
    assert sent(content=None, tool_calls=[]) == {"role": "assistant", "content": ""}
    assert sent() == sent(content="") == {"role": "assistant", "content": ""}
    assert sent(content=None, refusal="I cannot.")["content"] == "I cannot."
    assert plain_messages([{"role": "user", "content": None}])[0]["content"] == ""


def test_fields_of_a_models_own_reach_its_template() -> None:
    assert sent(content="x", channel="final")["channel"] == "final"
    for name in ("reasoning", "reasoning_content"):
        plain = sent(content="x", **{name: "Hm."})
        assert plain["reasoning"] == plain["reasoning_content"] == "Hm."


@pytest.mark.parametrize(
    ("arguments", "seen"),
    [
        ('{"a": 1}', {"a": 1}),
        ({"b": [2]}, {"b": [2]}),
        *((empty, {}) for empty in ("", "  ", "null", "{}", None, {})),
        *((none, {}) for none in ("[1]", "5", "true", '"text"', '{"cut": ', "[" * 100_000)),
    ],
)
def test_arguments_of_calls_are_objects(arguments: Any, seen: Any) -> None:
    call = {"id": "x", "type": "function", "function": {"name": "f", "arguments": arguments}}
    (plain,) = sent(content=None, tool_calls=[call])["tool_calls"]
    assert plain["function"]["arguments"] == plain_arguments(arguments) == seen
    assert call["function"]["arguments"] == arguments  # the caller's own is not changed


def test_calls_without_arguments_have_empty_ones() -> None:
    (call,) = sent(tool_calls=[{"function": {"name": "f"}}])["tool_calls"]
    assert call == {"type": "function", "function": {"name": "f", "arguments": {}}}


def test_legacy_function_calls_become_tool_calls() -> None:
    legacy = {"name": "f", "arguments": '{"a": 1}'}
    plain = sent(content=None, function_call=legacy)
    (call,) = plain["tool_calls"]
    assert call["function"] == {"name": "f", "arguments": {"a": 1}} and "function_call" not in plain
    (result,) = plain_messages([{"role": "function", "name": "f", "content": "2"}])
    assert (result["role"], result["tool_call_id"]) == ("tool", call["id"])


@pytest.mark.parametrize("calls", ["f", [5], {"name": "f"}])
def test_calls_that_are_none_are_refused(calls: Any) -> None:
    with pytest.raises(ValueError, match="tool_calls must be a list of objects"):
        plain_messages([{"role": "assistant", "content": "", "tool_calls": calls}])
