"""User options: frozen dataclasses, validated once, then resolved for a model and a machine.

The field names are the option names of `Engine(...)` and of the command line. Unknown names are
errors. Knows no torch: facts about the machine and the model come in as plain numbers.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field, fields
from typing import Any

from compiledllm.checks import reject_unknown

MAX_NUM_SEQS = 32768
_LARGE_GPU = 64 * 2**30  # bytes; GPUs with this much memory get larger steps and more requests
_MOST_CAPTURED = 512  # requests; larger decode steps take longer than the host's launches
DTYPES = ("auto", "float32", "float16", "bfloat16")
_DTYPE_ALIASES = {"half": "float16", "float": "float32"}
_DTYPE_NAMES = (*DTYPES, *_DTYPE_ALIASES)
LOAD_FORMATS = ("auto", "safetensors", "dummy")
POLICIES = ("fcfs", "priority")
GENERATION = ("auto", "off")
COMPILE_WHEN = ("auto", "start", "background", "busy")
QUANTIZATIONS = ("fp8", "fp8_block", "int8", "int4")
MODEL_IMPLS = ("auto", "compiledllm", "transformers")
BACKENDS = ("auto", "triton", "flashinfer", "torch")


class ConfigError(ValueError):
    """The configuration is impossible; the message names the option, its value and a way out."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A value that was given or chosen automatically, with the reason."""

    value: object
    reason: str

    def __str__(self) -> str:
        return f"{self.value} ({self.reason})"


