"""Logits processors: functions, supplied by the caller, that edit the logits of a request."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from compiledllm.runner.rule import Draw, Rule
from compiledllm.sampling_params import LogitsProcessor
from compiledllm.types import NewRequest


@dataclass(slots=True)
class _Processed:
    """One request with processors. token_ids: its prompt and output tokens."""

    processors: list[LogitsProcessor]
    num_prompt_tokens: int
    token_ids: list[int]


class Processors(Rule):
    """Calls each request's logits processors, in the order in which the request lists them."""

    follows_output = True

    def __init__(self) -> None:
        self._processed: dict[int, _Processed] = {}

    def fill(self, row: int, request: NewRequest) -> bool:
        if not (processors := request.spec.sampling_params.logits_processors):
            return False
        split, token_ids = request.spec.num_prompt_tokens, list(request.token_ids)
        self._processed[row] = _Processed(processors, split, token_ids)
        return True

    def release(self, row: int) -> None:
        del self._processed[row]

    def record(self, row: int, token_id: int) -> None:
        self._processed[row].token_ids.append(token_id)

    def apply(self, logits: Tensor, draw: Draw) -> dict[int, str]:
        errors: dict[int, str] = {}
        for index, row in draw.among(self._processed) if self._processed else ():
            request = self._processed[row]
            tokens = request.token_ids[: draw.positions[index]]
            prompt = tokens[: request.num_prompt_tokens]
            output = tokens[request.num_prompt_tokens :]
            try:
                for processor in request.processors:
                    logits[index] = _process(processor, prompt, output, logits[index])
            except Exception as error:  # the processor is the caller's code
                errors[index] = f"logits processor: {type(error).__name__}: {error}"
        return errors


def _process(
    processor: LogitsProcessor, prompt: list[int], output: list[int], logits: Tensor
) -> Tensor:
    """Call a processor and return the logits [vocab]. A processor that edits in place returns None.

    Raises ValueError if the processor returns anything else than logits of the same shape.
    """
    arguments: tuple[Any, ...] = (prompt, output, logits)
    result = processor(*arguments[-num_arguments(processor) :])
    if result is None:
        return logits
    if not isinstance(result, Tensor) or result.shape != logits.shape:
        got = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise ValueError(f"it must return logits {list(logits.shape)}, got {got}")
    return result.to(logits)


def num_arguments(processor: LogitsProcessor) -> int:
    """How many of (prompt, output, logits) the processor takes, counted from the end: 1, 2 or 3."""
    try:
        parameters = inspect.signature(processor).parameters.values()
    except (TypeError, ValueError):  # some built-in functions have no signature
        return 2
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return 3
    positional = [
        p
        for p in parameters
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty
    ]
    return min(max(len(positional), 1), 3)
