"""Copies of requests' states after a prefix: which slot holds which, and LRU eviction.

Layers that keep a state for each request make a prefix useful only together with the state behind
its last token. The device keeps copies of states in slots. A snapshot is found by the hash of the
last block of its prefix. The module knows hashes and slots, no tensors.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class Snapshots:
    """An index of `num_slots` slots, least recently used first.

    A step reads snapshots before it computes, and may write others while it computes. Until the
    next step is scheduled, those are `coming`: known, but neither found nor evicted.
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
        """From now on the snapshots that were coming are found."""
        self._slot_of_hash |= self._coming
        self._coming.clear()

    def longest(self, hashes: Sequence[bytes]) -> int:
        """Length, in blocks, of the longest prefix of `hashes` that has a snapshot; 0: none."""
        lengths = range(len(hashes), 0, -1)
        return next((n for n in lengths if hashes[n - 1] in self._slot_of_hash), 0)

    def use(self, block_hash: bytes) -> int:
        """The slot of a snapshot that a request starts from."""
        self.num_hits += 1
        self._slot_of_hash.move_to_end(block_hash)
        return self._slot_of_hash[block_hash]

    def add(self, block_hash: bytes, is_coming: bool = False) -> int | None:
        """The slot for a new snapshot, free or taken from the least recently used one.

        None if all slots belong to snapshots that are coming.
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
        """Free the slot of a snapshot, if it is still there."""
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
