"""Greedy tokens of transformers' models, the reference for whole engines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


def load_reference(checkpoint: Path) -> Any:
    """transformers' model in float32."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    # "eager", as older versions leave out Gemma 2's soft-caps in their fused attention.
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    architecture = json.loads((checkpoint / "config.json").read_text())["architectures"][0]
    has_vision = architecture.endswith("ForConditionalGeneration")
    auto = AutoModelForImageTextToText if has_vision else AutoModelForCausalLM
    return auto.from_pretrained(checkpoint, **options).eval()


@torch.inference_mode()
def logits_of_outputs(model: Any, prompt: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
    """The logits from which each of `tokens` is drawn, [len(tokens), vocab], without a KV cache."""
    logits: torch.Tensor = model(torch.tensor([[*prompt, *tokens]]), use_cache=False).logits[0]
    return logits[len(prompt) - 1 : -1]


@torch.inference_mode()
def greedy_tokens(model: Any, prompt: list[int], count: int) -> list[int]:
    """Generate with transformers' KV cache, and check all tokens by one forward without a cache."""
    guess, cache, fed = [], None, prompt
    for _ in range(count):
        out = model(torch.tensor([fed]), past_key_values=cache, use_cache=True)
        fed, cache = [int(out.logits[0, -1].argmax())], out.past_key_values
        guess += fed
    assert logits_of_outputs(model, prompt, guess).argmax(-1).tolist() == guess
    return guess
