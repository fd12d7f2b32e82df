"""Runs one case of each kernel test under compute-sanitizer, a part of CUDA's toolkit.

    python -m tests.kernels.sanitize [--tool memcheck racecheck] [-k EXPRESSION] [FILE ...]

memcheck finds accesses outside a tensor or of misaligned addresses, racecheck finds threads of a
block that use shared memory without a barrier between them. FILE: test files; default: those of
all kernels but sums over ranks, which need two GPUs. -k: as pytest's. Ends with 0 if no tool finds
anything, 1 if one does or a test fails, 2 if there is no compute-sanitizer or no GPU.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

FILES = [
    f"tests/kernels/test_{name}.py"
    for name in (
        "paged_attention_gpu", "split_attention", "rotate_store", "step_inputs", "skinny",
        "sampling", "logprobs", "penalties", "moe", "quantized_gpu", "delta_rule_gpu",
        "short_convolution", "state_space", "gated_norm", "fixed_order", "fp8_cache",
        "dense_linear", "decode_step_gpu",
    )
]  # fmt: skip
_ERRORS_FOUND = 9  # what compute-sanitizer returns, and no test run does
_SUMMARY = re.compile(r"SUMMARY: (\d+) (?:error|hazard)")


def sanitizer() -> str | None:
    """The path of compute-sanitizer, which often is not on the PATH."""
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
    search = os.pathsep.join([os.environ.get("PATH", ""), str(toolkit)])
    return shutil.which("compute-sanitizer", path=search)


def check(program: str, tool: str, arguments: Sequence[str]) -> bool:
    """Run the tests under one tool, print what it prints, and return whether all is well."""
    pytest = ("-m", "pytest", "-q", "--timeout", "0", "-p", "tests.support.one_of_each")
    limits = ("--error-exitcode", str(_ERRORS_FOUND), "--print-limit", "20")
    command = [program, "--tool", tool, *limits, sys.executable, *pytest, *arguments]
    print(f"{tool}: {' '.join(command)}", flush=True)
    # Every tensor gets memory of its own, so that nothing lies behind it.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    found = 0
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if summary := _SUMMARY.search(line):
                found += int(summary[1])
    status = process.returncode
    if found or status == _ERRORS_FOUND:
        print(f"{tool}: {found} errors")
    else:
        print(f"{tool}: clean" if status == 0 else f"{tool}: the tests end with {status}")
    return status == 0 and not found


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kernels.sanitize", allow_abbrev=False)
    tools = ["memcheck", "racecheck"]
    parser.add_argument("--tool", nargs="+", choices=tools, default=tools)
    parser.add_argument("-k", default=None, metavar="EXPRESSION")
    parser.add_argument("files", nargs="*", default=FILES)
    options = parser.parse_args(words)
    program = sanitizer()
    if program is None or not torch.cuda.is_available():
        print("compute-sanitizer is not installed" if program is None else "there is no GPU")
        return 2
    arguments = [*options.files, *(("-k", options.k) if options.k else ())]
    failed = [tool for tool in options.tool if not check(program, tool, arguments)]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
