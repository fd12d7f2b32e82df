"""Decides which layers share a block table and which layers share a KV cache tensor.

Layers with the same window are divided into groups; all groups have the same size. A block belongs
to one group and holds `block_size` tokens of each layer of the group. The layers in the same column
of the table below share a tensor. All blocks therefore have the same size, and one pool serves all
groups.

    column         0    1    2       one cache tensor per column
    group 0       L0   L1   L3       window of 1024 tokens: holds only the blocks in the window
    group 1       L4   L6   L7       window of 1024 tokens
    group 2       L2   L5    -       full attention
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from compiledllm.config import Choice
from compiledllm.kernels.backend import AttentionBackend
from compiledllm.models.spec import ModelSpec

MAX_GROUPS = 8  # bounded, because every step gathers a block table per group
NEARLY = 1.05  # accept up to this many times the minimum memory for fewer groups


class Place(NamedTuple):
    """The location of a layer's keys and values."""

    group: int  # index of the block table
    column: int  # index of the cache tensor


@dataclass(frozen=True, slots=True)
class CacheGroups:
    """windows: per group, the number of latest tokens that its layers see; 0: all.

    places: one per layer. Layers in the same column have keys and values of the same shape.
    """

    windows: tuple[int, ...]
    places: tuple[Place, ...]

    @property
    def size(self) -> int:
        """Number of cache tensors, which is the number of layers in a full group."""
        return 1 + max(place.column for place in self.places)

    def kv_bytes_per_token(self, spec: ModelSpec, itemsize: int) -> int:
        """KV bytes of one token over all layers of a group. itemsize: bytes per element."""
        layers = dict(zip((p.column for p in self.places), spec.layers, strict=True))
        return sum(2 * layer.attn.kv_size * itemsize for layer in layers.values())

    def __str__(self) -> str:
        groups = "group" if len(self.windows) == 1 else "groups"
        counts = Counter(self.windows).items()
        kinds = [f"{n} within {window} tokens" for window, n in counts if window]
        layers = "layer" if self.size == 1 else "layers"
        return ", ".join((f"{len(self.windows)} {groups} of {self.size} {layers}", *kinds))


def cache_groups(spec: ModelSpec, max_len: int) -> CacheGroups:
    """The fewest groups with which a request of `max_len` tokens takes nearly the least memory.

    All groups have the same size, so the last group of a window may have empty columns. A model
    gets a single group, with the largest window of its layers, if all windows are equal or the
    layers' keys and values differ in shape.
    """
    kinds: dict[int, list[int]] = {}  # window -> layers
    for index, layer in enumerate(spec.layers):
        window = layer.attn.sliding_window
        # A window of `max_len` tokens or more never fills.
        kinds.setdefault(window if window < max_len else 0, []).append(index)
    single = _of([(0 if 0 in kinds else max(kinds), list(range(len(spec.layers))))])
    if len(kinds) == 1 or not has_one_kv_shape(spec):
        return single
    found = [single]
    for size in range(1, max(map(len, kinds.values())) + 1):
        groups = [(window, part) for window in kinds for part in _parts(kinds[window], size)]
        if len(groups) <= MAX_GROUPS:
            found.append(_of(groups))
    costs = [_layers_times_tokens(groups, max_len) for groups in found]
    good = (g for g, cost in zip(found, costs, strict=True) if cost <= NEARLY * min(costs))
    return min(good, key=lambda groups: len(groups.windows))


def choose_groups(
    spec: ModelSpec, max_len: int, backend: AttentionBackend
) -> tuple[CacheGroups, Choice]:
    """The model's groups, and the reason for the choice."""
    groups, reason = cache_groups(spec, max_len), "layers that see equally far share a block table"
    if not backend.reads_groups:
        groups, reason = whole_contexts(spec), f"{backend.name} reads whole contexts"
    elif spec.implementation == "transformers":
        groups, reason = whole_contexts(spec), "transformers' module is given one block table"
    elif not has_one_kv_shape(spec):
        reason = "one block table, as the layers' KV differ in shape"
    return groups, Choice(groups, reason)


def whole_contexts(spec: ModelSpec) -> CacheGroups:
    """A single group without a window: a request keeps all its blocks until it ends."""
    return _of([(0, list(range(len(spec.layers))))])


def has_one_kv_shape(spec: ModelSpec) -> bool:
    return len({(layer.attn.num_kv_heads, layer.attn.head_dim) for layer in spec.layers}) == 1


def _parts(layers: list[int], size: int) -> Iterator[list[int]]:
    return (layers[start : start + size] for start in range(0, len(layers), size))


def _of(groups: list[tuple[int, list[int]]]) -> CacheGroups:
    """Build CacheGroups from the window and the layer indices of each group."""
    places = {
        layer: Place(group, column)
        for group, (_, layers) in enumerate(groups)
        for column, layer in enumerate(layers)
    }
    windows = tuple(window for window, _ in groups)
    return CacheGroups(windows, tuple(places[layer] for layer in sorted(places)))


def _layers_times_tokens(groups: CacheGroups, max_len: int) -> int:
    """KV memory of a request of `max_len` tokens, in units of one token of one layer."""
    return groups.size * sum(window or max_len for window in groups.windows)
