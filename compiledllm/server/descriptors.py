"""How many connections the process's limit on open files has room for."""

from __future__ import annotations

import os

from compiledllm.config import ConfigError

try:
    import resource
except ImportError:  # Windows has no such limit
    resource = None  # type: ignore[assignment]

MAX_DESCRIPTORS = 65_536  # the soft limit is raised to the hard limit, but to no more than this
MAX_CONNECTIONS = 8192  # default limit; each connection may hold a request of its own
RESERVED_DESCRIPTORS = 128  # for files, the engine's socket, helper processes and spare connections


def connection_limit(requested: int | None) -> int:
    """The maximum number of connections: the requested one, or what the descriptor limit allows.

    Raises ConfigError if the descriptor limit does not allow the requested number.
    """
    descriptors = _raise_descriptor_limit()
    room = max(descriptors - _num_open() - RESERVED_DESCRIPTORS, descriptors // 3)
    if requested is None:
        return min(room, MAX_CONNECTIONS)
    if not 1 <= requested <= room:
        raise ConfigError(
            f"--max-connections must be between 1 and {room} where {descriptors} files may be open "
            f"(`ulimit -n`), got {requested}"
        )
    return requested


def _raise_descriptor_limit() -> int:
    """Raise the descriptor limit as far as allowed and return the new limit."""
    if resource is None:
        return MAX_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    has_no_limit = hard == resource.RLIM_INFINITY
    wanted = MAX_DESCRIPTORS if has_no_limit else min(hard, MAX_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return MAX_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft


def _num_open() -> int:
    try:
        return len(os.listdir("/dev/fd"))
    except OSError:
        return 32
