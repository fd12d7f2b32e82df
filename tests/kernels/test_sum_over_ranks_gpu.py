"""Sums over ranks on two GPUs: values, replays of captured sums, and their end without a rank."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

END_S = 90


def test_two_processes_agree_with_float64_and_with_each_other() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "tests.kernels.summing_ranks"]
    root = Path(__file__).parents[2]
    ranks = [subprocess.Popen([*command, rank, port], cwd=root) for rank in ("0", "1")]
    try:
        assert [rank.wait(END_S) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
