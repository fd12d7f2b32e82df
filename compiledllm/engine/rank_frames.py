"""Messages between the first rank of a model and the others: msgpack frames over a socket.

Frames are msgpack and not pickle, because reading a frame must not run code. A step is sent to each
rank once, as the scheduler made it; every rank packs its inputs and draws its tokens by itself.
"""

from __future__ import annotations

import contextlib
import socket
from dataclasses import replace
from typing import Any

import msgspec

from compiledllm.types import NewRequest, RequestSpec, ScheduledRequest, SchedulerOutput

_LENGTH_BYTES = 4
MAX_FRAME_BYTES = 2**31 - 1


class Join(msgspec.Struct, tag=True):
    """Join the group of ranks by the store at (host, port), see `collectives.make_store`.

    device: the rank's device, as torch names it. num_threads: number of torch's threads on a CPU.
    """

    rank: int
    num_ranks: int
    host: str
    port: int
    device: str
    num_threads: int


class Build(msgspec.Struct, tag=True):
    """Make a plan of these resolved options (name -> value), and load the rank's weights."""

    options: dict[str, Any]


class CountBlocks(msgspec.Struct, tag=True):
    """Measure, together with all other ranks, for how many KV blocks there is room."""


class Run(msgspec.Struct, tag=True):
    """Allocate this many KV blocks and get ready for steps.

    max_blocks: maximum number of blocks of a request, the width of the block tables.
    """

    num_kv_blocks: int
    max_blocks: int


class New(msgspec.Struct, array_like=True):
    """A `NewRequest` without its grammar. outputs: its tokens after the prompt."""

    spec: RequestSpec
    outputs: list[int]


class Step(msgspec.Struct, tag=True):
    """Launch a step, after collecting all launched steps but the last `num_in_flight`.

    The other fields are those of `SchedulerOutput`.
    """

    num_in_flight: int
    new_requests: list[New]
    scheduled: list[ScheduledRequest]
    freed_request_ids: list[str]
    spoilt_block_ids: list[int]
    saved_states: list[tuple[str, int]]
    restored_states: list[tuple[str, int]]
    kept_states: list[tuple[str, int, int]]

    @classmethod
    def of(cls, step: SchedulerOutput, num_in_flight: int) -> Step:
        return cls(
            num_in_flight,
            [_new(request) for request in step.new_requests],
            step.scheduled,
            step.freed_request_ids,
            step.spoilt_block_ids,
            step.saved_states,
            step.restored_states,
            step.kept_states,
        )

    def to_run(self) -> SchedulerOutput:
        new = [
            NewRequest(one.spec, one.spec.prompt_token_ids + one.outputs)
            for one in self.new_requests
        ]
        return SchedulerOutput(
            new,
            self.scheduled,
            self.freed_request_ids,
            self.spoilt_block_ids,
            self.saved_states,
            self.restored_states,
            self.kept_states,
        )


class Reset(msgspec.Struct, tag=True):
    """Forget all requests, and all steps that were launched."""


class Ready(msgspec.Struct, tag=True):
    """The answer to a message that was carried out; steps have no answer.

    agreement: what the rank planned (`Plan.agreement`), to compare with the first rank's plan.
    num_kv_blocks: the answer to `CountBlocks`.
    """

    agreement: str = ""
    num_kv_blocks: int = 0


class Failed(msgspec.Struct, tag=True):
    """The rank has failed and its process ends. is_config: the options are wrong."""

    error: str
    is_config: bool = False


ToRank = Join | Build | CountBlocks | Run | Step | Reset
FromRank = Ready | Failed

_ENCODER = msgspec.msgpack.Encoder()
_TO_RANK: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(ToRank)
_FROM_RANK: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(FromRank)


def _new(request: NewRequest) -> New:
    """The request as it is sent to the other ranks.

    Only the first rank has grammars and logits processors. An empty grammar tells the other ranks
    that the first rank draws this request's tokens.
    """
    spec = request.spec
    params = spec.sampling_params
    if spec.grammar is not None or params.logits_processors is not None:
        spec = replace(spec, grammar="", sampling_params=replace(params, logits_processors=None))
    return New(spec, request.token_ids[spec.num_prompt_tokens :])


def frame(message: ToRank | FromRank) -> bytes:
    body = _ENCODER.encode(message)
    assert len(body) <= MAX_FRAME_BYTES, len(body)
    return len(body).to_bytes(_LENGTH_BYTES, "big") + body


def receive_by_rank(connection: socket.socket) -> ToRank | None:
    """Wait for the next message; None once the first rank has gone."""
    body = _read_body(connection)
    message: ToRank | None = None if body is None else _TO_RANK.decode(body)
    return message


def receive_from_rank(connection: socket.socket) -> FromRank | None:
    """Wait for the next message; None once the rank has gone."""
    body = _read_body(connection)
    message: FromRank | None = None if body is None else _FROM_RANK.decode(body)
    return message


def _read_body(connection: socket.socket) -> bytes | None:
    head = read_exactly(connection, _LENGTH_BYTES)
    return None if head is None else read_exactly(connection, int.from_bytes(head, "big"))


def read_exactly(connection: socket.socket, count: int) -> bytes | None:
    """Wait for this many bytes; None if the connection ends, or is silent for its timeout."""
    buffer = bytearray(count)
    view = memoryview(buffer)
    while view:
        size = 0
        with contextlib.suppress(OSError):
            size = connection.recv_into(view)
        if not size:
            return None
        view = view[size:]
    return bytes(buffer)
