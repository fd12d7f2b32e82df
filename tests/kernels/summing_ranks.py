"""One of two processes, each with a GPU: `python -m tests.kernels.summing_ranks RANK PORT`.

Checks sums over ranks against float64, and replays a captured graph with ranks that are ahead and
behind. Raises AssertionError. The process must end by itself.
"""

from __future__ import annotations

import random
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from compiledllm.kernels import collectives, late_compiles
from compiledllm.kernels.collectives import all_reduce, gather_columns, join, leave, sum_and_norm

EPS = 1e-6
ROWS = (1, 8, 31, 64, 129, 512, 2100)  # up to several launches
WIDTHS = (2880, 4096, 8192, 12288)
DTYPES = (torch.bfloat16, torch.float16)
NUM_REPLAYS = 2000


def parts_of(rows: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Both ranks' parts, and a residual: the same numbers in both processes."""
    torch.manual_seed(rows * width)
    first, second, residual = torch.randn(3, rows, width, device="cuda").to(dtype)
    return first, second, residual


def assert_equal_on_ranks(x: Tensor) -> None:
    bits = x.contiguous().view(torch.int32)
    least, most = bits.clone(), bits.clone()
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    assert torch.equal(least, most), "the ranks have different bits"


def check_values(rank: int) -> None:
    for width in WIDTHS:
        for rows, dtype in ((rows, dtype) for rows in ROWS for dtype in DTYPES):
            first, second, residual = parts_of(rows, width, dtype)
            weight = torch.linspace(0.5, 1.5, width, device="cuda").to(dtype)
            total, normed = sum_and_norm((first, second)[rank], residual, weight, EPS, False)
            wanted = (first.double() + second.double() + residual.double()).to(dtype)
            unit = torch.finfo(dtype).eps
            torch.testing.assert_close(total, wanted, rtol=unit, atol=4 * unit)
            wide = total.double()
            wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * weight.double()
            torch.testing.assert_close(normed.double(), wide, rtol=1.6 * unit, atol=1e-6)
            for found in (total, normed, all_reduce((first, second)[rank])):
                assert_equal_on_ranks(found)
            if rows <= 64:
                columns = gather_columns((first, second)[rank])
                assert torch.equal(columns, torch.cat((first, second), dim=1))


def check_replays(rank: int) -> None:
    data = [parts_of(rows, 4096, torch.bfloat16) for rows in (1, 32, 200, 1, 2100)]
    weight = torch.ones(4096, dtype=torch.bfloat16, device="cuda")

    def step() -> list[Tensor]:
        found = []
        for *parts, residual in data:
            part = parts[rank]
            for _ in range(3):
                residual, normed = sum_and_norm(part, residual, weight, EPS, False)
                part = normed * (0.5 + rank)
            found += [residual, normed, all_reduce(part)]
        return found

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    graph.replay()
    wanted = [output.clone() for output in outputs]
    for output in wanted:
        assert_equal_on_ranks(output)
    num_wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    delays = random.Random(rank)
    for _ in range(NUM_REPLAYS):
        if delays.random() < 0.3:
            torch.cuda._sleep(delays.randrange(1, 300_000))
        graph.replay()
        for output, expected in zip(outputs, wanted, strict=True):
            num_wrong += (output.view(torch.int16) != expected.view(torch.int16)).sum()
    assert num_wrong.item() == 0


@torch.inference_mode()
def main(rank: int, port: int) -> None:
    torch.cuda.set_device(rank)
    timeout = timedelta(seconds=60)
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=rank == 0, timeout=timeout)
    join(rank, 2, store, torch.device("cuda", rank))
    assert collectives._group is not None and collectives._group.own_sums is not None
    with late_compiles.starting():
        check_values(rank)
    check_replays(rank)
    dist.barrier()
    if rank == 0:  # a sum that the other rank has no part in
        all_reduce(torch.ones(8, 4096, dtype=torch.bfloat16, device="cuda"))
        torch.cuda._sleep(1000)
        assert not torch.cuda.current_stream().query()
        collectives.abandon()
    torch.cuda.synchronize()
    leave()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
