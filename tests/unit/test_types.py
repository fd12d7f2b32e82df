"""Requests keep their own books."""

from __future__ import annotations

import pytest

from compiledllm.types import (
    Request,
    RequestStatus,
    ScheduledRequest,
    SchedulerOutput,
)
from tests.support.requests import make_new_request, make_request

# -- requests -------------------------------------------------------------------------------------


def request_of() -> Request:
    return make_request("r", [5, 6, 7])


def test_request_starts_waiting_with_its_prompt_as_tokens() -> None:
    request = request_of()
    assert request.status is RequestStatus.WAITING
    assert request.token_ids == [5, 6, 7]
    assert (request.num_tokens, request.num_prompt_tokens, request.num_output_tokens) == (3, 3, 0)
    assert request.output_token_ids == []
    assert not request.is_finished


def test_outputs_are_the_tokens_after_the_prompt() -> None:
    request = request_of()
    request.token_ids += [8, 9]
    assert request.spec.prompt_token_ids == [5, 6, 7]
    assert request.output_token_ids == [8, 9]
    assert (request.num_tokens, request.num_prompt_tokens, request.num_output_tokens) == (5, 3, 2)


def test_requests_are_equal_only_to_themselves() -> None:
    request = request_of()
    assert request in [request_of(), request]
    assert request not in [request_of()]


def test_requests_share_no_list() -> None:
    first, second = request_of(), request_of()
    first.block_tables.append([1])
    first.block_hashes.append(b"")
    assert second.block_tables == []
    assert second.block_hashes == []


def test_messages_of_a_step_cannot_be_changed() -> None:
    line = ScheduledRequest("r", 0, 3, [[1]], True)
    new = make_new_request("r", [1])
    step = SchedulerOutput([new], [line], [])
    for message, name in (
        (line, "samples"),
        (new, "spec"),
        (new.spec, "seed"),
        (step, "scheduled"),
    ):
        with pytest.raises(AttributeError):
            setattr(message, name, None)


def test_step_counts_the_tokens_of_its_lines() -> None:
    lines = [ScheduledRequest(f"r{n}", 0, n, [], False) for n in (3, 4)]
    assert SchedulerOutput([], lines, []).num_scheduled_tokens == 7
