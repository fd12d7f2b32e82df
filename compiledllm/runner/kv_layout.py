"""Decides which layers share a block table and which layers share a KV cache tensor.

Layers with the same window are divided into groups; all groups have the same size. A block belongs
to one group and holds `block_size` tokens of each layer of the group. The layers in the same column
of the table below share a tensor. All blocks therefore have the same size, and one pool serves all
groups.

Layers whose KV per token takes k times the bytes of the smallest layers' KV are in groups of their
own, whose blocks hold a k-th of the tokens. Such a group has k block tables. To the scheduler these
are k tables like all others; attention reads them as one table, whose entries alternate.

    column         0    1    2       one cache tensor per column
    group 0       L0   L1   L3       window of 1024 tokens: holds only the blocks in the window
    group 1       L4   L6   L7       window of 1024 tokens
    group 2       L2   L5    -       full attention

Layers that keep a state for each request have no place in the table. Layers that read the KV of an
earlier layer have its place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from compiledllm.choices import Choice
from compiledllm.config import ConfigError
from compiledllm.kernels.backend import AttentionBackend
from compiledllm.models.layer_cache import LayerCache, PagedKV, SharedKV, State
from compiledllm.models.spec import ModelSpec

MAX_GROUPS = 8  # bounded, because every step gathers a block table per group
_SPLITS = (1, 2, 4, 8)
_MAX_MEMORY_FACTOR = 1.05  # fewer groups may take this many times the minimum memory

Caches = Sequence[LayerCache]  # one per layer
_Paged = TypeVar("_Paged")
_State = TypeVar("_State")


class Place(NamedTuple):
    """The location of a layer's keys and values."""

    group: int  # index of the group
    column: int  # index of the column


