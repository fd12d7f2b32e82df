"""Sums and gathers tensors over the ranks of a tensor-parallel model: ops opaque to the compiler.

A process belongs to at most one group of ranks, from `join` to `leave`. On a CPU the group uses
gloo. On GPUs the group gathers with NCCL, and sums with torch's operators on symmetric memory where
these are available and the tensor fits, otherwise with NCCL; CUDA graphs can capture both. Every
rank must call the same ops in the same order.
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
from typing import Any

import torch
from torch import Tensor

from compiledllm.kernels.ops import define

JOIN_TIMEOUT_S = 300.0  # for a rank to import torch and to connect
TIMEOUT_S = 1800.0  # for the slowest rank to arrive at a collective, such as after compiling
# Size of the symmetric memory: 2,048 tokens of width 4,096 in 16 bits.
_MAX_SYMMETRIC_BYTES = 16 * 2**20
# Up to this size a sum is one-shot: every rank reads the whole tensors of all ranks. A larger sum
# is two-shot: every rank sums a share of the elements, then reads the shares of the other ranks. On
# two H200s one-shot is faster at 8 rows of width 4,096, and two-shot from 32 rows on.
_MAX_ONE_SHOT_BYTES = 128 * 2**10
_GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
_SIOCGIFADDR = 0x8915  # Linux: the address of an interface
_ALIGNMENT = 16  # bytes per load of the operators on symmetric memory


@dataclass(frozen=True, slots=True)
class _Group:
    """The group of this process. buffer: symmetric memory, uint8; None: sums need NCCL or gloo."""

    rank: int
    size: int
    name: str
    buffer: Tensor | None


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
    buffer, reason = _symmetric_buffer(device, name) if is_cuda else (None, "gloo")
    _group = _Group(rank, size, name, buffer)
    return reason


def interface_to(host: str) -> str | None:
    """The network interface through which this machine reaches a host; None if it is not known.

    Only Linux tells, and only for the first IPv4 address of each interface.
    """
    if sys.platform != "linux":
        return None
    import fcntl

    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe,
    ):
        probe.connect((host, 1))  # sends nothing, but chooses this end's address
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

    By itself gloo takes the address of this machine's name, which is often the loopback's, where no
    other machine finds the rank.
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


def leave() -> None:
    """Leave the group, without waiting for ranks that may have ended.

    Does nothing in a process that belongs to no group.
    """
    import torch.distributed as dist

    global _group
    if _group is None:
        return
    _group = None
    is_nccl = dist.get_backend() == "nccl"
    abort = getattr(dist.distributed_c10d, "_abort_process_group", None) if is_nccl else None
    (abort or dist.destroy_process_group)()


def _symmetric_buffer(device: torch.device, group_name: str) -> tuple[Tensor | None, str]:
    """Memory that the group's GPUs map into each other, or None; and the name that `join` returns.

    If one rank cannot have the memory, no rank uses it, because all ranks must sum in the same way.
    """
    import torch.distributed as dist

    buffer, obstacle = None, ""
    try:
        symmetric_memory: Any = import_module("torch.distributed._symmetric_memory")
        buffer = symmetric_memory.empty(_MAX_SYMMETRIC_BYTES, dtype=torch.uint8, device=device)
        symmetric_memory.rendezvous(buffer, group=group_name)
    except Exception as error:  # no NVLink, another host, an old driver
        buffer, obstacle = None, str(error).strip().partition("\n")[0][:120]
    has_all = torch.tensor([buffer is not None], dtype=torch.int32, device=device)
    dist.all_reduce(has_all, op=dist.ReduceOp.MIN)
    if not has_all.item():
        return None, f"NCCL (no symmetric memory: {obstacle or 'another rank has none'})"
    return buffer, "symmetric memory"


def _all_reduce_fake(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@define("all_reduce", fake=_all_reduce_fake)
def all_reduce(x: Tensor) -> Tensor:
    """The sum of x over all ranks, a new tensor with the same bits on every rank."""
    import torch.distributed as dist

    assert _group is not None, "the process belongs to no group of ranks"
    num_bytes = x.numel() * x.element_size()
    fits = 0 < num_bytes <= _MAX_SYMMETRIC_BYTES and num_bytes % (_ALIGNMENT * _group.size) == 0
    if _group.buffer is not None and fits and x.dtype in (torch.bfloat16, torch.float32):
        return _sum_in_symmetric_memory(x, _group.buffer[:num_bytes].view(x.dtype), _group)
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


def _sum_in_symmetric_memory(x: Tensor, part: Tensor, group: _Group) -> Tensor:
    """The sum of x over all ranks. part: the beginning of the symmetric memory, as large as x.

    The operators wait for all ranks before and after the sum, so that the memory can be used again.
    """
    ops: Any = torch.ops.symm_mem
    part = part.view(x.shape)
    part.copy_(x)
    if x.numel() * x.element_size() <= _MAX_ONE_SHOT_BYTES:
        return ops.one_shot_all_reduce(part, "sum", group.name)  # type: ignore[no-any-return]
    return ops.two_shot_all_reduce_(part, "sum", group.name).clone()  # type: ignore[no-any-return]


def _all_gather_fake(x: Tensor, size: int) -> Tensor:
    return x.new_empty((size, *x.shape))


@define("all_gather", fake=_all_gather_fake)
def all_gather(x: Tensor, size: int) -> Tensor:
    """The tensors of all ranks, [size, *x.shape]. size: the number of ranks."""
    import torch.distributed as dist

    gathered = x.new_empty((size, *x.shape))
    gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(gathered.flatten(0, 1), x.contiguous())
    return gathered


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
