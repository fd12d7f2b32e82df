"""Ends whatever an engine's process leaves behind: `python guardian.py CONNECTION ENGINE_PID`.

A process beside the engine's, in a session of its own. Once the server or the engine is gone, it
kills the engine's process group: an engine that loads, is stopped or hangs, and compilers that it
has started. A script of its own so that it starts in no time and holds nothing.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys

_PERIOD_MS = 500  # between looks at the engine, where it cannot be waited for


def start_guardian(connection: int) -> None:
    """Make this process the leader of a group that ends with it, or with the connection's peer."""
    with contextlib.suppress(OSError):  # it leads a group already
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
    """Return when the connection's peer or the engine, this process's parent, is gone."""
    poller = select.poll()
    poller.register(connection, 0)  # hanging up is always reported
    with contextlib.suppress(AttributeError, OSError):  # Linux
        poller.register(os.pidfd_open(engine), select.POLLIN)
    while os.getppid() == engine and not poller.poll(_PERIOD_MS):
        pass


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it ends when its work is done
    engine_pid = int(sys.argv[2])
    guard(int(sys.argv[1]), engine_pid)
    with contextlib.suppress(OSError):
        os.killpg(engine_pid, signal.SIGKILL)
