"""The block pool: who holds a block, what is evicted first, and that the books balance."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from compiledllm.scheduler.block_pool import NULL_BLOCK, BlockPool, hash_blocks


def chain(*blocks: list[int]) -> list[bytes]:
    """Chained hashes of a sequence of full blocks."""
    hashes: list[bytes] = []
    for token_ids in blocks:
        hashes += hash_blocks(hashes[-1] if hashes else b"", token_ids, len(token_ids))
    return hashes


def hold_cached(pool: BlockPool, *hashes: bytes) -> list[int]:
    """Allocate one block per hash and make them findable."""
    block_ids = pool.allocate(len(hashes))
    for block_id, block_hash in zip(block_ids, hashes, strict=True):
        pool.register(block_id, block_hash)
    return block_ids


# -- who holds what ---------------------------------------------------------------------------


def test_every_block_but_the_null_block_can_be_allocated_once() -> None:
    pool = BlockPool(5)
    block_ids = pool.allocate(5)
    assert sorted(block_ids) == [1, 2, 3, 4, 5]
    assert NULL_BLOCK not in block_ids
    assert pool.num_free_blocks == 0
    pool.check_invariants([block_ids])


def test_usage_is_the_share_of_held_blocks() -> None:
    pool = BlockPool(4)
    assert pool.usage == 0
    pool.allocate(3)
    assert pool.usage == 0.75


def test_more_blocks_than_are_free_is_an_assertion() -> None:
    pool = BlockPool(2)
    with pytest.raises(AssertionError, match="asked for 3 blocks, 2 are free"):
        pool.allocate(3)


def test_shared_block_is_free_only_when_every_holder_gave_it_up() -> None:
    pool = BlockPool(2)
    block_ids = hold_cached(pool, *chain([1, 2]))
    pool.share(block_ids)
    pool.free(block_ids)
    assert pool.num_free_blocks == 1
    pool.free(block_ids)
    assert pool.num_free_blocks == 2


def test_free_cached_block_leaves_the_free_list_when_shared() -> None:
    pool = BlockPool(3)
    hashes = chain([1], [2])
    block_ids = hold_cached(pool, *hashes)
    pool.free(block_ids)
    assert pool.num_free_among(block_ids) == 2
    assert pool.lookup(hashes) == block_ids
    pool.share(block_ids)
    assert pool.num_free_among(block_ids) == 0
    assert pool.num_free_blocks == 1
    assert set(pool.allocate(1)).isdisjoint(block_ids)


def test_double_free_is_an_assertion() -> None:
    pool = BlockPool(2)
    block_ids = pool.allocate(1)
    pool.free(block_ids)
    with pytest.raises(AssertionError, match=f"block {block_ids[0]} was freed twice"):
        pool.free(block_ids)


# -- eviction order -----------------------------------------------------------------------------


def test_least_recently_freed_cached_block_is_evicted_first() -> None:
    pool = BlockPool(3)
    old, middle, recent = (hold_cached(pool, *chain([n])) for n in range(3))
    for block_ids in (old, middle, recent):
        pool.free(block_ids)
    assert [pool.allocate(1) for _ in range(3)] == [old, middle, recent]


def test_sharing_a_cached_block_makes_it_recent_again() -> None:
    pool = BlockPool(2)
    first, second = hold_cached(pool, *chain([1])), hold_cached(pool, *chain([2]))
    pool.free(first)
    pool.free(second)
    pool.share(first)
    pool.free(first)
    assert pool.allocate(1) == second


def test_end_of_a_sequence_is_evicted_before_its_beginning() -> None:
    pool = BlockPool(4)
    hashes = chain([1], [2], [3], [4])
    block_ids = hold_cached(pool, *hashes)
    pool.free(block_ids)
    for length in (3, 2, 1, 0):
        assert pool.allocate(1) == [block_ids[length]]
        assert pool.lookup(hashes) == block_ids[:length]


def test_uncached_freed_blocks_are_taken_before_cached_ones() -> None:
    pool = BlockPool(4)
    hashes = chain([1], [2])
    cached = hold_cached(pool, *hashes)
    plain = pool.allocate(2)
    pool.free(cached)
    pool.free(plain)  # freed last, and still taken first
    assert set(pool.allocate(2)) == set(plain)
    assert pool.lookup(hashes) == cached


def test_evicted_block_is_not_found_any_more() -> None:
    pool = BlockPool(1)
    hashes = chain([1])
    pool.free(hold_cached(pool, *hashes))
    assert pool.num_cached_blocks == 1
    pool.allocate(1)
    assert pool.lookup(hashes) == []
    assert pool.num_cached_blocks == 0


# -- the prefix index ---------------------------------------------------------------------------


def test_lookup_ends_at_the_first_unknown_block() -> None:
    pool = BlockPool(4)
    hashes = chain([1], [2], [3])
    block_ids = pool.allocate(3)
    pool.register(block_ids[0], hashes[0])
    pool.register(block_ids[2], hashes[2])
    assert pool.lookup(hashes) == block_ids[:1]


def test_a_block_is_known_until_it_is_forgotten_and_told_by_its_holders() -> None:
    pool = BlockPool(4)
    hashes = chain([1], [2], [3])
    block_ids = hold_cached(pool, *hashes)
    pool.share(block_ids[:1])
    pool.free(block_ids[2:])
    assert all(map(pool.is_known, hashes))
    assert pool.forget(block_ids[:2]) == [block_ids[1]]
    assert pool.forget(block_ids[2:], num_holders=0) == [block_ids[2]]
    assert not any(map(pool.is_known, hashes))
    pool.check_invariants([block_ids[:2], block_ids[:1]])


def test_hash_depends_on_the_parent_and_on_every_token() -> None:
    same = hash_blocks(b"", [1, 2], 2)
    assert hash_blocks(b"", [1, 2, 3], 2) == same
    assert hash_blocks(b"", [0, 0, 1, 2], 2)[1:] != same
    assert hash_blocks(b"", [0, 0, 1, 2], 2)[1:] == hash_blocks(
        hash_blocks(b"", [0, 0], 2)[0], [1, 2], 2
    )
    assert hash_blocks(b"", [2, 1], 2) != same
    assert hash_blocks(b"", [1, 2 + 2**32], 2) != same  # 64 bits of each token id count


def test_equal_blocks_after_different_prefixes_have_different_hashes() -> None:
    left, right = chain([1, 2], [7, 7]), chain([3, 4], [7, 7])
    assert left[1] != right[1]


def test_second_block_with_the_same_content_is_tolerated_and_unlisted() -> None:
    pool = BlockPool(3)
    hashes = chain([5, 6])
    first, second = hold_cached(pool, *hashes), hold_cached(pool, *hashes)
    assert pool.lookup(hashes) == first
    assert pool.num_cached_blocks == 1
    pool.check_invariants([first, second])
    pool.free(second)  # not cached, so it is the next to be taken
    assert pool.allocate(1) == second
    assert pool.lookup(hashes) == first


def test_registering_a_block_twice_changes_nothing() -> None:
    pool = BlockPool(2)
    hashes = chain([5])
    block_ids = hold_cached(pool, *hashes)
    pool.register(block_ids[0], hashes[0])
    pool.check_invariants([block_ids])
    assert pool.lookup(hashes) == block_ids


def test_reset_prefix_cache_forgets_all_content_and_frees_nothing() -> None:
    pool = BlockPool(3)
    hashes = chain([1], [2])
    block_ids = hold_cached(pool, *hashes)
    pool.free(block_ids[1:])
    pool.reset_prefix_cache()
    assert pool.lookup(hashes) == []
    assert pool.num_cached_blocks == 0
    assert pool.num_free_blocks == 2
    pool.check_invariants([block_ids[:1]])


def test_without_prefix_caching_nothing_is_registered() -> None:
    pool = BlockPool(2, enable_prefix_caching=False)
    hashes = chain([1])
    hold_cached(pool, *hashes)
    assert pool.lookup(hashes) == []


# -- the books ----------------------------------------------------------------------------------


def _count_a_reference_too_many(pool: BlockPool) -> None:
    pool._ref_counts[1] += 1


def _hold_the_null_block(pool: BlockPool) -> None:
    pool._ref_counts[NULL_BLOCK] += 1


def _lose_a_free_block(pool: BlockPool) -> None:
    pool._free.popitem()


def _list_a_held_block_as_free(pool: BlockPool) -> None:
    pool._free[1] = None


def _drop_one_side_of_the_index(pool: BlockPool) -> None:
    pool._hash_of_block.clear()


def _point_the_index_elsewhere(pool: BlockPool) -> None:
    pool._block_of_hash.update(dict.fromkeys(pool._block_of_hash, 3))


@pytest.mark.parametrize(
    "corrupt",
    [
        _count_a_reference_too_many,
        _hold_the_null_block,
        _lose_a_free_block,
        _list_a_held_block_as_free,
        _drop_one_side_of_the_index,
        _point_the_index_elsewhere,
    ],
)
def test_corrupted_books_are_noticed(corrupt: Callable[[BlockPool], None]) -> None:
    pool = BlockPool(4)
    held = hold_cached(pool, *chain([1], [2]))
    pool.check_invariants([held])
    corrupt(pool)
    with pytest.raises(AssertionError):
        pool.check_invariants([held])


def test_leaked_block_is_noticed() -> None:
    pool = BlockPool(4)
    held = pool.allocate(2)
    with pytest.raises(AssertionError, match="reference counts"):
        pool.check_invariants([held[:1]])


# -- against a naive model ----------------------------------------------------------------------

HASHES = [bytes([n]) * 32 for n in range(6)]


class PoolMachine(RuleBasedStateMachine):
    """Sequences come, share, register and go; the model knows only sets and a clock."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(7)
        self.held: list[list[int]] = []
        self.freed_at: dict[int, int] = {}  # of free blocks that were held before
        self.content: dict[int, bytes] = {}  # of findable blocks
        self.clock = 0

    # The model.

    def free_blocks(self) -> set[int]:
        return set(range(1, 8)) - {block_id for block_ids in self.held for block_id in block_ids}

    def eviction_order(self) -> list[int]:
        """Free cached blocks, the one freed longest ago first."""
        return sorted(self.free_blocks() & set(self.content), key=self.freed_at.__getitem__)

    def block_with(self, content: bytes) -> int | None:
        return next((b for b, known in self.content.items() if known == content), None)

    # The rules.

    @rule(count=st.integers(0, 7))
    def allocate(self, count: int) -> None:
        free, evictable = self.free_blocks(), self.eviction_order()
        if count > len(free):
            with pytest.raises(AssertionError):
                self.pool.allocate(count)
            return
        taken = self.pool.allocate(count)
        num_plain = min(count, len(free) - len(evictable))
        assert len(set(taken)) == count
        assert set(taken[:num_plain]) <= free - set(evictable)
        assert taken[num_plain:] == evictable[: count - num_plain]
        for block_id in taken:
            self.content.pop(block_id, None)
        self.held.append(taken)

    @rule(hashes=st.lists(st.sampled_from(HASHES), unique=True))
    def share_a_known_prefix(self, hashes: list[bytes]) -> None:
        expected: list[int] = []
        for content in hashes:
            block_id = self.block_with(content)
            if block_id is None:
                break
            expected.append(block_id)
        found = self.pool.lookup(hashes)
        assert found == expected
        assert self.pool.num_free_among(found) == len(set(found) & self.free_blocks())
        self.pool.share(found)
        self.held.append(found)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        block_ids = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.pool.free(block_ids)
        for block_id in reversed(block_ids):
            self.clock += 1
            if block_id in self.free_blocks():
                self.freed_at[block_id] = self.clock

    @precondition(lambda self: any(self.held))
    @rule(data=st.data(), content=st.sampled_from(HASHES))
    def register(self, data: st.DataObject, content: bytes) -> None:
        in_use = sorted({b for block_ids in self.held for b in block_ids} - set(self.content))
        if in_use:
            block_id = data.draw(st.sampled_from(in_use))
            self.pool.register(block_id, content)
            if self.block_with(content) is None:
                self.content[block_id] = content

    @rule()
    def reset(self) -> None:
        self.pool.reset_prefix_cache()
        self.content.clear()

    @invariant()
    def books_balance(self) -> None:
        self.pool.check_invariants(self.held)
        assert self.pool.num_free_blocks == len(self.free_blocks())
        assert self.pool.num_cached_blocks == len(self.content)
        assert self.pool.usage == 1 - len(self.free_blocks()) / 7


PoolMachine.TestCase.settings = settings(stateful_step_count=40)
TestPoolAgainstNaiveModel = PoolMachine.TestCase
