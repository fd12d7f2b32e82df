"""The package's logger: plain lines on stderr, unless the host application configured logging."""

from __future__ import annotations

import logging

log = logging.getLogger("compiledllm")


def show_logs(level: int = logging.INFO) -> None:
    """Send the package's log lines to stderr, once, if nobody else handles them."""
    if not log.handlers and not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s %(asctime)s %(message)s", "%H:%M:%S"))
        log.addHandler(handler)
        log.propagate = False
    if log.level == logging.NOTSET:
        log.setLevel(level)
