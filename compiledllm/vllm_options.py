"""vLLM's options that are not options here: the values of each that ask for nothing.

A script or a command line written for vLLM (0.6 to 0.33) may name any of these options, as long as
the value is what happens here anyway; `check_vllm_option` refuses every other value. An option that
both have is in `config` or `server.options` instead, and `SAME_VALUES` translates its values.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any


class _Zeros(dict[str, int]):
    """Equals a mapping that allows none of anything."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, dict) and not any(other.values())


@dataclass(frozen=True, slots=True)
class VllmOption:
    """An option of vLLM's that does nothing here.

    values: what is accepted beside None and empty collections, vLLM's default first; (): every
    value, as none makes a difference. why_not: what is missing here, or does the same.
    """

    values: tuple[Any, ...]
    why_not: str

    @property
    def is_switch(self) -> bool:
        """Whether the option takes no value on a command line."""
        return bool(self.values) and isinstance(self.values[0], bool)

    def accepts(self, value: object) -> bool:
        is_empty = value is None or (isinstance(value, (dict, list, tuple, set)) and not value)
        return is_empty or not self.values or value in self.values


@dataclass(frozen=True, slots=True)
class _OneOf:
    values: tuple[Any, ...]


def _one_of(*values: Any) -> _OneOf:
    return _OneOf(values)


_ANY = _OneOf(())
_EITHER = _one_of(False, True)  # a switch that makes no difference

