"""Collectives of a tensor-parallel model: all-reduce, all-gather and broadcast over the ranks.

A process belongs to at most one group of ranks, from `join` to `leave`. On a CPU the group uses
gloo. Where GPUs map each other's memory, `sum_over_ranks_cuda` sums small tensors (between two
ranks, tensors of any size), and torch's operators on symmetric memory sum larger ones. NCCL does
the rest. CUDA graphs can capture sums and gathers. Every rank must call the same collectives in the
same order.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compiledllm.kernels.ops import define
from compiledllm.platform import can_overlap_kernels

if TYPE_CHECKING:
    from compiledllm.kernels.sum_over_ranks_cuda import RankSums

JOIN_TIMEOUT_S = 300.0  # time for a rank to import torch and to connect
TIMEOUT_S = 1800.0  # time for the slowest rank to reach a collective, for example after compiling
# Symmetric memory of torch's operators: 8,192 tokens of width 4,096 in 16 bits.
_MAX_SYMMETRIC_BYTES = 64 * 2**20
# Up to this size a sum is one-shot: every rank reads the whole tensors of all ranks. A larger sum
# is two-shot: every rank sums a share of the elements, then reads the shares of the other ranks. On
# two H200s one-shot is faster at 8 rows of width 4,096, and two-shot from 32 rows on.
_MAX_ONE_SHOT_BYTES = 128 * 2**10
_GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
_SIOCGIFADDR = 0x8915  # Linux: the address of an interface
_ALIGNMENT = 16  # bytes per load of the operators on symmetric memory


@dataclass(frozen=True, slots=True)
class _Group:
    """The group of this process.

    buffer: symmetric memory, uint8; None: sums need NCCL or gloo. own_sums: sums by our kernel.
    """

    rank: int
    size: int
    name: str
    buffer: Tensor | None = None
    own_sums: RankSums | None = None


_group: _Group | None = None


def make_store(size: int, host: str, port: int | None = None) -> Any:
    """The store through which `size` ranks find each other.

    port: the port at which rank 0 listens; None: this process is rank 0 and listens at a free port,
    which is the `port` of the returned store.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    timeout = timedelta(seconds=JOIN_TIMEOUT_S)
    is_first = port is None
    return TCPStore(
        host, port or 0, size, is_master=is_first, timeout=timeout, wait_for_workers=False
    )


def join(rank: int, size: int, store: Any, device: torch.device) -> str:
    """Join the group of ranks. Returns the name of the implementation of sums, for reports.

    store: see `make_store`. Waits for the other ranks; raises RuntimeError if a rank does not join.
    """
    import torch.distributed as dist

    global _group
    assert _group is None, "the process belongs to a group already"
    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.cuda.set_device(device)
    with _gloo_on(interface_to(store.host)):
        dist.init_process_group(
            "nccl" if is_cuda else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=TIMEOUT_S),
            device_id=device if is_cuda else None,
        )
    name = dist.group.WORLD.group_name  # type: ignore[union-attr]
    if not is_cuda:
        _group = _Group(rank, size, name)
        return "gloo"
    _group, sums_by = _group_on_gpu(rank, size, name, device)
    return sums_by


def interface_to(host: str) -> str | None:
    """The network interface through which this machine reaches a host; None if it is not known.

    It is known on Linux only, and only from the first IPv4 address of each interface.
    """
    if sys.platform != "linux":
        return None
    import fcntl

    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe,
    ):
        probe.connect((host, 1))  # for UDP sends nothing, but chooses the local address
        own = socket.inet_aton(probe.getsockname()[0])
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an address
                asked = struct.pack("256s", name.encode())
                if fcntl.ioctl(probe, _SIOCGIFADDR, asked)[20:24] == own:
                    return name
    return None


@contextlib.contextmanager
def _gloo_on(interface: str | None) -> Iterator[None]:
    """Inside the context, gloo connects through this interface, unless the environment names one.

    By default, gloo uses the address that this machine's host name resolves to. That is often the
    loopback address, through which other machines cannot reach the rank.
    """
    if interface is None or _GLOO_INTERFACE in os.environ:
        yield
        return
    os.environ[_GLOO_INTERFACE] = interface
    try:
        yield
    finally:
        del os.environ[_GLOO_INTERFACE]


def is_member() -> bool:
    """Whether the process belongs to a group."""
    return _group is not None


def abandon() -> None:
    """End sums that wait for other ranks; their results are arbitrary.

    To be called if another rank has ended, or before this rank ends.
    """
    if _group is not None and _group.own_sums is not None:
        _group.own_sums.abandon()


def leave() -> None:
    """Leave the group, without waiting for ranks that may have ended.

    Does nothing in a process that belongs to no group.
    """
    import torch.distributed as dist

    global _group
    if _group is None:
        return
    abandon()
    _group = None
    is_nccl = dist.get_backend() == "nccl"
    abort = getattr(dist.distributed_c10d, "_abort_process_group", None) if is_nccl else None
    (abort or dist.destroy_process_group)()


def _group_on_gpu(rank: int, size: int, name: str, device: torch.device) -> tuple[_Group, str]:
    """The group, and the name that `join` returns.

    If one rank cannot have symmetric memory or the kernel, no rank uses it, because all ranks must
    sum in the same way.
    """
    import torch.distributed as dist

    buffer, sums, obstacle = None, None, ""
    try:
        buffer, inboxes = _symmetric_memory(size, name, device)
        sums = _own_sums(rank, inboxes)
    except Exception as error:  # no NVLink, another host, an old driver
        obstacle = str(error).strip().partition("\n")[0][:120]
    # After this reduction, all ranks have also prepared their memory.
    have_all = torch.tensor([buffer is not None, sums is not None], device=device).int()
    dist.all_reduce(have_all, op=dist.ReduceOp.MIN)
    have_buffer, have_sums = have_all.tolist()
    if not have_buffer:
        reason = obstacle or "another rank has none"
        return _Group(rank, size, name), f"NCCL (no symmetric memory: {reason})"
    group = _Group(rank, size, name, buffer, sums if have_sums else None)
    return group, "a kernel on symmetric memory" if have_sums else "symmetric memory"


