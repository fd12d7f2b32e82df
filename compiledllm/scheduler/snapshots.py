"""The index of snapshots, which are copies of requests' states after a prefix, with LRU eviction.

For a model whose layers keep a state per request, the KV of a prefix is of use only together with
the state after the prefix's last token. The device keeps copies of such states in slots. A snapshot
is found by the hash of the last block of its prefix. The module knows hashes and slots, no tensors.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class Snapshots:
    """An index of `num_slots` slots, least recently used first.

    A step restores snapshots before it computes, and may write new snapshots while it computes. A
    new snapshot is `coming` until the next step is scheduled: it is in the index, but it is neither
    found nor evicted.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.num_hits = 0
        self._slot_of_hash: OrderedDict[bytes, int] = OrderedDict()
        self._coming: dict[bytes, int] = {}
        self._free_slots = list(range(num_slots - 1, -1, -1))

    def __len__(self) -> int:
        return len(self._slot_of_hash) + len(self._coming)

    def __contains__(self, block_hash: bytes) -> bool:
        return block_hash in self._slot_of_hash or block_hash in self._coming

    def is_coming(self, block_hash: bytes) -> bool:
        return block_hash in self._coming

    def settle(self) -> None:
        """Let the snapshots that are coming be found. Call this before a step is scheduled."""
        self._slot_of_hash |= self._coming
        self._coming.clear()

    def longest(self, hashes: Sequence[bytes]) -> int:
        """Length, in blocks, of the longest prefix of `hashes` that has a snapshot; 0: none."""
        lengths = range(len(hashes), 0, -1)
        return next((n for n in lengths if hashes[n - 1] in self._slot_of_hash), 0)

    def use(self, block_hash: bytes) -> int:
        """The slot of an indexed snapshot from which a request starts; counts as a hit."""
        self.num_hits += 1
        self._slot_of_hash.move_to_end(block_hash)
        return self._slot_of_hash[block_hash]

    def add(self, block_hash: bytes, is_coming: bool = False) -> int | None:
        """Take a slot for a new snapshot: a free slot, or the slot of the least recently used.

        Returns None if all slots belong to snapshots that are coming.
        """
        assert block_hash not in self
        if not self._free_slots:
            if not self._slot_of_hash:
                return None
            _, slot = self._slot_of_hash.popitem(last=False)
            self._free_slots.append(slot)
        index = self._coming if is_coming else self._slot_of_hash
        index[block_hash] = self._free_slots.pop()
        return index[block_hash]

    def forget(self, block_hash: bytes) -> None:
        """Free the slot of a snapshot, unless the snapshot has been evicted."""
        slot = self._slot_of_hash.pop(block_hash, None)
        if slot is not None:
            self._free_slots.append(slot)

    def reset(self) -> None:
        """Forget all snapshots."""
        self._slot_of_hash.clear()
        self._coming.clear()
        self._free_slots = list(range(self.num_slots - 1, -1, -1))

    def check_invariants(self) -> None:
        """Raise AssertionError if a slot leaked or is held twice."""
        held = [*self._slot_of_hash.values(), *self._coming.values()]
        slots = sorted([*held, *self._free_slots])
        assert slots == list(range(self.num_slots)), "a slot of a snapshot leaked or is held twice"
