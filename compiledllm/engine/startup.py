"""Makes a `Plan` from options: all decisions about an engine that need no weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from compiledllm.choices import Choice, Report
from compiledllm.config import ConfigError, EngineConfig
from compiledllm.engine.tokenizer import read_template
from compiledllm.engine_options import CacheConfig
from compiledllm.kernels.backend import AttentionBackend
from compiledllm.log import log
from compiledllm.models.formats.kv_scales import stored_kv_format
from compiledllm.models.registry import load_spec
from compiledllm.models.sharded_spec import sharded
from compiledllm.models.shards import Ranks
from compiledllm.models.source import resolve_checkpoint
from compiledllm.models.spec import ModelSpec
from compiledllm.platform import Platform
from compiledllm.resolved_config import ResolvedConfig, StepLimits, resolve
from compiledllm.runner.choose_backend import choose_backend
from compiledllm.runner.kv_layout import KVLayout, choose_layout
from compiledllm.runner.plan import Plan
from compiledllm.runner.state_plan import with_room_for_states
from compiledllm.scheduler.kv_manager import max_blocks_in_use, num_blocks_needed


def plan(config: EngineConfig, rank: int = 0, device: str | None = None) -> Plan:
    """Plan an engine for this machine. With load_format="dummy" no weight file need exist.

    rank: index of this process among `tensor_parallel_size` processes. device: the device of this
    process; None: the GPU with the rank's index. Raises ConfigError for options that the model or
    the machine does not support.
    """
    model = config.model
    if model.chat_template is not None:
        read_template(model.chat_template)  # reports a wrong path before weights are loaded
    has_weights = model.load_format != "dummy"
    checkpoint = resolve_checkpoint(
        model.model, model.revision, has_weights, keep_packed=model.model_impl != "transformers"
    )
    stored = load_spec(checkpoint, model.model_impl, model.quantization)
    ranks = Ranks(rank, model.tensor_parallel_size)
    platform = _platform(model.device, ranks, device)
    resolved, report = resolve(config, platform.is_cuda, stored.max_position, platform.memory_bytes)
    if stored.implementation == "transformers":
        _note_transformers(config, stored.architecture, report)
    dtype = platform.choose_dtype(model.dtype, stored.dtype)
    report.note("dtype", dtype)
    spec = stored.for_context(resolved.limits.max_model_len)
    spec, kv_dtype = in_dtypes(spec, config.cache, str(dtype.value), checkpoint, platform)
    report.note("kv_cache_dtype", kv_dtype)
    spec = sharded(spec, ranks.count)
    if ranks.are_many:
        report.note("tensor_parallel_size", Choice(ranks.count, "as asked"))
    if spec.bytes_per_request:
        resolved = with_room_for_states(resolved, spec, platform, report)
    backend = _backend(resolved, spec, platform, report)
    if not backend.runs_ahead:
        reason = f"{backend.name} plans step by step"
        report.note("async_scheduling", Choice(False, reason))
        resolved = dataclasses.replace(resolved, async_scheduling=False)
    layout, choice = choose_layout(spec, resolved.limits.max_model_len, backend)
    report.note("kv_groups", choice)
    resolved = _with_whole_blocks(resolved, layout, report)
    return Plan(
        resolved,
        checkpoint,
        spec,
        stored.dtype,
        platform,
        backend,
        layout,
        blocks_per_context=_blocks_of_one(layout, resolved.limits),
        max_useful_blocks=_blocks_of_all(layout, resolved.limits),
        report=report,
        ranks=ranks,
    )


def _platform(device: str, ranks: Ranks, own: str | None) -> Platform:
    """The rank's GPU, or its share of the CPU's memory."""
    if not ranks.are_many:
        return Platform.detect(device)
    platform = Platform.detect(own or device)
    if platform.is_cuda:
        return Platform.detect(own or f"cuda:{ranks.index}")
    return dataclasses.replace(platform, memory_bytes=platform.memory_bytes // ranks.count)


def in_dtypes(
    spec: ModelSpec, cache: CacheConfig, dtype: str, checkpoint: Path, platform: Platform
) -> tuple[ModelSpec, Choice]:
    """The spec with the dtypes of the run, and the choice of the KV cache's dtype.

    dtype: the model's. Raises ConfigError for a KV cache in a dtype that does not fit.
    """
    kv_dtype = _kv_dtype(cache, dtype, checkpoint, platform)
    stored_as = "float8_e4m3fn" if kv_dtype.value == "fp8" else ""
    return spec.with_dtypes(dtype, stored_as, cache.state_dtype), kv_dtype


def _kv_dtype(cache: CacheConfig, dtype: str, checkpoint: Path, platform: Platform) -> Choice:
    """The KV cache's dtype: "fp8", or `dtype`, which is the model's."""
    asked = cache.kv_cache_dtype
    if asked == "auto":
        return _stored_kv_dtype(dtype, checkpoint, platform)
    if asked != dtype and not asked.startswith("fp8"):
        raise ConfigError(
            f"kv_cache_dtype='{asked}' is neither the model's dtype ({dtype}) nor fp8; leave it "
            f"out, use fp8, or set dtype='{asked}' too"
        )
    return Choice("fp8" if asked.startswith("fp8") else dtype, "as asked")


def _stored_kv_dtype(dtype: str, checkpoint: Path, platform: Platform) -> Choice:
    """The dtype that the checkpoint's quantization_config asks for, where the engine has it."""
    stored = stored_kv_format(checkpoint)
    if not stored:
        return Choice(dtype, "the model's")
    if stored != "fp8":
        return Choice(dtype, f"the checkpoint's format, {stored}, is not supported")
    if not platform.converts_fp8:
        return Choice(dtype, "the checkpoint asks for fp8, which this GPU does not convert")
    return Choice("fp8", "the checkpoint's")


