"""Decides which layers share a block table and which layers share a KV cache tensor.

Layers with the same window are divided into groups; all groups have the same size. A block belongs
to one group and holds `block_size` tokens of each layer of the group. The layers in the same column
of the table below share a tensor. All blocks therefore have the same size, and one pool serves all
groups.

    column         0    1    2       one cache tensor per column
    group 0       L0   L1   L3       window of 1024 tokens: holds only the blocks in the window
    group 1       L4   L6   L7       window of 1024 tokens
    group 2       L2   L5    -       full attention

Layers that keep a state for each request have no place in the table.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from compiledllm.choices import Choice
from compiledllm.config import ConfigError
from compiledllm.kernels.backend import AttentionBackend
from compiledllm.models.layer_cache import LayerCache, PagedKV, State
from compiledllm.models.spec import ModelSpec

MAX_GROUPS = 8  # bounded, because every step gathers a block table per group
_MAX_MEMORY_FACTOR = 1.05  # fewer groups may take this many times the minimum memory

Caches = Sequence[LayerCache]  # one per layer
_Paged = TypeVar("_Paged")
_State = TypeVar("_State")


class Place(NamedTuple):
    """The location of a layer's keys and values."""

    group: int  # index of the block table
    column: int  # index of the cache tensor


@dataclass(frozen=True, slots=True)
class KVLayout:
    """How a model's layers are divided into groups and columns.

    windows: per group, the number of latest tokens that its layers see; 0: all. places: one per
    layer that has KV. columns: per column, the cache that all its layers keep, but for their
    windows. states: by layer, for layers that keep a state instead.
    """

    windows: tuple[int, ...]
    places: tuple[Place, ...]
    columns: tuple[PagedKV, ...]
    states: dict[int, State] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Number of cache tensors, which is the number of layers in a full group."""
        return len(self.columns)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token over all layers of a group."""
        return sum(cache.bytes_per_token for cache in self.columns)

    @property
    def bytes_in_windows(self) -> int:
        """Bytes that a token takes in all groups while every window covers it."""
        return self.bytes_per_token * len(self.windows)

    @property
    def bytes_past_windows(self) -> int:
        """Bytes that a token still takes when it has left every window."""
        return self.bytes_per_token * self.windows.count(0)

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
        """Bytes of one block, which holds `block_size` tokens of all layers of a group."""
        return self.bytes_per_token * block_size

    def __str__(self) -> str:
        groups = "group" if len(self.windows) == 1 else "groups"
        counts = Counter(self.windows).items()
        kinds = [f"{n} within {window} tokens" for window, n in counts if window]
        layers = "layer" if self.size == 1 else "layers"
        return ", ".join((f"{len(self.windows)} {groups} of {self.size} {layers}", *kinds))


def kv_layout(caches: Caches, max_len: int) -> KVLayout:
    """The fewest groups with which a request of `max_len` tokens takes nearly the least memory.

    All groups have the same size, so the last group of a window may have empty columns. A model
    gets a single group, with the largest window of its layers, if all windows are equal or the
    layers' caches differ in shape or dtype.
    """
    kinds: dict[int, list[int]] = {}  # window -> layers
    for index, cache in _paged(caches).items():
        # A window of `max_len` tokens or more never fills.
        kinds.setdefault(cache.window if cache.window < max_len else 0, []).append(index)
    single = _layout([(0 if 0 in kinds else max(kinds), list(_paged(caches)))], caches)
    if len(kinds) == 1 or not have_one_shape(caches):
        return single
    layouts = [single]
    for size in range(1, max(map(len, kinds.values())) + 1):
        groups = [(window, part) for window in kinds for part in _parts(kinds[window], size)]
        if len(groups) <= MAX_GROUPS:
            layouts.append(_layout(groups, caches))
    costs = [_layers_times_tokens(layout, max_len) for layout in layouts]
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
    elif not have_one_shape(caches):
        reason = "one block table, as the layers' KV differ in shape"
    return layout, Choice(layout, reason)


def whole_contexts(caches: Caches) -> KVLayout:
    """A single group without a window: a request keeps all its blocks until it ends."""
    return _layout([(0, list(_paged(caches)))], caches)


def have_one_shape(caches: Caches) -> bool:
    """Whether all KV is equal but for the windows, so that layers can share a tensor."""
    paged = _paged(caches).values()
    return len({(cache.shape(num_blocks=1, block_size=1), cache.dtype) for cache in paged}) == 1


def _paged(caches: Caches) -> dict[int, PagedKV]:
    """The caches with KV, by layer."""
    return {index: cache for index, cache in enumerate(caches) if isinstance(cache, PagedKV)}


def _parts(layers: list[int], size: int) -> Iterator[list[int]]:
    return (layers[start : start + size] for start in range(0, len(layers), size))


def _layout(groups: list[tuple[int, list[int]]], caches: Caches) -> KVLayout:
    """Build the layout from the window and the layer indices of each group."""
    places = {
        layer: Place(group, column)
        for group, (_, layers) in enumerate(groups)
        for column, layer in enumerate(layers)
    }
    paged = _paged(caches)
    columns = {place.column: paged[layer] for layer, place in places.items()}
    return KVLayout(
        windows=tuple(window for window, _ in groups),
        places=tuple(places[layer] for layer in sorted(places)),
        columns=tuple(columns[column] for column in sorted(columns)),
        states={i: cache for i, cache in enumerate(caches) if isinstance(cache, State)},
    )


def _layers_times_tokens(layout: KVLayout, max_len: int) -> int:
    """KV memory of a request of `max_len` tokens, in units of one token of one layer."""
    return layout.size * sum(window or max_len for window in layout.windows)
