"""The model under measurement and the machine it runs on, shared by all engines of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from compiledllm.config import ConfigError, EngineConfig
from compiledllm.engine.startup import in_dtypes
from compiledllm.models.json_file import read_json
from compiledllm.models.registry import load_spec
from compiledllm.models.sharded_spec import sharded
from compiledllm.models.source import resolve_checkpoint
from compiledllm.models.spec import ModelSpec
from compiledllm.platform import Platform

# Engine options that `Model` holds as fields.
_FIELDS = ("model", "revision", "tokenizer", "device", "dtype")


@dataclass(frozen=True, slots=True)
class Model:
    """The checkpoint that all engines load.

    spec: in the dtypes of the run; with tensor parallelism, the part of one GPU. None for an
    architecture that only other engines support, which has no floors. options: all engine options
    that are no fields of this class, as the user gave them.
    """

    path: Path
    spec: ModelSpec | None
    vocab_size: int
    platform: Platform
    dtype: str
    options: Mapping[str, Any]

    @classmethod
    def from_options(cls, options: Mapping[str, Any], engines: tuple[str, ...]) -> Model:
        """Resolve engine options to a model. Raises ConfigError for options that are wrong."""
        config = EngineConfig.from_options(**options)
        dummy = options.get("load_format") == "dummy"
        is_ours = set(engines) == {"compiledllm"}  # others cannot load matrices that stay quantised
        path = resolve_checkpoint(
            options.get("model"), options.get("revision"), not dummy, keep_packed=is_ours
        )
        spec = None
        try:
            impl, quantization = options.get("model_impl", "auto"), options.get("quantization")
            spec = load_spec(path, impl, quantization)
        except ConfigError:
            if "compiledllm" in engines:
                raise
        platform = Platform.detect(options.get("device", "auto"))
        stored = spec.dtype if spec else "bfloat16"
        dtype = str(platform.choose_dtype(options.get("dtype", "auto"), stored).value)
        if spec:
            spec, _ = in_dtypes(spec, config.cache, dtype, path, platform)
            spec = sharded(spec, options.get("tensor_parallel_size") or 1)
        return cls(
            path=path,
            spec=spec,
            vocab_size=spec.vocab_size if spec else _vocab_size(path),
            platform=platform,
            dtype=dtype,
            options={name: value for name, value in options.items() if name not in _FIELDS},
        )

    def with_defaults(self, defaults: Mapping[str, Any]) -> Model:
        """The model with these engine options where the user has given no others."""
        return replace(self, options={**defaults, **self.options})

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def raw_config(self) -> dict[str, Any]:
        """The checkpoint's config.json."""
        return read_json(self.path / "config.json")

    @property
    def has_random_weights(self) -> bool:
        return self.options.get("load_format") == "dummy"

    def identity(self) -> dict[str, Any]:
        """Facts that tell this model from another one in a report."""
        known: dict[str, Any] = {}
        if self.spec:
            known["parameters"] = self.spec.whole.num_parameters
            known |= {"quantization": self.spec.quantization} if self.spec.quantization else {}
        return {"model": self.path.name, "dtype": self.dtype, **known}

    def check_length(self, num_tokens: int) -> None:
        """Raise ConfigError if a request of so many tokens, output included, cannot be run."""
        limit = self.options.get("max_model_len") or (self.spec and self.spec.max_position)
        if limit and num_tokens > limit:
            raise ConfigError(
                f"a request of {num_tokens} tokens, output included, is longer than the context of "
                f"{limit}; ask for shorter inputs or outputs"
            )

    def encode(self, text: str) -> list[int]:
        """Tokenize a text with the model's tokenizer."""
        from compiledllm.engine.tokenizer import Tokenizer

        return Tokenizer(self.path).encode(text)


def _vocab_size(path: Path) -> int:
    raw = read_json(path / "config.json")
    parts = [part for part in (raw, raw.get("text_config")) if isinstance(part, dict)]
    found = next((part["vocab_size"] for part in parts if "vocab_size" in part), None)
    if not isinstance(found, int):
        raise ConfigError(f"{path}/config.json gives no vocab_size but {found!r}")
    return found
