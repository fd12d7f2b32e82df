"""Several engines of one model behind one server, each a process of its own: `data_parallel_size`.

`Replicas` takes the place of an engine's client in the server. Every request goes to one replica,
and moves to another one, once, only if the replica ends before the request has begun. Each replica
is watched, restarted and given up by itself, and the server goes on as long as one replica does.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import TypeVar

from compiledllm.config import ConfigError
from compiledllm.engine.request_state import RequestState
from compiledllm.engine.requests import RequestFactory
from compiledllm.remote.engine_requests import EngineRequests
from compiledllm.remote.engine_state import State
from compiledllm.remote.errors import Overloaded, Unavailable
from compiledllm.remote.live_request import LiveRequest
from compiledllm.remote.routing import PrefixRouter, hashes
from compiledllm.remote.wire import Failed, Ready, Stats

_Result = TypeVar("_Result")
# Estimated load of the tokens that a request has yet to generate, in prompt tokens.
OUTPUT_TOKENS = 256


class Replicas:
    """The clients of all replicas, with the methods of a single client.

    clients: one for each replica, not yet started. Attributes, besides a client's: `on_route`
    (called with the router's keys of each prompt and the number of its replica, so that other
    processes with the same engines learn the route).
    """

    def __init__(self, clients: list[EngineRequests]) -> None:
        self.clients = clients
        self._router = PrefixRouter(len(clients))
        self._num_restarts = [0] * len(clients)
        self.on_loaded: Callable[[], None] = lambda: None
        self.on_route: Callable[[list[int], int], None] | None = None
        self.live = _AllLive(clients)
        for client in clients:
            client.on_loaded = self._share_texts
            client.on_loss = functools.partial(self._move_requests_of, client)

    # -- life and death ------------------------------------------------------------------------

    def start(self) -> None:
        """Start all replicas in the background."""
        for client in self.clients:
            client.start()

    @property
    def state(self) -> State:
        """The best state of any replica: ready, draining, loading or dead, in this order."""
        states = [client.state for client in self.clients]
        order: tuple[State, ...] = ("ready", "draining", "loading", "dead")
        return next(state for state in order if state in states)

    @property
    def failure(self) -> Failed | None:
        """Why no replica will serve any more; None as long as one may."""
        failures = [c.failure for c in self.clients if c.state == "dead" and c.failure]
        return failures[0] if len(failures) == len(self.clients) else None

    @property
    def num_restarts(self) -> int:
        return sum(client.num_restarts for client in self.clients)

    async def wait_until_settled(self) -> None:
        """Return once one replica is ready, or all have failed for good."""
        waits = {asyncio.create_task(client.wait_until_settled()) for client in self.clients}
        try:
            while waits and self.state == "loading":
                _, waits = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    async def wait_until_dead(self) -> None:
        """Return once all replicas have ended and none will be restarted."""
        await asyncio.gather(*(client.wait_until_dead() for client in self.clients))

    async def drain(self, timeout_s: float) -> None:
        """Admit no more requests; return when all are finished or `timeout_s` have passed."""
        await asyncio.gather(*(client.drain(timeout_s) for client in self.clients))

    async def stop(self) -> None:
        """End all processes, whatever they are doing."""
        await asyncio.gather(*(client.stop() for client in self.clients))

    def why_unhealthy(self) -> str | None:
        """The reasons of all replicas; None as long as one replica is healthy."""
        reasons = [client.why_unhealthy() for client in self.clients]
        return None if None in reasons else "; ".join(r for r in reasons if r is not None)

    def _share_texts(self) -> None:
        """Give the tokenizer that one replica's client has loaded to all other clients."""
        first = next(client for client in self.clients if client.requests is not None)
        for client in self.clients:
            client.share_texts(first)
        self.on_loaded()
        self.on_loaded = lambda: None

    @property
    def id_prefix(self) -> str:
        return self.clients[0].id_prefix

    # -- facts that are the same for all replicas ----------------------------------------------

    @property
    def requests(self) -> RequestFactory | None:
        return next((c.requests for c in self.clients if c.requests is not None), None)

    @property
    def ready(self) -> Ready | None:
        return next((client.ready for client in self.clients if client.ready is not None), None)

    @property
    def stats(self) -> Stats | None:
        return next((client.stats for client in self.clients if client.stats is not None), None)

    def reset_prefix_cache(self) -> None:
        """Let all replicas forget all cached prefixes."""
        self._router.forget()
        for client in self.clients:
            client.reset_prefix_cache()

    # -- requests ------------------------------------------------------------------------------

    def require_ready(self) -> RequestFactory:
        """The request factory. Raises Unavailable if no replica accepts requests now."""
        return self._first_that(lambda client: client.require_ready())

    def check_admission(self, num_requests: int, num_tokens: int) -> None:
        """`EngineRequests.check_admission` of the least loaded replica that does not refuse."""
        self._first_that(lambda client: client.check_admission(num_requests, num_tokens))

    def _first_that(self, ask: Callable[[EngineRequests], _Result]) -> _Result:
        """The answer of the least loaded replica that does not refuse.

        If all refuse, raises Overloaded if any replica is overloaded, otherwise Unavailable.
        """
        refusal: Exception | None = None
        for client in sorted(self.clients, key=_load_of):
            try:
                return ask(client)
            except (Unavailable, Overloaded) as error:
                if refusal is None or isinstance(error, Overloaded):
                    refusal = error
        assert refusal is not None
        raise refusal

    def admit(self, states: list[RequestState]) -> list[LiveRequest]:
        """Admit all of these requests or none, each by the replica that suits its prompt best."""
        admitted: list[LiveRequest] = []
        try:
            for state in states:
                admitted += self._admit(state)
        except BaseException:
            self.release(admitted)
            raise
        return admitted

    def _admit(self, state: RequestState) -> list[LiveRequest]:
        refusal: Exception = Unavailable(f"the engine is {self.state}", 5)
        keys = _keys_of(state)
        for index in self._choose(keys):
            try:
                admitted = self.clients[index].admit([state])
            except (Unavailable, Overloaded) as error:
                refusal = error
                continue
            self._router.note(keys, index)
            if self.on_route is not None:
                self.on_route(keys, index)
            return admitted
        raise refusal

    def note_route(self, keys: list[int], index: int) -> None:
        """Note to which replica another process has sent a prompt."""
        self._forget_restarted()
        self._router.note(keys, index)

    def _choose(self, keys: list[int]) -> list[int]:
        """The replicas that are ready, the best for the prompt first."""
        self._forget_restarted()
        return self._router.choose(keys, self._outstanding())

    def _move_requests_of(self, ended: EngineRequests) -> None:
        """Move requests of an ended engine to ready ones, since its restart may take long."""
        if all(client.state != "ready" for client in self.clients):
            return
        for live in ended.live.give_away():
            keys = _keys_of(live.state)
            index = self._choose(keys)[0]
            self.clients[index].live.take_over(live)
            self._router.note(keys, index)
            if self.on_route is not None:
                self.on_route(keys, index)

    def _outstanding(self) -> list[int | None]:
        """For each replica, about how many tokens it has yet to compute; None: it is not ready."""
        return [_load_of(client) if client.state == "ready" else None for client in self.clients]

    def _forget_restarted(self) -> None:
        for index, client in enumerate(self.clients):
            if client.num_restarts != self._num_restarts[index]:
                self._num_restarts[index] = client.num_restarts
                self._router.forget(index)

    def release(self, live_requests: list[LiveRequest]) -> None:
        """Abort the unfinished ones of these requests, because nobody waits for their output."""
        for live in live_requests:
            self._client_of(live).release([live])

    @contextlib.contextmanager
    def following(self, live: LiveRequest) -> Iterator[None]:
        """A context for taking a request's outputs; see `EngineRequests.following`."""
        try:
            with self._client_of(live).following(live):
                yield
        finally:
            if live.has_moved:
                self.release([live])

    def _client_of(self, live: LiveRequest) -> EngineRequests:
        """The client that has the request; any client if the request has ended."""
        name = live.state.request_id
        found = (client for client in self.clients if client.live.get(name) is live)
        return next(found, self.clients[0])


