"""Owner of the KV blocks: reference counts, the free list, and the index of cached prefixes.

Blocks 1 to num_blocks are usable; block 0 is the null block, which padding rows point at. A full
block of known tokens can be found by its chained hash, even after it was freed, until it is
evicted (least recently used first). The pool knows block ids and hashes, no tensors.

    free list   [uncached, uncached, ..., cached (old) ..., cached (recent)]  taken from the left
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

NULL_BLOCK = 0


def hash_blocks(parent: bytes, token_ids: Sequence[int], block_size: int) -> list[bytes]:
    """Chained hashes of consecutive full blocks; a partial last block is left out.

    A block's hash covers all tokens up to the end of the block, because it includes the hash of the
    block before it. parent: the hash of that block; for a request's first block the cache salt.
    """
    ids = array("q", token_ids)
    content, size = ids.tobytes(), block_size * ids.itemsize
    hashes: list[bytes] = []
    for start in range(0, len(content) // size * size, size):
        own = content[start : start + size]
        parent = hashlib.sha256(len(parent).to_bytes(4, "big") + parent + own).digest()
        hashes.append(parent)
    return hashes


class BlockPool:
    """Reference-counted blocks with a prefix index and LRU eviction.

    `num_blocks`: usable blocks, without the null block.
    """

    def __init__(self, num_blocks: int, enable_prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.enable_prefix_caching = enable_prefix_caching
        self._ref_counts = [0] * (num_blocks + 1)
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks + 1))
        self._block_of_hash: dict[bytes, int] = {}
        self._hash_of_block: dict[int, bytes] = {}

    @property
    def num_free_blocks(self) -> int:
        """Number of blocks that no request holds, cached or not; all of them can be allocated."""
        return len(self._free)

    @property
    def num_cached_blocks(self) -> int:
        return len(self._hash_of_block)

    @property
    def usage(self) -> float:
        """Share of the blocks in use, 0 to 1."""
        return 1 - self.num_free_blocks / self.num_blocks

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks, evicting the least recently used. At least `count` must be free."""
        assert count <= len(self._free), f"asked for {count} blocks, {len(self._free)} are free"
        taken = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block_id in taken:
            self._forget(block_id)
            self._ref_counts[block_id] = 1
        return taken

    def lookup(self, hashes: Iterable[bytes]) -> list[int]:
        """The blocks of the longest cached prefix of `hashes`. Takes no reference."""
        found: list[int] = []
        for block_hash in hashes:
            block_id = self._block_of_hash.get(block_hash)
            if block_id is None:
                break
            found.append(block_id)
        return found

    def is_known(self, block_hash: bytes) -> bool:
        """Whether the index has a block with this hash."""
        return block_hash in self._block_of_hash

    def num_free_among(self, block_ids: Iterable[int]) -> int:
        """Number of these blocks that are free; sharing one takes it off the free list."""
        return sum(self._ref_counts[block_id] == 0 for block_id in block_ids)

    def share(self, block_ids: Iterable[int]) -> None:
        """Take one more reference to each of these cached blocks."""
        for block_id in block_ids:
            if self._ref_counts[block_id] == 0:
                del self._free[block_id]
            self._ref_counts[block_id] += 1

    def free(self, block_ids: Sequence[int]) -> None:
        """Drop one reference to each. The end of a sequence is evicted before its beginning."""
        for block_id in reversed(block_ids):
            self._ref_counts[block_id] -= 1
            assert self._ref_counts[block_id] >= 0, f"block {block_id} was freed twice"
            if self._ref_counts[block_id] == 0:
                self._free[block_id] = None
                if block_id not in self._hash_of_block:
                    self._free.move_to_end(block_id, last=False)

    def register(self, block_id: int, block_hash: bytes) -> None:
        """Add a full block to the index. A second block with the same content is not indexed."""
        if self.enable_prefix_caching and block_hash not in self._block_of_hash:
            self._block_of_hash[block_hash] = block_id
            self._hash_of_block[block_id] = block_hash

    def forget(self, block_ids: Sequence[int], num_holders: int = 1) -> list[int]:
        """Remove blocks from the index. Returns the blocks with exactly `num_holders` holders."""
        for block_id in block_ids:
            self._forget(block_id)
        return [block_id for block_id in block_ids if self._ref_counts[block_id] == num_holders]

    def reset_prefix_cache(self) -> None:
        """Empty the index. Blocks in use stay valid for their holders."""
        self._block_of_hash.clear()
        self._hash_of_block.clear()

    def _forget(self, block_id: int) -> None:
        block_hash = self._hash_of_block.pop(block_id, None)
        if block_hash is not None:
            del self._block_of_hash[block_hash]

    def check_invariants(self, held: Iterable[Sequence[int]] = ()) -> None:
        """Raise AssertionError if the counts are wrong. held: block ids of each live request."""
        expected = [0] * (self.num_blocks + 1)
        for block_ids in held:
            for block_id in block_ids:
                expected[block_id] += 1
        assert expected == self._ref_counts, "reference counts differ from the requests' blocks"
        assert self._ref_counts[NULL_BLOCK] == 0, "the null block was handed out"
        free = {b for b in range(1, self.num_blocks + 1) if self._ref_counts[b] == 0}
        assert free == set(self._free), "the free list is not the set of unreferenced blocks"
        mirrored = {block_id: h for h, block_id in self._block_of_hash.items()}
        assert mirrored == self._hash_of_block, "the prefix index and its inverse differ"
