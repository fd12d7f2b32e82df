"""How layers share KV blocks: which layers have a block table in common, and which a cache tensor.

Layers with the same window form groups of one size. A block belongs to one group and holds
`block_size` tokens for each of the group's layers. The layers in the same column of all groups
share a tensor. So all blocks are alike, and one pool gives them to whichever group needs a block.

    column         0    1    2       a cache tensor each
    group 0       L0   L1   L3       sees 1024 tokens back: holds no more blocks than that takes
    group 1       L4   L6   L7       likewise
    group 2       L2   L5    -       sees all
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from compiledllm.config import Choice
from compiledllm.kernels.backend import AttentionBackend
from compiledllm.models.spec import ModelSpec

MAX_GROUPS = 8  # every step gathers block tables for every group
NEARLY = 1.05  # times the least memory, which is accepted for fewer groups


class Place(NamedTuple):
    """Where a layer's keys and values are."""

    group: int  # index of the block table
    column: int  # index of the cache tensor


@dataclass(frozen=True, slots=True)
class CacheGroups:
    """windows: per group, how many of the latest tokens its layers see; 0: all.

    places: per layer. Layers in the same column have KV of the same shape.
    """

    windows: tuple[int, ...]
    places: tuple[Place, ...]

    @property
    def size(self) -> int:
        """Number of cache tensors, which is the number of layers in a full group."""
        return 1 + max(place.column for place in self.places)

    def kv_bytes_per_token(self, spec: ModelSpec, itemsize: int) -> int:
        """Bytes of a token in a block, over all layers of a group. itemsize: bytes per element."""
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

    Groups are as large as each other, so one may lack layers. A model whose layers all see equally
    far, or have KV of several shapes, has a single group, which sees as far as any of its layers.
    """
    kinds: dict[int, list[int]] = {}  # window -> layers
    for index, layer in enumerate(spec.layers):
        window = layer.attn.sliding_window
        kinds.setdefault(window if window < max_len else 0, []).append(index)  # else it never ends
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
    """Which layers of the model share block tables, and why."""
    groups, reason = cache_groups(spec, max_len), "layers that see equally far share a block table"
    if not backend.reads_groups:
        groups, reason = whole_contexts(spec), f"{backend.name} reads whole contexts"
    elif spec.implementation == "transformers":
        groups, reason = whole_contexts(spec), "transformers' module is given one block table"
    elif not has_one_kv_shape(spec):
        reason = "one block table, as the layers' KV differ in shape"
    return groups, Choice(groups, reason)


def whole_contexts(spec: ModelSpec) -> CacheGroups:
    """One block table for all layers, whose blocks are never given back before the request ends."""
    return _of([(0, list(range(len(spec.layers))))])


def has_one_kv_shape(spec: ModelSpec) -> bool:
    return len({(layer.attn.num_kv_heads, layer.attn.head_dim) for layer in spec.layers}) == 1


def _parts(layers: list[int], size: int) -> Iterator[list[int]]:
    return (layers[start : start + size] for start in range(0, len(layers), size))


def _of(groups: list[tuple[int, list[int]]]) -> CacheGroups:
    """groups: for each its window and the indices of its layers."""
    places = {
        layer: Place(group, column)
        for group, (_, layers) in enumerate(groups)
        for column, layer in enumerate(layers)
    }
    windows = tuple(window for window, _ in groups)
    return CacheGroups(windows, tuple(places[layer] for layer in sorted(places)))


def _layers_times_tokens(groups: CacheGroups, max_len: int) -> int:
    """Memory of a request of `max_len` tokens, in tokens of one layer."""
    return groups.size * sum(window or max_len for window in groups.windows)
