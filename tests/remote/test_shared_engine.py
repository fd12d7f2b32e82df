"""One engine that several processes use, here all in one: messages, trials, who is told what."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

pytest.importorskip("msgspec")

import msgspec

from compiledllm.engine.request_state import RequestState
from compiledllm.grammars.library import Vocabulary
from compiledllm.remote.client_link import ClientLink, OwnerLink
from compiledllm.remote.errors import EngineError, Overloaded
from compiledllm.remote.hub import Hub
from compiledllm.remote.limits import Limits
from compiledllm.remote.live_request import LiveRequest
from compiledllm.remote.replay import TOKENS
from compiledllm.remote.shared_engine import COLUMNS_PER_ENGINE, SharedEngine
from compiledllm.remote.shared_life import SharedEngineLife
from compiledllm.remote.shared_table import SharedTable
from compiledllm.remote.wire import (
    Add,
    Failed,
    Finish,
    Ready,
    SetVocabulary,
    StepOutputs,
    ToEngine,
    encoded,
)
from compiledllm.sampling_params import RequestOutputKind
from compiledllm.types import RequestUpdate, StepNews
from tests.remote.test_engine_client import STATS, live_request

WHOLE = RequestOutputKind.FINAL_ONLY
READY = Ready({"max_num_seqs": 4}, {}, "", 9, [2], 9, {})
_TO_ENGINE: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(ToEngine)


class End:
    """One end of a connection: what is sent waits until `Bench.pass_on`."""

    num_unread_bytes = 0

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def send(self, message: Any) -> None:
        self.sent.append(encoded(message))


class Bench:
    """An engine's owner with clients; what the engine is sent is kept."""

    def __init__(self, num_clients: int = 2) -> None:
        limits = Limits(queued_requests=9, queued_tokens=99, request_s=9, stuck_s=9)
        self.life = SharedEngineLife(0, {}, limits, Path())
        self.hub = Hub([self.life])
        self.told: list[Any] = []
        self.life._child = cast(Any, SimpleNamespace(send_frame=self._hear, num_unread_bytes=0))
        cast(Any, self.life._child).send = self.told.append
        self.table = SharedTable.create(num_clients, COLUMNS_PER_ENGINE)
        self.links = [End() for _ in range(num_clients)]  # of the owner
        self.clients = [self.client(i, str(i), limits) for i in range(num_clients)]
        for link in self.links:
            self.hub.connect(cast(Any, link))

    def client(self, row: int, name: str, limits: Limits) -> SharedEngine:
        client = SharedEngine(0, limits, cast(Any, End()), self.table, row, name)
        client.requests = cast(Any, object())  # the tokenizer is loaded
        return client

    def _hear(self, raw: bytes) -> None:
        self.told.append(_TO_ENGINE.decode(raw[4:]))

    def pass_on(self) -> None:
        """Deliver all messages, and those that follow from them."""
        ends = [cast(End, client._link) for client in self.clients]
        while any(end.sent for end in (*self.links, *ends)):
            for client, link, end in zip(self.clients, self.links, ends, strict=True):
                while link.sent:
                    client.take(OwnerLink.decoder.decode(link.sent.pop(0)))
                while end.sent:
                    message = ClientLink.decoder.decode(end.sent.pop(0))
                    self.hub.take(cast(Any, link), message)

    def begin(self) -> None:
        """An engine is ready."""
        self.life._has_loaded = True
        asyncio.run(self.life._welcome(READY))
        self.pass_on()

    def add(self, client: int, *lives: LiveRequest) -> None:
        for live in lives:
            self.clients[client].live.add(live.state)
        self.pass_on()

    def step(self, tokens: dict[str, str], *updates: RequestUpdate) -> None:
        news = StepNews({name: ord(letter) for name, letter in tokens.items()})
        news.updates += updates
        self.life._handle(StepOutputs(news, STATS))
        self.pass_on()

    def crash(self, *started: str) -> None:
        self.life._handle_end(Failed("it broke", is_recorded=True), set(started))
        self.pass_on()

    def added(self) -> list[str]:
        """The ids of the requests that the engine was given since the last call."""
        names = [message.spec.request_id for message in self.told if isinstance(message, Add)]
        self.told.clear()
        return names

    def state(self, client: int, name: str) -> RequestState:
        live = self.clients[client].live.get(name)
        assert live is not None
        return live.state


