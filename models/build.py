"""Builds the model of a spec with its weights: a Decoder, or transformers' module in its place."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from compiledllm.models.decoder import Decoder
from compiledllm.models.spec import ModelSpec
from compiledllm.models.weights import fill_with_random_weights, load_weights


def build_model(spec: ModelSpec, backend: str, checkpoint: Path, dummy_seed: int | None) -> Decoder:
    """Build the model on torch's default device in torch's default dtype.

    dummy_seed: seed of random weights; None loads the checkpoint's. Raises ConfigError for weights
    that do not fit the spec.
    """
    if spec.implementation == "transformers":
        from compiledllm.models.transformers_model import build_transformers_model

        return cast("Decoder", build_transformers_model(spec, backend, checkpoint, dummy_seed))
    model = Decoder(spec, backend)
    if dummy_seed is None:
        load_weights(model, checkpoint)
    else:
        fill_with_random_weights(model, dummy_seed)
    return model