def _backend(
    config: ResolvedConfig, spec: ModelSpec, platform: Platform, report: Report
) -> AttentionBackend:
    options = config.requested.compile
    preferred = platform.choose_attention_backend(options.attention_backend, options.deterministic)
    choice, backend = choose_backend(preferred, spec, config.limits, platform.device)
    report.note("attention_backend", choice)
    return backend


def _note_transformers(config: EngineConfig, architecture: str, report: Report) -> None:
    if config.compile.deterministic:
        raise ConfigError(
            f"deterministic=True is not supported for {architecture} as transformers runs it; "
            "leave it out"
        )
    is_requested = config.model.model_impl == "transformers"
    reason = "as asked" if is_requested else f"there is no family for {architecture}"
    report.note("model_impl", Choice("transformers", reason))
    log.warning("transformers runs the model, over our paged attention (%s)", reason)


def _with_whole_blocks(config: ResolvedConfig, layout: KVLayout, report: Report) -> ResolvedConfig:
    """The same options, with blocks of `block_size` tokens of the layers with the largest KV."""
    largest, asked = max(layout.splits), config.requested.cache.block_size
    if largest == 1:
        return config
    size, reason = largest * asked, f"{asked} tokens of the layers with the largest KV"
    report.note("block_size", Choice(size, reason))
    limits = dataclasses.replace(config.limits, block_size=size)
    return dataclasses.replace(config, limits=limits)


def _blocks_of_one(layout: KVLayout, limits: StepLimits) -> int:
    """KV blocks that one request of `max_model_len` tokens needs."""
    return num_blocks_needed(layout.windows_of_tables, limits.block_size, limits.max_model_len)


def _blocks_of_all(layout: KVLayout, limits: StepLimits) -> int:
    """KV blocks that `max_num_seqs` such requests need: more would never be used."""
    return max_blocks_in_use(
        layout.windows_of_tables,
        limits.block_size,
        limits.max_num_seqs,
        limits.max_num_batched_tokens,
        limits.max_model_len,
    )