def option(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    """A config field that is also a command-line option."""
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Which model to load, from where, and in which dtype."""

    model: str | None = option(
        None, "local directory, .gguf file or Hugging Face id; default: SmolLM2-135M-Instruct"
    )
    tokenizer: str | None = option(None, "tokenizer directory or id; default: the model's")
    revision: str | None = option(None, "branch, tag or commit on the hub")
    dtype: str = option("auto", "dtype of weights and activations", DTYPES)
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    max_model_len: int | None = option(None, "longest prompt + output, in tokens")
    load_format: str = option("auto", "dummy: random weights from config.json alone", LOAD_FORMATS)
    model_impl: str = option(
        "auto",
        "who runs the model; transformers: its module over our paged cache; auto: that, for an "
        "architecture without a family here",
        MODEL_IMPLS,
    )
    quantization: str | None = option(
        None,
        "quantise 16-bit weights while loading, lossy: fp8 and int8 per channel, fp8_block in "
        "blocks of 128x128, int4 in groups of 128; quantised checkpoints need no option",
        QUANTIZATIONS,
    )
    skip_tokenizer_init: bool = option(False, "token ids in, token ids out")
    seed: int = option(0, "seed of the engine: dummy weights and requests without a seed")
    max_logprobs: int = option(20, "most logprobs a request may ask for; -1: the vocabulary")
    generation_config: str = option(
        "off", "auto: requests without sampling parameters get generation_config.json's", GENERATION
    )
    trust_remote_code: bool = option(False, "code from a checkpoint is never run: must be False")
    tensor_parallel_size: int = option(1, "GPUs to split the model over: must be 1 so far")


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """The paged KV cache."""

    block_size: int = option(16, "tokens in a KV block, a multiple of 16")
    gpu_memory_utilization: float = option(0.9, "share of the GPU's memory for the engine, (0, 1]")
    kv_cache_memory_bytes: int | None = option(None, "size of the KV cache in bytes")
    num_kv_blocks: int | None = option(None, "size of the KV cache in blocks; wins over bytes")
    enable_prefix_caching: bool = option(True, "reuse the KV of shared prompt prefixes")


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """How much work goes into a step, and in which order requests get it."""

    max_num_seqs: int | None = option(None, "most requests running at once")
    max_num_batched_tokens: int | None = option(None, "most tokens computed in a step")
    mixed_prompt_tokens: int | None = option(
        None,
        "most prompt tokens in a step in which requests decode: a longer step is a longer gap "
        "between their tokens; default: by how many decode and wait on a GPU, 128 on a CPU",
    )
    async_scheduling: bool | None = option(
        None, "launch a step before the last one's tokens are known; default: on a GPU"
    )
    scheduling_policy: str = option("fcfs", "which request goes first", POLICIES)


@dataclass(frozen=True, slots=True)
class CompileConfig:
    """What is compiled, and when."""

    enforce_eager: bool = option(False, "do not compile")
    compile_when: str = option(
        "auto",
        "start: before the first request; background: at once, serving eagerly meanwhile; busy: "
        "likewise, after some time of work; auto: start on a GPU, busy on a CPU",
        COMPILE_WHEN,
    )
    max_cudagraph_capture_size: int | None = option(
        None,
        "largest decode batch that is captured as a CUDA graph; default: max_num_seqs, at most 512",
    )
    attention_backend: str = option("auto", "implementation of paged attention", BACKENDS)
    deterministic: bool = option(
        False,
        "a request's tokens do not depend, to the last bit, on what else is in the batch; slower, "
        "needs a GPU, does not compile",
    )


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """All options of an engine.

    `EngineConfig.from_options(model=..., block_size=32)` takes flat options; `resolve` fills in
    open values, with a reason for each.
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
        try:
            reject_unknown(options, list(owners), "engine option")
        except ValueError as error:
            raise ConfigError(str(error)) from None
        chosen: dict[str, dict[str, Any]] = {group: {} for group in groups}
        for name, value in options.items():
            if name == "dtype":  # torch.bfloat16 and vLLM's short names are accepted
                text = str(value).removeprefix("torch.")
                value = _DTYPE_ALIASES.get(text, text) if text in _DTYPE_NAMES else value
            chosen[owners[name]][name] = value
        config = cls(**{group: kind(**chosen[group]) for group, kind in groups.items()})
        config.check()
        return config

    def check(self) -> None:
        """Raise ConfigError for a value that is wrong for every model and machine."""
        model, cache, scheduler = self.model, self.cache, self.scheduler
        positive = {
            "max_model_len": model.max_model_len,
            "kv_cache_memory_bytes": cache.kv_cache_memory_bytes,
            "num_kv_blocks": cache.num_kv_blocks,
            "max_num_seqs": scheduler.max_num_seqs,
            "max_num_batched_tokens": scheduler.max_num_batched_tokens,
            "mixed_prompt_tokens": scheduler.mixed_prompt_tokens,
            "max_cudagraph_capture_size": self.compile.max_cudagraph_capture_size,
        }
        for name, value in positive.items():
            is_int = isinstance(value, int) and not isinstance(value, bool)
            if value is not None and (not is_int or value < 1):
                raise ConfigError(f"{name} must be an integer >= 1, got {value!r}")
        for group in option_groups():
            _check_types_and_choices(getattr(self, group))
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
        if model.tensor_parallel_size != 1:
            raise ConfigError(
                f"tensor_parallel_size must be 1, got {model.tensor_parallel_size}: models are not "
                "split over GPUs yet"
            )
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

    def resolve(
        self, on_gpu: bool, max_position: int, memory_bytes: int = 0
    ) -> tuple[EngineConfig, dict[str, Choice]]:
        """A copy with every open value filled in, and the reason for each value.

        max_position: the longest context that the model supports, in tokens. memory_bytes: memory
        of the device.
        """
        asked = self.model.max_model_len
        if asked is not None and asked > max_position:
            raise ConfigError(
                f"max_model_len={asked} is more than the {max_position} positions of the model; "
                f"use at most {max_position}"
            )
        if self.compile.deterministic and not on_gpu:
            raise ConfigError(
                "deterministic=True needs a GPU: on a CPU the matrix library chooses the order of "
                "its sums by the batch; leave it out"
            )
        where = "the default on a GPU" if on_gpu else "the default on a CPU"
        seqs, tokens = (1024, 16384) if memory_bytes >= _LARGE_GPU else (256, 8192)
        if not on_gpu:
            seqs, tokens = 64, 512
        max_num_seqs = self.scheduler.max_num_seqs or seqs
        tokens = self.scheduler.max_num_batched_tokens or tokens
        largest = self.compile.max_cudagraph_capture_size
        if largest is not None and largest > max_num_seqs:
            raise ConfigError(
                f"max_cudagraph_capture_size={largest} is more than max_num_seqs={max_num_seqs}: "
                "such a batch never runs; lower the one or raise the other"
            )
        open_values = {
            "max_model_len": Choice(max_position, "the model's context"),
            "max_num_seqs": Choice(max_num_seqs, where),
            "max_num_batched_tokens": Choice(tokens, where),
            "mixed_prompt_tokens": Choice(None if on_gpu else min(128, tokens), where),
            "compile_when": Choice("start" if on_gpu else "busy", where),
            "async_scheduling": Choice(on_gpu, where),
            "max_cudagraph_capture_size": Choice(
                min(max_num_seqs, _MOST_CAPTURED), f"max_num_seqs, at most {_MOST_CAPTURED}"
            ),
        }
        groups = {f.name: group for group, f in all_options()}
        reasons = {}
        for name, choice in open_values.items():
            given = getattr(getattr(self, groups[name]), name)
            reasons[name] = choice if given in (None, "auto") else Choice(given, "as asked")
        return self.replace(**{name: c.value for name, c in reasons.items()}), reasons

    def replace(self, **options: Any) -> EngineConfig:
        """A copy with some flat options changed, checked again."""
        flat = {f.name: getattr(getattr(self, g), f.name) for g, f in all_options()}
        return EngineConfig.from_options(**(flat | options))


def option_groups() -> dict[str, type]:
    """Group name -> the dataclass with its options, in display order."""
    return {
        "model": ModelConfig,
        "cache": CacheConfig,
        "scheduler": SchedulerConfig,
        "compile": CompileConfig,
    }


def all_options() -> list[tuple[str, dataclasses.Field[Any]]]:
    """(group name, field) of every option."""
    return [(group, f) for group, kind in option_groups().items() for f in fields(kind)]


_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "str": ((str,), "a string"),
    "int": ((int,), "an integer"),
    "float": ((int, float), "a number"),
    "bool": ((bool,), "True or False"),
}


def _check_types_and_choices(group: object) -> None:
    for f in fields(group):  # type: ignore[arg-type]
        choices, value = f.metadata.get("choices"), getattr(group, f.name)
        kind, _, optional = str(f.type).partition(" | ")
        if choices and value not in choices and not (optional and value is None):
            raise ConfigError(f"{f.name} must be one of {', '.join(choices)}, got {value!r}")
        types, words = _KINDS[kind]
        is_kind = isinstance(value, types) and (kind == "bool" or not isinstance(value, bool))
        if not is_kind and not (optional and value is None):
            raise ConfigError(
                f"{f.name} must be {words}{' or None' * bool(optional)}, got {value!r}"
            )