# What is missing -> option -> its neutral value, or several of them.
_MISSING: dict[str, dict[str, Any]] = {
    "one device runs the model": {
        "pipeline_parallel_size": 1,
        "distributed_executor_backend": _one_of("mp", "uni"),
        "data_parallel_size": 1,
        "data_parallel_size_local": 1,
        "data_parallel_rank": 0,
        "data_parallel_start_rank": 0,
        "data_parallel_address": None,
        "data_parallel_rpc_port": None,
        "data_parallel_backend": "mp",
        "data_parallel_hybrid_lb": False,
        "data_parallel_external_lb": False,
        "data_parallel_multi_port_external_lb": False,
        "decode_context_parallel_size": 1,
        "prefill_context_parallel_size": 1,
        "dcp_comm_backend": "ag_rs",
        "dcp_q_replicate": None,
        "dcp_kv_cache_interleave_size": 1,
        "cp_kv_cache_interleave_size": 1,
        "master_addr": "127.0.0.1",
        "master_port": 29501,
        "nnodes": 1,
        "node_rank": 0,
        "distributed_timeout_seconds": None,
        "cpu_distributed_timeout_seconds": None,
        "numa_bind": False,
        "numa_bind_nodes": None,
        "numa_bind_cpus": None,
        "enable_hc_sp": False,
        "enable_expert_parallel": False,
        "enable_batch_sharded_sampling": False,
        "enable_ep_weight_filter": False,
        "all2all_backend": "allgather_reducescatter",
        "enable_elastic_ep": False,
        "elastic_ep_max_dp_size": None,
        "enable_dbo": False,
        "ubatch_size": 0,
        "dbo_decode_token_threshold": 32,
        "dbo_prefill_token_threshold": 512,
        "dp_sync_interval": 16,
        "disable_nccl_for_dp_synchronization": None,
        "disable_custom_all_reduce": _EITHER,
        "enable_eplb": False,
        "eplb_config": None,
        "expert_placement_strategy": "linear",
        "max_parallel_loading_workers": None,
        "worker_use_ray": False,
        "ray_workers_use_nsight": False,
        "enable_nccl_comm_suspend": False,
        "enable_shm_tensor_arena": False,
        "enable_fault_tolerance": False,
        "fault_tolerance_config": None,
        "api_server_count": 1,
        "headless": False,
        "grpc": False,
        "data_parallel_supervisor_port": 9256,
        "dp_supervisor_probe_interval_s": 5.0,
        "dp_supervisor_probe_timeout_s": 5.0,
        "dp_supervisor_probe_failure_threshold": 3,
    },
    "models read text only": {
        "limit_mm_per_prompt": _Zeros(),
        "language_model_only": _EITHER,
        "allowed_local_media_path": "",
        "allowed_media_domains": None,
        "enable_mm_embeds": False,
        "interleave_mm_strings": False,
        "media_io_kwargs": None,
        "mm_processor_kwargs": None,
        "mm_processor_cache_gb": _one_of(4, 0),
        "mm_processor_cache_type": "lru",
        "disable_mm_preprocessor_cache": _EITHER,
        "mm_hasher_algorithm": "blake3",
        "mm_shm_cache_max_object_size_mb": 128,
        "mm_encoder_only": False,
        "mm_encoder_tp_mode": "weights",
        "mm_encoder_attn_backend": None,
        "mm_encoder_attn_dtype": None,
        "mm_encoder_fp8_scale_path": None,
        "mm_encoder_fp8_scale_save_path": None,
        "mm_encoder_fp8_scale_save_margin": 1.5,
        "mm_tensor_ipc": "direct_rpc",
        "mm_processor_device": "auto",
        "mm_ipc_gpu_memory_gb": 0,
        "mm_device_do_normalize": True,
        "skip_mm_profiling": _EITHER,
        "disable_chunked_mm_input": _EITHER,
        "video_pruning_rate": None,
        "video_pruning_method": "evs",
        "io_processor_plugin": None,
        "enable_mm_processor_stats": False,
        "trust_request_mm_kwargs": False,
        "enable_prompt_embeds": False,
        "ec_transfer_config": None,
        "ec_manager_config": None,
    },
    "there are no LoRA adapters": {
        "enable_lora": False,
        "lora_modules": None,
        "max_loras": 1,
        "max_lora_rank": 16,
        "max_cpu_loras": None,
        "lora_dtype": "auto",
        "lora_extra_vocab_size": _one_of(256, 0),
        "lora_target_modules": None,
        "long_lora_scaling_factors": None,
        "default_mm_loras": None,
        "fully_sharded_loras": False,
        "enable_tower_connector_lora": False,
        "specialize_active_lora": False,
        "enable_mixed_moe_lora_format": False,
        "enable_moe_shared_loras": False,
        "max_lora_cls_labels": None,
    },
    "there is no speculative decoding": {
        "speculative_config": None,
        "speculative_model": None,
        "num_speculative_tokens": None,
        "num_lookahead_slots": 0,
        "spec_method": None,
        "spec_model": None,
        "spec_tokens": None,
        "per_request_spec_decode_metrics": "none",
        "diffusion_config": None,
    },
    "weights and KV stay on the device": {
        "cpu_offload_gb": 0,
        "cpu_offload_params": None,
        "offload_backend": "auto",
        "offload_group_size": 0,
        "offload_num_in_group": 1,
        "offload_prefetch_step": 1,
        "offload_params": None,
        "swap_space": _ANY,  # vLLM's newer versions do not swap either
        "kv_offloading_size": None,
        "kv_offloading_backend": "native",
        "kv_transfer_config": None,
        "kv_events_config": None,
        "kv_sharing_fast_prefill": False,
        "enable_sleep_mode": False,
        "sleep_mode_backend": "cumem",
        "sleep_mode_offload_cudagraph": False,
        "sleep_preserve_parameter_names": None,
        "enable_cumem_allocator": False,
        "weight_transfer_config": None,
    },
    "the scheduler has no such setting": {
        "enable_chunked_prefill": True,
        "max_num_scheduled_tokens": None,
        "max_num_active_seqs": None,
        "long_prefill_token_threshold": 0,
        "long_prefill_token_threshold_adaptive": False,
        "max_num_partial_prefills": 1,
        "max_long_partial_prefills": 1,
        "scheduler_reserve_full_isl": _EITHER,
        "prefill_schedule_interval": 1,
        "watermark": 0.0,
        "num_scheduler_steps": 1,
        "multi_step_stream_outputs": _EITHER,
        "scheduler_delay_factor": 0.0,
        "preemption_mode": "recompute",
        "scheduler_cls": None,
        "use_v2_block_manager": _EITHER,
        "disable_async_output_proc": False,
        "prefix_caching_hash_algo": _ANY,
        "prefix_cache_retention_interval": 0,
        "prefix_match_unit": None,
        "disable_hybrid_kv_cache_manager": False,
        "swa_bounded_replay": _EITHER,
    },
    "models keep keys and values only": {
        "mamba_config": None,
        "mamba_backend": "triton",
        "mamba_block_size": None,
        "mamba_cache_dtype": "auto",
        "mamba_ssm_cache_dtype": "auto",
        "mamba_cache_mode": "none",
        "mamba_ssu_algorithm": None,
        "mamba_cache_philox_rounds": 0,
        "enable_mamba_cache_stochastic_rounding": False,
        "enable_mamba_shared_prefix_checkpoint": False,
        "use_replayssm": False,
        "replayssm_buffer_len": 16,
        "gdn_prefill_backend": "auto",
        "kda_prefill_backend": "auto",
        "kda_decode_backend": "auto",
        "engram_config": None,
        "sparse_indexer_topk_backend": "auto",
    },
    "kernels are chosen by the engine": {
        "moe_backend": "auto",
        "linear_backend": "auto",
        "kernel_config": None,
        "enable_flashinfer_autotune": False,
        "enable_bf16x3_router_gemm": None,
        "monokernel": False,
        "ir_op_priority": None,
        "disable_cascade_attn": _EITHER,
        "override_attention_dtype": None,
        "use_fp64_gumbel": False,
        "performance_mode": "balanced",
        "additional_config": None,
        "worker_cls": "auto",
        "worker_extension_cls": "",
        "jit_monitor_mode": "warn",
        "jit_monitor_verbose": False,
        "fail_on_environ_validation": False,
    },
    "models generate text": {
        "runner": _one_of("auto", "generate"),
        "task": _one_of("auto", "generate"),
        "convert": _one_of("auto", "none"),
        "pooler_config": None,
        "override_pooler_config": None,
        "enable_flash_late_interaction": _EITHER,
        "cohere_is_reasoning_model": True,
        "cohere_format": "cmd4",
    },
    "checkpoints are read as they are": {
        "model_weights": "",
        "hf_config_path": None,
        "config_format": _one_of("auto", "hf"),
        "tokenizer_mode": _one_of("auto", "hf", "fast"),
        "model_class_overrides": None,
        "model_loader_extra_config": None,
        "ignore_patterns": _one_of("original/**/*", ["original/**/*"]),
        "safetensors_load_strategy": "lazy",
        "safetensors_prefetch_num_threads": 8,
        "safetensors_prefetch_block_size": 2**24,
        "pt_load_map_location": "cpu",
        "use_tqdm_on_load": _EITHER,
        "allow_deprecated_quantization": _EITHER,
        "quantization_config": None,
        "quantization_param_path": None,
        "kv_cache_dtype_skip_layers": None,
        "calculate_kv_scales": False,
        "rope_scaling": None,
        "rope_theta": None,
        "disable_sliding_window": False,
    },
    "nothing measures that": {
        "disable_log_stats": _EITHER,
        "aggregate_engine_logging": False,
        "kv_cache_metrics": False,
        "kv_cache_metrics_sample": 0.01,
        "cudagraph_metrics": False,
        "enable_layerwise_nvtx_tracing": False,
        "enable_mfu_metrics": False,
        "enable_logging_iteration_details": False,
        "otlp_traces_endpoint": None,
        "collect_detailed_traces": None,
        "show_hidden_metrics_for_version": None,
        "custom_histogram_buckets": None,
        "profiler_config": None,
        "watchdog_config": None,
        "aux_output_config": None,
    },
    "outputs do not have that": {
        "logprobs_mode": "raw_logprobs",
        "enable_return_routed_experts": False,
        "return_sampling_mask": False,
        "enable_trace_replay": False,
        "watermark_config": None,
        "tokens_only": False,
        "logits_processor_pattern": None,
    },
    "code is not loaded from options": {
        "middleware": None,
        "tool_parser_plugin": "",
        "reasoning_parser_plugin": "",
        "tool_server": None,
        "logging_config": None,
        "log_config_file": None,
    },
    "the server has no such setting": {
        "chat_template_content_format": "auto",
        "trust_request_chat_template": False,
        "reasoning_effort_map": None,
        "anthropic_disabled_thinking_effort": "auto",
        "response_role": "assistant",
        "exclude_tools_when_tool_choice_none": False,
        "tool_strict_level": None,
        "enable_auto_tool_choice": _EITHER,
        "enable_server_load_tracking": _EITHER,
        "enable_per_request_metrics": False,
        "enable_force_include_usage": False,
        "enable_tokenizer_info_endpoint": False,
        "enable_log_outputs": False,
        "enable_log_deltas": _EITHER,
        "max_log_len": _ANY,  # prompts are never logged
        "disable_log_requests": True,
        "log_error_stack": _EITHER,
        "enable_scale_out": False,
        "fingerprint_mode": _one_of("full", "none"),
        "fingerprint_value": None,
        "grpc_port": None,
        "sse_keep_alive_interval": 0,
        "disable_frontend_multiprocessing": False,
        "enable_ssl_refresh": False,
        "enable_offline_docs": _EITHER,
        "disable_uvicorn_access_log": _EITHER,
        "disable_access_log_for_endpoints": _ANY,
        "h11_max_incomplete_event_size": 4194304,
        "h11_max_header_count": 256,
    },
}