@dataclass(frozen=True, slots=True)
class KVLayout:
    """How a model's layers are divided into groups and columns.

    windows: per group, the number of latest tokens that its layers see; 0: all. splits: per group,
    the number of its block tables; its blocks hold `block_size` / split tokens. places, caches: one
    per layer that has KV: where the layer's KV is, and what the layer keeps. columns: per column,
    the bytes of a block, divided by `block_size`. states: by layer, for layers that keep a state
    instead of KV.
    """

    windows: tuple[int, ...]
    splits: tuple[int, ...]
    places: tuple[Place, ...]
    caches: tuple[PagedKV, ...]
    columns: tuple[int, ...]
    states: dict[int, State] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Number of columns, which is the number of layers in a full group."""
        return len(self.columns)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token over all layers of a group with one block table."""
        return sum(self.columns)

    @property
    def windows_of_tables(self) -> tuple[int, ...]:
        """Per block table, the window of its group."""
        pairs = zip(self.windows, self.splits, strict=True)
        return tuple(window for window, split in pairs for _ in range(split))

    def block_sizes(self, block_size: int) -> list[int]:
        """Per group, the tokens of one of its blocks."""
        return [block_size // split for split in self.splits]

    @property
    def bytes_in_windows(self) -> int:
        """Bytes that a token takes in all groups while every window covers it."""
        return self.bytes_per_token * len(self.windows_of_tables)

    @property
    def bytes_past_windows(self) -> int:
        """Bytes that a token still takes when it has left every window."""
        return self.bytes_per_token * self.windows_of_tables.count(0)

    @property
    def bytes_per_request(self) -> int:
        """Bytes of one request's states, whatever its length."""
        return sum(state.bytes_per_request for state in self.states.values())

    def in_layer_order(
        self, paged: Iterable[_Paged], states: Iterable[_State]
    ) -> list[_Paged | _State]:
        """One item per layer, from the items of the layers with KV and of those with a state."""
        paged_items, state_items = iter(paged), iter(states)
        layers = range(len(self.places) + len(self.states))
        return [next(state_items) if i in self.states else next(paged_items) for i in layers]

    def block_bytes(self, block_size: int) -> int:
        """Bytes of one block, which are the same for all groups."""
        return self.bytes_per_token * block_size

    def __str__(self) -> str:
        groups = "group" if len(self.windows) == 1 else "groups"
        counts = Counter(self.windows).items()
        kinds = [f"{n} within {window} tokens" for window, n in counts if window]
        layers = "layer" if self.size == 1 else "layers"
        return ", ".join((f"{len(self.windows)} {groups} of {self.size} {layers}", *kinds))


def kv_layout(caches: Caches, max_len: int) -> KVLayout:
    """The layout with the fewest groups that takes nearly the minimum memory.

    Memory is that of a request of `max_len` tokens. All groups have the same size, so the last
    group of a window may have empty columns. A model gets a single group, with the largest window
    of its layers, if all windows are equal or if blocks of the layers cannot be equally large.
    """
    paged, splits = _paged(caches), _splits(caches)
    kinds: dict[tuple[int, int], list[int]] = {}  # window and split -> layers
    for index, cache in paged.items():
        # A window of `max_len` tokens or more never fills.
        window = cache.window if cache.window < max_len else 0
        kinds.setdefault((window, splits.get(index, 1)), []).append(index)
    windows = {window for window, _ in kinds}
    single = _layout([(0 if 0 in windows else max(windows), 1, list(paged))], caches)
    if len(windows) == 1 or not splits:
        return single
    layouts = [single]
    for size in range(1, max(map(len, kinds.values())) + 1):
        groups = [(*kind, part) for kind in kinds for part in _parts(kinds[kind], size)]
        if len(groups) <= MAX_GROUPS:
            layouts.append(_layout(groups, caches))
    costs = [_bytes_of_request(layout, max_len) for layout in layouts]
    affordable = (
        g for g, cost in zip(layouts, costs, strict=True) if cost <= _MAX_MEMORY_FACTOR * min(costs)
    )
    return min(affordable, key=lambda layout: len(layout.windows))


def choose_layout(
    spec: ModelSpec, max_len: int, backend: AttentionBackend
) -> tuple[KVLayout, Choice]:
    """The layout of the model's KV cache, and the reason for the choice."""
    caches = spec.layer_caches
    if not spec.attentions:
        raise ConfigError(f"{spec.architecture} without any attention layer is not supported")
    layout, reason = kv_layout(caches, max_len), "layers that see equally far share a block table"
    if not backend.reads_groups:
        layout, reason = whole_contexts(caches), f"{backend.name} reads whole contexts"
    elif spec.implementation == "transformers":
        layout, reason = whole_contexts(caches), "transformers' module is given one block table"
    elif not _splits(caches):
        reason = "one block table, as blocks of the layers cannot be equally large"
    elif max(layout.splits) > 1:
        reason = "blocks of equal bytes for layers whose KV differ in size"
    return layout, Choice(layout, reason)


def whole_contexts(caches: Caches) -> KVLayout:
    """A single group without a window: a request keeps all its blocks until it ends."""
    return _layout([(0, 1, list(_paged(caches)))], caches)


def _splits(caches: Caches) -> dict[int, int]:
    """Per layer with KV, its bytes per token as a multiple of the smallest layer's.

    Empty if a multiple is not one of _SPLITS, or if the layers' dtypes differ.
    """
    paged = _paged(caches)
    smallest = min(cache.bytes_per_token for cache in paged.values())
    splits = {index: cache.bytes_per_token / smallest for index, cache in paged.items()}
    are_whole = all(split in _SPLITS for split in splits.values())
    have_one_dtype = len({cache.dtype for cache in paged.values()}) == 1
    return {i: int(split) for i, split in splits.items()} if are_whole and have_one_dtype else {}


def _paged(caches: Caches) -> dict[int, PagedKV]:
    """The caches with KV, by layer."""
    return {index: cache for index, cache in enumerate(caches) if isinstance(cache, PagedKV)}


def _parts(layers: list[int], size: int) -> Iterator[list[int]]:
    return (layers[start : start + size] for start in range(0, len(layers), size))


def _layout(groups: list[tuple[int, int, list[int]]], caches: Caches) -> KVLayout:
    """Build the layout from the window, the split and the layer indices of each group."""
    paged = _paged(caches)
    places = {
        layer: Place(group, column)
        for group, (_, _, layers) in enumerate(groups)
        for column, layer in enumerate(layers)
    }
    columns = {
        places[layer].column: paged[layer].bytes_per_token // split
        for _, split, layers in groups
        for layer in layers
    }
    sources = {i: cache.layer for i, cache in enumerate(caches) if isinstance(cache, SharedKV)}
    layers = {layer: layer for layer in places} | sources
    return KVLayout(
        windows=tuple(window for window, _, _ in groups),
        splits=tuple(split for _, split, _ in groups),
        places=tuple(places[layers[layer]] for layer in sorted(layers)),
        caches=tuple(paged[layers[layer]] for layer in sorted(layers)),
        columns=tuple(columns[column] for column in sorted(columns)),
        states={i: cache for i, cache in enumerate(caches) if isinstance(cache, State)},
    )


def _bytes_of_request(layout: KVLayout, max_len: int) -> int:
    """KV memory of a request of `max_len` tokens."""
    return layout.bytes_per_token * sum(window or max_len for window in layout.windows_of_tables)
