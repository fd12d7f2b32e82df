"""What windows mean for blocks, against oracles that go through positions one by one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from compiledllm.scheduler.block_pool import NULL_BLOCK, BlockPool, hash_blocks
from compiledllm.scheduler.kv_manager import (
    NO_LIMIT,
    KVManager,
    first_seen_block,
    num_blocks_needed,
)
from compiledllm.types import Request, RequestStatus
from tests.support.requests import make_request

windows_of_groups = st.lists(st.integers(0, 20), min_size=1, max_size=3)
block_sizes = st.integers(1, 6)


def seen(window: int, position: int) -> range:
    """Positions that the token at `position` sees."""
    return range(max(position - window + 1, 0) if window else 0, position + 1)


def held(windows: list[int], block_size: int, position: int) -> int:
    """Blocks of all groups in which lies what is seen from `position`."""
    return sum(len({p // block_size for p in seen(w, position)}) for w in windows)


def request(num_tokens: int) -> Request:
    return make_request("r", range(num_tokens))


@given(st.integers(0, 20), st.integers(0, 60), block_sizes)
def test_first_seen_block(window: int, position: int, block_size: int) -> None:
    assert first_seen_block(window, position, block_size) == seen(window, position)[0] // block_size


@given(windows_of_groups, block_sizes, st.integers(1, 80))
def test_blocks_needed_are_the_most_that_are_seen_at_once(
    windows: list[int], block_size: int, num_tokens: int
) -> None:
    max_held = max(held(windows, block_size, position) for position in range(num_tokens))
    assert num_blocks_needed(windows, block_size, num_tokens) == max_held


@given(windows_of_groups, block_sizes, st.integers(1, 12))
def test_the_longest_request_fits_and_one_more_does_not(
    windows: list[int], block_size: int, num_blocks: int
) -> None:
    longest = KVManager(BlockPool(num_blocks), block_size, windows).max_request_tokens
    assert longest == 0 or num_blocks_needed(windows, block_size, longest) <= num_blocks
    if longest < NO_LIMIT:
        assert num_blocks_needed(windows, block_size, longest + 1) > num_blocks
    else:
        assert 0 not in windows


@given(windows_of_groups, block_sizes, st.integers(4, 40), st.integers(0, 60), st.integers(1, 60))
def test_a_chunk_is_as_long_as_the_pool_has_room_for(
    windows: list[int], block_size: int, num_blocks: int, num_computed: int, count: int
) -> None:
    kv = KVManager(BlockPool(num_blocks), block_size, windows)

    def held_with(chunk: int) -> int:
        end = -(-(num_computed + chunk) // block_size)
        return sum(end - seen(w, num_computed)[0] // block_size for w in windows)

    allowed = kv.max_chunk(num_computed, count)
    if any(windows):
        assert allowed == count or held_with(allowed + 1) > num_blocks
        assert allowed < 1 or held_with(allowed) <= num_blocks
    else:
        assert allowed == count


@given(windows_of_groups, block_sizes, st.integers(1, 12), st.data())
def test_the_longest_prefix_is_found_that_all_groups_have_the_blocks_for(
    windows: list[int], block_size: int, num_blocks: int, data: st.DataObject
) -> None:
    pool = BlockPool(100)
    kv = KVManager(pool, block_size, windows)
    owner = request(num_blocks * block_size)
    owner.status = RequestStatus.RUNNING
    kv.adopt_prefix(owner, kv.lookup_prefix(owner))
    kv.extend(owner, owner.num_tokens, num_blocks * len(windows))
    owner.num_computed_tokens = owner.num_tokens
    kv.register_full_blocks(owner)
    lost = data.draw(
        st.sets(
            st.tuples(st.integers(0, len(windows) - 1), st.integers(0, num_blocks - 1)), max_size=4
        )
    )
    pool.forget([owner.block_tables[group][index] for group, index in lost])

    def is_there(num_tokens: int) -> bool:
        return not any(
            (group, position // block_size) in lost
            for group, window in enumerate(windows)
            for position in seen(window, num_tokens)[:-1]
        )

    follower = request(owner.num_tokens + 1)
    prefix = kv.lookup_prefix(follower)
    wanted = max(n for n in range(num_blocks + 1) if is_there(n * block_size))
    assert [len(table) for table in prefix] == [wanted] * len(windows)
    for group, table in enumerate(prefix):
        first = seen(windows[group], wanted * block_size)[0] // block_size
        assert table[:first] == [NULL_BLOCK] * first
        assert table[first:] == owner.block_tables[group][first:wanted]
    kv.adopt_prefix(follower, prefix)
    follower.num_computed_tokens = wanted * block_size
    follower.status = RequestStatus.RUNNING
    kv.check_invariants([owner, follower])


def test_a_groups_blocks_are_not_found_for_another_group() -> None:
    pool = BlockPool(8)
    kv = KVManager(pool, 2, [0, 0])
    (block_id,) = pool.allocate(1)
    pool.register(block_id, hash_blocks(b"", [0, 1], 2)[0])  # of the first group alone
    assert kv.lookup_prefix(request(5)) == [[], []]
