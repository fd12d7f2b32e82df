"""vLLM's options: what asks for nothing is accepted, and everything else is refused with a way out.

The defaults are those that vLLM 0.33.0 documents; 0.26.0's are given where they differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import pytest

from compiledllm import cli
from compiledllm.arguments import Parser
from compiledllm.config import ConfigError, EngineConfig, all_options
from compiledllm.engine_args import AsyncEngineArgs, EngineArgs
from compiledllm.sampling_params import BeamSearchParams, SamplingParams
from compiledllm.vllm_options import OTHER_NAMES, SHORT_FLAGS, check_arguments, vllm_options

OURS = {field.name: field for _, field in all_options()}
# What a vLLM script may write out of LLM(...), because the value is the default.
DEFAULTS: dict[str, Any] = {
    "runner": "auto", "convert": "auto", "tokenizer": None, "tokenizer_mode": "auto",
    "skip_tokenizer_init": False, "trust_remote_code": False, "allowed_local_media_path": "",
    "allowed_media_domains": None, "tensor_parallel_size": 1, "dtype": "auto",
    "quantization": None, "revision": None, "tokenizer_revision": None, "chat_template": None,
    "seed": 0, "gpu_memory_utilization": 0.92, "cpu_offload_gb": 0, "offload_params": set(),
    "enforce_eager": False, "disable_custom_all_reduce": False, "hf_token": None,
    "hf_overrides": {}, "mm_processor_kwargs": None, "pooler_config": None,
    "structured_outputs_config": {}, "profiler_config": {}, "attention_config": {},
    "kv_cache_memory_bytes": None, "compilation_config": {}, "quantization_config": None,
    "logits_processors": None, "spec_method": None, "spec_model": None, "spec_tokens": None,
    "block_size": None, "enable_prefix_caching": None, "max_model_len": None,
    "max_num_seqs": None, "max_num_batched_tokens": None, "enable_chunked_prefill": None,
    "distributed_executor_backend": None, "pipeline_parallel_size": 1, "data_parallel_size": 1,
    "enable_expert_parallel": False, "load_format": "auto", "config_format": "auto",
    "download_dir": None, "ignore_patterns": ["original/**/*"], "limit_mm_per_prompt": {},
    "enable_lora": False, "max_loras": 1, "max_lora_rank": 16, "speculative_config": None,
    "scheduling_policy": "fcfs", "async_scheduling": None, "stream_interval": 1,
    "disable_log_stats": True, "served_model_name": None, "attention_backend": None,
    "kv_cache_dtype": "auto", "num_gpu_blocks_override": None, "swap_space": 4,
    "generation_config": "vllm", "override_generation_config": {}, "enable_sleep_mode": False,
    "model_impl": "vllm", "optimization_level": 2, "performance_mode": "balanced",
    "task": "generate", "use_v2_block_manager": True, "num_scheduler_steps": 1,
}  # fmt: skip
# An option of vLLM's that asks for something -> what the error says besides.
REFUSED: dict[str, tuple[Any, str]] = {
    "enable_lora": (True, "LoRA"),
    "pipeline_parallel_size": (2, "tensor_parallel_size only"),
    "data_parallel_size": (4, "of `compiledllm serve`"),
    "speculative_config": ({"method": "ngram"}, "speculative"),
    "limit_mm_per_prompt": ({"image": 2}, "text only"),
    "cpu_offload_gb": (4, "stay on the device"),
    "num_gpu_blocks_override": (64, "num_kv_blocks"),
    "cudagraph_capture_sizes": ([1, 2], "max_cudagraph_capture_size"),
    "compilation_config": (0, "enforce_eager"),
    "attention_config": ({"backend": "FLASH_ATTN"}, "attention_backend"),
    "download_dir": ("/models", "HF_HOME"),
    "hf_token": ("hf_x", "HF_TOKEN"),
    "logits_processors": (["a.B"], "SamplingParams"),
    "runner": ("draft", "generate text"),
    "enable_chunked_prefill": (False, "leave it out"),
    "max_num_queued_reqs": (5, "--max-queued-requests"),
    "logprobs_mode": ("raw_logits", "leave it out"),
    "middleware": (["a.b"], "code"),
}
COMMAND_LINES = [
    "--host 0.0.0.0 --port 8001 --served-model-name a b --api-key k",
    "-tp 1 -pp 1 -dp 1 -dpb mp --no-trust-request-chat-template",
    "--max_model_len 8k --gpu_memory_utilization 0.9 --max_num_seqs 64",
    "--enable-auto-tool-choice --tool-call-parser hermes --reasoning-parser qwen3",
    "--enable-chunked-prefill --no-enable-expert-parallel --enable-prefix-caching",
    "--disable-log-stats --disable-log-requests --uvicorn-log-level info",
    "--generation-config vllm --model-impl vllm --dtype half --kv-cache-dtype auto",
    '-O2 --compilation-config {} --limit-mm-per-prompt {"image":0} --hf-overrides {}',
    "--distributed-executor-backend mp --swap-space 4 --block-size 32 --seed 0",
    "--max-model-len auto --attention-backend TRITON_ATTN --load-format safetensors",
    "--kv-cache-dtype fp8 --calculate-kv-scales --quantization fp8_per_tensor",
]


def refusal(**options: Any) -> str:
    with pytest.raises(ConfigError) as refused:
        EngineConfig.from_options(**options)
    return str(refused.value)


# -- options of constructors ----------------------------------------------------------------------


def test_what_vllm_does_by_default_may_be_written_out() -> None:
    assert EngineConfig.from_options(**DEFAULTS) == EngineConfig.from_options(
        generation_config="off", model_impl="compiledllm", gpu_memory_utilization=0.92
    )


def test_every_accepted_value_is_accepted_and_none_leaves_open() -> None:
    for name, option in vllm_options().items():
        for value in (*option.values, None):
            EngineConfig.from_options(**{name: value})
    everything_open = dict.fromkeys([*vllm_options(), *OURS])
    assert EngineConfig.from_options(**everything_open) == EngineConfig()


@pytest.mark.parametrize("name", REFUSED)
def test_what_asks_for_more_is_refused_with_a_way_out(name: str) -> None:
    value, way_out = REFUSED[name]
    message = refusal(**{name: value})
    assert message.startswith(f"{name}={value!r} is vLLM's option, not supported here: ")
    assert way_out in message


def test_every_option_says_why_another_value_is_refused() -> None:
    other = object()
    for name, option in vllm_options().items():
        if option.values and list(option.values) != [False, True] and name not in OTHER_NAMES:
            assert option.why_not and "not supported here" in refusal(**{name: other})


def test_no_option_is_both_ours_and_vllms_other() -> None:
    assert not set(OURS) & set(vllm_options())
    assert set(SHORT_FLAGS) <= set(vllm_options())


def test_a_long_value_is_shortened() -> None:
    assert len(refusal(additional_config={"x": "y" * 1000})) < 250


# -- objects with options -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [EngineArgs, AsyncEngineArgs])
def test_engine_args_are_options(kind: Any) -> None:
    arguments = kind(model="m", max_model_len=64, enable_chunked_prefill=True)
    assert (arguments.model, arguments.max_model_len, arguments.max_loras) == ("m", 64, 1)
    assert EngineConfig.from_options(**asdict(arguments)) == EngineConfig.from_options(
        model="m", max_model_len=64
    )
    assert kind() == kind() and kind() != arguments
    with pytest.raises(ValueError, match="unknown engine option 'max_modl_len'; did you mean"):
        kind(max_modl_len=64)


def test_engine_args_come_from_a_command_line_of_the_scripts_own() -> None:
    parser = EngineArgs.add_cli_args(Parser())
    parser.add_argument("--n", type=int, default=1)
    found = parser.parse_args(["--model", "m", "--max_num_seqs", "4", "-pp", "1", "--n", "2"])
    assert EngineArgs.from_cli_args(found) == EngineArgs(model="m", max_num_seqs=4)
    assert vars(found) == {"model": "m", "max_num_seqs": 4, "n": 2}


# -- the command line -----------------------------------------------------------------------------


def parse(*arguments: str) -> Mapping[str, Any]:
    return vars(cli._parser().parse_args(arguments))


def test_vllms_other_flags_of_our_options_are_ours() -> None:
    words = "-tp 1 --device-memory-utilization 0.5 -q awq_marlin --log-level DEBUG"
    found = parse("serve", "m", *words.split(), "--reasoning-parser", "")
    assert (found["tensor_parallel_size"], found["gpu_memory_utilization"]) == (1, 0.5)
    assert (found["log_level"], found["reasoning_parser"]) == ("debug", "auto")
    assert found["quantization"] == "awq"
    for theirs, ours in (
        *(("fp8_per_channel", "fp8"), ("fp8_per_tensor", "fp8"), ("fp8_per_block", "fp8_block")),
        ("int8_per_channel_weight_only", "int8"),
    ):
        assert parse("serve", "m", "-q", theirs)["quantization"] == ours
        assert EngineConfig.from_options(quantization=theirs).model.quantization == ours


def test_vllms_name_of_the_dtype_of_states_is_ours() -> None:
    for value, expected in (("bfloat16", "bfloat16"), ("float32", "float32"), ("auto", "float32")):
        config = EngineConfig.from_options(**asdict(EngineArgs(mamba_ssm_cache_dtype=value)))
        assert config.cache.state_dtype == expected
        words = ["serve", "m", "--mamba-ssm-cache-dtype", value]
        assert cli._parser().parse_args(words).state_dtype == expected
    with pytest.raises(ConfigError, match="state_dtype must be one of .*float16"):
        EngineConfig.from_options(mamba_ssm_cache_dtype="float16")


def test_benchmarks_take_vllms_options_too() -> None:
    found = parse("bench", "latency", "--model", "m", "-tp", "1", "-pp", "1", "--batch-size", "2")
    assert (found["model"], found["batch_size"]) == ("m", [2])


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_vllms_command_line_is_understood(line: str) -> None:
    assert parse("serve", "org/model", *line.split())["model_name"] == "org/model"
    assert parse("serve", *line.split(), "--model", "org/model")["model"] == "org/model"


def test_every_neutral_value_can_be_written_on_the_command_line() -> None:
    words = []
    for name, option in vllm_options().items():
        flag = "--" + name.replace("_", "-")
        default = option.values[0] if option.values else "whatever"
        if option.is_switch:
            words.append(flag if default else "--no-" + flag[2:])
        elif not isinstance(default, type(None)):
            words.append(f"{flag}={default}".replace("'", '"'))
    assert len(words) > 100
    assert parse("serve", *words, "m")["model_name"] == "m"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["serve", "--enable-lora", "m"], "serve: error: enable_lora=True is vLLM's option"),
        (["serve", "m", "-pp", "2"], "pipeline_parallel_size=2 is vLLM's option"),
        (["serve", "m", "--lora-modules", "a=b", "c=d"], "lora_modules='a=b' is vLLM's option"),
        (["serve", "m", "--max-modl-len", "9"], "unknown option --max-modl-len; did you mean "
         "--max-model-len?"),
        (["serve", "m", "n"], "one argument too many: 'n'"),
        (["srve"], "there is no command 'srve'; did you mean serve?"),
        (["bench", "latncy"], "there is no benchmark 'latncy'; did you mean latency?"),
        (["serve", "--dtype", "fp16"], "--dtype: must be one of auto, float32, float16, bfloat16"),
        (["generate", "x", "--temprature", "1"], "unknown option --temprature; did you mean "
         "--temperature?"),
        (["generate", "x", "--zzz=" + "y" * 500], "unknown option --zzz"),
    ],
)  # fmt: skip
def test_wrong_word_is_named_with_the_nearest_right_one(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(words)
    shown = capsys.readouterr().err
    assert exit.value.code == 2 and message in shown and len(shown) < 400
    assert "usage" not in shown  # which would hide the error behind forty lines


# -- sampling parameters and calls ----------------------------------------------------------------


def test_vllms_other_sampling_fields_may_ask_for_nothing() -> None:
    params = SamplingParams(temperature=0.5, flat_logprobs=False, thinking_token_budget=None)
    assert params == SamplingParams(temperature=0.5)
    with pytest.raises(ValueError, match="thinking_token_budget=5 is vLLM's field, not supported"):
        SamplingParams(thinking_token_budget=5)
    assert BeamSearchParams(beam_width=2, max_tokens=3, structured_outputs=None).beam_width == 2


def test_a_clone_of_sampling_params_has_lists_of_its_own() -> None:
    params = SamplingParams(
        stop=["a"], logit_bias={1: 2.0}, extra_args={"k": [1]}, logits_processors=[max]
    )
    clone = params.clone()
    assert clone == params
    clone.stop_strings.append("b")
    assert clone.extra_args is not None
    clone.extra_args["k"].append(2)
    assert params.stop == ["a"] and params.extra_args == {"k": [1]}


def test_arguments_of_vllms_methods_may_ask_for_nothing() -> None:
    check_arguments("generate", {"lora_request": None, "tokenization_kwargs": {}})
    with pytest.raises(ValueError, match=r"lora_request='a' is vLLM's argument of generate\(\)"):
        check_arguments("generate", {"lora_request": "a"})
    with pytest.raises(TypeError, match=r"generate\(\) got an unexpected keyword argument 'lora'"):
        check_arguments("generate", {"lora": None})
