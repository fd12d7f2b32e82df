"""Answers that are numbers about prompts: nothing is generated, and nothing can be streamed."""

from __future__ import annotations

from typing import ClassVar, TypeVar

from compiledllm.engine.request_state import RequestState
from compiledllm.outputs import CompletionOutput, RequestOutput
from compiledllm.sampling_params import SamplingParams
from compiledllm.server.openai.answer import Answer, Context
from compiledllm.server.openai.errors import ApiError
from compiledllm.server.openai.pooling_protocol import PoolingBase

BodyT = TypeVar("BodyT", bound=PoolingBase)


class PoolingAnswer(Answer[BodyT]):
    """An answer made of the results in its requests' states, once all are finished.

    states: the requests, in the order of the prompts.
    """

    streams: ClassVar[bool] = False
    takes_long_to_encode: ClassVar[bool] = True

    def __init__(self, body: BodyT, context: Context) -> None:
        super().__init__(body, context)
        if body.stream:
            raise ApiError(400, "stream must be false here: nothing is generated", "stream")
        self.params = SamplingParams(
            max_tokens=0, truncate_prompt_tokens=body.truncate_prompt_tokens, detokenize=False
        )
        self.states: list[RequestState] = []

    def grow(self, prompt_index: int, output: RequestOutput, completion: CompletionOutput) -> bytes:
        raise AssertionError("a pooling answer is not streamed")


def pooling_usage(outputs: list[RequestOutput]) -> dict[str, int]:
    count = sum(len(output.prompt_token_ids) for output in outputs)
    return {"prompt_tokens": count, "total_tokens": count}
