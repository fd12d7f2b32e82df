"""Limits on the requests of an engine in another process, and on its silence."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits on requests, and timeouts in seconds.

    queued_requests: number of requests that may wait, in addition to `max_num_seqs` running ones.
    queued_tokens: prompt tokens of all waiting and running requests. request_s: for a request to
    finish. stuck_s: without a sign of life, after which the engine is unhealthy, and after twice
    this time restarted. load_s: for the engine to load.
    """

    queued_requests: int
    queued_tokens: int
    request_s: float = math.inf
    stuck_s: float = 60.0
    load_s: float = 3600.0
