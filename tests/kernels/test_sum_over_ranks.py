"""Sums over ranks, fused with residual and norm: the CUDA kernel on a CPU, a thread per rank."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from compiledllm.kernels import collectives, sum_over_ranks_cuda
from compiledllm.kernels.collectives import _Group
from compiledllm.kernels.sum_over_ranks_cuda import RankSums, add_and_norm
from compiledllm.models.layers import norm as norm_layers
from compiledllm.models.layers.norm import PlusOneRMSNorm, RMSNorm
from tests.support.cuda_on_cpu import LoneCpuKernel

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or torch.cuda.is_available(),
    reason="runs a CUDA kernel on a CPU, with g++, where there is no GPU",
)

EPS = 1e-6
NUM_CHANNELS = 3


@pytest.fixture(autouse=True)
def cpu_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sum_over_ranks_cuda, "CudaKernel", LoneCpuKernel)
    monkeypatch.setattr(sum_over_ranks_cuda, "num_multiprocessors", lambda: NUM_CHANNELS)
    monkeypatch.setattr(sum_over_ranks_cuda, "INBOX_BYTES", 2**24)
    sum_over_ranks_cuda._one_rank.cache_clear()
    yield
    sum_over_ranks_cuda._one_rank.cache_clear()


class Ranks:
    """As many threads as ranks, which call the same function at the same time.

    parts, others: its arguments behind the RankSums: one for each rank, and those of all ranks.
    """

    def __init__(self, count: int) -> None:
        size = sum_over_ranks_cuda.INBOX_BYTES
        inboxes = [torch.empty(size, dtype=torch.uint8) for _ in range(count)]
        self.sums = [RankSums(rank, inboxes) for rank in range(count)]
        self._threads = ThreadPoolExecutor(count)

    def __call__(self, run: Callable[..., Any], parts: Sequence[Any], *others: Any) -> list[Any]:
        pending = [
            self._threads.submit(run, own, part, *others)
            for own, part in zip(self.sums, parts, strict=True)
        ]
        return [future.result(timeout=120) for future in pending]


def random_parts(num_ranks: int, num_rows: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(num_rows, width).to(dtype) for _ in range(num_ranks)]


def expected(
    parts: list[Tensor], residual: Tensor, weight: Tensor, adds_one: bool
) -> tuple[Tensor, Tensor]:
    """In float64, but that the sum is rounded as it is stored."""
    total = (sum(part.double() for part in parts) + residual.double()).to(residual.dtype)
    wide = total.double()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
    return total, normed * (weight.double() + adds_one)


def assert_near(actual: Tensor, expected: Tensor, roundings: float) -> None:
    digits = torch.finfo(actual.dtype).eps / 2
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=roundings * digits, atol=1e-6
    )


def gather(own: RankSums, part: Tensor, num_ranks: int) -> Tensor:
    return own.gather(part, part.new_empty(len(part), num_ranks * part.shape[1]))


CASES = [  # ranks, rows, width, dtype, adds_one
    (2, 1, 64, torch.bfloat16, False),
    (2, 5, 264, torch.float16, False),
    (2, 7, 4096, torch.bfloat16, True),
    (2, 40, 4096, torch.bfloat16, True),  # several launches
    (2, 70, 256, torch.bfloat16, False),  # more rows than a block stores ahead
    (2, 1, 8200, torch.bfloat16, False),
    (3, 4, 72, torch.float16, True),
    (4, 2, 256, torch.bfloat16, False),
]


@pytest.mark.parametrize(("num_ranks", "rows", "width", "dtype", "adds_one"), CASES, ids=str)
def test_all_ranks_get_the_sum_and_its_norm(
    num_ranks: int, rows: int, width: int, dtype: torch.dtype, adds_one: bool
) -> None:
    torch.manual_seed(rows)
    ranks = Ranks(num_ranks)
    weight = (torch.randn(width) / 4 + (not adds_one)).to(dtype)
    for _ in range(4):  # both buffers, twice
        parts, residual = random_parts(num_ranks, rows, width, dtype), torch.randn(rows, width)
        residual = residual.to(dtype)
        found = ranks(RankSums.sum_and_norm, parts, residual, weight, EPS, adds_one)
        total, normed = found[0]
        wanted, wanted_norm = expected(parts, residual, weight, adds_one)
        assert_near(total, wanted, 2)  # float32 sums may fall on the other side of a border
        assert_near(normed, expected([total], total * 0, weight, adds_one)[1], 1 if adds_one else 3)
        for other, other_norm in found[1:]:
            assert torch.equal(total, other) and torch.equal(normed, other_norm)
        assert wanted_norm.isfinite().all()


def test_sums_of_many_sizes_by_ranks_that_are_ahead_and_behind() -> None:
    """Sums with other numbers of rows and other widths share the memory in which ranks receive."""
    ranks = Ranks(2)
    torch.manual_seed(0)
    sizes = [(1, 64), (9, 128), (3, 8), (2, 1024), (1, 8), (4, 64), (12, 512)] * 4
    parts = [random_parts(2, *size, torch.bfloat16) for size in sizes]

    def run(own: RankSums, rank: int) -> list[Tensor]:
        found = []
        for index, part in enumerate(parts):
            time.sleep(0.003 * ((index * 7 + rank * 5) % 3))
            found.append(own.sum(part[rank]))
        return found

    for first, second, part in zip(*ranks(run, range(2)), parts, strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first, (part[0].float() + part[1].float()).bfloat16())


@pytest.mark.parametrize(
    ("num_ranks", "rows", "width", "dtype"),
    [(2, 1, 8, torch.bfloat16), (2, 5, 3000, torch.bfloat16), (3, 4, 2004, torch.float32)],
    ids=str,
)
def test_all_ranks_get_the_columns_of_all(
    num_ranks: int, rows: int, width: int, dtype: torch.dtype
) -> None:
    """In turns with sums, in the same memory."""
    torch.manual_seed(rows)
    ranks = Ranks(num_ranks)
    for _ in range(3):
        parts = random_parts(num_ranks, rows, width, dtype)
        found = ranks(gather, parts, num_ranks)
        for gathered in found:
            assert torch.equal(gathered, torch.cat(parts, dim=1))
        total, *_ = ranks(RankSums.sum, [torch.ones(7, 64).bfloat16()] * num_ranks)
        assert (total == num_ranks).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_any_numbers_arrive(dtype: torch.dtype) -> None:
    """Among them those whose bits stand for words that have not arrived."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype).view(2, 32, 1024)
    negative_zeros = torch.full((1, 1024), -0.0, dtype=dtype)
    ranks = Ranks(2)
    for part in (*every, negative_zeros):
        first, second = ranks(RankSums.sum, [part] * 2)
        torch.testing.assert_close(first, part + part, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(first.view(torch.int16), second.view(torch.int16))


def test_one_rank_adds_and_normalizes() -> None:
    torch.manual_seed(0)
    update, residual = random_parts(2, 200, 136, torch.bfloat16)
    weight = torch.randn(136).bfloat16()
    total, normed = add_and_norm(update, residual, weight, EPS, adds_one=False)
    wanted, _ = expected([update], residual, weight, adds_one=False)
    assert torch.equal(total, wanted)
    assert_near(normed, expected([total], total * 0, weight, adds_one=False)[1], 3)


class OneRank:
    """Stands in for `RankSums`: this rank's part is the sum."""

    def __init__(self, can_sum: bool) -> None:
        self._can_sum = can_sum
        self.sum_and_norm = add_and_norm

    def can_sum(self, part: Tensor) -> bool:
        return self._can_sum


@pytest.mark.parametrize("can_sum", [True, False])
@pytest.mark.parametrize("kind", [RMSNorm, PlusOneRMSNorm])
def test_norms_behind_a_sum_are_one_op(
    kind: type[RMSNorm], can_sum: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the kernel can sum the part or not; a norm made outside a group stays as it is."""
    torch.manual_seed(1)
    x, part = random_parts(2, 5, 64, torch.bfloat16)
    group = _Group(0, 1, "one", own_sums=OneRank(can_sum))  # type: ignore[arg-type]
    monkeypatch.setattr(collectives, "_lent_sum", lambda part, group: part)
    plain = make_norm(kind)
    monkeypatch.setattr(collectives, "_group", group)
    fused, wide = make_norm(kind), make_norm(kind, torch.float32)
    assert fused.is_fused and not plain.is_fused and not wide.is_fused
    monkeypatch.setattr(norm_layers, "all_reduce", lambda part: part)
    for actual, wanted in zip(fused.after_sum(x, part), plain.after_sum(x, part), strict=True):
        assert_near(actual, wanted, 4)
    compiled = torch.compile(type(fused).after_sum, fullgraph=True, backend="eager")
    for actual, wanted in zip(compiled(fused, x, part), fused.after_sum(x, part), strict=True):
        assert torch.equal(actual, wanted)


def make_norm(kind: type[RMSNorm], dtype: torch.dtype = torch.bfloat16) -> RMSNorm:
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    norm = kind((64,), EPS)
    torch.set_default_dtype(default)
    norm.weight.data.copy_(torch.linspace(-1, 1, 64))
    return norm


def test_what_the_kernel_does_not_sum() -> None:
    two, many = Ranks(2).sums[0], Ranks(5).sums[0]
    most = sum_over_ranks_cuda._MAX_SENT_BYTES // 4 // 2
    assert many.can_sum(torch.empty(most // 1024, 1024, dtype=torch.bfloat16))
    assert not many.can_sum(torch.empty(most // 1024 + 1, 1024, dtype=torch.bfloat16))
    assert two.can_sum(torch.empty(most, 1024, dtype=torch.bfloat16, device="meta"))
    assert not two.can_sum(torch.empty(1, 64))  # float32
    assert not two.can_sum(torch.empty(1, 20, dtype=torch.float16))
    assert not two.can_sum(torch.empty(1, 2**15, dtype=torch.float16))
    assert not two.can_sum(torch.empty(0, 64, dtype=torch.float16))
    assert two.can_gather(torch.empty(3, 5456, dtype=torch.float16))
    assert not two.can_gather(torch.empty(3, 2**15, dtype=torch.float16))
    assert not two.can_gather(torch.empty(1, 20, dtype=torch.float16))


def test_a_sum_ends_though_another_rank_has_ended() -> None:
    alone = Ranks(2).sums[0]
    thread = threading.Thread(target=alone.sum, args=[torch.ones(5, 64).bfloat16()], daemon=True)
    thread.start()
    thread.join(0.2)
    assert thread.is_alive()
    alone.abandon()
    thread.join(120)
    assert not thread.is_alive()
