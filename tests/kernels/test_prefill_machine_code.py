"""What the compiler makes of the main loop of prompts' attention, which it may spoil unnoticed.

Needs NVRTC, which comes with torch for CUDA, and cuobjdump, which comes with Triton; no GPU.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import triton

from compiledllm.kernels import cuda_kernel, late_compiles, prefill_attention_cuda
from compiledllm.kernels.machine_code import CudaError

INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(.*?)\s*;", re.MULTILINE)
JUMP = re.compile(r"\bBRA\b.*?(0x[0-9a-f]+)")


@pytest.fixture(scope="module")
def disassembler() -> str:
    ours = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    found = str(ours) if ours.is_file() else shutil.which("cuobjdump")
    try:
        cuda_kernel._nvrtc()
    except CudaError:
        pytest.skip("needs NVRTC, which comes with torch for CUDA")
    if found is None:
        pytest.skip("needs cuobjdump")
    return found


def main_loop(listing: str) -> list[str]:
    """The instructions of the shortest loop that multiplies on the tensor cores."""
    lines = [(int(at, 16), text) for at, text in INSTRUCTION.findall(listing)]
    place = {at: index for index, (at, _) in enumerate(lines)}
    loops = []
    for index, (at, text) in enumerate(lines):
        jump = JUMP.search(text)
        if jump and (start := int(jump[1], 16)) <= at and start in place:
            body = [text for _, text in lines[place[start] : index + 1]]
            if any("HGMMA" in text for text in body):
                loops.append(body)
    return min(loops, key=len)


@pytest.mark.parametrize("is_fp8", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_addresses_stay_in_uniform_registers_and_nothing_is_spilled(
    head_dim: int, is_fp8: bool, disassembler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three moves to uniform registers per product, instead of one or so, cost 10 % of the time."""
    made: list[bytes] = []

    def compile_only(source: str, _: str, options: Mapping[str, int], __: int) -> None:
        options = tuple(sorted(options.items()))
        made.append(cuda_kernel._compiled(source, options, "sm_90a"))

    monkeypatch.setattr(prefill_attention_cuda, "CudaKernel", compile_only)
    monkeypatch.setattr(prefill_attention_cuda, "compile_together", lambda *_: None)
    monkeypatch.setenv("COMPILEDLLM_CACHE_DIR", str(tmp_path))
    arguments = torch.bfloat16, is_fp8, head_dim, 4, 8, 16, False, False, 0, False
    with late_compiles.starting():
        prefill_attention_cuda._kernels.__wrapped__(*arguments)
    for code in dict.fromkeys(made):
        file = tmp_path / "kernel.cubin"
        file.write_bytes(code)
        command = [disassembler, "-sass", str(file)]
        listing = subprocess.run(command, capture_output=True, text=True).stdout
        loop = main_loop(listing)
        count = {word: sum(word in text for text in loop) for word in ("HGMMA", "R2UR")}
        assert count["HGMMA"] >= 12
        assert count["R2UR"] <= 1.5 * count["HGMMA"]
        assert not re.search(r"\b(LDL|STL)\b", listing)