# Option -> its neutral value, and what does the same here.
_INSTEAD: dict[str, tuple[Any, str]] = {
    "num_gpu_blocks_override": (None, "use num_kv_blocks"),
    "max_num_queued_reqs": (None, "use --max-queued-requests of `compiledllm serve`"),
    "max_num_queued_tokens": (None, "use --max-queued-tokens of `compiledllm serve`"),
    "max_context_len_to_capture": (_ANY, ""),
    "max_seq_len_to_capture": (_ANY, ""),
    "cudagraph_capture_sizes": (None, "use max_cudagraph_capture_size"),
    "cuda_graph_sizes": (None, "use max_cudagraph_capture_size"),
    "compilation_config": (_one_of(3, {"mode": 3}, {"level": 3}), "use enforce_eager"),
    "optimization_level": (_one_of(2, 3), "use enforce_eager or compile_when"),
    "attention_config": (None, "use attention_backend"),
    "structured_outputs_config": (
        _one_of({"backend": "auto"}, {"backend": "guidance"}),
        "structured outputs are llguidance's and need no option",
    ),
    "guided_decoding_backend": (_one_of("auto", "guidance"), "llguidance serves all forms"),
    "guided_decoding_disable_fallback": (_EITHER, ""),
    "enable_reasoning": (_EITHER, ""),
    "reasoning_config": (None, "use --reasoning-parser"),
    "logits_processors": (None, "use SamplingParams(logits_processors=[...])"),
    "override_generation_config": (None, "give SamplingParams, or fields in each request"),
    "hf_token": (_one_of("", True, False), "set HF_TOKEN"),
    "download_dir": (None, "set HF_HOME"),
    "hf_overrides": (None, "change config.json in a copy of the checkpoint"),
    "tokenizer_revision": (None, "name a local directory with tokenizer"),
    "code_revision": (None, "code from a checkpoint is never run"),
    "device_ids": (None, "use device='cuda:N'"),
    "renderer_num_workers": (1, "two threads render and tokenise"),
    "enable_request_id_headers": (_EITHER, "every answer has its id"),
    "return_tokens_as_token_ids": (False, "set return_tokens_as_token_ids in each request"),
    "uvicorn_log_level": (_one_of("info", "warning"), "use --log-level"),
    "batch_invariant": (False, "use deterministic"),
    "stream_interval": (1, "use SamplingParams(stream_interval=...)"),
    # Options of `compiledllm serve`, which vLLM's constructors take as well.
    "served_model_name": (_ANY, ""),
    "enable_log_requests": (False, "use --enable-log-requests of `compiledllm serve`"),
    "shutdown_timeout": (0, "use --shutdown-timeout of `compiledllm serve`"),
    "reasoning_parser": ("", "use --reasoning-parser of `compiledllm serve`"),
    "tool_call_parser": (None, "use --tool-call-parser of `compiledllm serve`"),
    "log_level": (None, "use logging.getLogger('compiledllm').setLevel(...)"),
}

