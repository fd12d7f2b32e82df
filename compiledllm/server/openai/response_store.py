"""Finished responses that later requests may refer to."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

from compiledllm.config import ConfigError
from compiledllm.server.openai.errors import ApiError

MAX_STORED_BYTES = 2**28  # of all responses and conversations together


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """response: the JSON of the answer. items: the JSON of the conversation up to its end."""

    response: bytes
    items: bytes

    @property
    def num_bytes(self) -> int:
        return len(self.response) + len(self.items)


class ResponseStore:
    """Keeps the responses that were used last, at most `capacity` of them; 0: none.

    owner: identifies the API key that asked for the response; other keys do not find it. Several
    threads may use a store.
    """

    def __init__(self, capacity: int = 0) -> None:
        if capacity < 0:
            raise ConfigError(f"responses_store must be at least 0, got {capacity}")
        self.capacity = capacity
        self._stored: OrderedDict[tuple[str, str], StoredResponse] = OrderedDict()
        self._num_bytes = 0
        self._lock = threading.Lock()

    def add(self, owner: str, response_id: str, stored: StoredResponse) -> None:
        with self._lock:
            self._stored[owner, response_id] = stored
            self._num_bytes += stored.num_bytes
            while len(self._stored) > self.capacity or self._num_bytes > MAX_STORED_BYTES:
                _, oldest = self._stored.popitem(last=False)
                self._num_bytes -= oldest.num_bytes

    def get(self, owner: str, response_id: str) -> StoredResponse:
        """Raises ApiError if there is none, or if the store keeps none."""
        with self._lock:
            stored = self._stored.get((owner, response_id))
            if stored is None:
                raise self._missing(response_id)
            self._stored.move_to_end((owner, response_id))
            return stored

    def remove(self, owner: str, response_id: str) -> None:
        """Raises ApiError as `get`."""
        with self._lock:
            stored = self._stored.pop((owner, response_id), None)
            if stored is None:
                raise self._missing(response_id)
            self._num_bytes -= stored.num_bytes

    def _missing(self, response_id: str) -> ApiError:
        if self.capacity == 0:
            return ApiError(
                400,
                "this server keeps no responses; start it with --responses-store N to keep the "
                "last N, or send the whole conversation as input",
            )
        return ApiError(
            404,
            f"response '{response_id[:80]}' is not kept; the server keeps the last {self.capacity}",
            code="response_not_found",
        )
