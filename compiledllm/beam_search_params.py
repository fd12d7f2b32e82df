"""How beam search looks for the likeliest continuations. Pure Python (no torch)."""

from __future__ import annotations

from dataclasses import dataclass

from compiledllm.checks import is_finite, require, require_int, strict_fields
from compiledllm.vllm_options import without_vllm_fields


@strict_fields("beam search field", without_vllm_fields)
@dataclass(slots=True)
class BeamSearchParams:
    """A search for the likeliest continuations. Names are vLLM's.

    beam_width: number of sequences kept in each round, 1 to 64. max_tokens: largest number of
    tokens to generate, >= 1. ignore_eos: continue after the end-of-sequence token. temperature: 0
    to 2; 0 ranks by the model's own probabilities. length_penalty: a sequence's score is its
    cumulative logprob divided by its length (without the end-of-sequence token) to this power.
    include_stop_str_in_output: keep the end-of-sequence token in the text.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        require_int(self, "beam_width", 1, 64)
        require_int(self, "max_tokens", 1, 2**31)
        for name, min_value, max_value in (
            ("temperature", 0.0, 2.0),
            ("length_penalty", -100.0, 100.0),
        ):
            value = getattr(self, name)
            ok = is_finite(value) and min_value <= value <= max_value
            require(ok, name, value, f"in [{min_value:g}, {max_value:g}]")