SHORT_FLAGS: dict[str, tuple[str, ...]] = {
    "pipeline_parallel_size": ("-pp",),
    "nnodes": ("-n",),
    "node_rank": ("-r",),
    "decode_context_parallel_size": ("-dcp",),
    "prefill_context_parallel_size": ("-pcp",),
    "data_parallel_size": ("-dp",),
    "data_parallel_rank": ("-dpn",),
    "data_parallel_start_rank": ("-dpr",),
    "data_parallel_size_local": ("-dpl",),
    "data_parallel_address": ("-dpa",),
    "data_parallel_rpc_port": ("-dpp",),
    "data_parallel_backend": ("-dpb",),
    "data_parallel_hybrid_lb": ("-dph",),
    "data_parallel_external_lb": ("-dpe",),
    "data_parallel_multi_port_external_lb": ("-dpm",),
    "enable_expert_parallel": ("-ep",),
    "speculative_config": ("-sc",),
    "diffusion_config": ("-dc",),
    "compilation_config": ("-cc",),
    "attention_config": ("-ac",),
    "optimization_level": ("-O",),
    "api_server_count": ("-asc",),
}

# Values of options that both have: our option -> vLLM's value -> ours.
SAME_VALUES: dict[str, dict[object, str]] = {
    "dtype": {"half": "float16", "float": "float32"},
    "model_impl": {"vllm": "compiledllm"},
    "generation_config": {"vllm": "off"},
    "quantization": {
        "awq_marlin": "awq",
        "auto_awq": "awq",
        "gptq_marlin": "gptq",
        "auto_gptq": "gptq",
        "modelopt_fp4": "modelopt",
    },
    "attention_backend": {"FLASHINFER": "flashinfer", "TRITON_ATTN": "triton"},
    "max_model_len": {-1: "auto"},
    "load_format": {"gguf": "auto"},
}


