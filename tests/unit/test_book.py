"""The book of outputs: what the news of steps mean for requests, and for the calls that wait."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from compiledllm.engine.book import Book, Growth
from compiledllm.engine.request_state import Completion, RequestState
from compiledllm.engine.shared_core import SharedCore
from compiledllm.sampling_params import SamplingParams
from compiledllm.types import RequestSpec, RequestUpdate, StepNews
from tests.support.fakes import Letters

NO_LETTER = 0x110000  # no character


def state_of(name: str = "r", n: int = 1, **params: Any) -> RequestState:
    asked = SamplingParams(n=n, **params)
    names = [name] if n == 1 else [f"{i}_{name}" for i in range(n)]
    tokenizer = cast(Any, Letters())
    completions = [
        Completion(i, RequestSpec(each, [1], asked, 99), asked, tokenizer)
        for i, each in enumerate(names)
    ]
    return RequestState(name, asked, completions)


def book_of(*states: RequestState) -> Book:
    book = Book()
    for state in states:
        book.open(state)
    return book


def test_news_grow_finish_stop_and_fail_requests() -> None:
    grows, ends, stops, fails = map(state_of, ["grows", "ends", "stops", "fails"])
    stops = state_of("stops", stop=["b"])
    book = book_of(grows, ends, stops, fails)
    first = book.take(StepNews({"grows": 97, "stops": 97, "unknown": 97, "fails": NO_LETTER}))
    assert (first.grown, first.finished, first.stopped) == ([grows, stops], [], [])
    ((failed, error),) = first.failed
    assert failed is fails and isinstance(error, ValueError)
    second = book.take(StepNews({"stops": 98}, updates=[RequestUpdate("ends", [97], "length")]))
    assert second == Growth([stops, ends], [stops, ends], ["stops"], [])
    assert (stops.output().outputs[0].text, stops.output().outputs[0].stop_reason) == ("a", "b")
    assert list(book.states) == ["grows", "fails"]  # the owner closes what failed


def test_a_request_starts_with_the_first_of_its_completions() -> None:
    state = state_of(n=2)
    book = book_of(state)
    for started in ({"1_r": 5.0}, {"0_r": 7.0, "unknown": 1.0}):
        assert not book.take(StepNews(started=started)).grown
    metrics = state.output().metrics
    assert metrics is not None and metrics.first_scheduled_time == 5.0


def test_request_with_several_completions_is_finished_with_the_last() -> None:
    state = state_of(n=2)
    book = book_of(state)
    assert not book.take(StepNews(updates=[RequestUpdate("1_r", [97], "length")])).finished
    assert list(book.core_ids) == ["0_r"]
    assert book.take(StepNews(updates=[RequestUpdate("0_r", [97], "length")])).finished == [state]
    assert not book.states and not book.core_ids


def test_id_may_be_used_again_only_when_its_request_has_left() -> None:
    first, second = state_of(), state_of()
    book = book_of(first)
    with pytest.raises(ValueError, match="'r' is already in use"):
        book.open(second)
    assert book.close(first) and not book.close(first)
    book.open(second)
    assert not book.close(first)  # the entries are the second one's
    assert book.take(StepNews({"r": 97})).grown == [second]


def test_id_of_another_requests_completion_is_in_use() -> None:
    both = state_of("r", n=2)
    book = book_of(both)
    with pytest.raises(ValueError, match="'0_r' is already in use"):
        book.open(state_of("0_r"))
    assert book.take(StepNews({"0_r": 97})).grown == [both]


def test_text_that_cannot_be_made_raises_in_its_own_call() -> None:
    ended: list[tuple[str, str]] = []
    steps = iter([StepNews({"broken": NO_LETTER, "whole": 97}), StepNews({"whole": 98})])
    core = SimpleNamespace(
        add=lambda spec, grammar: None,
        finish=lambda request_id, reason: ended.append((request_id, reason)),
        step=lambda: next(steps),
        check_when_idle=lambda: None,
    )
    shared, broken, whole = SharedCore(cast(Any, core)), state_of("broken"), state_of("whole")
    shared.add([broken, whole])
    stream = shared.stream([whole])
    assert next(stream).outputs[0].text == "a"
    assert next(stream).outputs[0].text == "ab"
    assert ended == [("broken", "error")]
    with pytest.raises(ValueError, match="chr"):
        shared.run_until_finished([broken], lambda count: None)


def test_call_whose_request_is_lost_in_part_does_not_wait_for_the_rest() -> None:
    unfinished = {"0_r", "1_r"}

    def step() -> StepNews:
        unfinished.discard("0_r")
        raise RuntimeError("the device is lost")

    core = SimpleNamespace(
        add=lambda spec, grammar: None,
        finish=lambda request_id, reason: None,
        step=step,
        unfinished_ids=unfinished,
        check_when_idle=lambda: None,
    )
    shared, state = SharedCore(cast(Any, core)), state_of(n=2)
    shared.add([state])
    with pytest.raises(RuntimeError, match="the device is lost"):
        shared.run_until_finished([state], lambda count: None)
    assert [completion.finish_reason for completion in state.completions] == ["error", None]
