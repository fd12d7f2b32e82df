"""Runs requests that use every kernel of a step, so that no later request waits for a compiler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from compiledllm.log import log
from compiledllm.sampling_params import SamplingParams
from compiledllm.types import RequestSpec

if TYPE_CHECKING:
    from compiledllm.engine.core import EngineCore

_FILTERS: dict[str, Any] = {"temperature": 0.8, "top_k": 5, "top_p": 0.9, "min_p": 0.01}
_PENALTIES: dict[str, Any] = {
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "repetition_penalty": 1.1,
}
# The kinds of sampling that use different kernels. The last one runs steps without a CUDA graph.
KINDS = (
    SamplingParams(temperature=0),
    SamplingParams(temperature=0.8),
    SamplingParams(**_FILTERS),
    SamplingParams(temperature=0, **_PENALTIES),
    SamplingParams(temperature=0, logit_bias={3: -1.0}, min_tokens=2),
    SamplingParams(temperature=0, allowed_token_ids=[3, 4]),
    SamplingParams(temperature=0, logprobs=2),
    SamplingParams(temperature=0, prompt_logprobs=2),
)
_PROMPT_LENGTHS = (3, 40)
_MAX_TOKENS = 3


def warm_up(core: EngineCore) -> None:
    """Run requests of each kind, and of all kinds at once. A failure is only logged."""
    try:
        for kind in KINDS:
            _run(core, [kind])
        _run(core, KINDS)
    except Exception as error:
        log.warning("the warm-up failed (%s: %s)", type(error).__name__, error)
    core.reset_prefix_cache()


def _run(core: EngineCore, kinds: Sequence[SamplingParams]) -> None:
    room = core.max_model_len - _MAX_TOKENS
    for index, kind in enumerate(kinds):
        for length in _PROMPT_LENGTHS:
            if length <= room:
                name = f"warm-up {index}, {length}"
                core.add(RequestSpec(name, [3] * length, kind, _MAX_TOKENS, cache_salt="warm-up"))
    while core.has_unfinished():
        core.step()
