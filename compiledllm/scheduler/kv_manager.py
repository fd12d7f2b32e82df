"""Which blocks hold each request's KV: allocated, shared by prefix, registered, given back.

The scheduler asks by request and token counts; the pool knows blocks only. A request's table is
`Request.block_ids`, its `num_registered_blocks` first blocks are in the prefix index.
"""

from __future__ import annotations

from compiledllm.scheduler.block_pool import BlockPool, hash_block
from compiledllm.types import Request, RequestStatus


class KVManager:
    """Block tables of the requests, over one pool. block_size: tokens of a block."""

    def __init__(self, pool: BlockPool, block_size: int) -> None:
        self.pool = pool
        self.block_size = block_size

    def check_fits(self, request: Request) -> None:
        """Raise ValueError, naming what would fit, if the whole pool could not hold a request."""
        # The last sampled token's KV is never needed, hence the -1.
        num_slots = request.num_prompt_tokens + request.max_tokens - 1
        capacity = self.pool.num_blocks * self.block_size
        if num_slots > capacity:
            room = capacity - request.num_prompt_tokens + 1
            way_out = f"max_tokens <= {room} would fit" if room > 0 else "shorten the prompt"
            raise ValueError(
                f"a prompt of {request.num_prompt_tokens} tokens with max_tokens="
                f"{request.max_tokens} needs {-(-num_slots // self.block_size)} KV blocks of "
                f"{self.block_size} tokens and the cache has {self.pool.num_blocks}; "
                f"{way_out}, or give the cache more room (num_kv_blocks, kv_cache_memory_bytes)"
            )

    def num_missing_blocks(self, request: Request, num_tokens: int) -> int:
        """Until a request has room for its first `num_tokens` tokens."""
        missing = num_tokens - len(request.block_ids) * self.block_size
        return -(-missing // self.block_size) if missing > 0 else 0

    def lookup_prefix(self, request: Request) -> list[int]:
        """Cached blocks of the request's beginning; at least one token is left to compute."""
        if request.is_second_try or not request.sampling_params.reads_prefix_cache:
            return []
        if not self.pool.enable_prefix_caching:
            return self._blocks_of_sibling(request)
        self._extend_hashes(request, request.num_tokens)
        usable = (request.num_tokens - 1) // self.block_size
        return self.pool.lookup(request.block_hashes[:usable])

    def share(self, request: Request, block_ids: list[int]) -> None:
        """Let a request that has no blocks begin with these of `lookup_prefix`."""
        self.pool.share(block_ids)
        request.block_ids = list(block_ids)
        request.num_registered_blocks = len(block_ids)

    def allocate(self, request: Request, count: int) -> list[int]:
        """Add `count` blocks to a request's table; they."""
        allocated = self.pool.allocate(count)
        request.block_ids += allocated
        return allocated

    def register_full_blocks(self, request: Request) -> None:
        """Tokens in flight are not known here, so their blocks are registered a step later."""
        if not self.pool.enable_prefix_caching:
            return
        num_full = min(request.num_computed_tokens, len(request.token_ids)) // self.block_size
        if num_full > request.num_registered_blocks:
            self._extend_hashes(request, num_full * self.block_size)
            for index in range(request.num_registered_blocks, num_full):
                self.pool.register(request.block_ids[index], request.block_hashes[index])
            request.num_registered_blocks = num_full

    def spoil(self, request: Request) -> list[int]:
        """A request's KV may be NaN: nobody finds it any more. Its own blocks, to be zeroed."""
        return self.pool.forget(request.block_ids)

    def release(self, request: Request) -> None:
        """Give a request's blocks back."""
        self.pool.free(request.block_ids)
        request.block_ids = []
        request.num_registered_blocks = 0

    def _blocks_of_sibling(self, request: Request) -> list[int]:
        """Full blocks of the prompt that a request with the same prompt has got."""
        sibling = request.sibling
        if sibling is None or sibling.status is not RequestStatus.RUNNING:
            return []
        most = min(request.num_prompt_tokens - 1, sibling.num_computed_tokens)
        return sibling.block_ids[: most // self.block_size]

    def _extend_hashes(self, request: Request, num_tokens: int) -> None:
        hashes, size = request.block_hashes, self.block_size
        for start in range(len(hashes) * size, num_tokens // size * size, size):
            parent = hashes[-1] if hashes else request.cache_salt.encode()
            hashes.append(hash_block(parent, request.token_ids[start : start + size]))

    def check_invariants(self, alive: list[Request]) -> None:
        """Raise AssertionError if the pool's books and the requests' tables differ."""
        self.pool.check_invariants(request.block_ids for request in alive)
        for request in alive:
            held = len(request.block_ids) * self.block_size
            assert held >= request.num_computed_tokens, f"{request.request_id} lacks KV blocks"
