"""Grammars compiled beside the engine's loop: in order, forgotten in time, and failing alone."""

from __future__ import annotations

import queue
import threading
from typing import Any

import pytest

from compiledllm.grammars.grammar import Grammars
from compiledllm.remote.grammar_thread import Compiled, GrammarThread
from compiledllm.remote.wire import Add, SetVocabulary, frame, receive
from compiledllm.sampling_params import SamplingParams
from compiledllm.structured_outputs import StructuredOutputsParams
from compiledllm.types import Request, RequestSpec
from tests.support.grammars import make_vocabulary

VOCABULARY = make_vocabulary()
GRAMMARS = Grammars(VOCABULARY)


def request(request_id: str, regex: str) -> RequestSpec:
    grammar = GRAMMARS.compile(StructuredOutputsParams(regex=regex))
    return RequestSpec(request_id, [5], SamplingParams(), 9, frozenset({0}), grammar=grammar.text)


def wait(inbox: queue.SimpleQueue[Compiled]) -> Compiled:
    return inbox.get(timeout=60)


def test_a_form_crosses_between_the_processes_as_data() -> None:
    import socket

    ours, theirs = socket.socketpair()
    ours.sendall(frame(SetVocabulary(VOCABULARY)) + frame(Add(request("r", "[ab]"))))
    ours.close()
    first, add = receive(theirs), receive(theirs)
    assert first == SetVocabulary(VOCABULARY) and isinstance(add, Add)
    assert add.spec.grammar
    inbox: queue.SimpleQueue[Compiled] = queue.SimpleQueue()
    thread = GrammarThread(inbox.put)
    assert isinstance(first, SetVocabulary)
    thread.set_vocabulary(first.vocabulary)
    thread.compile(add.spec)
    compiled = wait(inbox)
    assert compiled.error is None and thread.is_wanted(compiled)
    again = Request(compiled.spec, compiled.grammar)
    assert again.needs_last_token and again.grammar is compiled.grammar
    assert again.grammar is not None and again.grammar.text == add.spec.grammar


def test_requests_come_in_order_and_those_forgotten_are_not_wanted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inbox: queue.SimpleQueue[Compiled] = queue.SimpleQueue()
    thread = GrammarThread(inbox.put)
    thread.set_vocabulary(VOCABULARY)
    may_go_on, remake_now = threading.Event(), Grammars.remake

    def slow(self: Grammars, text: str) -> Any:
        may_go_on.wait(60)
        return remake_now(self, text)

    specs = [request(name, "[ab]") for name in ("a", "b", "c")]
    monkeypatch.setattr(Grammars, "remake", slow)
    for spec in specs:
        thread.compile(spec)
    thread.forget("b")  # its client has left while it was compiled
    may_go_on.set()
    found = [wait(inbox) for _ in specs]
    assert [compiled.spec.request_id for compiled in found] == ["a", "b", "c"]
    assert [thread.is_wanted(compiled) for compiled in found] == [True, False, True]


@pytest.mark.parametrize("has_vocabulary", [True, False])
def test_what_cannot_be_compiled_ends_its_own_request(has_vocabulary: bool) -> None:
    inbox: queue.SimpleQueue[Compiled] = queue.SimpleQueue()
    thread = GrammarThread(inbox.put)
    if has_vocabulary:
        thread.set_vocabulary(VOCABULARY)
    text = "start: nothing" if has_vocabulary else "x"
    bad = RequestSpec("bad", [5], SamplingParams(), 9, grammar=text)
    thread.compile(bad)
    compiled = wait(inbox)
    assert compiled.grammar is None and compiled.error
    assert ("cannot be compiled" if has_vocabulary else "vocabulary") in compiled.error
