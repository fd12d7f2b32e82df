"""Reads generation_config.json. Imports no torch, because the HTTP process uses this module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compiledllm.config import ConfigError
from compiledllm.models.json_file import read_json

# Name in generation_config.json -> name of the sampling parameter.
_GENERATION_DEFAULTS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


def generation_defaults(checkpoint: Path) -> dict[str, Any]:
    """The sampling parameters that generation_config.json sets; empty if there is no such file."""
    found = _generation_config(checkpoint)
    defaults = {name: found.get(hf_name) for hf_name, name in _GENERATION_DEFAULTS.items()}
    return {name: value for name, value in defaults.items() if value is not None}


def generation_eos_token_ids(checkpoint: Path) -> tuple[int, ...]:
    """End-of-sequence ids of generation_config.json, as transformers' `generate` uses them.

    Raises ConfigError for values that are not token ids.
    """
    path = checkpoint / "generation_config.json"
    eos = _generation_config(checkpoint).get("eos_token_id")
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(isinstance(token_id, int) for token_id in ids):
        raise ConfigError(f"{path}: eos_token_id must be a token id or a list of them, got {eos!r}")
    return tuple(ids)


def _generation_config(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / "generation_config.json"
    return read_json(path) if path.exists() else {}
