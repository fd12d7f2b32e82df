"""Manages the blocks of each request's KV: allocates, shares prefixes, registers, frees.

Layers with equal attention windows form a group. Every request has one block table per group, and
all tables draw from one pool. A block that no later token sees is freed; its entry stays in the
table, left of `Request.first_owned_blocks`, and is meaningless from then on.

    window 6, blocks of 4, next token 13:   table [7, 3, 9, 5]
                                                      ^ first block: 13 sees 8 to 13

The scheduler asks by request and token count; the pool knows only blocks. Of the layers, this
module knows only the windows of their groups.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from compiledllm.scheduler.block_pool import NULL_BLOCK, BlockPool, hash_blocks
from compiledllm.scheduler.state_keeper import StateKeeper
from compiledllm.types import Request, RequestStatus

NO_LIMIT = 2**40  # tokens, more than any context

Tables = list[list[int]]  # block ids, one list per group of layers


def first_seen_block(window: int, position: int, block_size: int) -> int:
    """Index of the first block that the token at `position`, or any later token, sees."""
    return max(position - window + 1, 0) // block_size if window else 0


def num_blocks_needed(windows: Sequence[int], block_size: int, num_tokens: int) -> int:
    """Largest number of blocks a request holds while it grows to `num_tokens`, one at a time."""
    last = (num_tokens - 1) // block_size  # the number peaks when this block has just been added
    firsts = (first_seen_block(window, last * block_size, block_size) for window in windows)
    return sum(last + 1 - first for first in firsts)


def max_blocks_in_use(
    windows: Sequence[int], block_size: int, max_num_seqs: int, max_tokens: int, max_len: int
) -> int:
    """Maximum number of blocks in use: `max_num_seqs` requests of `max_len` tokens each.

    max_tokens: largest number of tokens in a step; in groups with a window, its chunks hold extra
    blocks until the step is done.
    """
    for_prompts = (-(-max_tokens // block_size) for window in windows if window)
    return max_num_seqs * num_blocks_needed(windows, block_size, max_len) + sum(for_prompts)


class KVManager:
    """Block tables of the requests, over one pool.

    block_size: tokens per block. windows: for each group of layers, the number of latest tokens
    that a token sees, itself included; 0: all. num_snapshots: for models that keep a state for each
    request, the number of snapshots that the device has room for; None: the model has no states.
    Attribute: `states` (decides which snapshots are taken; None: no states, or no room for any).
    """

    def __init__(
        self,
        pool: BlockPool,
        block_size: int,
        windows: Sequence[int] = (0,),
        num_snapshots: int | None = None,
    ) -> None:
        self.pool = pool
        self._has_states = num_snapshots is not None
        self.states = StateKeeper(num_snapshots, block_size) if num_snapshots else None
        self.block_size = block_size
        self.windows = tuple(windows)
        self._num_groups = len(self.windows)
        self._windowed = [(g, window) for g, window in enumerate(self.windows) if window]
        self.max_request_tokens = self._max_request_tokens()

    def _max_request_tokens(self) -> int:
        """Longest request, in tokens, that fits if it has the whole pool to itself."""

        def needed(num_tokens: int) -> int:
            return num_blocks_needed(self.windows, self.block_size, num_tokens)

        max_blocks = self.pool.num_blocks
        if needed(NO_LIMIT) <= max_blocks:
            return NO_LIMIT
        lengths = range(self.block_size, (max_blocks + 1) * self.block_size, self.block_size)
        return bisect_right(lengths, max_blocks, key=needed) * self.block_size

    def check_fits(self, request: Request) -> None:
        """Raise ValueError, saying what would fit, if the whole pool could not hold a request."""
        # The last sampled token's KV is never needed, hence the -1.
        num_slots = request.num_prompt_tokens + max(request.spec.max_tokens, 1) - 1
        if num_slots > self.max_request_tokens:
            needed = num_blocks_needed(self.windows, self.block_size, num_slots)
            room = self.max_request_tokens - request.num_prompt_tokens + 1
            way_out = f"max_tokens <= {room} would fit" if room > 0 else "shorten the prompt"
            raise ValueError(
                f"a prompt of {request.num_prompt_tokens} tokens with max_tokens="
                f"{request.spec.max_tokens} needs {needed} KV blocks of {self.block_size} tokens "
                f"and the cache has {self.pool.num_blocks}; {way_out}, or give the cache more room "
                f"(num_kv_blocks, kv_cache_memory_bytes)"
            )

    # -- room for a step's tokens --------------------------------------------------------------

    def max_chunk(self, num_computed: int, count: int) -> int:
        """Reduce `count` to the number of tokens after `num_computed` that the whole pool can hold.

        Only windows reduce `count`: a prompt may fit in small chunks but not in a large one.
        """
        if not self._windowed:
            return count
        firsts = (first_seen_block(w, num_computed, self.block_size) for w in self.windows)
        max_blocks = (self.pool.num_blocks + sum(firsts)) // self._num_groups
        return min(count, max_blocks * self.block_size - num_computed)

    def room_at_hand(self, request: Request) -> int:
        """Number of tokens for which the free blocks have room; 0 if there is no whole block.

        Always 0 without windows: a smaller chunk would only postpone preemption. With windows, a
        smaller chunk frees blocks for the next one.
        """
        if not self._windowed:
            return 0
        blocks = len(request.block_tables[0]) + self.pool.num_free_blocks // self._num_groups
        room = blocks * self.block_size - request.num_computed_tokens
        return room if room >= self.block_size else 0

    def trim(self, request: Request) -> None:
        """Free the blocks that no token still to be computed sees."""
        if not self._windowed:
            return
        self.register_full_blocks(request)  # while the request still holds them
        for group, window in self._windowed:
            old = request.first_owned_blocks[group]
            first = first_seen_block(window, request.num_computed_tokens, self.block_size)
            self.pool.free(request.block_tables[group][old:first])
            request.first_owned_blocks[group] = first

    def num_missing_blocks(self, tables: Tables, num_tokens: int) -> int:
        """Number of blocks, over all groups, that `tables` lack to hold `num_tokens` tokens."""
        missing = -(-num_tokens // self.block_size) - len(tables[0])
        return missing * self._num_groups if missing > 0 else 0

    def extend(self, request: Request, count: int, num_missing: int) -> Tables:
        """Allocate `num_missing` blocks for `count` more tokens; returns their ids by group."""
        added: Tables = []
        if num_missing:
            per_group = num_missing // self._num_groups
            block_ids = self.pool.allocate(num_missing)
            for group, table in enumerate(request.block_tables):
                added.append(block_ids[group * per_group : (group + 1) * per_group])
                table += added[group]
        request.next_kv_check = len(request.block_tables[0]) * self.block_size
        if self._windowed and count > 1:  # after a chunk, blocks may have left the window
            request.next_kv_check = request.num_computed_tokens + count
        return added

    def release(self, request: Request) -> None:
        """Free a request's blocks."""
        for table, first in zip(request.block_tables, request.first_owned_blocks, strict=True):
            self.pool.free(table[first:])
        request.block_tables, request.first_owned_blocks = [], []
        request.num_registered_blocks = request.next_kv_check = 0

    def forget_blocks(self, request: Request) -> list[int]:
        """Remove a request's blocks, which may hold NaN, from the prefix index; drop all snapshots.

        Returns the ids of the blocks to zero, which are those that no other request holds. Blocks
        that the request has already freed may hold NaN, too, and are included.
        """
        if self.states is not None:
            self.states.snapshots.reset()
        held: list[int] = []
        given_back: list[int] = []
        for table, first in zip(request.block_tables, request.first_owned_blocks, strict=True):
            held += table[first:]
            given_back += [block_id for block_id in table[:first] if block_id != NULL_BLOCK]
        return self.pool.forget(held) + self.pool.forget(given_back, num_holders=0)

    # -- prefixes ------------------------------------------------------------------------------

    def max_with_one_snapshot(self, request: Request, start: int, count: int) -> int:
        """Reduce `count` so that a step from `start` on needs at most one snapshot."""
        if self.states is None:
            return count
        self._extend_hashes(request, request.num_tokens)
        return self.states.max_with_one_point(request, start, count)

    def slot_to_save(self, request: Request, num_running: int) -> int | None:
        """The slot that receives the request's state before its next step; None: no copy."""
        if self.states is None or request.num_computed_tokens > request.num_tokens:
            return None
        self._extend_hashes(request, request.num_tokens)
        return self.states.slot_to_save(request, num_running)

    def reset_prefixes(self) -> None:
        """Forget all cached prefixes."""
        self.pool.reset_prefix_cache()
        if self.states is not None:
            self.states.snapshots.reset()

    def lookup_prefix(self, request: Request) -> Tables:
        """Cached blocks of the request's beginning; at least one token is left to compute.

        The tables of all groups have equal length. Blocks that the next token does not see are the
        null block.
        """
        if request.is_second_try or not request.spec.sampling_params.reads_prefix_cache:
            return self._no_blocks()
        if not self.pool.enable_prefix_caching:
            return self._blocks_of_sibling(request)
        self._extend_hashes(request, request.num_tokens)
        usable = (request.num_tokens - 1) // self.block_size
        found = self._lookup(request.block_hashes[:usable])
        return found if self.states is None else self._with_state(request, self.states, found)

    def _with_state(self, request: Request, states: StateKeeper, found: Tables) -> Tables:
        """The longest part of a prefix after which there is a snapshot of the state."""
        length = len(found[0])
        request.diverges_at = length * self.block_size
        while length := states.longest_prefix(request, length):
            found = self._lookup(request.block_hashes[:length])
            if len(found[0]) == length:
                return found
            length = len(found[0])  # some blocks in windows have been evicted
        return self._no_blocks()

    def seen_blocks(self, prefix: Tables) -> list[int]:
        """The blocks of a prefix that the next token sees; a request with the prefix holds them."""
        firsts = self._firsts(len(prefix[0]))
        return [i for table, first in zip(prefix, firsts, strict=True) for i in table[first:]]

    def adopt_prefix(self, request: Request, prefix: Tables) -> None:
        """Give a request without blocks the blocks of a prefix from `lookup_prefix`."""
        self.pool.share(self.seen_blocks(prefix))
        request.block_tables = [list(table) for table in prefix]
        request.first_owned_blocks = self._firsts(len(prefix[0]))
        request.num_registered_blocks = len(prefix[0])

    def register_full_blocks(self, request: Request) -> None:
        """Add full blocks to the prefix index.

        The host does not know tokens in flight, so their blocks are registered a step later.
        """
        if not self.pool.enable_prefix_caching:
            return
        num_full = min(request.num_computed_tokens, len(request.token_ids)) // self.block_size
        old = request.num_registered_blocks
        if num_full > old:
            self._extend_hashes(request, num_full * self.block_size)
            for group, table in enumerate(request.block_tables):
                keys = self._keys(group, request.block_hashes[old:num_full])
                for block_id, key in zip(table[old:num_full], keys, strict=True):
                    self.pool.register(block_id, key)
            request.num_registered_blocks = num_full

    def _no_blocks(self) -> Tables:
        return [[] for _ in self.windows]

    def _firsts(self, num_blocks: int) -> list[int]:
        """Per group, the first block seen by the token that follows `num_blocks` full blocks."""
        position = num_blocks * self.block_size
        return [first_seen_block(window, position, self.block_size) for window in self.windows]

    def _lookup(self, hashes: list[bytes]) -> Tables:
        """The longest prefix whose blocks are cached in every group."""
        found = self._no_blocks()
        for group, window in enumerate(self.windows):
            if not window:
                found[group] = self.pool.lookup(self._keys(group, hashes))
                hashes = hashes[: len(found[group])]
        hashes = hashes[: self._longest_in_windows(hashes)]
        firsts = self._firsts(len(hashes))
        for group, _ in self._windowed:
            seen = self.pool.lookup(self._keys(group, hashes[firsts[group] :]))
            found[group] = [NULL_BLOCK] * firsts[group] + seen
        return [table[: len(hashes)] for table in found]

    def _keys(self, group: int, hashes: Sequence[bytes]) -> Sequence[bytes]:
        """Keys, in the pool's index, of a group's blocks whose contents have these hashes."""
        return [block_hash + bytes([group]) for block_hash in hashes] if group else hashes

    def _longest_in_windows(self, hashes: list[bytes]) -> int:
        """Length, in blocks, of the longest prefix whose seen blocks all windowed groups cache.

        The search goes from the last block to the first, so each block is looked up at most once.
        """
        length, size = len(hashes), self.block_size
        keys = {group: self._keys(group, hashes) for group, _ in self._windowed}
        known_from = dict.fromkeys(keys, length)
        is_settled = False
        while not is_settled:
            is_settled = True
            for group, window in self._windowed:
                first = first_seen_block(window, length * size, size)
                index = min(known_from[group], length)
                while index > first and self.pool.is_known(keys[group][index - 1]):
                    index -= 1
                known_from[group] = index
                if index > first:  # longer prefixes need the missing block too
                    length, is_settled = index - 1, False
        return length

    def _blocks_of_sibling(self, request: Request) -> Tables:
        """Full blocks of the prompt that a running request with the same prompt has computed."""
        sibling = request.sibling
        if sibling is None or sibling.status is not RequestStatus.RUNNING or self._has_states:
            return self._no_blocks()
        num_computed = min(request.num_prompt_tokens - 1, sibling.num_computed_tokens)
        num_full = num_computed // self.block_size
        firsts = self._firsts(num_full)
        if any(map(int.__lt__, firsts, sibling.first_owned_blocks)):  # the sibling has freed some
            return self._no_blocks()
        return [
            [NULL_BLOCK] * first + table[first:num_full]
            for table, first in zip(sibling.block_tables, firsts, strict=True)
        ]

    def _extend_hashes(self, request: Request, num_tokens: int) -> None:
        hashes, size = request.block_hashes, self.block_size
        known = len(hashes) * size
        if num_tokens - known >= size:
            parent = hashes[-1] if hashes else request.spec.cache_salt.encode()
            hashes += hash_blocks(parent, request.token_ids[known:num_tokens], size)

    @property
    def num_snapshot_hits(self) -> int:
        """Number of times that a request started from a snapshot of a state."""
        return 0 if self.states is None else self.states.snapshots.num_hits

    def check_invariants(self, alive: list[Request]) -> None:
        """Raise AssertionError if the pool's reference counts and the requests' tables differ."""
        if self.states is not None:
            self.states.snapshots.check_invariants()
        self.pool.check_invariants(
            table[first:]
            for request in alive
            for table, first in zip(request.block_tables, request.first_owned_blocks, strict=True)
        )
        for request in alive:
            computed = request.num_computed_tokens
            for group, table in enumerate(request.block_tables):
                held = len(table) * self.block_size
                assert held >= computed, f"{request.request_id} lacks KV blocks"
                assert len(table) == len(request.block_tables[0]), "tables differ in length"
                seen = first_seen_block(self.windows[group], computed, self.block_size)
                assert request.first_owned_blocks[group] <= seen, "a block was freed that is seen"
            assert bool(request.block_tables) == (request.status is RequestStatus.RUNNING)
