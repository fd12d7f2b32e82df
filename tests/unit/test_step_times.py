"""The times of steps that are measured at start, from steps whose times are known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from compiledllm.runner import step_times

READ_S, PAIR_S = 3e-8, 5e-10


class Probe:
    """Steps whose time grows with their tokens, and with the tokens before them."""

    def __init__(self, *_: Any) -> None:
        pass

    def fastest_s(self, num_tokens: int, position: int) -> float:
        pairs = num_tokens * position if num_tokens > 1 else 0
        return 1e-3 + 1e-6 * num_tokens + READ_S * position * (num_tokens == 1) + PAIR_S * pairs


@pytest.mark.parametrize("max_model_len", [64, 512, 2048, 100_000])
@pytest.mark.parametrize("target_s", [1e-9, 1e-3, 1.0])
def test_attention_to_earlier_tokens_is_measured_if_a_context_fits_a_step(
    max_model_len: int, target_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_times, "_Probe", Probe)
    runner: Any = SimpleNamespace(reset=lambda: None)
    limits: Any = SimpleNamespace(
        max_model_len=max_model_len, block_size=16, max_num_batched_tokens=2048
    )
    times = step_times.measure_step_times(runner, limits, 10_000, (), target_s)
    assert times.read_s == pytest.approx(READ_S)
    is_chunk = target_s >= 1
    assert times.pair_s == pytest.approx(PAIR_S if is_chunk else READ_S)
