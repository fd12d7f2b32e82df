"""Results of a launched step, which may still be in flight from the device to the host."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from compiledllm.kernels.logprobs import Logprobs
from compiledllm.kernels.sampling import INVALID
from compiledllm.types import StepOutput, TokenLogprobs

MAX_IN_FLIGHT = 2  # maximum number of steps that are launched and not yet collected


@dataclass(frozen=True, slots=True)
class LogprobsBatch:
    """Log probabilities at positions of one request, or at one position each of several requests.

    num_best: number of columns for the most likely tokens. num_returned: per position, how many of
    these columns to return, and how many of the columns after them, which hold named tokens.
    """

    logprobs: Logprobs
    num_best: int
    num_returned: list[tuple[int, int]]

    def to_host(self) -> LogprobsBatch:
        packed = self.logprobs.packed
        host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
        return replace(self, logprobs=Logprobs(host.copy_(packed, non_blocking=True)))

    def positions(self) -> list[TokenLogprobs]:
        """One tuple per position. The copy to the host must have arrived."""
        found = self.logprobs
        arrays = (x.numpy().tolist() for x in (found.token_ids, found.values, found.ranks))
        lines = zip(*arrays, self.num_returned, strict=True)
        kinds, first = set(self.num_returned), 1 + self.num_best
        every_column = self.num_best, found.num_columns - first
        if kinds == {every_column}:
            return [(tuple(ids), tuple(values), rank, k) for ids, values, rank, (k, _) in lines]
        chosen = {(k, m): (0, *range(1, 1 + k), *range(first, first + m)) for k, m in kinds}
        return [
            (
                tuple(ids[c] for c in chosen[returned]),
                tuple(values[c] for c in chosen[returned]),
                rank,
                returned[0],
            )
            for ids, values, rank, returned in lines
        ]


@dataclass(slots=True)
class Extras:
    """A step's results besides tokens.

    logprobs: (request ids, values at one position each). prompt_logprobs: (request id, first
    position, values). errors: messages by request id. pooled: (request ids, float32 vectors
    [request ids, hidden]).
    """

    logprobs: list[tuple[list[str], LogprobsBatch]] = field(default_factory=list)
    prompt_logprobs: list[tuple[str, int, LogprobsBatch]] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)
    pooled: tuple[list[str], Tensor] | None = None

    def to_host(self) -> None:
        self.logprobs = [(ids, found.to_host()) for ids, found in self.logprobs]
        self.prompt_logprobs = [
            (request_id, position, found.to_host())
            for request_id, position, found in self.prompt_logprobs
        ]
        if self.pooled is not None:
            request_ids, vectors = self.pooled
            host = torch.empty(vectors.shape, dtype=vectors.dtype, pin_memory=True)
            self.pooled = request_ids, host.copy_(vectors, non_blocking=True)

    def pooled_vectors(self) -> dict[str, bytes]:
        """The vectors by request id, without vectors that hold NaN or infinity."""
        if self.pooled is None:
            return {}
        request_ids, vectors = self.pooled
        are_finite = vectors.isfinite().all(1).tolist()
        lines = zip(request_ids, vectors.numpy(), are_finite, strict=True)
        return {request_id: vector.tobytes() for request_id, vector, is_good in lines if is_good}


class PendingOutput:
    """The tokens and extras of a launched step."""

    def __init__(
        self,
        request_ids: list[str],
        token_ids: Tensor,
        arrived: torch.cuda.Event | None,
        extras: Extras | None,
    ) -> None:
        self._request_ids = request_ids
        self._token_ids = token_ids
        self._arrived = arrived
        self._extras = extras

    @property
    def has_arrived(self) -> bool:
        """Whether `collect` would not wait."""
        return self._arrived is None or bool(self._arrived.query())  # type: ignore[no-untyped-call]

    def collect(self) -> StepOutput:
        """Wait for the step and return its results."""
        if self._arrived is not None:
            self._arrived.synchronize()
        tokens = dict(zip(self._request_ids, self._token_ids.tolist(), strict=True))
        extras = self._extras
        if extras is None:
            return StepOutput(tokens)
        logprobs = {
            request_id: position
            for request_ids, found in extras.logprobs
            for request_id, position in zip(request_ids, found.positions(), strict=True)
        }
        prompt_logprobs: dict[str, tuple[int, list[TokenLogprobs]]] = {}
        for request_id, first, found in extras.prompt_logprobs:
            prompt_logprobs.setdefault(request_id, (first, []))[1].extend(found.positions())
        pooled = extras.pooled_vectors()
        for request_id in extras.pooled[0] if extras.pooled else ():
            if request_id not in pooled:
                tokens[request_id] = INVALID
        return StepOutput(tokens, logprobs, prompt_logprobs, extras.errors, pooled)


class OutputRing:
    """Copies drawn tokens to the host without waiting, through a ring of pinned buffers.

    num_slots: number of buffers; must exceed the number of steps in flight.
    """

    def __init__(self, num_slots: int, max_num_seqs: int, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        if self._is_cuda:
            shape = num_slots, max_num_seqs
            self._buffers = torch.empty(shape, dtype=torch.int64, pin_memory=True)
            self._events = [torch.cuda.Event() for _ in range(num_slots)]  # type: ignore[no-untyped-call]
            self._next = 0

    def send(
        self, request_ids: list[str], drawn: Tensor, extras: Extras | None = None
    ) -> PendingOutput:
        """Start copying `drawn`, int64 [request_ids] on the device, to the host.

        Later work on the stream may overwrite `drawn`.
        """
        if not self._is_cuda:
            return PendingOutput(request_ids, drawn, None, extras)
        buffer, arrived = self._buffers[self._next, : len(drawn)], self._events[self._next]
        self._next = (self._next + 1) % len(self._events)
        buffer.copy_(drawn, non_blocking=True)
        if extras is not None:
            extras.to_host()
        arrived.record()
        return PendingOutput(request_ids, buffer, arrived, extras)
