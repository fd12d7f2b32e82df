"""User options: frozen dataclasses, validated once. `resolved_config` fills in what is left open.

`engine_options` declares the options. Unknown names are errors. Knows no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import PurePath
from typing import Any

from compiledllm.checks import is_int, reject_unknown
from compiledllm.engine_options import (
    AUTO,
    KINDS,
    CacheConfig,
    CompileConfig,
    ModelConfig,
    SchedulerConfig,
)
from compiledllm.vllm_options import without_vllm_options

MAX_NUM_SEQS = 32768


class ConfigError(ValueError):
    """The configuration is impossible; the message names the option, its value and a way out."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """All options of an engine.

    `EngineConfig.from_options(model=..., block_size=32)` takes flat options.
    """

    model: ModelConfig = ModelConfig()
    cache: CacheConfig = CacheConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    compile: CompileConfig = CompileConfig()

    @classmethod
    def from_options(cls, **options: Any) -> EngineConfig:
        """Sort flat options into groups. Raises ConfigError for an unknown name or a bad value."""
        groups = option_groups()
        owners = {f.name: group for group, kind in groups.items() for f in fields(kind)}
        chosen: dict[str, dict[str, Any]] = {group: {} for group in groups}
        for name, value in own_options(options).items():
            chosen[owners[name]][name] = value
        config = cls(**{group: kind(**chosen[group]) for group, kind in groups.items()})
        config.check()
        return config

    def check(self) -> None:
        """Raise ConfigError for a value that is wrong for every model and machine."""
        model, cache, scheduler = self.model, self.cache, self.scheduler
        positive: dict[str, Any] = {
            "max_model_len": None if model.max_model_len == AUTO else model.max_model_len,
            "tensor_parallel_size": model.tensor_parallel_size,
            "kv_cache_memory_bytes": cache.kv_cache_memory_bytes,
            "num_kv_blocks": cache.num_kv_blocks,
            "max_num_seqs": scheduler.max_num_seqs,
            "max_num_batched_tokens": scheduler.max_num_batched_tokens,
            "mixed_prompt_tokens": scheduler.mixed_prompt_tokens,
            "max_cudagraph_capture_size": self.compile.max_cudagraph_capture_size,
        }
        for name, value in positive.items():
            if value is not None and not (is_int(value) and value >= 1):
                or_auto = f" or '{AUTO}'" if name == "max_model_len" else ""
                raise ConfigError(f"{name} must be an integer >= 1{or_auto}, got {value!r}")
        for group in option_groups():
            check_types_and_choices(getattr(self, group))
        self._check_unsupported()
        if cache.block_size < 16 or cache.block_size % 16:
            raise ConfigError(
                f"block_size must be a multiple of 16, got {cache.block_size}; try 16 or 32"
            )
        if not 0 < cache.gpu_memory_utilization <= 1:
            raise ConfigError(
                f"gpu_memory_utilization must be in (0, 1], got {cache.gpu_memory_utilization}"
            )

    def _check_unsupported(self) -> None:
        model, max_num_seqs = self.model, self.scheduler.max_num_seqs
        if model.trust_remote_code:
            raise ConfigError("trust_remote_code=True is not supported: leave it out")
        if model.tensor_parallel_size > 1:
            self._check_parallel(model.tensor_parallel_size)
        self._check_target()
        if model.max_logprobs < -1:
            raise ConfigError(
                f"max_logprobs must be at least 0, or -1 for no limit, got {model.max_logprobs}"
            )
        if model.max_model_len == 1:
            raise ConfigError(
                "max_model_len must be at least 2 (a prompt token and one more), got 1"
            )
        backend = self.compile.attention_backend
        if self.compile.deterministic and backend not in ("auto", "triton"):
            raise ConfigError(
                f"deterministic=True has its own attention, got attention_backend='{backend}'; "
                "leave one of them out"
            )
        if max_num_seqs is not None and max_num_seqs > MAX_NUM_SEQS:
            raise ConfigError(f"max_num_seqs must be at most {MAX_NUM_SEQS}, got {max_num_seqs}")

    def _check_parallel(self, num_ranks: int) -> None:
        model = self.model
        if model.distributed_executor_backend == "uni":
            raise ConfigError(
                f"distributed_executor_backend='uni' is one process, and tensor_parallel_size="
                f"{num_ranks} needs one for each GPU; leave one of them out"
            )
        if self.compile.deterministic:
            raise ConfigError(
                f"deterministic=True is not supported with tensor_parallel_size={num_ranks}: the "
                "order in which GPUs add depends on the batch; leave one of them out"
            )
        if ":" in model.device:
            raise ConfigError(
                f"device='{model.device}' names one GPU, and tensor_parallel_size={num_ranks} "
                "takes the first ones; use device='cuda' and CUDA_VISIBLE_DEVICES"
            )

    def _check_target(self) -> None:
        target_ms = self.scheduler.target_itl_ms
        if target_ms is None:
            return
        if not 0 < target_ms < float("inf"):
            raise ConfigError(f"target_itl_ms must be a number above 0, got {target_ms}")
        if self.model.tensor_parallel_size > 1:
            raise ConfigError(
                f"target_itl_ms={target_ms} is not supported with tensor_parallel_size="
                f"{self.model.tensor_parallel_size}: each GPU measures its own steps; use "
                "mixed_prompt_tokens"
            )
        if self.scheduler.mixed_prompt_tokens is not None:
            raise ConfigError(
                f"target_itl_ms={target_ms} chooses the prompt tokens of each step, but "
                f"mixed_prompt_tokens={self.scheduler.mixed_prompt_tokens} fixes them; leave one "
                "of them out"
            )
        if self.compile.deterministic:
            raise ConfigError(
                f"target_itl_ms={target_ms} makes steps depend on measured times, which "
                "deterministic=True rules out; leave one of them out, or bound the prompt tokens "
                "of a step by mixed_prompt_tokens"
            )

    def replace(self, **options: Any) -> EngineConfig:
        """A copy with some flat options changed, checked again."""
        return EngineConfig.from_options(**(self.options() | options))

    def options(self) -> dict[str, Any]:
        """All options by name."""
        return {f.name: getattr(getattr(self, group), f.name) for group, f in all_options()}


def option_groups() -> dict[str, type]:
    """Group name -> the dataclass with its options, in display order."""
    return {f.name: type(f.default) for f in fields(EngineConfig)}


def all_options() -> list[tuple[str, dataclasses.Field[Any]]]:
    """(group name, field) of every option."""
    return [(group, f) for group, kind in option_groups().items() for f in fields(kind)]


def own_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Flat options as ours alone, with our values.

    None leaves an option open. Paths and dtypes become strings, and vLLM's other options are
    dropped where they ask for nothing. Raises ConfigError for an unknown name, and for an option of
    vLLM's that is not supported.
    """
    kinds = {f.name: f.metadata["kind"] for _, f in all_options()}
    try:
        own = without_vllm_options(options, kinds)
        reject_unknown(own, list(kinds), "engine option")
    except ValueError as error:
        raise ConfigError(str(error)) from None
    for name, value in own.items():
        if isinstance(value, PurePath) and kinds[name] == "path":
            own[name] = str(value)
    return own


def check_types_and_choices(group: object) -> None:
    """Raise ConfigError for an option of a group whose value is of another kind than its own."""
    for f in fields(group):  # type: ignore[arg-type]
        choices, value = f.metadata["choices"], getattr(group, f.name)
        if value is None and f.default is None:
            continue
        if choices and value not in choices:
            raise ConfigError(f"{f.name} must be one of {', '.join(choices)}, got {value!r}")
        types, words = KINDS[f.metadata["kind"]]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            words += " or None" * (f.default is None)
            raise ConfigError(f"{f.name} must be {words}, got {value!r}")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ConfigError(f"{f.name} must be a 64-bit integer, got {value}")
