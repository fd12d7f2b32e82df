"""Sampling parameters say what is wrong with them; requests keep their own books."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from compiledllm.types import (
    NewRequest,
    Request,
    RequestStatus,
    SamplingParams,
    ScheduledRequest,
    SchedulerOutput,
    reject_unknown,
)

# -- sampling parameters --------------------------------------------------------------------------

WRONG_FIELDS: list[tuple[str, Any, str]] = [
    ("n", 0, "must be 1"),
    ("n", 2, "must be 1"),
    ("n", 1.0, "must be 1"),
    ("n", True, "must be 1"),
    ("temperature", -0.1, "0 (greedy) or above"),
    ("temperature", math.nan, "a finite number"),
    ("temperature", math.inf, "a finite number"),
    ("temperature", 10**400, "a finite number"),
    ("temperature", 1e39, "a finite number"),  # infinite in float32
    ("temperature", "hot", "a finite number"),
    ("temperature", None, "a finite number"),
    ("temperature", True, "a finite number"),
    ("top_p", 0, "in (0, 1]"),
    ("top_p", -0.5, "in (0, 1]"),
    ("top_p", 1.01, "in (0, 1]"),
    ("top_p", math.nan, "a finite number"),
    ("top_p", "0.9", "a finite number"),
    ("top_p", None, "a finite number"),
    ("top_k", -2, "an integer >= 1, or 0 or -1 for all tokens"),
    ("top_k", 5.0, "an integer >= 1, or 0 or -1 for all tokens"),
    ("top_k", None, "an integer >= 1, or 0 or -1 for all tokens"),
    ("top_k", True, "an integer >= 1, or 0 or -1 for all tokens"),
    ("top_k", 2**63, "an integer"),
    ("seed", 1.5, "None or a 64-bit integer"),
    ("seed", "7", "None or a 64-bit integer"),
    ("seed", 2**63, "None or a 64-bit integer"),
    ("seed", -(2**63) - 1, "None or a 64-bit integer"),
    ("seed", True, "None or a 64-bit integer"),
    ("max_tokens", 0, "an integer >= 1, or None for no limit"),
    ("max_tokens", -1, "an integer >= 1, or None for no limit"),
    ("max_tokens", 16.0, "an integer >= 1, or None for no limit"),
    ("max_tokens", "16", "an integer >= 1, or None for no limit"),
    ("max_tokens", True, "an integer >= 1, or None for no limit"),
    ("min_tokens", -1, "an integer >= 0"),
    ("min_tokens", 2.0, "an integer >= 0"),
    ("min_tokens", None, "an integer >= 0"),
    ("stop", "", "a non-empty string or a list of non-empty strings"),
    ("stop", ["a", ""], "a non-empty string or a list of non-empty strings"),
    ("stop", ["a", 1], "a non-empty string or a list of non-empty strings"),
    ("stop", b"END", "a non-empty string or a list of non-empty strings"),
    ("stop", {"a": 1}, "a non-empty string or a list of non-empty strings"),
    ("stop", 0, "a non-empty string or a list of non-empty strings"),
    ("stop", False, "a non-empty string or a list of non-empty strings"),
    ("stop_token_ids", [-1], "a list of token ids (integers >= 0)"),
    ("stop_token_ids", [1, 2.0], "a list of token ids (integers >= 0)"),
    ("stop_token_ids", ["a"], "a list of token ids (integers >= 0)"),
    ("stop_token_ids", [True], "a list of token ids (integers >= 0)"),
    ("stop_token_ids", 2, "a list of token ids (integers >= 0)"),
    ("stop_token_ids", 0, "a list of token ids (integers >= 0)"),
    ("stop_token_ids", "", "a list of token ids (integers >= 0)"),
    ("ignore_eos", "no", "True or False"),
    ("ignore_eos", None, "True or False"),
    ("include_stop_str_in_output", 1, "True or False"),
    ("detokenize", "false", "True or False"),
    ("skip_special_tokens", 0, "True or False"),
]


@pytest.mark.parametrize(
    ("name", "value", "must"), WRONG_FIELDS, ids=[f"{n}={v!r:.20}" for n, v, _ in WRONG_FIELDS]
)
def test_wrong_field_is_refused_with_its_name_value_and_range(
    name: str, value: Any, must: str
) -> None:
    with pytest.raises(ValueError) as refused:
        SamplingParams(**{name: value})
    message = str(refused.value)
    assert message.startswith(f"{name} must be ")
    assert must in message
    assert repr(value) in message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens must be at most max_tokens=4, got 5"),
        (
            {"stop": "END", "detokenize": False},
            "stop strings need detokenize=True; use stop_token_ids instead",
        ),
    ],
)
def test_contradicting_fields_are_refused_with_a_way_out(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as refused:
        SamplingParams(**fields)
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [("temprature", "temperature"), ("max_token", "max_tokens"), ("stop_tokens", "stop_token_ids")],
)
def test_unknown_field_is_refused_with_the_nearest_name(wrong: str, nearest: str) -> None:
    with pytest.raises(ValueError) as refused:
        SamplingParams(**{wrong: 1})
    assert f"unknown sampling field '{wrong}'; did you mean '{nearest}'?" in str(refused.value)


def test_field_like_no_other_is_refused_with_the_known_names() -> None:
    with pytest.raises(ValueError, match="unknown sampling field 'zzz'; known: detokenize, ") as e:
        SamplingParams(zzz=1)
    assert "did you mean" not in str(e.value)


def test_names_in_the_list_are_not_rejected() -> None:
    reject_unknown(["a", "b"], ["b", "a"], "letter")


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0},
        {"temperature": 0.0},
        {"temperature": 1e-5},
        {"temperature": 100},
        {"top_p": 1},
        {"top_p": 1e-9},
        {"top_k": -1},
        {"top_k": 0},
        {"top_k": 2**31},
        {"seed": 2**63 - 1},
        {"seed": -(2**63)},
        {"max_tokens": 1},
        {"min_tokens": 4, "max_tokens": 4},
        {"min_tokens": 4},
        {"stop": []},
        {"stop": ("a", "b")},
        {"stop_token_ids": (1, 2)},
    ],
)
def test_values_at_the_edge_of_their_range_are_accepted(fields: dict[str, Any]) -> None:
    SamplingParams(**fields)


def test_stop_becomes_a_list_of_its_own() -> None:
    stops = ["a", "b"]
    ids = [1, 2]
    params = SamplingParams(stop=stops, stop_token_ids=ids)
    stops.append("c")
    ids.append(3)
    assert params.stop_strings == ["a", "b"]
    assert params.stop_token_ids == [1, 2]
    assert SamplingParams(stop="END").stop_strings == ["END"]
    assert SamplingParams().stop_strings == []
    assert SamplingParams().stop_token_ids == []


def test_temperature_below_1e_5_is_greedy() -> None:
    assert SamplingParams(temperature=0).is_greedy
    assert SamplingParams(temperature=9e-6).is_greedy
    assert not SamplingParams(temperature=1e-5).is_greedy
    assert not SamplingParams().is_greedy


def test_changed_parameters_are_checked_again_when_replaced() -> None:
    params = SamplingParams(stop="a", temperature=0.5)
    assert dataclasses.replace(params) == params
    params.top_p = 7.0
    with pytest.raises(ValueError, match="top_p must be in"):
        dataclasses.replace(params)


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
    first.block_ids.append(1)
    first.block_hashes.append(b"")
    assert second.block_ids == []
    assert second.block_hashes == []


def test_messages_of_a_step_cannot_be_changed() -> None:
    line = ScheduledRequest("r", 0, 3, [1], True)
    new = NewRequest("r", [1], 1, SamplingParams(), frozenset(), 0)
    step = SchedulerOutput([new], [line], [])
    for message, name in ((line, "samples"), (new, "seed"), (step, "scheduled")):
        with pytest.raises(AttributeError):
            setattr(message, name, None)


def test_step_counts_the_tokens_of_its_lines() -> None:
    lines = [ScheduledRequest(f"r{n}", 0, n, [], False) for n in (3, 4)]
    assert SchedulerOutput([], lines, []).num_scheduled_tokens == 7
