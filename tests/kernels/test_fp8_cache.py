"""An FP8 KV cache against the same kernels on the dequantised cache, to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from compiledllm.kernels.attention import (
    kv_cache_shape,
    make_backend,
    paged_attention,
    rotate_and_store,
    store_kv,
)
from compiledllm.kernels.backend import FP8, MAX_FP8, ScoreOptions
from tests.kernels.test_paged_attention import (
    BACKENDS,
    CUDA,
    HALF,
    ROWS,
    Case,
    Step,
    make_step,
    scale_of,
)

SCALES = (0.25, 2.0)  # powers of two: then even the order of products changes no bit
MASKS = {
    "plain": Case([]),
    "window": Case([], sliding_window=9),
    "soft cap": Case([], soft_cap=1.5),
    "sinks in a window": Case([], sliding_window=17, has_sinks=True),
    # A scale that float32 holds: the interpreter does not round scalar arguments to float32.
    "mqa": Case([], heads="mqa", head_dim=80, scale=0.109375),
}

pytestmark = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def where_the_backend_runs(backend: str) -> Iterator[None]:
    torch.set_default_device("cuda" if backend != "torch" and CUDA else "cpu")
    yield
    torch.set_default_device("cpu")


def as_fp8(cache: Tensor, scales: Tensor) -> Tensor:
    wide = scales.view(2, 1, 1, 1, 1)
    return (cache.float() / wide).clamp(-MAX_FP8, MAX_FP8).to(FP8)


def attend(case: Case, step: Step, backend: str, scales: Tensor | None = None) -> Tensor:
    options = ScoreOptions(scale_of(case), case.sliding_window, case.soft_cap, step.sinks, scales)
    return paged_attention(step.query, step.kv_cache, step.attn, options, make_backend(backend))


def pair_of_steps(case: Case, backend: str, scales: Tensor) -> tuple[Step, Step]:
    """The same step on an FP8 cache and on the cache that it stands for."""
    step = make_step(case, backend)
    packed = as_fp8(step.kv_cache, scales)
    wide = (packed.float() * scales.view(2, 1, 1, 1, 1)).to(case.dtype)
    return replace(step, kv_cache=packed), replace(step, kv_cache=wide)


@pytest.mark.pairwise
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("mask", MASKS)
def test_attention_equals_that_on_the_dequantised_cache_to_the_bit(
    mask: str, rows: str, half: bool, backend: str
) -> None:
    dtype = HALF[backend] if half else torch.float32
    case = replace(MASKS[mask], rows=ROWS[rows](16)[-4:], dtype=dtype)
    scales = torch.tensor(SCALES)
    packed, wide = pair_of_steps(case, backend, scales)
    assert torch.equal(attend(case, packed, backend, scales), attend(case, wide, backend))


@pytest.mark.parametrize("rows", ROWS)
def test_any_scale_will_do(rows: str, backend: str) -> None:
    case = Case(ROWS[rows](16)[-4:])
    scales = torch.tensor([0.3, 1.7])
    packed, wide = pair_of_steps(case, backend, scales)
    out = attend(case, packed, backend, scales)
    torch.testing.assert_close(out, attend(case, wide, backend), atol=1e-5, rtol=1e-5)


SPECIAL = [448.0, 464.0, 465.0, 1e9, float("inf"), float("nan"), 2**-9, 2**-10, 3 * 2**-10, 0.0]


@pytest.mark.parametrize("half", [False, True])
def test_stored_values_are_rounded_to_nearest_and_clamped(half: bool, backend: str) -> None:
    dtype = HALF[backend] if half else torch.float32
    generator = torch.Generator("cpu").manual_seed(0)
    random = torch.randn(1014, generator=generator, device="cpu").tolist()
    x = torch.tensor([*SPECIAL, *random]).to(dtype).view(-1, 2, 8)
    x = torch.cat((x, -x, x * 100, x * 0.01))
    scales = torch.tensor(SCALES)
    kv_cache = torch.zeros(kv_cache_shape(len(x) // 16 + 2, 16, 2, 8), dtype=FP8)
    slots = torch.arange(len(x)) + 16
    store_kv(x, x, kv_cache, slots, make_backend(backend), scales)
    stored = kv_cache.float().flatten(1, 2)[:, 16 : 16 + len(x)]
    expected = as_fp8(torch.stack((x, x))[:, None], scales).float()[:, 0]
    torch.testing.assert_close(stored, expected, rtol=0, atol=0, equal_nan=True)
    assert stored.nan_to_num().abs().max() == MAX_FP8
    assert torch.equal(stored.isnan(), torch.stack((x, x)).isnan())  # an overflow is none


@pytest.mark.parametrize("with_norm", [False, True])
def test_fused_store_writes_what_the_plain_cache_would_hold(with_norm: bool, backend: str) -> None:
    if not make_backend(backend).fuses_rotation:
        pytest.skip("the backend does not fuse")
    torch.manual_seed(0)
    qkv, weight = torch.randn(5, 8 * 16), torch.randn(16) * 100 if with_norm else None
    angles = torch.rand(5, 1, 16)
    slots = torch.tensor([17, 40, -1, 63, 16])
    scales = torch.tensor(SCALES)
    plain = torch.zeros(kv_cache_shape(4, 16, 2, 16))
    packed = plain.to(FP8)
    arguments = (qkv, weight, weight, 1e-6, angles.cos(), angles.sin())
    queries = [
        rotate_and_store(*arguments, cache, slots, 4, its_scales)
        for cache, its_scales in ((plain, None), (packed, scales))
    ]
    assert torch.equal(*queries)
    assert torch.equal(packed.float()[:, 1:], as_fp8(plain, scales).float()[:, 1:])


def test_operators_are_sound(backend: str) -> None:
    scales = torch.tensor(SCALES)
    case = Case([(1, 17), (3, 5)])
    step, _ = pair_of_steps(case, backend, scales)
    options = ScoreOptions(0.125, 0, 0.0, None, scales)
    checks = {
        "paged_attention": (step.query, step.kv_cache, *step.attn, *options, backend),
        "store_kv": (
            *(torch.randn(2, 2, 64), torch.randn(2, 2, 64), step.kv_cache),
            *(torch.tensor([16, 40]), backend, scales),
        ),
    }
    for name, arguments in checks.items():
        operator = getattr(torch.ops.compiledllm, name).default
        results = torch.library.opcheck(operator, arguments, test_utils="test_faketensor")
        assert set(results.values()) == {"SUCCESS"}