# Arguments of vLLM's methods that ours do not have.
_ARGUMENTS: dict[str, tuple[Any, str]] = {
    "lora_request": (None, "there are no LoRA adapters"),
    "prompt_adapter_request": (None, "there are no prompt adapters"),
    "mm_processor_kwargs": (None, "models read text only"),
    "tokenization_kwargs": (None, "use SamplingParams(truncate_prompt_tokens=...) or token ids"),
    "prompt_token_ids": (None, 'give the ids as prompts, or as {"prompt_token_ids": [...]}'),
    "prompt_text": (_ANY, ""),
    "guided_options_request": (None, "use SamplingParams(structured_outputs=...)"),
    "chat_template_content_format": ("auto", "the template itself shows which form it takes"),
    "data_parallel_rank": (None, "one device runs the model"),
    "trace_headers": (None, "nothing traces requests"),
    "concurrency_limit": (_ANY, ""),
    "usage_context": (_ANY, ""),
    "stat_loggers": (None, "use get_metrics()"),
    "enable_multiprocessing": (_EITHER, ""),
    "enable_log_requests": (False, "requests are not logged"),
    "disable_log_stats": (_EITHER, ""),
    "start_engine_loop": (True, "the engine starts with its first request"),
    "reset_running_requests": (False, "requests in progress keep their blocks"),
    "reset_connector": (_EITHER, ""),
}

