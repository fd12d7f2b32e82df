"""User options: frozen dataclasses, validated once. `resolved_config` fills in what is left open.

The field names are the option names of `Engine(...)` and of the command line. Unknown names are
errors. Knows no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import PurePath
from typing import Any

from compiledllm.checks import is_int, reject_unknown
from compiledllm.vllm_options import without_vllm_options

MAX_NUM_SEQS = 32768
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


class ConfigError(ValueError):
    """The configuration is impossible; the message names the option, its value and a way out."""


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
        "bound on the time between a request's tokens: in a step in which requests decode, prompts "
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
        if not -(2**63) <= model.seed < 2**63:
            raise ConfigError(f"seed must be a 64-bit integer, got {model.seed}")
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
