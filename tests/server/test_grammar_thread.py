"""Grammars compiled beside the engine's loop: in order, forgotten in time, and failing alone."""

from __future__ import annotations

import queue
import threading
from typing import Any

import pytest

from compiledllm.grammars.grammar import Grammars
from compiledllm.sampling_params import SamplingParams
from compiledllm.server.grammar_thread import Compiled, GrammarThread
from compiledllm.server.wire import Add, Speak, add_of, frame, receive, request_of
from compiledllm.structured_outputs import StructuredOutputsParams
from compiledllm.types import Request
from tests.support.grammars import make_vocabulary

VOCABULARY = make_vocabulary()
GRAMMARS = Grammars(VOCABULARY)


def request(request_id: str, regex: str) -> Request:
    form = StructuredOutputsParams(regex=regex)
    params = SamplingParams(structured_outputs=form)
    grammar = GRAMMARS.compile(form)
    return Request(request_id, [5], params, 9, frozenset({0}), grammar=grammar)


def wait(inbox: queue.SimpleQueue[Compiled]) -> Compiled:
    return inbox.get(timeout=60)


def test_a_form_crosses_between_the_processes_as_data() -> None:
    import socket

    ours, theirs = socket.socketpair()
    ours.sendall(frame(Speak(VOCABULARY)) + frame(add_of(request("r", "[ab]"))))
    ours.close()
    speak, add = receive(theirs), receive(theirs)
    assert speak == Speak(VOCABULARY) and isinstance(add, Add)
    assert "structured_outputs" not in add.params and add.grammar
    inbox: queue.SimpleQueue[Compiled] = queue.SimpleQueue()
    thread = GrammarThread(inbox.put)
    assert isinstance(speak, Speak)
    thread.speak(speak.vocabulary)
    thread.compile(add)
    compiled = wait(inbox)
    assert compiled.error is None and thread.is_wanted(compiled)
    again = request_of(compiled.add, {}, compiled.grammar)
    assert again.needs_last_token and again.grammar is compiled.grammar
    assert again.grammar is not None and again.grammar.text == add.grammar


def test_requests_come_in_order_and_those_forgotten_are_not_wanted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inbox: queue.SimpleQueue[Compiled] = queue.SimpleQueue()
    thread = GrammarThread(inbox.put)
    thread.speak(VOCABULARY)
    may_go_on, remake_now = threading.Event(), Grammars.remake

    def slow(self: Grammars, text: str) -> Any:
        may_go_on.wait(60)
        return remake_now(self, text)

    adds = [add_of(request(name, "[ab]")) for name in ("a", "b", "c")]
    monkeypatch.setattr(Grammars, "remake", slow)
    for add in adds:
        thread.compile(add)
    thread.forget("b")  # its client has left while it was compiled
    may_go_on.set()
    found = [wait(inbox) for _ in adds]
    assert [compiled.add.request_id for compiled in found] == ["a", "b", "c"]
    assert [thread.is_wanted(compiled) for compiled in found] == [True, False, True]


@pytest.mark.parametrize("has_vocabulary", [True, False])
def test_what_cannot_be_compiled_ends_its_own_request(has_vocabulary: bool) -> None:
    inbox: queue.SimpleQueue[Compiled] = queue.SimpleQueue()
    thread = GrammarThread(inbox.put)
    if has_vocabulary:
        thread.speak(VOCABULARY)
    bad = Add("bad", [5], {}, 9, [0], 0, grammar="start: nothing" if has_vocabulary else "x")
    thread.compile(bad)
    compiled = wait(inbox)
    assert compiled.grammar is None and compiled.error
    assert ("cannot be compiled" if has_vocabulary else "vocabulary") in compiled.error
