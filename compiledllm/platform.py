"""What this machine offers: device, dtypes, memory, compiler, and the preferred attention backend.

Every choice comes with a reason, which the engine logs once at start.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from compiledllm.choices import Choice
from compiledllm.config import ConfigError

_OLDEST_TORCH = (2, 11)
_OLDEST_COMPUTE_CAPABILITY = 8


@dataclass(frozen=True, slots=True)
class Platform:
    """One device and its capabilities."""

    device: torch.device
    name: str
    memory_bytes: int  # CUDA: the device's memory; CPU: memory available to new processes now

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def converts_fp8(self) -> bool:
        """Whether kernels of the device can convert FP8, as they do for an FP8 KV cache."""
        return not self.is_cuda or torch.cuda.get_device_capability(self.device) >= (8, 9)

    @classmethod
    def detect(cls, device: str = "auto") -> Platform:
        """The platform of "auto", "cpu", "cuda" or "cuda:N". ConfigError if there is none."""
        _check_torch()
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cpu":
            return cls(torch.device("cpu"), cpu_name(), _available_cpu_memory())
        if not device.startswith("cuda"):
            raise ConfigError(f"device must be auto, cpu, cuda or cuda:N, got '{device}'")
        if not torch.cuda.is_available():
            raise ConfigError(
                f"device='{device}' but torch {torch.__version__} sees no CUDA device "
                f"({_why_no_cuda()}); use device='cpu'"
            )
        try:
            properties = torch.cuda.get_device_properties(device)
        except (RuntimeError, AssertionError) as error:
            raise ConfigError(f"device='{device}' cannot be used: {error}") from error
        if properties.major < _OLDEST_COMPUTE_CAPABILITY:
            raise ConfigError(
                f"{properties.name} has compute capability {properties.major}.{properties.minor}; "
                f"{_OLDEST_COMPUTE_CAPABILITY}.0 (Ampere) or newer is needed; use device='cpu'"
            )
        return cls(torch.device(device), properties.name, properties.total_memory)

    def versions(self) -> str:
        """Versions of torch and of the device's driver stack, for the report at start."""
        parts = [f"torch {torch.__version__}"]
        if self.is_cuda:
            major, minor = torch.cuda.get_device_capability(self.device)
            parts += [f"CUDA {torch.version.cuda}", f"compute capability {major}.{minor}"]
        return ", ".join(parts)

    def choose_dtype(self, requested: str, checkpoint_dtype: str) -> Choice:
        """The dtype of weights and activations."""
        if requested != "auto":
            return Choice(requested, "as asked")
        if checkpoint_dtype == "float32":
            return Choice("float32", "the checkpoint's")
        if self.is_cuda:
            return Choice(checkpoint_dtype, "the checkpoint's")
        if _cpu_multiplies_bfloat16():
            return Choice("bfloat16", "this CPU has bfloat16 dot products")
        return Choice("float32", "this CPU has no bfloat16 dot products")

    def choose_attention_backend(self, requested: str, deterministic: bool = False) -> Choice:
        """The preferred attention backend. ConfigError if `requested` cannot run here."""
        if deterministic:
            return Choice("fixed_order", "deterministic")
        if requested in ("triton", "flashinfer") and not self.is_cuda:
            raise ConfigError(f"attention_backend='{requested}' needs a GPU; use 'auto' or 'torch'")
        if requested != "auto":
            return Choice(requested, "as asked")
        if not self.is_cuda:
            return Choice("torch", "the CPU path")
        if find_spec("triton") is None:
            return Choice("torch", "slow: triton is not installed (pip install triton)")
        return Choice("triton", "the GPU path")

    def why_not_compile(self) -> str | None:
        """Why torch.compile cannot be used on this machine, or None."""
        if self.is_cuda or _cpp_compiler() is not None:
            return None
        return "no C++ compiler was found (looked for $CXX, g++, clang++); install g++ to compile"


@functools.cache
def can_overlap_kernels() -> bool:
    """Whether the GPU has programmatic dependent launch (Hopper and newer).

    A kernel may then start before the kernel ahead of it has ended, if both allow it.
    """
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9


def is_fatal(error: BaseException) -> bool:
    """Whether this is a CUDA error, after which the process cannot use the device any more."""
    if isinstance(error, torch.OutOfMemoryError):
        return False
    accelerator = getattr(torch, "AcceleratorError", ())
    return isinstance(error, accelerator) or "CUDA error" in str(error)


@contextmanager
def single_row_products() -> Iterator[None]:
    """Inside the block, ATen instead of oneDNN computes bfloat16 matmuls of one row on a CPU.

    ATen's kernel reads the weights at 31 instead of 12 GB/s (AMD EPYC Zen 4, 2 cores, torch 2.13),
    which halves the time of one-row decode steps. From two rows on, oneDNN is faster.
    """
    was_enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(was_enabled)


def cpu_name() -> str:
    """Name of the CPU and the number of threads that torch uses."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if "model name" in line]
    except OSError:
        names = []
    return f"{names[0] if names else 'CPU'}, {torch.get_num_threads()} threads"


def _available_cpu_memory() -> int:
    """Bytes that new processes can allocate without swapping."""
    try:
        with open("/proc/meminfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _check_torch() -> None:
    numbers = re.findall(r"\d+", torch.__version__)[:2]
    if tuple(map(int, numbers)) < _OLDEST_TORCH:
        oldest = ".".join(map(str, _OLDEST_TORCH))
        raise ConfigError(f"torch {torch.__version__} is too old; install torch>={oldest}")


def _why_no_cuda() -> str:
    if torch.version.cuda is None:
        return "it was built without CUDA"
    return f"it was built for CUDA {torch.version.cuda}; is the driver there and new enough?"


def _cpu_multiplies_bfloat16() -> bool:
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, check, bool)() for check in checks)


def _cpp_compiler() -> str | None:
    candidates = (os.environ.get("CXX"), "g++", "clang++")
    return next((path for c in candidates if c and (path := shutil.which(c))), None)
