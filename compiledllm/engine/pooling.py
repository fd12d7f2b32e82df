"""Finishes the vectors of prompts: cuts them, scales them to length 1 and compares them."""

from __future__ import annotations

import numpy as np

from compiledllm.engine.request_state import RequestState
from compiledllm.models.pooling import StoredPooling
from compiledllm.outputs import EmbeddingOutput, EmbeddingRequestOutput
from compiledllm.pooling_params import PoolingParams

_MIN_LENGTH = 1e-12  # a shorter vector is scaled as if it had this length, as in torch


def vector_of(state: RequestState, stored: StoredPooling, params: PoolingParams) -> np.ndarray:
    """A finished request's vector, float32 [dimensions].

    Raises RuntimeError if the request ended with an error.
    """
    (completion,) = state.completions
    if completion.pooled is None:
        cause = completion.stop_reason or completion.finish_reason
        raise RuntimeError(f"request '{state.request_id}' has no vector: {cause}")
    vector = np.frombuffer(completion.pooled, np.float32)[: params.dimensions]
    normalize = stored.normalize if params.normalize is None else params.normalize
    return normalized(vector) if normalize else vector


def normalized(vector: np.ndarray) -> np.ndarray:
    """The vector scaled to length 1, float32."""
    scaled: np.ndarray = vector / np.maximum(np.linalg.norm(vector), np.float32(_MIN_LENGTH))
    return scaled


def embedding_output(
    state: RequestState, stored: StoredPooling, params: PoolingParams
) -> EmbeddingRequestOutput:
    """A finished request's vector as the caller gets it."""
    (completion,) = state.completions
    return EmbeddingRequestOutput(
        state.request_id,
        EmbeddingOutput(vector_of(state, stored, params).tolist()),
        completion.spec.prompt_token_ids,
        completion.is_finished,
        completion.num_cached_tokens,
    )
