"""Messages between the server's two processes: msgpack frames over a socket pair.

Each step sends one frame with the outputs of the whole batch. Frames are msgpack and not pickle,
because reading a frame must not run code.
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
    """A frame is too long or not a known message."""


class Start(msgspec.Struct, tag=True):
    """The first message: engine options by name, and the folder of crash records."""

    options: dict[str, Any]
    crash_folder: str


class Speak(msgspec.Struct, tag=True):
    """The vocabulary for compiling grammars; sent once, before the first request."""

    vocabulary: Vocabulary


class Add(msgspec.Struct, tag=True, omit_defaults=True):
    """Add a request. params: the non-default sampling parameters that the engine needs.

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
    """End requests: the client left ("abort"), or a stop string completed the text ("stop")."""

    request_ids: list[str]
    reason: FinishReason


class Ping(msgspec.Struct, tag=True):
    """Asks for an `Alive`; sent at least every second, in every state."""


class Alive(msgspec.Struct, tag=True):
    """The answer to a ping, sent by the reading thread.

    loop_silence_s: seconds since the first ping that arrived after the loop's last turn (the loop
    turns between steps and when idle); 0 without such a ping and while the engine loads.
    """

    loop_silence_s: float


class Ready(msgspec.Struct, tag=True):
    """The engine is warm. options: resolved, by name. choices: chosen values with reasons."""

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
    """What a request gained in a step, if more than a single token."""

    request_id: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    num_cached_tokens: int = 0
    logprobs: list[TokenLogprobs] = []
    prompt_logprobs: list[TokenLogprobs] = []


class Stats(msgspec.Struct, array_like=True):
    """Statistics of the engine after a step."""

    num_running: int
    num_waiting: int
    kv_usage: float
    num_preemptions: int
    num_failed_rows: int
    num_recompiles: int
    step_seconds: float
    num_tokens: int  # computed in this step
    prefix_queries: int  # prompt tokens looked up and found in the prefix cache since the start
    prefix_hits: int


class Stepped(msgspec.Struct, tag=True):
    """A step is done.

    token_ids: by request id, for requests that gained one token and nothing else, as most do.
    Decoding a list of structs instead takes ten times as long.
    """

    token_ids: dict[str, int]
    grown: list[Grown]
    stats: Stats

    @property
    def num_tokens(self) -> int:
        """The number of tokens that requests gained."""
        return len(self.token_ids) + sum([len(grown.token_ids) for grown in self.grown])


class Failed(msgspec.Struct, tag=True):
    """The engine cannot start or go on, and its process ends. is_config: the options are wrong.

    blamed: ids of the requests that were running. is_recorded: a crash record has been written.
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
    """Wait for a frame in the engine's process; None at the end. Raises WireError."""
    head = _read(connection, _LENGTH_BYTES)
    body = head and _read(connection, _checked(int.from_bytes(head, "big")))
    message: ToEngine | None = _decoded(_TO_ENGINE, body) if body else None
    return message


async def receive_async(reader: asyncio.StreamReader) -> FromEngine | None:
    """Wait for a frame in the server's process; None at the end, even within a frame.

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
_TEXT_ONLY |= {"structured_outputs"}  # `Add` carries the compiled grammar instead
_DEFAULTS = SamplingParams()


def add_of(request: Request) -> Add:
    """The message that adds a request, without the fields that only concern text."""
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
    """The request of a message. alive: requests by id, for the sibling. grammar: compiled."""
    params = message.params
    if message.bad_words:  # the logits rules only check that bad_words is not empty
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
