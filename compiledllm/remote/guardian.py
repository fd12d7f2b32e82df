"""Kills what an engine's process leaves behind: `python guardian.py CONNECTION ENGINE_PID`.

The guardian is a process beside the engine's, in a session of its own. Once the client or the
engine is gone, the guardian kills the engine's process group: an engine that is loading, stopped or
hanging, and the compilers that the engine has started. It is a separate script so that it starts
quickly and uses little memory.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys

_PERIOD_MS = 500  # interval of checks of the parent process, which matter where pidfds are missing


def start_guardian(connection: int) -> None:
    """Make this process lead a process group, and start the guardian that ends the group."""
    with contextlib.suppress(OSError):  # this process already leads a group
        os.setsid()
    subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, str(connection), str(os.getpid())],
        pass_fds=[connection],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def guard(connection: int, engine: int) -> None:
    """Return once the connection's peer or the engine, which is this process's parent, is gone."""
    poller = select.poll()
    poller.register(connection, 0)  # poll always reports a hang-up
    with contextlib.suppress(AttributeError, OSError):  # only Linux has pidfds
        poller.register(os.pidfd_open(engine), select.POLLIN)
    while os.getppid() == engine and not poller.poll(_PERIOD_MS):
        pass


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the guardian ends once its work is done
    engine_pid = int(sys.argv[2])
    guard(int(sys.argv[1]), engine_pid)
    with contextlib.suppress(OSError):
        os.killpg(engine_pid, signal.SIGKILL)
