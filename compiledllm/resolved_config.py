"""Fills in the options that a user left open, for one model and one machine. Knows no torch.

Facts about the machine and the model come in as plain numbers. The dtype and the attention backend
need more than numbers: `engine.startup` chooses them, and a `Plan` holds them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from compiledllm.choices import Choice, Report
from compiledllm.config import ConfigError, EngineConfig
from compiledllm.engine_options import AUTO

_LARGE_GPU = 64 * 2**30  # bytes; GPUs with this much memory get larger steps and more requests
_MAX_CAPTURED = 512  # requests; larger decode steps take longer than the host's launches


@dataclass(frozen=True, slots=True)
class StepLimits:
    """The bounds of steps and requests, for which the scheduler and the device are laid out.

    block_size: tokens of a KV block. max_num_seqs: requests running at once.
    max_num_batched_tokens: tokens computed in a step. max_model_len: tokens of a request, prompt
    and output together.
    """

    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int

    @property
    def blocks_per_request(self) -> int:
        """Blocks of one block table that hold `max_model_len` tokens."""
        return -(-self.max_model_len // self.block_size)


@dataclass(frozen=True, slots=True)
class ResolvedConfig:
    """The options of one engine: those that the user gave, and the values of those left open.

    requested: the options as the user gave them. mixed_prompt_tokens: maximum number of prompt
    tokens in a step in which requests decode; None: `scheduler.policy.Pace` decides in each step.
    """

    requested: EngineConfig
    limits: StepLimits
    mixed_prompt_tokens: int | None
    compile_when: str
    async_scheduling: bool
    max_cudagraph_capture_size: int

    def options(self) -> dict[str, Any]:
        """All options by name, with the resolved values where there are any."""
        limits = {
            "block_size": self.limits.block_size,
            "max_num_seqs": self.limits.max_num_seqs,
            "max_num_batched_tokens": self.limits.max_num_batched_tokens,
            "max_model_len": self.limits.max_model_len,
        }
        names = "mixed_prompt_tokens compile_when async_scheduling max_cudagraph_capture_size"
        model = self.requested.model
        executor = model.distributed_executor_backend
        if executor == AUTO:
            executor = "mp" if model.tensor_parallel_size > 1 else "uni"
        return (
            self.requested.options()
            | limits
            | {"distributed_executor_backend": executor}
            | {name: getattr(self, name) for name in names.split()}
        )


def resolve(
    requested: EngineConfig, on_gpu: bool, max_position: int, memory_bytes: int = 0
) -> tuple[ResolvedConfig, Report]:
    """The options with every open value filled in, and the reason for each value.

    max_position: the longest context that the model supports, in tokens. memory_bytes: memory of
    the device. Raises ConfigError for options that this model or machine cannot have.
    """
    _check(requested, on_gpu, max_position)
    report = Report()
    given = requested.options()

    def chosen(name: str, default: Any, reason: str) -> Any:
        is_open = given[name] in (None, "auto")
        choice = Choice(default, reason) if is_open else Choice(given[name], "as asked")
        report.note(name, choice)
        return choice.value

    where = "the default on a GPU" if on_gpu else "the default on a CPU"
    seqs, tokens = _default_step(on_gpu, memory_bytes)
    limits = StepLimits(
        block_size=requested.cache.block_size,
        max_model_len=chosen("max_model_len", max_position, "the model's context"),
        max_num_seqs=chosen("max_num_seqs", seqs, where),
        max_num_batched_tokens=chosen("max_num_batched_tokens", tokens, where),
    )
    has_target = requested.scheduler.target_itl_ms is not None
    is_measured = on_gpu or has_target
    prompt_tokens = None if is_measured else min(128, limits.max_num_batched_tokens)
    captured = min(limits.max_num_seqs, _MAX_CAPTURED)
    why_captured = f"max_num_seqs, at most {_MAX_CAPTURED}"
    config = ResolvedConfig(
        requested,
        limits,
        mixed_prompt_tokens=chosen(
            "mixed_prompt_tokens", prompt_tokens, "target_itl_ms" if has_target else where
        ),
        compile_when=chosen("compile_when", "start" if on_gpu else "busy", where),
        async_scheduling=chosen("async_scheduling", on_gpu, where),
        max_cudagraph_capture_size=chosen("max_cudagraph_capture_size", captured, why_captured),
    )
    if config.max_cudagraph_capture_size > limits.max_num_seqs:
        raise ConfigError(
            f"max_cudagraph_capture_size={config.max_cudagraph_capture_size} is more than "
            f"max_num_seqs={limits.max_num_seqs}: such a batch never runs; lower the one or raise "
            "the other"
        )
    return config, report


def _check(requested: EngineConfig, on_gpu: bool, max_position: int) -> None:
    max_model_len = requested.model.max_model_len
    if isinstance(max_model_len, int) and max_model_len > max_position:
        raise ConfigError(
            f"max_model_len={max_model_len} is more than the {max_position} positions of the "
            f"model; use at most {max_position}"
        )
    if requested.compile.deterministic and not on_gpu:
        raise ConfigError(
            "deterministic=True needs a GPU: on a CPU the matrix library chooses the order of "
            "its sums by the batch; leave it out"
        )


def _default_step(on_gpu: bool, memory_bytes: int) -> tuple[int, int]:
    """Requests that run at once, and tokens of a step."""
    if not on_gpu:
        return 64, 512
    return (1024, 16384) if memory_bytes >= _LARGE_GPU else (256, 8192)
