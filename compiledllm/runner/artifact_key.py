"""The key of a start's artifact: all facts on which the compiled code and measurements depend."""

from __future__ import annotations

import functools
import hashlib
import os
import platform as system
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import compiledllm.graphs
import compiledllm.kernels
import compiledllm.models
import compiledllm.runner
from compiledllm.caches import cache_dir
from compiledllm.kernels.machine_code import driver_version
from compiledllm.kernels.tables import file_name
from compiledllm.platform import Platform
from compiledllm.runner.plan import Plan
from compiledllm.version import version_of

# Fields of the model's spec on which the compiled blocks and edges (`graphs.compile`), or a step's
# memory, depend.
_SPEC_FIELDS = (
    *("vocab_size", "hidden_size", "final_norm", "num_learned_positions", "first_position"),
    *("embedding_scale", "embedding_size", "token_vocab_size", "lm_head_bias"),
    *("logit_scale", "logit_soft_cap", "implementation", "formats"),
    *("dtype", "kv_dtype", "state_dtype"),
)
_COMPILERS_VARIABLES = ("TORCHINDUCTOR_", "TORCH_COMPILE_", "TRITON_", "PYTORCH_")
_FOLDER_VARIABLES = ("_DIR", "_HOME", "_PATH")  # they say where files lie, not what is in them
_MAX_SHOWN = 60  # characters of a value in the key; longer values are shown as digests


def key_of(plan: Plan) -> dict[str, str]:
    """Name of a fact on which the artifact depends -> its value, as text."""
    spec, limits = plan.spec, plan.config.limits
    layers = list(dict.fromkeys(spec.layers))
    facts: dict[str, Any] = {
        "source": source_digest(),
        **_software(),
        **(_gpu(plan.platform) if plan.platform.is_cuda else _cpu()),
        "architecture": spec.architecture,
        "layers": layers,
        **{name: getattr(spec, name) for name in _SPEC_FIELDS},
        **_across_layers(plan),
        "attention_backend": plan.backend.name,
        "persistent_decode": plan.config.requested.compile.persistent_decode,
        "kv_groups": (plan.kv_layout.windows, plan.kv_layout.splits),
        "block_size": limits.block_size,
        "max_num_seqs": limits.max_num_seqs,
        "max_num_batched_tokens": limits.max_num_batched_tokens,
        "max_model_len": limits.max_model_len,
        "captured": plan.shapes_to_capture(),
    }
    return {name: _shown(value) for name, value in facts.items()}


def _across_layers(plan: Plan) -> dict[str, Any]:
    """What decides compiled functions that compute something for several layers at once.

    transformers' body is one function of all layers, with constants of the config that no spec has.
    A decoder's per-layer inputs of a token come from one function, too.
    """
    if plan.spec.implementation == "transformers":
        config = (plan.checkpoint / "config.json").read_text(encoding="utf-8")
        return {"config": config, "transformers": version_of("transformers")}
    has_token_inputs = any(layer.token_size for layer in plan.spec.layers)
    return {"num_layers": len(plan.spec.layers)} if has_token_inputs else {}


def _software() -> dict[str, Any]:
    return {
        "python": f"{sys.implementation.cache_tag} {system.machine()}",
        "torch": torch.__version__,
        "triton": version_of("triton") or "none",
        "compilers_variables": _variables(os.environ),
    }


def _gpu(platform: Platform) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(platform.device)
    return {
        "device": f"cuda:{platform.device.index or 0}",
        "gpu": platform.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "driver": driver_version(),
        "tilings": own_tilings_digest(platform.name),
    }


def _cpu() -> dict[str, Any]:
    """Inductor compiles for the CPU's instruction sets and the number of threads."""
    return {
        "device": "cpu",
        "cpu": _cpu_flags(),
        "threads": torch.get_num_threads(),
        "libc": os.confstr("CS_GNU_LIBC_VERSION") if hasattr(os, "confstr") else None,
    }


@functools.cache
def _cpu_flags() -> str:
    """A digest of the CPU's instruction sets, or its name where the system does not list them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return system.processor()
    kinds = ("model name", "flags", "Features")
    first = {line.split(":")[0].strip(): line for line in reversed(lines) if ":" in line}
    return _digest("".join(first.get(kind, "") for kind in kinds))


def _variables(environment: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value
        for name, value in sorted(environment.items())
        if name.startswith(_COMPILERS_VARIABLES) and not name.endswith(_FOLDER_VARIABLES)
    }


def own_tilings_digest(gpu: str) -> str:
    """A digest of the machine's own table of tilings for a GPU; "none" without one."""
    path = cache_dir() / "tilings" / file_name(gpu)
    return _digest(path.read_text(encoding="utf-8")) if path.is_file() else "none"


@functools.cache
def source_digest() -> str:
    """A digest of our source code on which compiled code and measurements depend."""
    found = hashlib.sha256()
    for package in (
        compiledllm.graphs,
        compiledllm.kernels,
        compiledllm.models,
        compiledllm.runner,
    ):
        folder = Path(next(iter(package.__path__)))
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".py", ".cu", ".cuh", ".h", ".json"):
                found.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return found.hexdigest()[:12]


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= _MAX_SHOWN else f"digest {_digest(text)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
