"""Chat templates of the user's own, and the one for tools that the examples have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import compiledllm
from compiledllm.config import ConfigError, EngineConfig
from compiledllm.engine.tokenizer import Tokenizer, load

pytestmark = pytest.mark.real_model  # its tokenizer

TOOLS_TEMPLATE = Path(compiledllm.__file__).parent / "server" / "examples" / "chatml_tools.jinja"
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}{% if loud %}!{% endif %}"
HI = [{"role": "user", "content": "hi"}]
CALL = {"name": "add", "arguments": {"a": 1}}
CONVERSATION: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": None, "tool_calls": [{"function": CALL, "type": "function"}]},
    {"role": "tool", "content": "2"},
    {"role": "assistant", "content": "Two."},
]


@pytest.fixture(scope="module")
def with_tools(default_model: Path) -> Tokenizer:
    return Tokenizer(default_model, str(TOOLS_TEMPLATE))


@pytest.mark.parametrize("messages", [HI, CONVERSATION[:2]])
def test_without_tools_a_conversation_is_that_of_the_models_own_template(
    messages: list[dict[str, Any]], with_tools: Tokenizer, default_model: Path
) -> None:
    ours, own = with_tools, Tokenizer(default_model)
    assert ours.encode_chat(messages, add_generation_prompt=True) == own.encode_chat(
        messages, add_generation_prompt=True
    )


def test_tools_calls_and_results_are_shown(with_tools: Tokenizer) -> None:
    pytest.importorskip("msgspec")
    from compiledllm.server.openai.tool_formats import FORMATS, find_format

    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    text, _ = with_tools.encode_chat(CONVERSATION, tools=tools)
    assert text.startswith("<|im_start|>system\nBe brief.\n\n")
    assert '{"name": "add", "parameters": {"type": "object"}}\n</tools>' in text
    assert (
        '<|im_start|>assistant\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
        "<|im_end|>\n<|im_start|>user\n<tool_response>\n2\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\nTwo.<|im_end|>\n"
    ) in text
    assert find_format("auto", with_tools.chat_template_text) is FORMATS["hermes"]


def test_a_template_is_a_text_or_a_file_and_has_defaults(
    default_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    for template in (TEMPLATE, str(tmp_path / "t.jinja")):
        config = EngineConfig.from_options(
            chat_template=template, default_chat_template_kwargs={"loud": True}
        )
        made = load(config, default_model)
        assert made is not None and made.encode_chat(HI)[0] == "hi!"
        assert made.encode_chat(HI, loud=False)[0] == "hi"
        assert made.encode_chat(HI, chat_template=TEMPLATE + "?", loud=False)[0] == "hi?"


def test_a_template_that_is_neither_is_refused(default_model: Path) -> None:
    with pytest.raises(ConfigError, match="chat_template='nowhere.jinja' is neither a Jinja"):
        Tokenizer(default_model, "nowhere.jinja")