def _symmetric_memory(
    size: int, group_name: str, device: torch.device
) -> tuple[Tensor, list[Tensor]]:
    """Memory that the group's GPUs map into each other, uint8.

    Returns this rank's memory for torch's operators, and the memory of each rank in which it
    receives the summands of the others.
    """
    from compiledllm.kernels.sum_over_ranks_cuda import INBOX_BYTES

    symmetric_memory: Any = import_module("torch.distributed._symmetric_memory")
    num_bytes = _MAX_SYMMETRIC_BYTES + INBOX_BYTES
    memory = symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=device)
    handle = symmetric_memory.rendezvous(memory, group=group_name)
    of_ranks = [handle.get_remote_tensor(r, (num_bytes,), torch.uint8) for r in range(size)]
    of_ranks[handle.rank] = memory
    return memory[:_MAX_SYMMETRIC_BYTES], [rank[_MAX_SYMMETRIC_BYTES:] for rank in of_ranks]


def _own_sums(rank: int, inboxes: list[Tensor]) -> RankSums | None:
    from compiledllm.kernels.sum_over_ranks_cuda import RankSums

    return RankSums(rank, inboxes) if can_overlap_kernels() else None


def _all_reduce_fake(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@define("all_reduce", fake=_all_reduce_fake)
def all_reduce(x: Tensor) -> Tensor:
    """The sum of x over all ranks, a new tensor with the same bits on every rank."""
    assert _group is not None, "the process belongs to no group of ranks"
    sums = _group.own_sums
    if sums is not None and sums.can_sum(rows := x.reshape(-1, x.shape[-1])):
        return sums.sum(rows).view(x.shape)
    total = _lent_sum(x, _group)
    is_lent = _group.buffer is not None and total.data_ptr() == _group.buffer.data_ptr()
    return total.clone() if is_lent else total


def _lent_sum(x: Tensor, group: _Group) -> Tensor:
    """The sum of x over all ranks. The result may lie in `group.buffer`, until the next sum.

    torch's operators wait for all ranks before and after the sum, so the next sum may overwrite the
    buffer.
    """
    import torch.distributed as dist

    num_bytes = x.numel() * x.element_size()
    fits = 0 < num_bytes <= _MAX_SYMMETRIC_BYTES and num_bytes % (_ALIGNMENT * group.size) == 0
    if group.buffer is None or not fits or x.dtype not in (torch.bfloat16, torch.float32):
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total
    ops: Any = torch.ops.symm_mem
    part = group.buffer[:num_bytes].view(x.dtype).view(x.shape)
    part.copy_(x)
    if num_bytes <= _MAX_ONE_SHOT_BYTES:
        return ops.one_shot_all_reduce(part, "sum", group.name)  # type: ignore[no-any-return]
    return ops.two_shot_all_reduce_(part, "sum", group.name)  # type: ignore[no-any-return]


def fuses_norm(weight: Tensor) -> bool:
    """Whether `sum_and_norm` can be called in this process for a norm's weight [width]."""
    if _group is None or _group.own_sums is None:
        return False
    from compiledllm.kernels.sum_over_ranks_cuda import can_normalize

    return can_normalize(weight.view(1, -1))


def _sum_and_norm_fake(
    part: Tensor, residual: Tensor, weight: Tensor, eps: float, adds_one: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(residual), torch.empty_like(residual)


@define("sum_and_norm", fake=_sum_and_norm_fake)
def sum_and_norm(
    part: Tensor, residual: Tensor, weight: Tensor, eps: float, adds_one: bool
) -> tuple[Tensor, Tensor]:
    """`residual` plus the sum of `part` over all ranks, and its RMSNorm, both [rows, width].

    adds_one: whether the norm's weight is stored minus one. `fuses_norm(weight)` must be True. All
    ranks get the same bits.
    """
    from compiledllm.kernels.sum_over_ranks_cuda import add_and_norm

    assert _group is not None and _group.own_sums is not None
    if _group.own_sums.can_sum(part):
        return _group.own_sums.sum_and_norm(part, residual, weight, eps, adds_one)
    return add_and_norm(_lent_sum(part, _group), residual, weight, eps, adds_one)


def gather_columns(part: Tensor, out: Tensor | None = None) -> Tensor:
    """The tensors [rows, width] of all ranks side by side, [rows, ranks * width].

    out: written and returned if given. All ranks get the same bits. Not for compiled code.
    """
    import torch.distributed as dist

    assert _group is not None, "the process belongs to no group of ranks"
    num_rows, width = part.shape
    if out is None:
        out = part.new_empty((num_rows, _group.size * width))
    sums = _group.own_sums
    if sums is not None and out.is_contiguous() and sums.can_gather(part):
        return sums.gather(part, out)
    gathered = part.new_empty((_group.size, num_rows, width))
    gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(gathered.flatten(0, 1), part.contiguous())
    return out.copy_(gathered.transpose(0, 1).flatten(1))


def broadcast(x: Tensor) -> None:
    """Overwrite x with rank 0's x."""
    import torch.distributed as dist

    dist.broadcast(x, src=0)


def max_over_ranks(value: float, device: torch.device) -> float:
    """The largest of the ranks' values. Waits for the device."""
    import torch.distributed as dist

    largest = torch.tensor([value], dtype=torch.float64, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return float(largest.item())
