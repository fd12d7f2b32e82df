"""Many clients at once, good and bad: the short form of `python -m tests.server.soak`."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.server.soak import MANNERS, soak

pytestmark = pytest.mark.real_model  # its tokenizer


def test_everybody_is_served_and_nothing_is_left(server: Any) -> None:
    figures = asyncio.run(soak(server.url, server.pids(), clients=32, seconds=6))
    assert not figures["faults"], figures
    assert set(figures["requests"]) == set(MANNERS) and set(figures["statuses"]) == {200, 400}
    assert "leak" not in server.log
