"""What the server's two processes say to each other: msgpack frames over a socket pair.

One frame for each step's outputs of the whole batch. Never pickle: a frame is data.
"""

from __future__ import annotations

import asyncio
import socket
from dataclasses import fields
from typing import Any

import msgspec

from compiledllm.grammars.library import Vocabulary
from compiledllm.outputs import FinishReason
from compiledllm.sampling_params import SamplingParams
from compiledllm.types import Grammar, Request, TokenLogprobs

_LENGTH_BYTES = 4
MAX_FRAME_BYTES = 2**31 - 1


class WireError(Exception):
    """A frame that is too long, or is no message."""


class Start(msgspec.Struct, tag=True):
    """The first frame: engine options by name, and where a crash is recorded."""

    options: dict[str, Any]
    crash_folder: str


class Speak(msgspec.Struct, tag=True):
    """What compiling grammars takes; sent once, before the first request."""

    vocabulary: Vocabulary


class Add(msgspec.Struct, tag=True, omit_defaults=True):
    """Queue a request. params: the fields that differ from the defaults and concern the engine.

    grammar: a `Grammar.text`.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: dict[str, Any]
    max_tokens: int
    stop_token_ids: list[int]
    seed: int
    priority: int = 0
    bad_words: list[list[int]] = []
    grammar: str | None = None
    sibling: str | None = None
    cache_salt: str = ""


class Finish(msgspec.Struct, tag=True):
    """End requests: the client left ("abort"), or their text is complete ("stop")."""

    request_ids: list[str]
    reason: FinishReason


class Ping(msgspec.Struct, tag=True):
    """Asks for `Alive`; sent every second or oftener, in every state."""


class Alive(msgspec.Struct, tag=True):
    """The answer to a ping, by the thread that reads.

    loop_silence_s: of the first ping that the engine's loop has not taken, which it does between
    steps and when idle; 0 if there is none, and while the engine loads.
    """

    loop_silence_s: float


class Ready(msgspec.Struct, tag=True):
    """The engine is warm. options: resolved, by name; choices: what was chosen, and why."""

    options: dict[str, Any]
    choices: dict[str, str]
    model_path: str
    vocab_size: int
    eos_token_ids: list[int]
    num_slots: int
    startup_s: dict[str, float]
    is_cpu: bool = False
    max_position: int = 0


class Grown(msgspec.Struct, array_like=True, omit_defaults=True):
    """What a request got in a step, if that is more than a token."""

    request_id: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    num_cached_tokens: int = 0
    logprobs: list[TokenLogprobs] = []
    prompt_logprobs: list[TokenLogprobs] = []


class Stats(msgspec.Struct, array_like=True):
    """The engine's books after a step."""

    num_running: int
    num_waiting: int
    kv_usage: float
    num_preemptions: int
    num_failed_rows: int
    num_recompiles: int
    step_seconds: float
    num_tokens: int  # computed in this step
    prefix_queries: int  # prompt tokens looked up, and found, since the start
    prefix_hits: int


class Stepped(msgspec.Struct, tag=True):
    """A step is done.

    token_ids: by request, of those that got one token and nothing else, as most do. A list of
    structs takes ten times as long to read.
    """

    token_ids: dict[str, int]
    grown: list[Grown]
    stats: Stats

    @property
    def num_tokens(self) -> int:
        """That requests got."""
        return len(self.token_ids) + sum([len(grown.token_ids) for grown in self.grown])


class Failed(msgspec.Struct, tag=True):
    """The engine cannot start, or cannot go on; the process ends. is_config: the options are wrong.

    blamed: the requests that were running. is_recorded: a crash record has been written.
    """

    error: str
    is_config: bool = False
    blamed: list[str] = []
    is_recorded: bool = False


ToEngine = Start | Speak | Add | Finish | Ping
FromEngine = Ready | Stepped | Failed | Alive

_ENCODER = msgspec.msgpack.Encoder()
_TO_ENGINE: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(ToEngine)
_FROM_ENGINE: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(FromEngine)


