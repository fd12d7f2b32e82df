"""The decisions about an engine on this machine, made before any weight is read.

`engine.startup.plan` makes a `Plan`. A `Worker` carries the plan out on one device, the core sizes
its scheduler by the plan, and `compiledllm info` shows the plan.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compiledllm.choices import Choice, Report
from compiledllm.graphs.buckets import StepShape, step_shapes
from compiledllm.kernels.backend import AttentionBackend
from compiledllm.models.shards import Ranks
from compiledllm.models.spec import ModelSpec
from compiledllm.platform import Platform
from compiledllm.resolved_config import ResolvedConfig
from compiledllm.runner.kv_layout import KVLayout

SNAPSHOT_SHARE = 0.1  # memory for snapshots of states, as a share of the KV blocks' memory


@dataclass(frozen=True, slots=True)
class Plan:
    """All decisions about an engine that need no weights. Every open option has a value.

    checkpoint: directory with config.json. spec: the model, in the dtypes in which it runs, or the
    part of it that each rank holds. ranks: which of the model's processes carries out the plan.
    stored_dtype: dtype of the checkpoint's weights, a name in torch. backend: the attention
    backend, prepared to run the model. blocks_per_context: number of KV blocks that a request of
    `max_model_len` tokens holds. max_useful_blocks: number of KV blocks of all requests that can
    run at once; more would stay idle. report: the choices, with reasons.
    """

    config: ResolvedConfig
    checkpoint: Path
    spec: ModelSpec
    stored_dtype: str
    platform: Platform
    backend: AttentionBackend
    kv_layout: KVLayout
    blocks_per_context: int
    max_useful_blocks: int
    report: Report
    ranks: Ranks = Ranks()

    @property
    def agreement(self) -> str:
        """The decisions that must be the same on all ranks of a model, as text to compare."""
        limits = self.config.limits
        return (
            f"{limits}, {self.kv_layout}, {self.backend.name}, {self.spec.dtype}, "
            f"{len(self.shapes_to_capture())} step sizes to capture"
        )

    @property
    def block_bytes(self) -> int:
        return self.kv_layout.block_bytes(self.config.limits.block_size)

    @property
    def state_bytes(self) -> int:
        """Bytes of the states of all request rows, the padding row included."""
        return self.spec.bytes_per_request * (self.config.limits.max_num_seqs + 1)

    @property
    def snapshot_share(self) -> float:
        """Memory for snapshots of states, as a share of the KV blocks' memory."""
        is_wanted = self.config.requested.cache.enable_prefix_caching
        return SNAPSHOT_SHARE if self.spec.bytes_per_request and is_wanted else 0.0

    def num_snapshots(self, num_kv_blocks: int) -> int:
        """Number of snapshots of states that go with a KV cache of this size."""
        num_bytes = int(self.snapshot_share * num_kv_blocks * self.block_bytes)
        return num_bytes // self.spec.bytes_per_request if num_bytes else 0

    def caches_prefixes(self, num_kv_blocks: int) -> Choice:
        """Whether prefixes are cached; models with states need room for a snapshot, too."""
        is_wanted = self.config.requested.cache.enable_prefix_caching
        if not is_wanted or not self.spec.bytes_per_request:
            return Choice(is_wanted, "as asked" if not is_wanted else "the default")
        mib = self.spec.bytes_per_request / 2**20
        if count := self.num_snapshots(num_kv_blocks):
            return Choice(True, f"{count} snapshots of states, {mib:.1f} MiB each")
        reason = f"{SNAPSHOT_SHARE:.0%} of the KV cache hold no snapshot of {mib:.1f} MiB"
        return Choice(False, f"{reason}; give the cache more room")

    @property
    def has_fp8_cache(self) -> bool:
        return self.spec.torch_kv_dtype.itemsize == 1

    def options(self) -> dict[str, Any]:
        """All options by name, resolved, but for the KV cache's size, which the worker measures."""
        is_dummy = self.config.requested.model.load_format == "dummy"
        return self.config.options() | {
            "load_format": "dummy" if is_dummy else "safetensors",
            "dtype": self.spec.dtype,
            "kv_cache_dtype": "fp8" if self.has_fp8_cache else self.spec.dtype,
            "device": str(self.platform.device),
            "attention_backend": self.backend.name,
            "model_impl": self.spec.implementation,
        }

    def why_not_capture(self) -> str | None:
        """The reason why steps cannot be captured as CUDA graphs, or None."""
        if not self.platform.is_cuda:
            return "CUDA graphs need a GPU"
        if self.config.requested.compile.enforce_eager:
            return "enforce_eager"
        if not self.backend.captures:
            return f"attention_backend='{self.backend.name}' reads values on the host"
        return None

    def shapes_to_capture(self) -> list[StepShape]:
        """The step shapes to capture as CUDA graphs; [] if `why_not_capture` gives a reason."""
        if self.why_not_capture():
            return []
        max_rows = self.config.max_cudagraph_capture_size
        shapes = step_shapes(max_rows, self.config.limits.max_num_batched_tokens)
        return [shape for shape in shapes if shape.is_decode or self.backend.captures_prompts]
