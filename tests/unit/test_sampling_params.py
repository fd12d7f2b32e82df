"""Sampling parameters say what is wrong with them: the field, the value and the range."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from compiledllm.checks import reject_unknown
from compiledllm.sampling_params import (
    BeamSearchParams,
    RepetitionDetectionParams,
    RequestOutputKind,
    SamplingParams,
)

WRONG_FIELDS: list[tuple[str, Any, str]] = [
    ("n", 0, "an integer from 1 to 128"),
    ("n", 129, "an integer from 1 to 128"),
    ("n", 1.0, "an integer from 1 to 128"),
    ("n", True, "an integer from 1 to 128"),
    ("best_of", 0, "an integer from 1 to 128"),
    ("best_of", 129, "an integer from 1 to 128"),
    ("best_of", "2", "an integer from 1 to 128"),
    ("temperature", -0.1, "in [0, 2]"),
    ("temperature", 2.01, "in [0, 2]"),
    ("temperature", math.nan, "in [0, 2]"),
    ("temperature", math.inf, "in [0, 2]"),
    ("temperature", 10**400, "in [0, 2]"),
    ("temperature", "hot", "in [0, 2]"),
    ("temperature", None, "in [0, 2]"),
    ("temperature", True, "in [0, 2]"),
    ("top_p", 0, "in (0, 1]"),
    ("top_p", -0.5, "in (0, 1]"),
    ("top_p", 1.01, "in (0, 1]"),
    ("top_p", math.nan, "in (0, 1]"),
    ("top_p", "0.9", "in (0, 1]"),
    ("top_p", None, "in (0, 1]"),
    ("min_p", -0.01, "in [0, 1]"),
    ("min_p", 1.01, "in [0, 1]"),
    ("min_p", math.nan, "in [0, 1]"),
    ("min_p", None, "in [0, 1]"),
    ("presence_penalty", -2.1, "in [-2, 2]"),
    ("presence_penalty", 2.1, "in [-2, 2]"),
    ("presence_penalty", "1", "in [-2, 2]"),
    ("frequency_penalty", 2.5, "in [-2, 2]"),
    ("frequency_penalty", math.nan, "in [-2, 2]"),
    ("repetition_penalty", 0, "a finite number above 0"),
    ("repetition_penalty", -1.0, "a finite number above 0"),
    ("repetition_penalty", math.inf, "a finite number above 0"),
    ("repetition_penalty", None, "a finite number above 0"),
    ("logprobs", -2, "an integer >= 0, or -1 for the whole vocabulary"),
    ("logprobs", 1.5, "an integer >= 0, or -1 for the whole vocabulary"),
    ("logprobs", "5", "an integer >= 0, or -1 for the whole vocabulary"),
    ("prompt_logprobs", -2, "an integer >= 0, or -1 for the whole vocabulary"),
    ("prompt_logprobs", "5", "an integer >= 0, or -1 for the whole vocabulary"),
    ("logprob_token_ids", [-1], "a list of token ids (integers >= 0)"),
    ("logprob_token_ids", 3, "a list of token ids (integers >= 0)"),
    ("allowed_token_ids", [], "None or at least one token id"),
    ("allowed_token_ids", [1.0], "a list of token ids (integers >= 0)"),
    ("logit_bias", [1], "a mapping of token ids to numbers"),
    ("bad_words", [""], "a non-empty string or a list of non-empty strings"),
    ("bad_words", [3], "a non-empty string or a list of non-empty strings"),
    ("logits_processors", [3], "a list of callables"),
    ("logits_processors", len, "a list of callables"),
    ("repetition_detection", 3, "a RepetitionDetectionParams or None"),
    ("output_kind", "delta", "a RequestOutputKind"),
    ("stream_interval", 0, "an integer >= 1"),
    ("stream_interval", 1.5, "an integer >= 1"),
    ("truncate_prompt_tokens", 0, "an integer >= 1, -1 or None"),
    ("truncate_prompt_tokens", -2, "an integer >= 1, -1 or None"),
    ("truncate_prompt_tokens", "all", "an integer >= 1, -1 or None"),
    ("skip_reading_prefix_cache", "no", "True or False"),
    ("spaces_between_special_tokens", False, "True"),
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
    ("max_tokens", -1, "an integer >= 0 or None"),
    ("max_tokens", 16.0, "an integer >= 0 or None"),
    ("max_tokens", "16", "an integer >= 0 or None"),
    ("max_tokens", True, "an integer >= 0 or None"),
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
    assert f"{value!r:.80}" in message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens must be at most max_tokens=4, got 5"),
        ({"n": 3, "best_of": 2}, "best_of must be an integer from 3 to 128, got 2"),
        ({"stop": ["a" * 1001]}, "stop must be at most 1000 characters, got 1001"),
        (
            {"stop": [str(n) for n in range(129)]},
            "stop must be at most 128 strings, got '129 strings'",
        ),
        (
            {"stop_token_ids": list(range(129))},
            "stop_token_ids must be at most 128 token ids, got '129 token ids'",
        ),
        (
            {"allowed_token_ids": list(range(1025))},
            "allowed_token_ids must be at most 1024 token ids, got '1025 token ids'",
        ),
        (
            {"logprob_token_ids": list(range(129))},
            "logprob_token_ids must be at most 128 token ids, got '129 token ids'",
        ),
        (
            {"bad_words": [str(n) for n in range(129)]},
            "bad_words must be at most 128 strings, got '129 strings'",
        ),
        (
            {"logit_bias": dict.fromkeys(range(1025), 1.0)},
            "logit_bias must be at most 1024, got '1025 entries'",
        ),
        (
            {"logit_bias": {-1: 2.0}},
            "logit_bias must be keyed by token ids (integers >= 0), got -1",
        ),
        (
            {"logit_bias": {1: math.nan}},
            "logit_bias must be of finite numbers, got nan",
        ),
        (
            {"repetition_detection": {"max_pattern_size": 3, "min_count": 1}},
            "min_count must be at least 2, got 1",
        ),
        (
            {"repetition_detection": {"max_pattern_size": 3, "min_pattern_size": 4}},
            "min_pattern_size must be at most 3, the largest, got 4",
        ),
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
    with pytest.raises(ValueError, match="unknown sampling field 'zzz'; known: allowed_") as e:
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
        {"temperature": 2},
        {"min_p": 0},
        {"min_p": 1},
        {"presence_penalty": -2},
        {"frequency_penalty": 2.0},
        {"repetition_penalty": 0.01},
        {"n": 128},
        {"n": 2, "best_of": 2},
        {"logprobs": -1},
        {"logprobs": 0},
        {"prompt_logprobs": 0},
        {"logprob_token_ids": [1, 2]},
        {"allowed_token_ids": (1, 2)},
        {"logit_bias": {}},
        {"bad_words": "word"},
        {"logits_processors": []},
        {"repetition_detection": {"max_pattern_size": 3, "min_count": 2}},
        {"output_kind": RequestOutputKind.DELTA},
        {"stream_interval": 1},
        {"truncate_prompt_tokens": -1},
        {"top_p": 1},
        {"top_p": 1e-9},
        {"top_k": -1},
        {"top_k": 0},
        {"top_k": 2**31},
        {"seed": 2**63 - 1},
        {"seed": -(2**63)},
        {"max_tokens": 0},
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


def test_none_and_minus_one_are_no_seed() -> None:
    assert SamplingParams(seed=-1).seed is None
    assert SamplingParams(seed=-2).seed == -2


def test_logprobs_may_be_a_switch() -> None:
    assert SamplingParams(logprobs=True).logprobs == 1
    assert SamplingParams(logprobs=False).logprobs is None


def test_bias_is_clamped_and_may_have_text_for_keys() -> None:
    params = SamplingParams(logit_bias={"5": 101, 7: -1e9, 9: 0.5})  # type: ignore[dict-item]
    assert params.logit_bias == {5: 100.0, 7: -100.0, 9: 0.5}


def test_prompt_logprobs_keep_the_prefix_cache_from_being_read() -> None:
    assert SamplingParams().reads_prefix_cache
    assert not SamplingParams(prompt_logprobs=0).reads_prefix_cache
    assert not SamplingParams(skip_reading_prefix_cache=True).reads_prefix_cache
    assert not SamplingParams(prompt_logprobs=0, skip_reading_prefix_cache=False).reads_prefix_cache


def test_detection_of_repetition_is_off_unless_it_has_a_size() -> None:
    assert RepetitionDetectionParams().max_pattern_size == 0
    with pytest.raises(ValueError, match="unknown repetition detection field 'size'"):
        RepetitionDetectionParams(size=3)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"beam_width": 0, "max_tokens": 1}, "beam_width must be an integer from 1 to 64, got 0"),
        ({"beam_width": 65, "max_tokens": 1}, "beam_width must be an integer from 1 to 64"),
        ({"beam_width": 2, "max_tokens": 0}, "max_tokens must be an integer from 1"),
        ({"beam_width": 2, "max_tokens": 2, "temperature": 3}, "temperature must be in"),
        ({"beam_width": 2, "max_tokens": 2, "length_penalty": math.nan}, "length_penalty must"),
    ],
)
def test_wrong_beam_search_parameters_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BeamSearchParams(**fields)


def test_a_copy_checks_fields_that_have_changed() -> None:
    given = SamplingParams(temperature=0.5, stop=["a"], logit_bias={3: 1.0})
    copy = given.checked_copy()
    assert copy == given
    given.stop.append("b")  # type: ignore[union-attr]
    assert copy.stop == ["a"]
    assert given.checked_copy().stop == ["a", "b"]
    for name, value in (
        ("n", True),
        ("temperature", 9.0),
        ("stop", [""]),
        ("logit_bias", {3: "x"}),
    ):
        changed = given.checked_copy()
        setattr(changed, name, value)
        with pytest.raises(ValueError, match=name):
            changed.checked_copy()
    given.stop.append("")  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="stop"):
        given.checked_copy()
