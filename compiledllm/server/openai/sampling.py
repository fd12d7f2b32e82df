"""Makes sampling parameters from the fields that all bodies of generation share."""

from __future__ import annotations

from typing import Any

from compiledllm.sampling_params import RequestOutputKind, SamplingParams
from compiledllm.server.openai.errors import ApiError
from compiledllm.server.openai.protocol import Generation, ResponseFormat
from compiledllm.structured_outputs import StructuredOutputsParams

# Body fields that are sampling parameters of the same name; None keeps the default.
_SAME = (
    *("n", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids"),
    *("frequency_penalty", "presence_penalty", "repetition_penalty", "logit_bias", "ignore_eos"),
    *("min_tokens", "skip_special_tokens", "spaces_between_special_tokens", "prompt_logprobs"),
    *("allowed_token_ids", "bad_words", "logprob_token_ids", "truncate_prompt_tokens"),
    "include_stop_str_in_output",
)


def sampling_params(body: Generation, defaults: SamplingParams, **more: Any) -> SamplingParams:
    """The body's sampling parameters over the server's defaults. ApiError names a wrong field."""
    given = {name: getattr(body, name) for name in _SAME if getattr(body, name) is not None}
    if body.repetition_detection is not None:
        given["repetition_detection"] = body.repetition_detection.plain()
    base = {
        name: getattr(defaults, name)
        for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    }
    kind = RequestOutputKind.DELTA if body.stream else RequestOutputKind.FINAL_ONLY
    try:
        return SamplingParams(**(base | given | more | {"output_kind": kind}))
    except ValueError as error:
        raise ApiError(400, str(error), str(error).partition(" ")[0]) from None


def structured_outputs_from(body: Generation) -> StructuredOutputsParams | None:
    """The structured output that the body asks for. Raises ApiError naming the field."""
    wanted, given = body.response_format, body.structured_outputs
    name = "response_format" if given is None else "structured_outputs"
    if wanted is not None and wanted.type != "text" and given is not None:
        raise ApiError(400, "give either response_format or structured_outputs, not both", name)
    try:
        if given is not None:
            return StructuredOutputsParams(**given.plain())
        return None if wanted is None else _from_response_format(wanted)
    except ValueError as error:
        raise ApiError(400, str(error).replace("structured_outputs", name), name) from None


def _from_response_format(wanted: ResponseFormat) -> StructuredOutputsParams | None:
    if wanted.type == "json_object":
        return StructuredOutputsParams(json_object=True)
    if wanted.type == "json_schema":
        if wanted.json_schema is None:
            raise ValueError('response_format needs a json_schema: {"name": ..., "schema": {...}}')
        return StructuredOutputsParams(json=wanted.json_schema.schema_)
    if wanted.type == "structural_tag":
        tag = {"structures": wanted.structures, "triggers": wanted.triggers}
        return StructuredOutputsParams(structural_tag=tag)
    return None
