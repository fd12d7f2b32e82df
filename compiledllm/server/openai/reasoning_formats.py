"""The forms in which models write reasoning, as data, and where an answer's reasoning begins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from compiledllm.engine.tokenizer import Tokenizer
from compiledllm.server.openai.format_markers import MARKER
from compiledllm.structured_outputs import ReasoningTokens

Mode = Literal["off", "leading", "begun", "channels"]


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """Reasoning is the text between `start` and `end` at the beginning of an answer.

    names: of `--reasoning-parser`, as in vLLM. is_begun: answers begin inside the reasoning, even
    if the prompt does not show it. has_channels: gpt-oss's channels instead, whose reasoning ends
    with the token `end`.
    """

    names: tuple[str, ...]
    start: str
    end: str
    is_begun: bool = False
    has_channels: bool = False

    def mode(self, prompt: str) -> Mode:
        """How the answer to a prompt begins: the chat template may open or close the reasoning."""
        if self.has_channels:
            return "channels"
        end = prompt[-100:].rstrip()
        if end.endswith(self.end):
            return "off"
        return "begun" if self.is_begun or end.endswith(self.start) else "leading"


THINK = ReasoningFormat(
    (
        *("qwen3", "deepseek_v3", "deepseek_v4", "glm45", "kimi_k2", "nemotron_v3", "holo2"),
        *("ernie45", "step3p5", "olmo3"),
    ),
    "<think>",
    "</think>",
)
CHANNELS = ReasoningFormat(("openai_gptoss",), "<|channel|>analysis", "<|end|>", has_channels=True)
ROWS = (
    THINK,
    ReasoningFormat(("deepseek_r1", "minimax_m2", "step3"), "<think>", "</think>", is_begun=True),
    ReasoningFormat(("mistral",), "[THINK]", "[/THINK]"),
    ReasoningFormat(("gemma4",), "<|channel>thought", "<channel|>"),
    ReasoningFormat(("seed_oss",), "<seed:think>", "</seed:think>"),
    CHANNELS,
)
REASONING = {name: row for row in ROWS for name in row.names}
"""Names of `--reasoning-parser`."""
_SPACES = ("\n", "\n\n", " ")  # what models write between reasoning and answer


def find_reasoning(name: str, chat_template: str) -> ReasoningFormat | None:
    """The form of a name, or for "auto" of the chat template; None if there is none."""
    if name != "auto":
        return REASONING.get(name)
    marks = {row: "<|channel|>" if row.has_channels else row.end for row in ROWS}
    return next((row for row, mark in marks.items() if mark in chat_template), None)


@dataclass(frozen=True, slots=True)
class Reasoning:
    """The reasoning of one answer."""

    form: ReasoningFormat = THINK
    mode: Mode = "off"

    def tokens(self, tokenizer: Tokenizer, begin_calls: str = "") -> ReasoningTokens | None:
        """The tokens that separate the reasoning from the structured answer after it.

        begin_calls: as in `ReasoningScanner`. None if the answer has no reasoning of this kind, or
        if the vocabulary does not have its markers as single tokens.
        """
        if self.mode not in ("begun", "leading"):
            return None
        start = None if self.mode == "begun" else _marker_id(tokenizer, self.form.start)
        end = tokenizer.token_id(self.form.end)
        if end is None or (start is None and self.mode == "leading"):
            return None
        spaces = [tokenizer.encode(text, add_special_tokens=False) for text in _SPACES]
        single = tuple(ids[0] for ids in spaces if len(ids) == 1)
        return ReasoningTokens(end, start, _marker_id(tokenizer, begin_calls), single)


def _marker_id(tokenizer: Tokenizer, text: str) -> int | None:
    """The token of the marker with which a text begins; None if there is none."""
    marker = MARKER.match(text)
    return None if marker is None else tokenizer.token_id(marker.group())
