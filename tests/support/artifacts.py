"""Artifacts that starts leave in threads."""

from __future__ import annotations

import threading


def wait_until_kept() -> None:
    """Wait until every start of this process has written its artifact."""
    for thread in threading.enumerate():
        if thread.name == "keep":
            thread.join()