def frame(message: ToEngine | FromEngine) -> bytes:
    body = _ENCODER.encode(message)
    return _checked(len(body)).to_bytes(_LENGTH_BYTES, "big") + body


def receive(connection: socket.socket) -> ToEngine | None:
    """The engine's side: wait for a frame; None at the end. Raises WireError."""
    head = _read(connection, _LENGTH_BYTES)
    body = head and _read(connection, _checked(int.from_bytes(head, "big")))
    message: ToEngine | None = _decoded(_TO_ENGINE, body) if body else None
    return message


async def receive_async(reader: asyncio.StreamReader) -> FromEngine | None:
    """The server's side: wait for a frame; None at the end, also in the middle of one.

    Raises WireError.
    """
    try:
        head = await reader.readexactly(_LENGTH_BYTES)
        body = await reader.readexactly(_checked(int.from_bytes(head, "big")))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    message: FromEngine = _decoded(_FROM_ENGINE, body)
    return message


def _checked(num_bytes: int) -> int:
    if not 0 < num_bytes <= MAX_FRAME_BYTES:
        raise WireError(f"a frame has {num_bytes} bytes; 1 to {MAX_FRAME_BYTES} are possible")
    return num_bytes


def _decoded(decoder: msgspec.msgpack.Decoder[Any], body: bytes) -> Any:
    try:
        return decoder.decode(body)
    except msgspec.DecodeError as error:
        raise WireError(f"a frame of {len(body)} bytes is no message: {error}") from None


def _read(connection: socket.socket, count: int) -> bytes | None:
    buffer = bytearray()
    while len(buffer) < count:
        try:
            piece = connection.recv(min(count - len(buffer), 2**20))
        except ConnectionError:
            return None
        if not piece:
            return None
        buffer += piece
    return bytes(buffer)


# -- requests --------------------------------------------------------------------------------------

_TEXT_ONLY = {"stop", "detokenize", "bad_words", "output_kind", "stream_interval", "n", "best_of"}
_TEXT_ONLY |= {"structured_outputs"}  # `Add` has them as a grammar
_DEFAULTS = SamplingParams()


def add_of(request: Request) -> Add:
    """A request as a message; without what only text needs."""
    given = {
        f.name: getattr(request.sampling_params, f.name)
        for f in fields(SamplingParams)
        if f.name not in _TEXT_ONLY
        and getattr(request.sampling_params, f.name) != getattr(_DEFAULTS, f.name)
    }
    assert "logits_processors" not in given, "functions do not leave their process"
    rule = given.get("repetition_detection")
    if rule is not None:
        given["repetition_detection"] = {f.name: getattr(rule, f.name) for f in fields(rule)}
    return Add(
        request_id=request.request_id,
        prompt_token_ids=request.prompt_token_ids,
        params=given,
        max_tokens=request.max_tokens,
        stop_token_ids=list(request.stop_token_ids),
        seed=request.seed,
        priority=request.priority,
        bad_words=[list(word) for word in request.bad_words],
        grammar=None if request.grammar is None else request.grammar.text,
        sibling=None if request.sibling is None else request.sibling.request_id,
        cache_salt=request.cache_salt,
    )


def request_of(message: Add, alive: dict[str, Request], grammar: Grammar | None = None) -> Request:
    """The request of a message. alive: by id, among which its sibling may be. grammar: compiled."""
    params = message.params
    if message.bad_words:  # rules for logits look at whether there are any
        params = params | {"bad_words": ["tokenised"]}
    return Request(
        request_id=message.request_id,
        prompt_token_ids=message.prompt_token_ids,
        sampling_params=SamplingParams(**params),
        max_tokens=message.max_tokens,
        stop_token_ids=frozenset(message.stop_token_ids),
        seed=message.seed,
        priority=message.priority,
        bad_words=tuple(tuple(word) for word in message.bad_words),
        grammar=grammar,
        sibling=alive.get(message.sibling or ""),
        cache_salt=message.cache_salt,
    )
