"""The helper process, which tries untrusted grammars. `compiler.Compiler` starts the process.

`python -m compiledllm.grammars.helper FD...` gets one socket per worker. The first message on the
first socket is the vocabulary, and the answer says whether llguidance supports it. Then this
process forks a worker for each socket, and a new one whenever a worker dies; a fork takes
milliseconds because the vocabulary's tables exist already. A worker that crashes or exceeds its
memory or time does not affect the other workers. All processes end when the sockets are closed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
import traceback
from typing import Any, NoReturn

from compiledllm.grammars.frames import TOO_LATE, receive, send
from compiledllm.grammars.library import Vocabulary, make_tokenizer
from compiledllm.grammars.matcher import initial_matcher
from compiledllm.grammars.stack import TRIAL_BYTES, call_with_stack
from compiledllm.grammars.text import Writer
from compiledllm.grammars.walk import find_dead_end
from compiledllm.structured_outputs import StructuredOutputsParams

_MAX_EXTRA_BYTES = 2**30  # of address space, for the grammars of one worker
_CAUSES = {
    signal.SIGALRM: TOO_LATE,
    signal.SIGSEGV: "it is nested too deep",
    signal.SIGBUS: "it is nested too deep",
    signal.SIGABRT: "it takes too much memory",
    signal.SIGKILL: "it takes too much memory",
}
_PR_SET_PDEATHSIG = 1


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is for the parent
    connections = [socket.socket(fileno=int(number)) for number in sys.argv[1:]]
    first = receive(connections[0])
    if first is None:
        return
    vocabulary = Vocabulary(first["tokenizer_json"], first["size"], tuple(first["eos_token_ids"]))
    try:
        tokenizer = make_tokenizer(vocabulary)
    except ValueError as error:
        send(connections[0], {"error": str(error)})
        return
    send(connections[0], {"pid": os.getpid()})
    keep_workers(connections, tokenizer)


def keep_workers(connections: list[socket.socket], tokenizer: Any) -> None:
    """Fork a worker for each socket, report and replace workers that a signal has killed.

    Returns when a worker exits, because then its socket is closed.
    """
    workers = {fork_worker(connection, tokenizer): connection for connection in connections}
    while True:
        pid, status = os.wait()
        connection = workers.pop(pid)
        if not os.WIFSIGNALED(status):
            return
        cause = _CAUSES.get(signal.Signals(os.WTERMSIG(status)), "its compilation crashed")
        with contextlib.suppress(OSError):
            send(connection, {"died": cause})
        workers[fork_worker(connection, tokenizer)] = connection


def fork_worker(connection: socket.socket, tokenizer: Any) -> int:
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        work(connection, tokenizer, parent)
    return pid


def work(connection: socket.socket, tokenizer: Any, parent: int) -> NoReturn:
    """The life of a worker: set its limits, compile until the socket is closed, and exit."""
    try:
        with contextlib.suppress(OSError, AttributeError):  # Linux only: end with the parent
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(0)
        _limit_memory()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # hides the library's crash messages
        call_with_stack(TRIAL_BYTES, answer_all, connection, tokenizer)
    except OSError:
        pass
    except BaseException:
        traceback.print_exc()
        os.kill(os.getpid(), signal.SIGTERM)
    os._exit(0)


def answer_all(connection: socket.socket, tokenizer: Any) -> None:
    """Answer requests until the socket is closed. A timer kills the worker at the time limit."""
    while (message := receive(connection)) is not None:
        signal.setitimer(signal.ITIMER_REAL, message["limit_s"])
        answer = compiled(message["fields"], tokenizer)
        signal.setitimer(signal.ITIMER_REAL, 0)
        send(connection, answer)


def compiled(fields: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """The answer to a request: {"text", "ignored"}, {"error"} or {"died"}.

    fields: those of `StructuredOutputsParams`.
    """
    try:
        writer = Writer(tokenizer)
        params = StructuredOutputsParams(**fields)
        text = writer.text_of(params)
        start = initial_matcher(text, tokenizer)
        if params.grammar is not None:
            find_dead_end(start)
    except ValueError as error:
        return {"error": str(error)}
    except MemoryError:
        return {"died": _CAUSES[signal.SIGABRT]}
    return {"text": text, "ignored": writer.ignored[:20]}


def _limit_memory() -> None:
    """Limit the address space, so that a huge grammar kills its worker and not the machine."""
    import resource

    with contextlib.suppress(OSError, ValueError), open("/proc/self/statm") as statm:
        size = int(statm.read().split()[0]) * resource.getpagesize() + _MAX_EXTRA_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    main()
