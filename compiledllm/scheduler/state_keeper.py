"""Decides where snapshots of requests' states are taken, and from which snapshot a request starts.

A snapshot is the state after a block border (`snapshots`). A step that computes several tokens of a
request can keep the state after one of them. A step that begins at a block border of a request can
first save the request's current state, which is the state at the border. Snapshots are taken

- at two fixed points of a prompt: after its last full block, and where it diverges from the blocks
  that an earlier request has computed;
- at the request's latest border. This snapshot moves along with the request; after the request's
  end, the next turn of the conversation starts from it.
"""

from __future__ import annotations

from compiledllm.scheduler.snapshots import Snapshots
from compiledllm.types import Request, RequestStatus

MIN_TOKENS = 64  # a snapshot at a fixed point must save computing at least this many tokens
# Copies take memory bandwidth from decoding, so with many running requests the snapshots at the
# latest borders move by _STRIDE blocks instead of one.
_MAX_REQUESTS_IN_SINGLE_STRIDES = 8
_STRIDE = 4  # blocks
# With fewer slots per running request, requests would evict each other's snapshots, so no snapshots
# at latest borders are taken.
_SLOTS_PER_REQUEST = 2


class StateKeeper:
    """Takes snapshots of the states of requests whose blocks hold `block_size` tokens."""

    def __init__(self, num_slots: int, block_size: int) -> None:
        self.snapshots = Snapshots(num_slots)
        self._block_size = block_size

    def max_with_one_point(self, request: Request, start: int, count: int) -> int:
        """The number of tokens, up to `count`, that a step may compute from `start` on.

        A step can keep only one state of a request. If both fixed points lie among the tokens, the
        step ends at the first one.
        """
        points = self._points_within(request, start, count)
        return points[0] - start if len(points) > 1 else count

    def slot_to_keep(self, request: Request, start: int, count: int) -> tuple[int, int] | None:
        """The snapshot that a step takes while it computes `count` tokens from `start` on.

        Returns a slot and the number of the step's tokens after which the state is kept; None: the
        step takes no snapshot.
        """
        points = self._points_within(request, start, count)
        if not points:
            return None
        slot = self.snapshots.add(self._hash_before(request, points[0]), is_coming=True)
        if slot is None:
            return None
        request.state_kept_at = request.latest_state_at = points[0]
        return slot, points[0] - start

    def _points_within(self, request: Request, start: int, count: int) -> list[int]:
        """The fixed points strictly between `start` and `start + count` that need a snapshot."""
        found: list[int] = []
        last = request.state_kept_at
        for point in sorted(self._points(request)):
            if not start < point < start + count or point - last < MIN_TOKENS:
                continue
            if self._hash_before(request, point) not in self.snapshots:
                found.append(point)
                last = point
        return found

    def slot_to_save(self, request: Request, num_running: int) -> int | None:
        """The slot that receives a running request's state before its next step; None: no copy.

        The hashes of all blocks before the request's next token must be known.
        """
        computed = request.num_computed_tokens
        if computed == 0 or computed % self._block_size:
            return None
        key, is_point = self._hash_before(request, computed), computed in self._points(request)
        if is_point and computed - request.state_kept_at >= MIN_TOKENS:
            request.state_kept_at = computed
        elif computed - request.latest_state_at >= self._stride(num_running):
            self.snapshots.forget(request.latest_state)
            # A snapshot that exists was taken for another request, so this request must not forget
            # the snapshot when its own latest border moves on.
            request.latest_state = b"" if key in self.snapshots else key
        else:
            return None
        request.latest_state_at = computed
        return None if key in self.snapshots else self.snapshots.add(key)

    def longest_prefix(self, request: Request, num_blocks: int) -> int:
        """Length, in blocks, of the longest prefix with a snapshot; at most `num_blocks`."""
        return self.snapshots.longest(request.block_hashes[:num_blocks])

    def begin(self, request: Request, start: int) -> None:
        """Note that a request will start from the state after its first `start` tokens."""
        request.state_kept_at = request.latest_state_at = start

    def slot_to_restore(self, request: Request) -> int | None:
        """The slot of the state from which a request starts; None if it starts from zeros."""
        start = request.num_computed_tokens
        return self.snapshots.use(self._hash_before(request, start)) if start else None

    def waits_for_sibling(self, request: Request) -> bool:
        """Whether another completion of the same prompt will soon take the prompt's snapshot."""
        sibling, point = request.sibling, self._prompt_end(request)
        if sibling is None or sibling.status is not RequestStatus.RUNNING or point < MIN_TOKENS:
            return False
        if sibling.state_kept_at >= point:
            return self.snapshots.is_coming(self._hash_before(sibling, point))
        return sibling.num_computed_tokens <= point

    def _points(self, request: Request) -> tuple[int, int]:
        return request.diverges_at, self._prompt_end(request)

    def _prompt_end(self, request: Request) -> int:
        """The last block border before the last token of the prompt."""
        return (request.num_prompt_tokens - 1) // self._block_size * self._block_size

    def _stride(self, num_running: int) -> float:
        """Number of tokens by which the copy at the latest border moves."""
        if num_running * _SLOTS_PER_REQUEST > self.snapshots.num_slots:
            return float("inf")
        is_single = num_running <= _MAX_REQUESTS_IN_SINGLE_STRIDES
        return self._block_size * (1 if is_single else _STRIDE)

    def _hash_before(self, request: Request, num_tokens: int) -> bytes:
        return request.block_hashes[num_tokens // self._block_size - 1]
