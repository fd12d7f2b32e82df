"""What the engine's process says about a step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import MagicMock

import pytest

pytest.importorskip("msgspec")

from compiledllm.sampling_params import SamplingParams
from compiledllm.server.engine_loop import EngineLoop
from compiledllm.server.wire import Add, Grown
from compiledllm.types import Request, RequestStatus, TokenLogprobs

LOGPROBS: TokenLogprobs = ((5, 6), (-0.5, -1.5), 1, 1)


def test_single_tokens_are_told_apart_from_all_that_is_more() -> None:
    core: Any = SimpleNamespace(
        isolate_failures=lambda: None, platform=SimpleNamespace(is_cuda=False), add=lambda r: None
    )
    loop = EngineLoop(core, MagicMock(), MagicMock())
    for name in ("plain", "rich", "ending"):
        loop._add(Add(name, [1, 2], {}, 9, [], 0))
    requests = [plain, rich, ending] = list(loop._alive.values())
    unknown = Request("other", [1, 2], SamplingParams(), 9)
    for request in requests:
        request.num_cached_tokens = 1
    told: list[tuple[dict[str, int], list[Grown]]] = []
    for step in range(3):
        for request in (*requests, unknown):
            request.token_ids.append(10 + step)
        rich.logprobs.append(LOGPROBS)
        if step == 2:
            ending.status, ending.finish_reason = RequestStatus.FINISHED, "length"
        told.append(loop._news_of([*requests, unknown]))
    # The first of each says how much of the prompt was cached.
    assert told[0] == (
        {},
        [Grown(r.request_id, [10], None, None, 1, r.logprobs[:1]) for r in requests],
    )
    assert told[1] == (
        {"plain": 11, "ending": 11},
        [Grown("rich", [11], None, None, 1, [LOGPROBS])],
    )
    assert told[2] == (
        {"plain": 12},
        [
            Grown("rich", [12], None, None, 1, [LOGPROBS]),
            Grown("ending", [12], "length", None, 1),
        ],
    )
    plain.token_ids += [13, 14]  # two at once
    assert loop._news_of([plain, cast(Any, ending)]) == (
        {},
        [Grown("plain", [13, 14], None, None, 1)],
    )