ServedEngine = EngineRequests | Replicas


def gpus_of_replicas(count: int, num_ranks: int, visible: str | None) -> list[dict[str, str]]:
    """For each replica the environment variables that give it GPUs of its own.

    num_ranks: GPUs of a replica. visible: this process's CUDA_VISIBLE_DEVICES. Raises ConfigError
    if there are fewer GPUs than needed.
    """
    needed = count * num_ranks
    gpus = [str(i) for i in range(needed)] if not visible else visible.split(",")
    if len(gpus) < needed:
        raise ConfigError(
            f"data_parallel_size={count} with tensor_parallel_size={num_ranks} needs {needed} "
            f"GPUs, and CUDA_VISIBLE_DEVICES={visible} names {len(gpus)}; at most "
            f"{len(gpus) // num_ranks} replicas fit"
        )
    parts = (gpus[i * num_ranks : (i + 1) * num_ranks] for i in range(count))
    return [{"CUDA_VISIBLE_DEVICES": ",".join(part)} for part in parts]


def clients_of(engine: ServedEngine) -> list[EngineRequests]:
    """The clients of all engines behind a server."""
    return engine.clients if isinstance(engine, Replicas) else [engine]


def _keys_of(state: RequestState) -> list[int]:
    """The router's keys of a prompt. Prompts with different cache salts share no key."""
    spec = state.completions[0].spec
    return hashes(spec.prompt_token_ids, spec.cache_salt)


def _load_of(client: EngineRequests) -> int:
    """About how many tokens an engine has yet to compute."""
    load = client.load
    return load.num_tokens + OUTPUT_TOKENS * load.num_requests


class _AllLive:
    """The requests in progress of all replicas."""

    def __init__(self, clients: list[EngineRequests]) -> None:
        self._clients = clients

    def __len__(self) -> int:
        return sum(len(client.live) for client in self._clients)

    def __iter__(self) -> Iterator[LiveRequest]:
        for client in self._clients:
            yield from client.live
