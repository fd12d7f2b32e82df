"""Which attention backend runs a model: the preferred one, or what stands in where it cannot."""

from __future__ import annotations

import torch

from compiledllm.config import Choice, ConfigError
from compiledllm.kernels.attention import STAND_INS, make_backend
from compiledllm.kernels.backend import AttentionBackend
from compiledllm.log import log
from compiledllm.models.spec import ModelSpec


def choose_backend(
    preferred: Choice,
    spec: ModelSpec,
    dtype: torch.dtype,
    block_size: int,
    max_pages: int,
    device: torch.device,
) -> tuple[Choice, AttentionBackend]:
    """A backend that is prepared for the model, its name and the reason for it.

    max_pages: the most blocks that all rows of a step have together. Raises ConfigError if the
    preferred backend cannot run the model and nothing may stand in for it.
    """
    name = str(preferred.value)
    backend = make_backend(name)
    obstacle = _prepare(backend, spec, dtype, block_size, max_pages, device)
    if obstacle is None:
        return preferred, backend
    if name not in STAND_INS:
        raise ConfigError(
            f"deterministic=True cannot be had for this model: {obstacle}; leave it out"
        )
    stand_in = STAND_INS[name]
    slow = "" if make_backend(stand_in).captures else ", which is slow"
    log.warning(
        "attention_backend='%s' cannot be used (%s); using %s", name, obstacle, stand_in + slow
    )
    choice = Choice(stand_in, f"{name} cannot be used: {obstacle}")
    return choose_backend(choice, spec, dtype, block_size, max_pages, device)


def _prepare(
    backend: AttentionBackend,
    spec: ModelSpec,
    dtype: torch.dtype,
    block_size: int,
    max_pages: int,
    device: torch.device,
) -> str | None:
    """What prevents the backend from running the model, None if it is ready to."""
    layers = [layer.attn for layer in spec.layers]
    if obstacle := backend.why_not(layers, dtype):
        return obstacle
    try:
        backend.prepare(layers, dtype, block_size, max_pages, device)
    except Exception as error:  # a missing package or compiler, a GPU it does not know: anything
        first_line = str(error).strip().partition("\n")[0][:160]
        return f"{type(error).__name__}: {first_line}"
    return None
