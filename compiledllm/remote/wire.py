"""Messages between the engine's process and its client's: msgpack frames over a socket pair.

Each step sends one frame with the news of the whole batch. Frames are msgpack and not pickle,
because reading a frame must not run code. Requests and news travel as the dataclasses that the
engine itself uses (`compiledllm.types`).
"""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import Any

import msgspec

from compiledllm.grammars.library import Vocabulary
from compiledllm.outputs import FinishReason
from compiledllm.types import RequestSpec, StepNews

_LENGTH_BYTES = 4
MAX_FRAME_BYTES = 2**31 - 1


class WireError(Exception):
    """A frame is too long or not a known message."""


class Start(msgspec.Struct, tag=True):
    """The first message: engine options by name, and the folder of crash records.

    log_level: as in `logging`.
    """

    options: dict[str, Any]
    crash_folder: str
    log_level: int = logging.INFO


class SetVocabulary(msgspec.Struct, tag=True):
    """The vocabulary for compiling grammars; sent once, before the first request."""

    vocabulary: Vocabulary


class Add(msgspec.Struct, tag=True):
    """Add a request, as the request factory has described it."""

    spec: RequestSpec


class Finish(msgspec.Struct, tag=True):
    """End requests: the client left ("abort"), or a stop string completed the text ("stop")."""

    request_ids: list[str]
    reason: FinishReason


class ResetPrefixCache(msgspec.Struct, tag=True):
    """Forget all cached prefixes."""


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


class Stats(msgspec.Struct, array_like=True):
    """Statistics of the engine after a step; totals are since the start of the engine."""

    num_running: int
    num_waiting: int
    kv_usage: float
    num_preemptions: int
    num_failed_rows: int
    num_recompiles: int
    step_s: float
    num_tokens: int  # computed in this step
    prefix_queries: int  # prompt tokens looked up in the prefix cache since the start
    prefix_hits: int  # of these, tokens that were found
    prefix_misses_of_state: int = 0  # prompt tokens whose KV was found, but no state after them
    snapshot_hits: int = 0  # requests that started from a snapshot of a state
    snapshot_bytes: int = 0


class StepOutputs(msgspec.Struct, tag=True):
    """A step is done, or requests ended between steps."""

    news: StepNews
    stats: Stats


class Failed(msgspec.Struct, tag=True):
    """The engine cannot start or go on, and its process ends. is_config: the options are wrong.

    blamed: ids of the requests that were running. is_recorded: a crash record has been written.
    """

    error: str
    is_config: bool = False
    blamed: list[str] = []
    is_recorded: bool = False


ToEngine = Start | SetVocabulary | Add | Finish | ResetPrefixCache | Ping
FromEngine = Ready | StepOutputs | Failed | Alive

_ENCODER = msgspec.msgpack.Encoder()
_TO_ENGINE: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(ToEngine)
_FROM_ENGINE: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(FromEngine)


def encoded(message: msgspec.Struct) -> bytes:
    return _ENCODER.encode(message)


def frame(message: msgspec.Struct) -> bytes:
    return framed(_ENCODER.encode(message))


def receive(connection: socket.socket) -> ToEngine | None:
    """Wait for a frame in the engine's process; None at the end. Raises WireError."""
    head = _read(connection, _LENGTH_BYTES)
    body = head and _read(connection, _checked(int.from_bytes(head, "big")))
    message: ToEngine | None = _decoded(_TO_ENGINE, body) if body else None
    return message


async def receive_async(
    reader: asyncio.StreamReader, decoder: msgspec.msgpack.Decoder[Any] = _FROM_ENGINE
) -> Any:
    """Wait for a frame in the client's process; None at the end, even within a frame.

    decoder: of the messages that may come; without one, those of an engine. Raises WireError.
    """
    try:
        head = await reader.readexactly(_LENGTH_BYTES)
        body = await reader.readexactly(_checked(int.from_bytes(head, "big")))
    except (asyncio.IncompleteReadError, OSError):
        return None
    return _decoded(decoder, body)


def framed(body: bytes | msgspec.Raw) -> bytes:
    """A frame around a message that has been encoded before."""
    return _checked(len(body)).to_bytes(_LENGTH_BYTES, "big") + body


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
        except OSError:  # reset, or the other machine is gone
            return None
        if not piece:
            return None
        buffer += piece
    return bytes(buffer)
