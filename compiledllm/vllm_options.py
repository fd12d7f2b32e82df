"""vLLM's options that are not options here, each with its neutral values, which ask for nothing.

A script or a command line written for vLLM (0.6 to 0.33) may name any of these options with a
neutral value; `check_vllm_option` refuses every other value. Options that both engines have are in
`config` or `server.options` instead, and `SAME_VALUES` translates their values.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

from compiledllm.vllm_features import ANY, EITHER, MISSING, OneOf, one_of


@dataclass(frozen=True, slots=True)
class VllmOption:
    """An option of vLLM's that does nothing here.

    values: the values that are accepted besides None and empty collections, vLLM's default first;
    (): every value. why_not: for the error: what is missing here, or what does the same.
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


# Option -> its neutral value, and what does the same here.
_INSTEAD: dict[str, tuple[Any, str]] = {
    "num_gpu_blocks_override": (None, "use num_kv_blocks"),
    "max_num_queued_reqs": (None, "use --max-queued-requests of `compiledllm serve`"),
    "max_num_queued_tokens": (None, "use --max-queued-tokens of `compiledllm serve`"),
    "worker_use_ray": (False, "use distributed_executor_backend='ray'"),
    "max_context_len_to_capture": (ANY, ""),
    "max_seq_len_to_capture": (ANY, ""),
    "cudagraph_capture_sizes": (None, "use max_cudagraph_capture_size"),
    "cuda_graph_sizes": (None, "use max_cudagraph_capture_size"),
    "compilation_config": (one_of(3, {"mode": 3}, {"level": 3}), "use enforce_eager"),
    "optimization_level": (one_of(2, 3), "use enforce_eager or compile_when"),
    "attention_config": (None, "use attention_backend"),
    "structured_outputs_config": (
        one_of({"backend": "auto"}, {"backend": "guidance"}),
        "structured outputs are llguidance's and need no option",
    ),
    "guided_decoding_backend": (one_of("auto", "guidance"), "llguidance serves all forms"),
    "guided_decoding_disable_fallback": (EITHER, ""),
    "enable_reasoning": (EITHER, ""),
    "reasoning_config": (None, "use --reasoning-parser"),
    "logits_processors": (None, "use SamplingParams(logits_processors=[...])"),
    "override_generation_config": (None, "give SamplingParams, or fields in each request"),
    "hf_token": (one_of("", True, False), "set HF_TOKEN"),
    "download_dir": (None, "set HF_HOME"),
    "hf_overrides": (None, "change config.json in a copy of the checkpoint"),
    "tokenizer_revision": (None, "name a local directory with tokenizer"),
    "code_revision": (None, "code from a checkpoint is never run"),
    "device_ids": (None, "use device='cuda:N'"),
    "renderer_num_workers": (1, "two threads render and tokenise"),
    "enable_request_id_headers": (EITHER, "every answer has its id"),
    "return_tokens_as_token_ids": (False, "set return_tokens_as_token_ids in each request"),
    "uvicorn_log_level": (one_of("info", "warning"), "use --log-level"),
    "batch_invariant": (False, "use deterministic"),
    "stream_interval": (1, "use SamplingParams(stream_interval=...)"),
    # Options of `compiledllm serve`, which vLLM's constructors take as well.
    "served_model_name": (ANY, ""),
    "data_parallel_size": (1, "use --data-parallel-size of `compiledllm serve`"),
    "api_server_count": (1, "use --api-server-count of `compiledllm serve`"),
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
}

# vLLM's names of options that both have -> ours. Its "auto" is our default.
OTHER_NAMES = {"mamba_ssm_cache_dtype": "state_dtype"}

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
        "fp8_per_channel": "fp8",
        "fp8_per_tensor": "fp8",  # a scale of each output, which is finer
        "fp8_per_block": "fp8_block",
        "int8_per_channel_weight_only": "int8",
    },
    "attention_backend": {"FLASHINFER": "flashinfer", "TRITON_ATTN": "triton"},
    "max_model_len": {-1: "auto"},
    "load_format": {"gguf": "auto"},
    "state_dtype": {"auto": "float32"},
}


