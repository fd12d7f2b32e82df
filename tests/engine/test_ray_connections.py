"""How an actor's connection proves that it is the expected one."""

from __future__ import annotations

import socket
import time
from threading import Thread

from compiledllm.engine.ray_ranks import TOKEN_BYTES, accepted

TOKEN = bytes(range(TOKEN_BYTES))


def test_a_token_may_arrive_in_parts_and_a_wrong_token_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(30)
        stranger = socket.create_connection(listener.getsockname())
        stranger.sendall(bytes(TOKEN_BYTES))
        actor = socket.create_connection(listener.getsockname())
        actor.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def send_parts() -> None:
            actor.sendall(TOKEN[:10])
            time.sleep(0.2)
            actor.sendall(TOKEN[10:] + b"after")

        sender = Thread(target=send_parts)
        sender.start()
        with stranger, actor, accepted(listener, TOKEN) as connection:
            sender.join()
            assert connection.recv(16) == b"after"
            assert connection.getpeername() == actor.getsockname()
            assert stranger.recv(1) == b""
