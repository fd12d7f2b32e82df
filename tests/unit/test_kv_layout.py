"""Which layers share block tables and tensors: the published layouts, and any mix of windows."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compiledllm.config import ConfigError
from compiledllm.models.layer_cache import PagedKV
from compiledllm.models.spec import (
    AttentionSpec,
    LayerSpec,
    MlpSpec,
    ModelSpec,
    NormSpec,
    RopeSpec,
)
from compiledllm.runner import kv_cache
from compiledllm.runner.kv_cache import allocate_kv_caches
from compiledllm.runner.kv_layout import MAX_GROUPS, kv_layout, whole_contexts
from compiledllm.scheduler.kv_manager import num_blocks_needed

ATTENTION = AttentionSpec(4, 2, 8, 1.0, RopeSpec((1.0,) * 4))
LAYER = LayerSpec(32, ATTENTION, MlpSpec(64), NormSpec(1e-5))


def model(windows: list[int], head_dims: list[int] | None = None) -> ModelSpec:
    layers = tuple(
        dataclasses.replace(
            LAYER, mixer=dataclasses.replace(ATTENTION, sliding_window=w, head_dim=d)
        )
        for w, d in zip(windows, head_dims or [8] * len(windows), strict=True)
    )
    return ModelSpec("Any", 100, 32, layers, NormSpec(1e-5), True, 32768, "float32", (2,))


def pattern(num_layers: int, window: int, every: int) -> list[int]:
    """Each `every`th layer sees all."""
    return [0 if (index + 1) % every == 0 else window for index in range(num_layers)]


@pytest.mark.parametrize(
    ("windows", "max_len", "size", "groups"),
    [
        ([0] * 30, 8192, 30, (0,)),  # Llama
        ([4096] * 32, 32768, 32, (4096,)),  # Mistral
        ([4096] * 32, 4096, 32, (0,)),  # no context outgrows the window
        (pattern(26, 4096, 2), 8192, 13, (4096, 0)),  # Gemma 2
        (pattern(26, 512, 6), 32768, 4, (512,) * 6 + (0,)),  # Gemma 3 1B: 22 and 4
        (pattern(48, 1024, 6), 131072, 8, (1024,) * 5 + (0,)),  # Gemma 3 12B
        (pattern(62, 1024, 6), 131072, 10, (1024,) * 6 + (0,)),  # Gemma 3 27B: 52 and 10
        (pattern(36, 128, 2), 131072, 18, (128, 0)),  # gpt-oss 120B
        ([0, *[64] * 24], 32768, 4, (0,) + (64,) * 6),  # padded, rather than 25 groups
        ([115, 0], 120, 2, (0,)),  # a second table would save little here
    ],
    ids=str,
)
def test_published_layouts(
    windows: list[int], max_len: int, size: int, groups: tuple[int, ...]
) -> None:
    found = kv_layout(model(windows).layer_caches, max_len)
    assert (found.size, found.windows) == (size, groups)


def test_layers_with_kv_of_several_shapes_have_one_table() -> None:
    kept = model([64, 0, 64, 32], [8, 24, 8, 8]).layer_caches  # not a few times as large
    assert kv_layout(kept, 1024) == whole_contexts(kept)
    windowed = model([64, 32], [8, 24]).layer_caches
    assert kv_layout(windowed, 1024).windows == (64,)  # as far as any of them sees
    caches = allocate_kv_caches(kv_layout(kept, 1024), 3, 16, torch.device("cpu"))
    assert [cache.shape[-1] for cache in caches] == [8, 24, 8, 8]
    assert len({cache.data_ptr() for cache in caches}) == 4
    assert kv_layout(kept, 1024).bytes_per_token == (8 + 24 + 8 + 8) * 2 * 2 * 4


def gemma4(
    num_layers: int, every: int, window: int, heads: tuple[int, int], num_shared: int
) -> ModelSpec:
    """Heads of 256 with a window, of 512 without. heads: KV heads of the two kinds of layer."""
    layers: list[LayerSpec] = []
    for index, w in enumerate(pattern(num_layers, window, every)):
        attention = dataclasses.replace(
            ATTENTION,
            num_kv_heads=heads[w == 0],
            head_dim=256 if w else 512,
            sliding_window=w,
        )
        if index >= num_layers - num_shared:
            source = max(i for i in range(num_layers - num_shared) if layers[i].mixer == attention)
            attention = dataclasses.replace(attention, kv_layer=source)
        layers.append(dataclasses.replace(LAYER, mixer=attention))
    return dataclasses.replace(model([0]), layers=tuple(layers)).with_dtypes("bfloat16")


@pytest.mark.parametrize(
    ("spec", "size", "windows", "splits"),
    [
        (gemma4(30, 6, 1024, (8, 2), 0), 5, (1024,) * 5 + (0,), (2,) * 5 + (1,)),  # 26B-A4B
        (gemma4(60, 6, 1024, (16, 4), 0), 10, (1024,) * 5 + (0,), (2,) * 5 + (1,)),  # 31B
        (gemma4(42, 6, 512, (2, 2), 18), 4, (512,) * 5 + (0,), (1,) * 5 + (2,)),  # E4B
        (gemma4(35, 5, 512, (1, 1), 20), 3, (512,) * 4 + (0,), (1,) * 4 + (2,)),  # E2B
    ],
    ids=["26B-A4B", "31B", "E4B", "E2B"],
)
def test_kv_of_two_shapes_lies_in_blocks_of_equal_bytes(
    spec: ModelSpec, size: int, windows: tuple[int, ...], splits: tuple[int, ...]
) -> None:
    length, block_size = 32768, 32
    layout = kv_layout(spec.layer_caches, length)
    assert (layout.size, layout.windows, layout.splits) == (size, windows, splits)
    needed = num_blocks_needed(layout.windows_of_tables, block_size, length)
    kept = [cache for cache in spec.layer_caches if isinstance(cache, PagedKV)]
    least = sum(cache.bytes_per_token * (cache.window or length) for cache in kept)
    assert least < needed * layout.block_bytes(block_size) < 1.05 * least
    caches = allocate_kv_caches(layout, 3, block_size, torch.device("meta"))
    sizes = {16 if split == 2 else 32 for split in splits}
    assert {cache.shape[2] for cache in caches} == sizes
    assert len(caches) == len(spec.layers) == len(layout.places)
    for index, layer in enumerate(spec.layers):
        source = layer.mixer.kv_layer if isinstance(layer.mixer, AttentionSpec) else None
        if source is not None:
            assert layout.places[index] == layout.places[source]


def test_a_block_is_the_same_bytes_in_every_shape() -> None:
    layout = kv_layout(model([64, 0, 64, 64], [16, 8, 16, 16]).layer_caches, 1024)
    assert layout.splits == (2, 2, 2, 1)
    wide, narrow, *_ = allocate_kv_caches(layout, 5, 32, torch.device("cpu"))
    assert (wide.shape, narrow.shape) == ((2, 6, 16, 2, 16), (2, 6, 32, 2, 8))
    wide[:, 3] = 1
    assert narrow[:, 3].eq(1).all() and narrow.sum() == narrow[:, 3].numel()


def test_layers_with_kv_of_several_dtypes_have_one_table() -> None:
    kept = model([64, 0]).layer_caches
    mixed = [kept[0], dataclasses.replace(kept[1], dtype=torch.float8_e4m3fn)]
    layout = kv_layout(mixed, 1024)
    assert layout == whole_contexts(mixed)
    caches = allocate_kv_caches(layout, 3, 16, torch.device("cpu"))
    assert [cache.dtype for cache in caches] == [torch.float32, torch.float8_e4m3fn]
    assert sum(cache.nbytes for cache in caches) == 4 * layout.block_bytes(16)


@given(st.lists(st.sampled_from([0, 16, 64, 1000]), min_size=1, max_size=30), st.integers(1, 4000))
def test_every_layer_has_a_place_of_its_own_in_a_group_that_sees_as_far(
    windows: list[int], max_len: int
) -> None:
    groups = kv_layout(model(windows).layer_caches, max_len)
    assert len(set(groups.places)) == len(windows)
    assert {place.group for place in groups.places} == set(range(len(groups.windows)))
    assert len(groups.windows) <= MAX_GROUPS
    for window, place in zip(windows, groups.places, strict=True):
        reach = groups.windows[place.group]
        assert reach == 0 or reach >= window > 0
        assert place.column < groups.size
    tokens = sum(window or max_len for window in groups.windows)
    assert groups.size * tokens <= 1.05 * len(windows) * max_len


def test_blocks_are_as_large_as_the_tensors_that_hold_them() -> None:
    spec = model(pattern(26, 64, 6)).with_dtypes("float32", kv_dtype="float16")
    groups = kv_layout(spec.layer_caches, 32768)
    caches = allocate_kv_caches(groups, 9, 16, torch.device("cpu"))
    assert {cache.dtype for cache in caches} == {torch.float16}
    assert len(caches) == 26
    tensors = {cache.data_ptr(): cache for cache in caches}
    assert len(tensors) == groups.size
    held = sum(cache.nbytes for cache in tensors.values())
    assert held == 10 * groups.block_bytes(16)


def test_cache_larger_than_the_gpus_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(kv_cache, "lazy_zeros", fails)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (3 * 2**30, 80 * 2**30))
    layout = kv_layout(model([0]).layer_caches, 1024)
    with pytest.raises(ConfigError, match=r"cache of 77 blocks .* 3\.0 GiB .* use fewer"):
        kv_cache.allocate_kv_caches(layout, 77, 16, torch.device("cuda"))