def text_of(state: RequestState) -> str:
    return "".join(chr(token) for token in state.completions[0].token_ids)


def test_each_client_gets_the_news_of_its_own_requests() -> None:
    bench = Bench()
    bench.begin()
    bench.add(0, live_request("a"), live_request("b"))
    bench.add(1, live_request("c"))
    assert bench.added() == ["a", "b", "c"]
    states = bench.state(0, "a"), bench.state(0, "b"), bench.state(1, "c")
    bench.step({"a": "x", "c": "y"}, RequestUpdate("b", [ord("z")], "length"))
    assert [text_of(state) for state in states] == ["x", "z", "y"]
    assert len(bench.clients[0].live) == 1 and bench.life.num_live == 2
    assert [client.load.num_requests for client in bench.clients] == [2, 2], "of both together"


def test_requests_of_a_client_that_ends_are_aborted() -> None:
    bench = Bench()
    bench.begin()
    bench.add(0, live_request("a"))
    bench.add(1, live_request("b"), live_request("c"))
    bench.step({}, RequestUpdate("c", [1], "length"))
    bench.told.clear()
    bench.hub.disconnect(cast(Any, bench.links[1]))
    bench.table.clear(1)
    assert bench.told == [Finish(["b"], "abort")]
    assert bench.life.num_live == 1 and bench.clients[0].load.num_requests == 1


def test_the_limit_on_waiting_requests_counts_those_of_all() -> None:
    bench = Bench()
    bench.begin()
    for number in range(13):  # four run, nine wait
        bench.clients[number % 2].admit([live_request(f"r{number}").state])
    with pytest.raises(Overloaded, match="13 requests are running or waiting"):
        bench.clients[0].admit([live_request("another").state])


def test_an_engine_is_told_the_vocabulary_once() -> None:
    bench = Bench()
    for client in bench.clients:
        client._vocabulary = Vocabulary("{}", 9, (2,))
    for _ in range(2):
        bench.begin()
        assert sum(isinstance(message, SetVocabulary) for message in bench.told) == 1
        bench.told.clear()
        bench.crash()


def test_messages_for_an_ended_engine_do_not_reach_the_next_one() -> None:
    bench = Bench()
    bench.begin()
    bench.clients[0].live.add(live_request("late").state)  # while the engine ends
    bench.life._handle_end(Failed("it broke", is_recorded=True), set())
    asyncio.run(bench.life._welcome(READY))
    bench.pass_on()
    assert bench.added() == ["late"], "once, by the client that has read of the end"
    assert bench.life.num_live == 1


def test_requests_that_ran_are_tried_one_at_a_time_over_all_clients() -> None:
    bench = Bench()
    bench.begin()
    bench.add(0, live_request("a", output_kind=WHOLE), live_request("b", output_kind=WHOLE))
    bench.add(1, live_request("c", output_kind=WHOLE), live_request("waits"))
    bench.crash("a", "b", "c")
    bench.added()
    bench.begin()
    for name in "abc":
        assert bench.added() == [name]
        for _ in range(TOKENS):
            assert not bench.added(), "the next one follows only then"
            bench.step({name: "x"})
    assert bench.added() == ["waits"]


def test_an_engine_that_ends_while_it_drains_is_started_again_for_its_requests() -> None:
    bench = Bench()
    bench.begin()
    bench.add(0, live_request("a", output_kind=WHOLE))
    bench.life.begin_draining()
    assert bench.life._handle_end(Failed("it broke", is_recorded=True), {"a"})
    bench.pass_on()
    bench.added()
    bench.begin()
    assert bench.added() == ["a"]
    bench.step({}, RequestUpdate("a", [1], "length"))
    assert not bench.life._handle_end(Failed("it broke", is_recorded=True), set())