# Arguments of vLLM's methods that ours do not have.
_ARGUMENTS: dict[str, tuple[Any, str]] = {
    "lora_request": (None, "there are no LoRA adapters"),
    "prompt_adapter_request": (None, "there are no prompt adapters"),
    "mm_processor_kwargs": (None, "models read text only"),
    "tokenization_kwargs": (None, "use SamplingParams(truncate_prompt_tokens=...) or token ids"),
    "prompt_token_ids": (None, 'give the ids as prompts, or as {"prompt_token_ids": [...]}'),
    "prompt_text": (ANY, ""),
    "guided_options_request": (None, "use SamplingParams(structured_outputs=...)"),
    "chat_template_content_format": ("auto", "the template itself shows which form it takes"),
    "data_parallel_rank": (None, "the server chooses a replica for each request"),
    "trace_headers": (None, "there are no traces"),
    "concurrency_limit": (ANY, ""),
    "usage_context": (ANY, ""),
    "stat_loggers": (None, "use get_metrics()"),
    "enable_multiprocessing": (EITHER, ""),
    "enable_log_requests": (False, "requests are not logged"),
    "disable_log_stats": (EITHER, ""),
    "start_engine_loop": (True, "the engine starts with its first request"),
    "reset_running_requests": (False, "requests in progress keep their blocks"),
    "reset_connector": (EITHER, ""),
}

# Fields of vLLM's SamplingParams and BeamSearchParams that ours do not have.
_FIELDS: dict[str, tuple[Any, str]] = {
    "flat_logprobs": (False, "logprobs are one mapping for each token"),
    "prompt_logprob_token_ids": (None, "use prompt_logprobs"),
    "prompt_logprob_start": (one_of(0), "use prompt_logprobs"),
    "skip_clone": (EITHER, ""),
    "output_text_buffer_length": (ANY, ""),
    "routed_experts_prompt_start": (0, "outputs do not show routed experts"),
    "thinking_token_budget": (None, "use max_tokens"),
    "watermarking": (one_of(False), "there are no watermarks"),
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
    return VllmOption(neutral.values if isinstance(neutral, OneOf) else (neutral,), why_not)


@functools.cache
def vllm_options() -> dict[str, VllmOption]:
    """vLLM's other options by name."""
    groups = [(f"{why_not}; leave it out", group) for why_not, group in MISSING.items()]
    found = {name: _option(value, why) for why, group in groups for name, value in group.items()}
    return found | {name: _option(*row) for name, row in _INSTEAD.items()}


def check_vllm_option(name: str, value: object) -> None:
    """Raise ValueError if an option of vLLM's asks for something that is not supported here."""
    _check("option", name, value, vllm_options()[name])


def check_arguments(method: str, given: Mapping[str, object]) -> None:
    """Raise ValueError for an argument of vLLM's method that asks for something unsupported.

    Raises TypeError, as Python does, for a name that is not one of vLLM's arguments.
    """
    for name, value in given.items():
        if name not in _ARGUMENTS:
            raise TypeError(f"{method}() got an unexpected keyword argument '{name}'")
        _check(f"argument of {method}()", name, value, _option(*_ARGUMENTS[name]))


def without_vllm_fields(given: Mapping[str, Any], known: Container[str]) -> dict[str, Any]:
    """Sampling fields without vLLM's other fields, which are checked. Raises ValueError."""
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
    """Our options only: vLLM's other options are checked and dropped, and None for ours as well.

    known: names of our options. Names that neither engine has stay. Raises ValueError for an option
    of vLLM's that asks for something unsupported.
    """
    kept: dict[str, Any] = {}
    for name, value in options.items():
        if value != "auto":
            name = OTHER_NAMES.get(name, name)
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
