"""Loads the engines that a benchmark's options name."""

from __future__ import annotations

import fcntl
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from compiledllm.benchmarks.model import Model
from compiledllm.benchmarks.peers import CompiledLLM, Peer, make_other_peer, make_peer
from compiledllm.config import ConfigError


@contextmanager
def measuring(arguments: Namespace, model: Model) -> Iterator[list[Peer]]:
    """A context with the loaded engines.

    With --lock, loading shares the file's lock, and the context holds the lock alone. Processes
    that were started with the same file thus load together, and then measure one after another.
    """
    if arguments.lock and model.platform.is_cuda and "kv_cache_memory_bytes" not in model.options:
        raise ConfigError(
            "--lock needs --kv-cache-memory-bytes: engines that load together cannot measure how "
            "much memory is free"
        )
    with arguments.lock.open("a") if arguments.lock else nullcontext() as lock:
        if lock:
            fcntl.flock(lock, fcntl.LOCK_SH)
        peers = _load(arguments, model)
        if lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # gives up the shared lock while it waits
        yield peers


def _load(arguments: Namespace, model: Model) -> list[Peer]:
    """Load the engines. compiledllm compiles before the first request, even on a CPU."""
    model = model.with_defaults({"compile_when": "start"})
    names, others = list(dict.fromkeys(arguments.engine)), arguments.other
    taken = set(names)
    for label, _ in others:
        if label in taken:
            raise ConfigError(f"--other {label}=...: another engine of this name is measured, too")
        taken.add(label)
    started = [make_other_peer(label, python, model, len(taken)) for label, python in others]
    peers = [make_peer(name, model, len(taken), arguments.hf_max_batch_size) for name in names]
    for other in started:
        other.wait_until_ready()
    return peers + started


def by_sampling(peers: list[Peer], sampling: list[str]) -> list[Peer]:
    """A peer for each kind of sampling, all of one compiledllm; other engines only run greedily."""
    if sampling == ["greedy"]:
        return peers
    ours = [peer for peer in peers if isinstance(peer, CompiledLLM)]
    others = [peer for peer in peers if not isinstance(peer, CompiledLLM)]
    kinds = dict.fromkeys(sampling)
    return [peer.sampling_as(kind) for peer in ours for kind in kinds] + others
