"""Requests keep their own books."""

from __future__ import annotations

import pytest

from compiledllm.sampling_params import SamplingParams
from compiledllm.types import (
    NewRequest,
    Request,
    RequestStatus,
    ScheduledRequest,
    SchedulerOutput,
)

# -- requests -------------------------------------------------------------------------------------


def make_request() -> Request:
    return Request("r", [5, 6, 7], SamplingParams(), max_tokens=4)


def test_request_starts_waiting_with_its_prompt_as_tokens() -> None:
    request = make_request()
    assert request.status is RequestStatus.WAITING
    assert request.token_ids == [5, 6, 7]
    assert (request.num_tokens, request.num_prompt_tokens, request.num_output_tokens) == (3, 3, 0)
    assert request.output_token_ids == []
    assert not request.is_finished


def test_outputs_are_the_tokens_after_the_prompt() -> None:
    request = make_request()
    request.token_ids += [8, 9]
    assert request.prompt_token_ids == [5, 6, 7]
    assert request.output_token_ids == [8, 9]
    assert (request.num_tokens, request.num_prompt_tokens, request.num_output_tokens) == (5, 3, 2)


def test_requests_are_equal_only_to_themselves() -> None:
    request = make_request()
    assert request in [make_request(), request]
    assert request not in [make_request()]


def test_requests_share_no_list() -> None:
    first, second = make_request(), make_request()
    first.block_tables.append([1])
    first.block_hashes.append(b"")
    assert second.block_tables == []
    assert second.block_hashes == []


def test_messages_of_a_step_cannot_be_changed() -> None:
    line = ScheduledRequest("r", 0, 3, [[1]], True)
    new = NewRequest("r", [1], 1, SamplingParams(), frozenset(), 0)
    step = SchedulerOutput([new], [line], [])
    for message, name in ((line, "samples"), (new, "seed"), (step, "scheduled")):
        with pytest.raises(AttributeError):
            setattr(message, name, None)


def test_step_counts_the_tokens_of_its_lines() -> None:
    lines = [ScheduledRequest(f"r{n}", 0, n, [], False) for n in (3, 4)]
    assert SchedulerOutput([], lines, []).num_scheduled_tokens == 7
