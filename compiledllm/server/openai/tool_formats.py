"""The formats in which models write tool calls, as data for scanners and grammars.

An answer with calls is `begin`, the calls with `separator` between them, and `end`. A call is
`open`, `head` with the function's name, the arguments, and `close`. A new format is a row, and a
reader in `call_readers` if it has a syntax of its own for arguments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Syntax = Literal["object", "json", "tags", "gemma", "python", "channels"]


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """A format of tool calls.

    names: of `--tool-call-parser`, as in vLLM. syntax: "object" is a JSON object that has name and
    arguments, and its head and close are parts of the object; "json", "tags", "gemma" and "python"
    are ways to write arguments after a head; "channels" are gpt-oss's. marks: a chat template that
    contains one of them, and none of `other_marks`, uses this format. parameter: an argument of
    "tags". extra_openers, extra_closers: further markers that may stand before and after calls.
    bare: the character with which an answer may begin a call without a marker. id_length: length of
    a call's id, to which "call_" is prepended unless the id is short; a few templates require nine
    letters and digits. has_ids: whether the head begins with the call's id. stops: special tokens
    that end an answer, even if the checkpoint does not declare them as end tokens.
    """

    names: tuple[str, ...]
    syntax: Syntax
    marks: tuple[str, ...]
    other_marks: tuple[str, ...] = ()
    begin: str = ""
    open: str = ""
    head: str = "{name}"
    close: str = ""
    separator: str = ""
    end: str = ""
    parameter: str = ""
    extra_openers: tuple[str, ...] = ()
    extra_closers: tuple[str, ...] = ()
    bare: str = ""
    id_length: int = 24
    has_ids: bool = False
    stops: tuple[str, ...] = ()

    @property
    def ends_reasoning(self) -> str:
        """The text that begins a call and thereby also ends reasoning that the model did not end.

        "" for formats whose calls are JSON objects, since such objects may occur in reasoning.
        """
        if self.begin or self.syntax in ("object", "channels"):
            return self.begin.rstrip("\n[")
        return self.open + self.head.partition("{name}")[0]

    def is_of(self, chat_template: str) -> bool:
        has = any(mark in chat_template for mark in self.marks)
        return has and not any(mark in chat_template for mark in self.other_marks)


_OBJECT = '{"name": "{name}", "arguments": '
_XML = ("<function=", "<arg_key>")  # marks of calls in tags
_DSML_V4 = ("DSML｜tool_calls", "dsml_token + 'tool_calls>")

_HERMES = ToolFormat(
    ("hermes",),
    "object",
    marks=("<tool_call>",),
    other_marks=(*_XML, "<tool_calls>", '<invoke name="'),
    open="<tool_call>\n",
    head=_OBJECT,
    close="}\n</tool_call>",
    separator="\n",
)
_QWEN = ToolFormat(
    ("qwen3_coder", "qwen3_xml"),
    "tags",
    marks=("<parameter=",),
    other_marks=("<seed:tool_call>",),
    open="<tool_call>\n<function=",
    head="{name}>\n",
    close="</function>\n</tool_call>",
    separator="\n",
    parameter="<parameter={key}>\n{value}\n</parameter>\n",
)
_SEED = ToolFormat(
    ("seed_oss",),
    "tags",
    marks=("<seed:tool_call>",),
    open="<seed:tool_call>\n<function=",
    head="{name}>\n",
    close="</function>\n</seed:tool_call>",
    separator="\n",
    parameter="<parameter={key}>{value}</parameter>\n",
)
_GLM47 = ToolFormat(
    ("glm47",),
    "tags",
    marks=("</arg_key><arg_value>",),
    open="<tool_call>",
    close="</tool_call>",
    parameter="<arg_key>{key}</arg_key><arg_value>{value}</arg_value>",
)
_GLM45 = ToolFormat(
    ("glm45",),
    "tags",
    marks=("<arg_key>",),
    other_marks=_GLM47.marks,
    open="<tool_call>",
    head="{name}\n",
    close="</tool_call>",
    separator="\n",
    parameter="<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n",
)
_MINIMAX = ToolFormat(
    ("minimax_m2",),
    "tags",
    marks=("<minimax:tool_call>",),
    begin="<minimax:tool_call>\n",
    open='<invoke name="',
    head='{name}">\n',
    close="</invoke>\n",
    end="</minimax:tool_call>",
    parameter='<parameter name="{key}">{value}</parameter>\n',
)
_DEEPSEEK_V32 = ToolFormat(
    ("deepseek_v32",),
    "tags",
    marks=("<｜DSML｜function_calls>", "｜DSML｜"),
    other_marks=_DSML_V4,
    begin="<｜DSML｜function_calls>\n",
    open='<｜DSML｜invoke name="',
    head='{name}">\n',
    close="</｜DSML｜invoke>\n",
    end="</｜DSML｜function_calls>",
    parameter='<｜DSML｜parameter name="{key}" string="{is_string}">{value}</｜DSML｜parameter>\n',
)
_DEEPSEEK_V4 = ToolFormat(
    ("deepseek_v4",),
    "tags",
    marks=_DSML_V4,
    begin="<｜DSML｜tool_calls>\n",
    open=_DEEPSEEK_V32.open,
    head=_DEEPSEEK_V32.head,
    close=_DEEPSEEK_V32.close,
    end="</｜DSML｜tool_calls>",
    parameter=_DEEPSEEK_V32.parameter,
)
_DEEPSEEK_V3 = ToolFormat(
    ("deepseek_v3",),
    "json",
    marks=("<｜tool▁call▁begin｜>",),
    begin="<｜tool▁calls▁begin｜>",
    open="<｜tool▁call▁begin｜>",
    head="function<｜tool▁sep｜>{name}\n```json\n",
    close="\n```<｜tool▁call▁end｜>",
    separator="\n",
    end="<｜tool▁calls▁end｜>",
)
_DEEPSEEK_V31 = ToolFormat(
    ("deepseek_v31",),
    "json",
    marks=_DEEPSEEK_V3.marks,
    other_marks=("```json",),
    begin=_DEEPSEEK_V3.begin,
    open=_DEEPSEEK_V3.open,
    head="{name}<｜tool▁sep｜>",
    close="<｜tool▁call▁end｜>",
    end=_DEEPSEEK_V3.end,
)
_KIMI = ToolFormat(
    ("kimi_k2",),
    "json",
    marks=("<|tool_calls_section_begin|>",),
    begin="<|tool_calls_section_begin|>",
    open="<|tool_call_begin|>",
    head="functions.{name}:{number}<|tool_call_argument_begin|>",
    close="<|tool_call_end|>",
    end="<|tool_calls_section_end|>",
    has_ids=True,  # templates show the ids, by which results refer to their calls
)
_GEMMA = ToolFormat(
    ("gemma4",),
    "gemma",
    marks=("<|tool_call>",),
    open="<|tool_call>",
    head="call:{name}",
    close="<tool_call|>",
    stops=("<|tool_response>",),
)
_GPT_OSS = ToolFormat(
    ("openai",),
    "channels",
    marks=("<|channel|>",),
    open="<|channel|>commentary to=functions.",
    head="{name} <|constrain|>json<|message|>",
    close="<|call|>",
    separator="<|start|>assistant",
    stops=("<|call|>", "<|return|>"),
)
_LFM2 = ToolFormat(
    ("lfm2",),
    "python",
    marks=("<|tool_call_start|>", "<|tool_list_start|>", "List of tools: ["),
    begin="<|tool_call_start|>[",
    separator=", ",
    end="]<|tool_call_end|>",
)
_OLMO3 = ToolFormat(
    ("olmo3",),
    "python",
    marks=("<function_calls>",),
    begin="<function_calls>",
    separator="\n",
    end="</function_calls>",
)
_PYTHONIC = ToolFormat(
    ("pythonic", "llama4_pythonic"),
    "python",
    marks=("<|python_start|>", "[func_name1("),
    begin="[",
    separator=", ",
    end="]",
    extra_openers=("<|python_start|>",),
    extra_closers=("<|python_end|>",),
    bare="[",
)
_LLAMA3 = ToolFormat(
    ("llama3_json", "llama4_json"),
    "object",
    marks=("<|python_tag|>", '"parameters": dictionary of argument name'),
    other_marks=("<function=",),
    head=_OBJECT.replace("arguments", "parameters"),
    close="}",
    separator="; ",
    extra_openers=("<|python_tag|>",),
    bare="{",
)
_MISTRAL = ToolFormat(
    ("mistral",),
    "object",
    marks=("[TOOL_CALLS]",),
    other_marks=("[ARGS]",),
    begin="[TOOL_CALLS][",
    head=_OBJECT,
    close="}",
    separator=", ",
    end="]",
    id_length=9,
)
_MISTRAL_ARGS = ToolFormat(
    ("mistral",),
    "json",
    marks=("[ARGS]",),
    open="[TOOL_CALLS]",
    head="{name}[ARGS]",
    id_length=9,
)

# A template may have marks of several rows; the first one is meant.
ROWS = (
    *(_DEEPSEEK_V4, _DEEPSEEK_V32, _DEEPSEEK_V31, _DEEPSEEK_V3, _KIMI, _MINIMAX, _SEED, _QWEN),
    *(_GLM47, _GLM45, _GEMMA, _GPT_OSS, _LFM2, _OLMO3, _PYTHONIC, _HERMES, _LLAMA3),
    *(_MISTRAL, _MISTRAL_ARGS),
)
FORMATS = {name: row for row in reversed(ROWS) for name in row.names}
"""Names of `--tool-call-parser`; of formats with the same name the first one."""


def find_format(name: str, chat_template: str) -> ToolFormat | None:
    """The format of a name, or for "auto" of the chat template; None if there is none."""
    if name == "none":
        return None
    rows = [row for row in ROWS if name in ("auto", *row.names)]
    found = next((row for row in rows if row.is_of(chat_template)), None)
    return FORMATS[name] if found is None and name != "auto" else found
