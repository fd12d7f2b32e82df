"""Chooses a model's attention backend: the preferred one, or a stand-in that can run the model."""

from __future__ import annotations

import torch

from compiledllm.choices import Choice
from compiledllm.config import ConfigError
from compiledllm.kernels.attention import STAND_INS, make_backend
from compiledllm.kernels.backend import AttentionBackend
from compiledllm.log import log
from compiledllm.models.spec import ModelSpec
from compiledllm.resolved_config import StepLimits


def choose_backend(
    preferred: Choice,
    spec: ModelSpec,
    limits: StepLimits,
    device: torch.device,
) -> tuple[Choice, AttentionBackend]:
    """Return the name of a backend, the reason for choosing it, and the backend, prepared to run.

    Raises ConfigError if the preferred backend cannot run the model and has no stand-in.
    """
    name = str(preferred.value)
    backend = make_backend(name)
    obstacle = _prepare(backend, spec, limits, device)
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
    return choose_backend(choice, spec, limits, device)


def _prepare(
    backend: AttentionBackend,
    spec: ModelSpec,
    limits: StepLimits,
    device: torch.device,
) -> str | None:
    """Prepare the backend; return the reason why it cannot run the model, or None."""
    layers, dtype = spec.attentions, spec.torch_dtype
    if obstacle := backend.why_not(layers, dtype, spec.torch_kv_dtype):
        return obstacle
    try:
        max_pages = (limits.max_num_seqs + 1) * limits.blocks_per_request
        backend.prepare(layers, dtype, limits.block_size, max_pages, device)
    except Exception as error:  # e.g. a missing package or compiler, an unknown GPU
        first_line = str(error).strip().partition("\n")[0][:160]
        return f"{type(error).__name__}: {first_line}"
    return None
