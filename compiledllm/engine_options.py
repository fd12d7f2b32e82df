"""The options of an engine, in groups: their names, defaults, kinds and help texts.

The field names are the option names of `Engine(...)` and of the command line. `config` checks the
values. Knows no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

DTYPES = ("auto", "float32", "float16", "bfloat16")
AUTO = "auto"
LOAD_FORMATS = ("auto", "safetensors", "dummy")
POLICIES = ("fcfs", "priority")
GENERATION = ("auto", "off")
COMPILE_WHEN = ("auto", "start", "background", "busy")
ONLINE = ("fp8", "fp8_block", "int8", "int4")  # methods of quantising while loading
# Methods of checkpoints that are stored quantised.
STORED = ("awq", "gptq", "gguf", "compressed-tensors", "fbgemm_fp8", "modelopt", "mxfp4")
QUANTIZATIONS = (*ONLINE, *STORED)
MODEL_IMPLS = ("auto", "compiledllm", "transformers")
KV_CACHE_DTYPES = (*DTYPES, "fp8", "fp8_e4m3")
STATE_DTYPES = ("float32", "bfloat16")
EXECUTORS = ("auto", "mp", "ray", "uni")
BACKENDS = ("auto", "triton", "flashinfer", "torch")

# Kind of option -> the types of its values, and a name for them. `arguments` parses each kind.
KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "str": ((str,), "a string"),
    "path": ((str, PurePath), "a string"),
    "int": ((int,), "an integer"),
    "length": ((int, str), f"an integer or '{AUTO}'"),
    "float": ((int, float), "a number"),
    "bool": ((bool,), "True or False"),
    "list": ((list, tuple), "a list"),
    "dict": ((dict,), "a dictionary"),
}


def option(
    default: Any, help: str, choices: tuple[str, ...] | None = None, kind: str = "str"
) -> Any:
    """A config field that is also a command-line option.

    kind: a key of KINDS. An option whose default is None may be None.
    """
    assert kind in KINDS, kind
    return field(default=default, metadata={"help": help, "choices": choices, "kind": kind})


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Which model to load, from where, and in which dtype."""

    model: str | None = option(
        None,
        "local directory, .gguf file or Hugging Face id; default: SmolLM2-135M-Instruct",
        kind="path",
    )
    tokenizer: str | None = option(
        None, "tokenizer directory or id; default: the model's", kind="path"
    )
    revision: str | None = option(None, "branch, tag or commit on the hub")
    dtype: str = option("auto", "dtype of weights and activations", DTYPES)
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    max_model_len: int | str | None = option(
        None,
        "maximum length of prompt and output together, in tokens; default: the model's context; "
        "auto: as much of the context as the KV cache holds",
        kind="length",
    )
    load_format: str = option("auto", "dummy: random weights from config.json alone", LOAD_FORMATS)
    model_impl: str = option(
        "auto",
        "implementation of the model: compiledllm: the families here; transformers: "
        "transformers' module over our paged cache; auto: transformers only for an architecture "
        "without a family here",
        MODEL_IMPLS,
    )
    quantization: str | None = option(
        None,
        "quantise 16-bit weights while loading (lossy): fp8 and int8 per channel, fp8_block in "
        "blocks of 128x128, int4 in groups of 128; a quantised checkpoint does not need the "
        "option, but accepts the name of its own method",
        QUANTIZATIONS,
    )
    skip_tokenizer_init: bool = option(False, "token ids in, token ids out", kind="bool")
    chat_template: str | None = option(
        None, "a Jinja chat template, or the file that holds one; default: the model's", kind="path"
    )
    default_chat_template_kwargs: dict[str, Any] | None = option(
        None, "variables of the chat template, unless a request sets them itself", kind="dict"
    )
    seed: int = option(
        0, "seed of the engine: dummy weights and requests without a seed", kind="int"
    )
    max_logprobs: int = option(
        20,
        "maximum number of logprobs that a request may ask for; -1: the whole vocabulary",
        kind="int",
    )
    generation_config: str = option(
        "off",
        "auto: requests without sampling parameters get those of generation_config.json",
        GENERATION,
    )
    trust_remote_code: bool = option(
        False, "code from a checkpoint is never run: must be False", kind="bool"
    )
    tensor_parallel_size: int = option(
        1, "number of GPUs among which the model is divided", kind="int"
    )
    distributed_executor_backend: str = option(
        "auto",
        "what starts the processes of the other GPUs: mp: this machine; ray: a Ray cluster; auto: "
        "mp; uni: there are no other GPUs",
        EXECUTORS,
    )


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """The paged KV cache."""

    block_size: int = option(16, "tokens in a KV block, a multiple of 16", kind="int")
    gpu_memory_utilization: float = option(
        0.9, "share of the GPU's memory for the engine, (0, 1]", kind="float"
    )
    kv_cache_memory_bytes: int | None = option(None, "size of the KV cache in bytes", kind="int")
    num_kv_blocks: int | None = option(
        None, "size of the KV cache in blocks; wins over bytes", kind="int"
    )
    kv_cache_dtype: str = option(
        "auto",
        "dtype of keys and values; fp8 (fp8_e4m3): room for twice the tokens, with scales from the "
        "checkpoint or measured at start; auto: as the checkpoint's quantization says, else the "
        "dtype of the weights",
        KV_CACHE_DTYPES,
    )
    state_dtype: str = option(
        "float32",
        "dtype of the states of Gated DeltaNet and Mamba-2; bfloat16: half the bytes, with "
        "relative errors up to 0.035",
        STATE_DTYPES,
    )
    enable_prefix_caching: bool = option(
        True, "reuse the KV of shared prompt prefixes", kind="bool"
    )


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """How much work goes into a step, and in which order requests get it."""

    max_num_seqs: int | None = option(
        None, "maximum number of requests that run at once", kind="int"
    )
    max_num_batched_tokens: int | None = option(
        None, "maximum number of tokens computed in a step", kind="int"
    )
    mixed_prompt_tokens: int | None = option(
        None,
        "maximum number of prompt tokens in a step in which requests decode: a longer step is a "
        "longer gap between their tokens; default: on a GPU by how many requests decode and wait, "
        "on a CPU 128",
        kind="int",
    )
    target_itl_ms: float | None = option(
        None,
        "bound on the time between a request's tokens (not in `generate`, which returns whole "
        "answers): in a step in which requests decode, prompts "
        "get as many tokens as fit, by step times measured at start and while running",
        kind="float",
    )
    async_scheduling: bool | None = option(
        None,
        "launch a step before the tokens of the step before it are known; default: only on a GPU",
        kind="bool",
    )
    scheduling_policy: str = option("fcfs", "which request goes first", POLICIES)


@dataclass(frozen=True, slots=True)
class CompileConfig:
    """What is compiled, and when."""

    enforce_eager: bool = option(False, "do not compile", kind="bool")
    compile_when: str = option(
        "auto",
        "start: before the first request; background: from the start on, while requests run "
        "eagerly; busy: in the background after some time of work; auto: start on a GPU, busy on a "
        "CPU",
        COMPILE_WHEN,
    )
    max_cudagraph_capture_size: int | None = option(
        None,
        "largest decode batch that is captured as a CUDA graph; default: max_num_seqs, at most 512",
        kind="int",
    )
    attention_backend: str = option("auto", "implementation of paged attention", BACKENDS)
    artifact_dir: str | None = option(
        None,
        "folder that `compiledllm build` has filled: the engine starts without compiling; default: "
        "what an earlier start left in the cache",
        kind="path",
    )
    persistent_decode: bool = option(
        True,
        "one kernel for all layers of a decode step of few requests, for the sizes of models and "
        "batches where that is faster; needs a Hopper GPU",
        kind="bool",
    )
    deterministic: bool = option(
        False,
        "a request's tokens do not depend, to the last bit, on what else is in the batch; slower, "
        "needs a GPU, does not compile",
        kind="bool",
    )