def on_trial() -> Bench:
    """Each client has a request that ran when an engine ended; the first one's is on trial."""
    bench = Bench()
    bench.begin()
    bench.add(0, live_request("a", output_kind=WHOLE))
    bench.add(1, live_request("b", output_kind=WHOLE))
    bench.crash("a", "b")
    bench.added()
    bench.begin()
    assert bench.added() == ["a"]
    return bench


def test_requests_that_come_during_a_trial_wait_for_its_end_in_all_clients() -> None:
    bench = Bench(3)
    bench.hub.disconnect(cast(Any, bench.links[2]))
    bench.begin()
    bench.add(0, live_request("a", output_kind=WHOLE))
    bench.crash("a")
    bench.added()
    bench.begin()
    bench.hub.connect(cast(Any, bench.links[2]))  # a process that is started meanwhile
    bench.pass_on()
    bench.add(1, live_request("new"))
    bench.add(2, live_request("newer"))
    assert bench.added() == ["a"]
    for _ in range(TOKENS):
        bench.step({"a": "x"})
    assert bench.added() == ["new", "newer"]


def test_a_client_that_comes_after_a_trial_sends_its_requests_at_once() -> None:
    bench = Bench()
    bench.hub.disconnect(cast(Any, bench.links[1]))
    bench.begin()
    bench.clients[1].requests = None
    bench.hub.connect(cast(Any, bench.links[1]))
    link = bench.links[1].sent
    messages = [OwnerLink.decoder.decode(raw) for raw in link]
    link.clear()
    loads = [more for message in messages if (more := bench.clients[1].take(message)) is not None]
    bench.clients[1].requests = cast(Any, object())  # the tokenizer is loaded last
    for load in loads:
        asyncio.run(load)
    bench.add(1, live_request("late"))
    assert bench.added() == ["late"]


def test_a_crash_in_ones_turn_blames_nobody_elses_request() -> None:
    bench = on_trial()
    for _ in range(TOKENS):
        bench.step({"a": "x"})
    assert bench.added() == ["b"]
    bench.crash("a", "b")
    assert not bench.clients[1].live, "the second one's was on trial"
    bench.begin()
    assert bench.added() == ["a"]


def test_a_client_that_ends_in_its_turn_holds_up_nobody() -> None:
    bench = on_trial()
    bench.hub.disconnect(cast(Any, bench.links[0]))
    bench.pass_on()
    assert bench.added() == ["b"]


def test_a_request_on_trial_whose_caller_leaves_holds_up_nobody() -> None:
    bench = on_trial()
    live = bench.clients[0].live.get("a")
    assert live is not None
    bench.clients[0].live.abort(live)
    bench.pass_on()
    bench.step({})  # as an engine reports that has nothing left to do
    assert bench.added() == ["b"]


def test_an_engine_that_is_given_up_ends_the_requests_of_all() -> None:
    bench = Bench()
    bench.begin()
    lives = []
    for number, client in enumerate(bench.clients):
        lives += client.admit([live_request(f"r{number}").state])
    bench.life._give_up(Failed("the device is lost"))
    bench.pass_on()
    for live, client in zip(lives, bench.clients, strict=True):
        assert isinstance(live.error, EngineError) and "device is lost" in str(live.error)
        assert client.state == "dead" and client.why_unhealthy() == "the device is lost"


def test_an_owner_that_says_nothing_makes_the_engine_unhealthy() -> None:
    bench = Bench()
    bench.begin()
    client = bench.clients[0]
    for _ in range(10):
        client.tick()
    assert "no sign of life for 10 s" in str(client.why_unhealthy())
    bench.life.report()
    bench.pass_on()
    assert client.why_unhealthy() is None
