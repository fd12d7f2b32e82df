"""Bytes of a model's weights in their formats, without building the model."""

from __future__ import annotations

import torch

from compiledllm.kernels.attention import REFERENCE, make_backend
from compiledllm.models.decoder import Decoder
from compiledllm.models.spec import ModelSpec


def weight_bytes(spec: ModelSpec, dtype: torch.dtype) -> int:
    """Bytes of all parameters. dtype: of those that are not quantised."""
    if not spec.quantization:
        return spec.num_parameters * dtype.itemsize
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model = Decoder(spec, make_backend(REFERENCE))
    finally:
        torch.set_default_dtype(default)
    return sum(p.numel() * p.itemsize for p in model.parameters())


def dtype_of(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name)
    return dtype
