"""Plans a GPU's memory: the KV cache gets the engine's share minus all other, measured uses."""

from __future__ import annotations

import gc
from dataclasses import dataclass

import torch

from compiledllm.config import ConfigError
from compiledllm.graphs.buckets import StepShape
from compiledllm.models.decoder import Decoder
from compiledllm.platform import Platform
from compiledllm.resolved_config import StepLimits
from compiledllm.runner.kv_cache import allocate_kv_caches
from compiledllm.runner.kv_layout import KVLayout
from compiledllm.runner.model_runner import ModelRunner
from compiledllm.runner.penalties import Penalties
from compiledllm.runner.sampler import WORKSPACE_BYTES

# Driver memory of one captured graph of a few hundred kernels. torch does not count driver memory.
_BYTES_PER_GRAPH = 4 * 2**20
_GIB = 2**30


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """Bytes of GPU memory.

    limit: the engine's share of the GPU. held: weights and the process's other tensors.
    activations: measured peak of the largest step. captures: the memory pool and the graphs of
    captured steps. sampling: maximum for penalties and log probabilities. states: the states of all
    request rows, of layers without KV.
    """

    limit: int
    held: int
    activations: int
    captures: int
    sampling: int
    states: int = 0

    @property
    def in_use(self) -> int:
        return self.held + self.activations + self.captures + self.sampling + self.states

    def __str__(self) -> str:
        parts = {
            "weights": self.held,
            "activations": self.activations,
            "captured steps": self.captures,
            "sampling": self.sampling,
            **({"states": self.states} if self.states else {}),
            "KV cache": max(self.limit - self.in_use, 0),
        }
        sizes = ", ".join(f"{name} {size / _GIB:.2f}" for name, size in parts.items())
        return f"{self.limit / _GIB:.2f} GiB: {sizes}"


def check_gpu_is_free(platform: Platform, share: float) -> None:
    """Raise ConfigError if other processes leave too little memory free.

    share: the fraction of the GPU's memory that the engine needs, (0, 1].
    """
    free, total = torch.cuda.mem_get_info(platform.device)
    ours = torch.cuda.memory_reserved(platform.device)
    if total * share > free + ours:
        fits = int((free + ours) / total * 100) / 100
        raise ConfigError(
            f"gpu_memory_utilization={share} asks for {total * share / _GIB:.1f} of "
            f"{total / _GIB:.1f} GiB, but other processes hold "
            f"{(total - free - ours) / _GIB:.1f} GiB "
            f"(nvidia-smi shows who); use gpu_memory_utilization={fits}, or num_kv_blocks"
        )


@dataclass(frozen=True, slots=True)
class Measured:
    """Bytes of GPU memory that steps take. activations: the peak of the largest step. workspaces:
    what libraries hold on to from the first step on.
    """

    activations: int
    workspaces: int


@torch.inference_mode()
def measure_activations(
    model: Decoder,
    kv_layout: KVLayout,
    limits: StepLimits,
    platform: Platform,
    shapes: list[StepShape],
) -> Measured:
    """Peak bytes of the largest step, uncompiled, without weights and KV cache.

    The step runs on a KV cache of one block. Only the allocations of this process count. shapes:
    steps to be captured later, whose kernels are compiled in other threads from here on.
    """
    device = platform.device
    base = torch.cuda.memory_allocated(device)
    kv_caches = allocate_kv_caches(kv_layout, 1, limits.block_size, device)
    max_blocks = -(-limits.max_model_len // limits.block_size)
    probe = ModelRunner(model, kv_layout, kv_caches, limits, max_blocks)
    if shapes:
        probe.rehearse(shapes)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    probe.run_dummy(limits.max_num_batched_tokens, num_samples=limits.max_num_seqs)
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    del probe, kv_caches  # the collector must free the probe, which is in a reference cycle
    gc.collect()
    torch.cuda.empty_cache()
    retained = torch.cuda.memory_allocated(device) - base
    return Measured(peak - before, max(retained, 0))


def max_sampling_bytes(max_num_seqs: int, vocab_size: int) -> int:
    """Bytes that sampling takes if every request has penalties and wants log probabilities."""
    return WORKSPACE_BYTES + Penalties.max_bytes(max_num_seqs, vocab_size)


def plan_memory(
    platform: Platform,
    share: float,
    activations: int,
    num_captures: int,
    sampling: int,
    states: int = 0,
    workspaces: int = 0,
) -> MemoryBudget:
    """The budget of an engine. share: its fraction of the GPU's memory, (0, 1].

    activations, sampling: bytes, see `MemoryBudget`. workspaces: bytes of libraries' workspaces
    that this process does not hold yet, because an earlier start has measured the activations.
    Captured steps share one memory pool, which is as large as the largest step.
    """
    return MemoryBudget(
        limit=int(platform.memory_bytes * share),
        held=torch.cuda.memory_allocated(platform.device) + workspaces,
        activations=activations,
        captures=(activations + num_captures * _BYTES_PER_GRAPH) if num_captures else 0,
        sampling=sampling,
        states=states,
    )
