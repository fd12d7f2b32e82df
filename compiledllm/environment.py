"""`compiledllm env`: the facts about this machine that a bug report needs. Never shows secrets."""

from __future__ import annotations

import os
import platform as system
import shutil
import subprocess
import sys

from compiledllm.config import ConfigError
from compiledllm.version import __version__, version_of

PACKAGES = (
    *("torch", "triton", "transformers", "tokenizers", "safetensors", "huggingface-hub", "numpy"),
    *("fastapi", "uvicorn", "uvloop", "httptools", "msgspec", "pydantic", "llguidance"),
    *("flashinfer-python", "gguf", "prometheus-client", "vllm"),
)
# Prefixes of the variables that change what the engine or its libraries do.
_PREFIXES = ("COMPILEDLLM_", "HF_", "CUDA_", "NVIDIA_", "TORCH", "TRITON_", "OMP_", "GOMP_", "MKL_")
_NAMES = ("CXX", "LD_LIBRARY_PATH", "TOKENIZERS_PARALLELISM", "XDG_CACHE_HOME")
_SECRET = ("TOKEN", "KEY", "SECRET", "PASSWORD")
_GPU_FIELDS = "name,driver_version,memory.total,memory.used,compute_cap,mig.mode.current"


def facts() -> dict[str, str]:
    """Facts by name, in the order in which they are shown."""
    return {
        "compiledllm": __version__,
        "python": f"{sys.version.split()[0]} ({sys.executable})",
        "system": f"{system.platform()}{_inside_container()}",
        **_devices(),
        "C++ compiler": _first_line(os.environ.get("CXX") or "g++", "--version") or "none",
        **{name: version for name in PACKAGES if (version := version_of(name))},
        **_variables(),
    }


def _devices() -> dict[str, str]:
    """The devices as torch and as the driver see them."""
    import torch

    from compiledllm.caches import cache_dir
    from compiledllm.platform import Platform, cpu_name

    found = {"cpu": cpu_name()}
    try:
        device = Platform.detect()
        found["memory"] = f"{device.memory_bytes / 2**30:.1f} GiB"
        found["engine's device"] = f"{device.device}, {device.name} ({device.versions()})"
        found["attention"] = str(device.choose_attention_backend("auto"))
        found["compiles"] = device.why_not_compile() or "yes"
    except ConfigError as error:
        found["engine's device"] = f"none: {error}"
    for index in range(torch.cuda.device_count()):
        found[f"cuda:{index}"] = torch.cuda.get_device_name(index)
    if gpu := _first_line("nvidia-smi", f"--query-gpu={_GPU_FIELDS}", "--format=csv,noheader"):
        found["nvidia-smi"] = gpu
    free = shutil.disk_usage(_existing(cache_dir())).free
    found["cache"] = f"{cache_dir()} ({free / 2**30:.0f} GiB free)"
    return found


def _existing(path: os.PathLike[str]) -> str:
    text = os.fspath(path)
    while not os.path.exists(text):
        text = os.path.dirname(text)
    return text


def _variables() -> dict[str, str]:
    """Environment variables that matter; for those that may hold a secret, only "(set)"."""
    found = {}
    for name, value in sorted(os.environ.items()):
        if name.startswith(_PREFIXES) or name in _NAMES:
            is_secret = any(word in name for word in _SECRET)
            found[f"${name}"] = "(set)" if is_secret else value
    return found


def _first_line(*command: str) -> str | None:
    """The first line that a command prints; None if it fails or does not exist."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.partition("\n")[0].strip() if done.returncode == 0 else None


def _inside_container() -> str:
    marks = ("/.dockerenv", "/run/.containerenv")
    return ", in a container" if any(map(os.path.exists, marks)) else ""
