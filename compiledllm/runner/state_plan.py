"""Plans the memory of layers that keep a state of fixed size for each request."""

from __future__ import annotations

from dataclasses import replace

from compiledllm.choices import Choice, Report
from compiledllm.config import ConfigError
from compiledllm.kernels import delta_rule, state_space
from compiledllm.log import log
from compiledllm.models.spec import ModelSpec
from compiledllm.models.state_specs import DeltaNetSpec, Mamba2Spec
from compiledllm.platform import Platform
from compiledllm.resolved_config import ResolvedConfig
from compiledllm.runner.kv_cache import available_bytes

MAX_SHARE = 0.5  # of the memory that weights leave, for the states of running requests


def with_room_for_states(
    config: ResolvedConfig, spec: ModelSpec, platform: Platform, report: Report
) -> ResolvedConfig:
    """The config with `max_num_seqs` lowered to the number of requests whose states fit.

    Raises ConfigError if the state of a single request does not fit, or if the GPU has no kernels
    for a layer's heads.
    """
    if platform.is_cuda:
        _check_heads(spec)
    in_use = spec.num_bytes(spec.weights) if platform.is_cuda else 0
    room, _ = available_bytes(config.requested.cache, platform, in_use)
    mib = spec.bytes_per_request / 2**20
    num_rows = int(room * MAX_SHARE) // spec.bytes_per_request - 1  # one is for padding
    if num_rows < 1:
        raise ConfigError(
            f"no room for requests: the states of one take {mib:.1f} MiB, and half of the memory "
            f"beside the weights is {max(room, 0) * MAX_SHARE / 2**20:.1f} MiB; free memory, or "
            "raise gpu_memory_utilization"
        )
    requested = config.limits.max_num_seqs
    if num_rows < requested:
        reason = f"half of the memory beside the weights holds no more states of {mib:.1f} MiB"
        report.note("max_num_seqs", Choice(num_rows, reason))
        if config.requested.scheduler.max_num_seqs is not None:
            log.warning("max_num_seqs=%d is lowered to %d: %s", requested, num_rows, reason)
        captured = min(config.max_cudagraph_capture_size, num_rows)
        limits = replace(config.limits, max_num_seqs=num_rows)
        config = replace(config, limits=limits, max_cudagraph_capture_size=captured)
    num_rows = config.limits.max_num_seqs
    report.note("states", Choice(f"{num_rows} requests", f"{mib:.1f} MiB each"))
    return config


def _check_heads(spec: ModelSpec) -> None:
    for mixer in {layer.mixer for layer in spec.layers}:
        what, obstacle = "", None
        if isinstance(mixer, DeltaNetSpec):
            what = "gated delta rule"
            obstacle = delta_rule.why_not_on_gpu(mixer.key_dim, mixer.value_dim)
        elif isinstance(mixer, Mamba2Spec):
            what = "state space"
            obstacle = state_space.why_not_on_gpu(mixer.state_dim, mixer.head_dim)
        if obstacle is not None:
            raise ConfigError(
                f"the {what} of {spec.architecture} cannot run on a GPU: {obstacle}; "
                "use device='cpu'"
            )
