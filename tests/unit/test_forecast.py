"""A call without a limit says how long it may take, once its speed is known."""

from __future__ import annotations

import logging
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from compiledllm.engine import forecast as home
from compiledllm.engine.forecast import duration, forecast
from compiledllm.log import log


def request(max_tokens: int | None) -> Any:
    spec = SimpleNamespace(max_tokens=900 if max_tokens is None else max_tokens)
    params = SimpleNamespace(max_tokens=max_tokens)
    return SimpleNamespace(params=params, completions=[SimpleNamespace(spec=spec)])


@pytest.mark.parametrize(
    ("limits", "said"),
    [([5, None], "up to 900 tokens a request, in all up to "), ([5, 7], None)],
)
def test_only_requests_without_a_limit_have_a_forecast(
    limits: list[int | None], said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(home, "DELAY_S", 0.0)
    lines: list[str] = []
    is_said = threading.Event()
    handler = logging.Handler()
    handler.emit = lambda record: (lines.append(record.getMessage()), is_said.set())  # type: ignore[assignment, func-returns-value]
    counts = iter(range(0, 100, 10))
    log.addHandler(handler)
    level, log.level = log.level, logging.INFO
    try:
        with forecast([request(limit) for limit in limits], lambda: next(counts)):
            is_said.wait(5 if said else 0.1)
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
    assert [said in line for line in lines] == [True] if said else not lines


def test_durations_are_rough_words() -> None:
    assert [duration(s) for s in (5, 119, 600, 9000)] == [
        *("5 seconds", "119 seconds", "10 minutes", "2 hours"),
    ]
