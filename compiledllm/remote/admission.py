"""Checks the limits on the number of requests and of prompt tokens that an engine takes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from compiledllm.remote.errors import Overloaded
from compiledllm.remote.limits import Limits


@dataclass(frozen=True, slots=True)
class Load:
    """A number of engine requests (one per completion), and the tokens of all their prompts."""

    num_requests: int
    num_tokens: int


def check_admission(
    requested: Load, admitted: Load, limits: Limits, max_num_seqs: int, num_waiting: int
) -> None:
    """Raise ValueError for a load that never fits, and Overloaded for one that fits later.

    requested: the load of the new requests. admitted: the load of the requests that run or wait.
    num_waiting: number of admitted requests that do not run, from which `retry_after` follows.
    """
    max_requests = max_num_seqs + limits.queued_requests
    if requested.num_requests > max_requests:
        raise ValueError(
            f"prompts times n (or best_of) are {requested.num_requests} sequences, and at most "
            f"{max_requests} may run or wait at once; ask for fewer, or raise --max-queued-requests"
        )
    if requested.num_tokens > limits.queued_tokens and requested.num_requests > 1:
        raise ValueError(
            f"the prompts times n (or best_of) are {requested.num_tokens} tokens, and at most "
            f"{limits.queued_tokens} may run or wait at once; ask for fewer, or raise "
            "--max-queued-tokens"
        )
    retry_after = min(1 + math.ceil(num_waiting / 32), 30)
    if admitted.num_requests + requested.num_requests > max_requests:
        raise Overloaded(
            f"{admitted.num_requests} requests are running or waiting, and at most {max_requests} "
            "may; try again later",
            retry_after,
        )
    if admitted.num_tokens and admitted.num_tokens + requested.num_tokens > limits.queued_tokens:
        raise Overloaded(
            f"prompts of {admitted.num_tokens} tokens are running or waiting, and at most "
            f"{limits.queued_tokens} tokens may; try again later",
            retry_after,
        )
