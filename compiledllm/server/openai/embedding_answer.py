"""Answers of `/v1/embeddings`."""

from __future__ import annotations

import base64
from typing import Any

import msgspec

from compiledllm.engine.pooling import vector_of
from compiledllm.engine.prompts import Prompt
from compiledllm.engine.request_state import RequestState
from compiledllm.outputs import RequestOutput
from compiledllm.pooling_params import PoolingParams
from compiledllm.server.openai.answer import Context
from compiledllm.server.openai.pooling_answer import PoolingAnswer, pooling_usage
from compiledllm.server.openai.pooling_protocol import EmbeddingRequest


class EmbeddingAnswer(PoolingAnswer[EmbeddingRequest]):
    """One vector for each input, as a list of floats or as the base64 of float32."""

    body_type = EmbeddingRequest
    id_prefix = "embd"

    def __init__(self, body: EmbeddingRequest, context: Context) -> None:
        super().__init__(body, context)
        self._is_base64 = body.encoding_format == "base64"
        self._pooling = PoolingParams(
            normalize=body.normalize,
            dimensions=body.dimensions,
            truncate_prompt_tokens=body.truncate_prompt_tokens,
        )

    def prompts(self, body: EmbeddingRequest) -> list[Prompt]:
        given: Any = body.input
        return list(given) if body.has_many_prompts else [given]

    def make_request(
        self, request_id: str, prompt: Prompt, priority: int, cache_salt: str
    ) -> RequestState:
        requests = self._context.requests
        state = requests.make_pooling(request_id, prompt, self._pooling, priority, cache_salt)
        self.states.append(state)
        return state

    def whole(self, outputs: list[RequestOutput], num_output_tokens: int) -> dict[str, Any]:
        data = [
            {"object": "embedding", "index": index, "embedding": self._embedding(state)}
            for index, state in enumerate(self.states)
        ]
        head = {"id": self._context.request_id, "object": "list", "model": self._context.model}
        return head | {"data": data, "usage": pooling_usage(outputs)}

    def _embedding(self, state: RequestState) -> Any:
        """A vector in the format asked for. Encoding one at a time lets other threads run."""
        vector = vector_of(state, self._context.requests.pooling, self._pooling)
        if self._is_base64:
            return base64.b64encode(vector.astype("<f4").tobytes()).decode()
        return msgspec.Raw(msgspec.json.encode(vector.tolist()))
