"""Builds the model of a spec with its weights: a Decoder, or transformers' module in its place."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from compiledllm.config import ConfigError
from compiledllm.kernels.backend import AttentionBackend
from compiledllm.models.checkpoint import files_by_tensor, weight_files
from compiledllm.models.decoder import Decoder
from compiledllm.models.layers.factory import Products
from compiledllm.models.layers.linear import Matrix
from compiledllm.models.spec import ModelSpec
from compiledllm.models.weights import fill_with_random_weights, load_weights

_MIN_BYTES_PER_PARAMETER = 1 / 8  # no format has less than one bit per weight


def build_model(
    spec: ModelSpec,
    backend: AttentionBackend,
    checkpoint: Path,
    dummy_seed: int | None,
    products: Products | None = None,
    rank: int = 0,
) -> Decoder:
    """Build the model on torch's default device in torch's default dtype.

    dummy_seed: seed of random weights; None loads the checkpoint's weights. products: the kernels
    for matrix products and norms. rank: the rank of this process, below `spec.num_ranks`. Raises
    ConfigError for weights that do not fit the spec.
    """
    if dummy_seed is None:
        _check_size(spec, checkpoint)
    if spec.implementation == "transformers":
        from compiledllm.models.transformers_model import build_transformers_model

        return cast("Decoder", build_transformers_model(spec, backend, checkpoint, dummy_seed))
    model = Decoder(spec, backend, products, rank)
    if dummy_seed is None:
        load_weights(model, checkpoint)
    else:
        fill_with_random_weights(model, dummy_seed)
    for module in model.modules():
        if isinstance(module, Matrix):
            module.finish()
    return model


def _check_size(spec: ModelSpec, checkpoint: Path) -> None:
    """Raise ConfigError for a config with far more parameters than the files can hold.

    The check comes before any memory is allocated for the parameters.
    """
    files = weight_files(checkpoint)
    num_bytes = sum(path.stat().st_size for path in files)
    if spec.num_parameters > num_bytes / _MIN_BYTES_PER_PARAMETER:
        files_by_tensor(files)  # raises an error that names a truncated file, the likelier cause
        raise ConfigError(
            f"{checkpoint}: the config asks for {spec.num_parameters} parameters and the weight "
            f"files have {num_bytes} bytes; they do not belong together"
        )
