"""Crash records: JSON files about how an engine ended, readable only by their owner.

A record holds ids, counts, times and error texts, never prompts or generated text.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from compiledllm.log import log

MAX_RECORDS = 20
MAX_AGE_S = 30 * 86_400.0


def write_crash_record(folder: Path, record: dict[str, object]) -> Path | None:
    """Write a record and delete old ones. If writing fails, log the reason and return None."""
    name = f"crash-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{time.time_ns() % 10**9:09}.json"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = folder / name
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump(record, file, indent=1)
    except OSError as problem:
        log.error("the crash record cannot be written to %s (%s)", folder, problem)
        return None
    log.error("crash record: %s", path)
    tidy_crash_records(folder)
    return path


def tidy_crash_records(folder: Path) -> None:
    """Keep the newest `MAX_RECORDS` younger than `MAX_AGE_S`, readable only by their owner."""
    try:
        if not folder.is_dir():
            return
        folder.chmod(0o700)
        dated = sorted((path.stat().st_mtime, path) for path in folder.glob("crash-*.json"))
        oldest = time.time() - MAX_AGE_S
        for index, (written, path) in enumerate(reversed(dated)):
            if index >= MAX_RECORDS or written < oldest:
                path.unlink(missing_ok=True)
            else:
                path.chmod(0o600)
    except OSError as problem:
        log.warning("crash records in %s cannot be tidied (%s)", folder, problem)
