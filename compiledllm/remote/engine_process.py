"""The engine's process: how it starts and how it reports failures. `engine_loop` does the work.

Heavy modules are imported only once the connection is being read: a process whose client is gone
ends at once, whatever it is doing, and a loading process answers pings. An unexpected exception in
any thread ends the process; the client starts another one.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from compiledllm import bytecode
from compiledllm.config import ConfigError, EngineConfig
from compiledllm.log import log, show_logs
from compiledllm.remote.guardian import start_guardian
from compiledllm.remote.lifeline import Lifeline
from compiledllm.remote.running_log import RunningLog
from compiledllm.remote.wire import Failed, Ping, Start

if TYPE_CHECKING:
    from compiledllm.engine.core import EngineCore


def run(load: Callable[[EngineConfig], EngineCore]) -> None:
    """The whole life of the process. load: makes the engine from its config."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    connection.set_inheritable(False)
    running = RunningLog(int(sys.argv[2])) if len(sys.argv) > 2 else RunningLog.create()
    os.set_inheritable(running.fd, False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is for the client
    show_logs()
    lifeline = Lifeline(connection)
    try:
        start_guardian(connection.fileno())
        lifeline.start()
        start = _first_message(lifeline)
        log.setLevel(start.log_level)
        core = load(EngineConfig.from_options(**start.options))
        gc.collect()
        gc.freeze()  # models, kernels and graphs are permanent, so collections skip them
        from compiledllm.remote.engine_loop import EngineLoop

        loop = EngineLoop(core, lifeline, running)
    except ConfigError as error:
        lifeline.send(Failed(str(error), is_config=True))
        sys.exit(1)
    except BaseException as error:
        lifeline.fail(error, [], {})
    lifeline.crash_folder = Path(start.crash_folder)
    loop.run()


def _first_message(lifeline: Lifeline) -> Start:
    while isinstance(message := lifeline.inbox.get(), Ping):
        pass
    assert isinstance(message, Start), message
    return message


def load_core(config: EngineConfig) -> EngineCore:
    with bytecode.kept(config.compile.artifact_dir):
        from compiledllm.engine import cuda_context
        from compiledllm.ledger import Ledger

        ledger = Ledger()
        with ledger.phase("import"):
            cuda_context.make_in_thread(config.model.device)
            from compiledllm.engine.core import EngineCore
            from compiledllm.engine.startup import plan

        with ledger.phase("plan"):
            planned = plan(config)
        return EngineCore(planned, ledger)


if __name__ == "__main__":
    run(load_core)