# Fields of vLLM's SamplingParams and BeamSearchParams that ours do not have.
_FIELDS: dict[str, tuple[Any, str]] = {
    "flat_logprobs": (False, "logprobs are one mapping for each token"),
    "prompt_logprob_token_ids": (None, "use prompt_logprobs"),
    "prompt_logprob_start": (_one_of(0), "use prompt_logprobs"),
    "skip_clone": (_EITHER, ""),
    "output_text_buffer_length": (_ANY, ""),
    "routed_experts_prompt_start": (0, "outputs do not tell experts"),
    "thinking_token_budget": (None, "use max_tokens"),
    "watermarking": (_one_of(False), "there are no watermarks"),
    "trace_decode_token_ids": (None, "there are no traces"),
    "guided_decoding": (None, "use structured_outputs"),
    "use_beam_search": (False, "use beam_search(prompts, BeamSearchParams(...))"),
    "early_stopping": (False, "use beam_search(prompts, BeamSearchParams(...))"),
    "length_penalty": (1.0, "use beam_search(prompts, BeamSearchParams(...))"),
    # Of BeamSearchParams.
    "structured_outputs": (None, "beam search does not know forms"),
    "allowed_token_ids": (None, "beam search looks at all tokens"),
    "skip_special_tokens": (True, "beam search leaves special tokens out"),
}


def _option(neutral: Any, why_not: str) -> VllmOption:
    return VllmOption(neutral.values if isinstance(neutral, _OneOf) else (neutral,), why_not)


@functools.cache
def vllm_options() -> dict[str, VllmOption]:
    """vLLM's other options by name."""
    groups = [(f"{why_not}; leave it out", group) for why_not, group in _MISSING.items()]
    found = {name: _option(value, why) for why, group in groups for name, value in group.items()}
    return found | {name: _option(*row) for name, row in _INSTEAD.items()}


def check_vllm_option(name: str, value: object) -> None:
    """Raise ValueError if an option of vLLM's asks for something that is not supported here."""
    _check("option", name, value, vllm_options()[name])


def check_arguments(method: str, given: Mapping[str, object]) -> None:
    """Raise ValueError for an argument of vLLM's method that asks for what is not supported here.

    Raises TypeError, as Python does, for a name that is not one of vLLM's arguments.
    """
    for name, value in given.items():
        if name not in _ARGUMENTS:
            raise TypeError(f"{method}() got an unexpected keyword argument '{name}'")
        _check(f"argument of {method}()", name, value, _option(*_ARGUMENTS[name]))


def without_vllm_fields(given: Mapping[str, Any], known: Container[str]) -> dict[str, Any]:
    """Sampling fields without vLLM's others, which are checked. Raises ValueError."""
    others = [name for name in given if name in _FIELDS and name not in known]
    for name in others:
        _check("field", name, given[name], _option(*_FIELDS[name]))
    return {name: value for name, value in given.items() if name not in others}


def _check(what: str, name: str, value: object, option: VllmOption) -> None:
    if not option.accepts(value):
        raise ValueError(
            f"{name}={value!r:.80} is vLLM's {what}, not supported here: {option.why_not}"
        )


def without_vllm_options(options: Mapping[str, Any], known: Container[str]) -> dict[str, Any]:
    """The options without vLLM's others, which are checked, and without those that are None.

    known: names of our options. Names that nobody knows stay. Raises ValueError for what is not
    supported.
    """
    kept: dict[str, Any] = {}
    for name, value in options.items():
        if name not in known and name in vllm_options():
            check_vllm_option(name, value)
        elif value is not None or name not in known:
            kept[name] = same_value(name, value)
    return kept


def same_value(name: str, value: Any) -> Any:
    """Our value of an option for vLLM's or torch's; any other value unchanged."""
    if name == "dtype" and str(value).startswith("torch."):
        value = str(value).removeprefix("torch.")
    same = SAME_VALUES.get(name, {})
    return same[value] if isinstance(value, (str, int)) and value in same else value


def value_of(text: str) -> Any:
    """The value of an option of vLLM's on a command line: JSON, None, or a text."""
    try:
        return None if text == "None" else json.loads(text)
    except ValueError:
        return text
