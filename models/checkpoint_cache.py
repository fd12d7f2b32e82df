"""The cache of converted checkpoints: folders that appear complete or not at all.

A folder is filled under a scratch name and then renamed. The process that fills the folder holds a
file lock, so that other processes, also on other machines, notice if it has been killed. A finished
folder has a list of checksums, because a crash of the machine may leave zeros in files.
"""

from __future__ import annotations

import contextlib
import functools
import json
import mmap
import os
import re
import shutil
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from compiledllm.log import log

DIGESTS = ".digests.json"
_LOCK, _NEW_LOCK = ".lock", ".lock.new"
_BLOCK = 2**24  # bytes per checksum; threads compute the checksums of a file's blocks
_MAX_THREADS = 8
_SCRATCH = re.compile(r"\..+\.\d+\.[0-9a-f]{8}")  # as `temporary_name` makes them
_ABANDONED_S = 3600.0  # a scratch folder without a lock counts as abandoned after this time


def temporary_name(name: str) -> str:
    """A hidden file name that is unique to this call, and that `sweep` recognises."""
    return f".{name}.{os.getpid()}.{os.urandom(4).hex()}"


# Making


@contextlib.contextmanager
def scratch(parent: Path, name: str) -> Iterator[Path]:
    """A context with a new, locked folder, removed at the end unless `publish` has renamed it."""
    folder = parent / temporary_name(name)
    folder.mkdir(parents=True)
    lock = _hold_lock(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def publish(folder: Path, target: Path) -> None:
    """Write a scratch folder's checksums and rename it. Raises OSError if `target` exists."""
    _write_digests(folder)
    for name in (_LOCK, _NEW_LOCK):
        (folder / name).unlink(missing_ok=True)
    folder.rename(target)


def sweep(*parents: Path) -> None:
    """Remove the scratch folders in `parents` whose processes have ended."""
    for parent in parents:
        with contextlib.suppress(OSError):
            for path in list(parent.iterdir()):
                if _SCRATCH.fullmatch(path.name) and _is_abandoned(path):
                    log.info("removing %s, left behind by a process that was ended", path)
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _hold_lock(folder: Path) -> int:
    """A descriptor that holds the folder's lock; the system releases the lock with the process."""
    unlocked = folder / _NEW_LOCK  # other processes find the lock file only once it is locked
    lock = os.open(unlocked, os.O_RDWR | os.O_CREAT, 0o600)
    if _try_lock(lock):
        unlocked.rename(folder / _LOCK)
    return lock


def _try_lock(lock: int) -> bool:
    """Try to take the lock. False if another process holds it or the file system has no locks."""
    try:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True


def _is_abandoned(path: Path) -> bool:
    try:
        lock = os.open(path / _LOCK, os.O_RDWR)
    except OSError:  # no lock file: the file system may have no locks
        newest = max(p.lstat().st_mtime for p in (path, *path.glob("*")))
        return time.time() - newest > _ABANDONED_S
    try:
        return _try_lock(lock)
    finally:
        os.close(lock)


# Checking


def _write_digests(folder: Path) -> None:
    files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    digests = {path.name: _digest(path) for path in files}
    unfinished = folder / temporary_name(DIGESTS)
    with unfinished.open("w", encoding="utf-8") as file:
        json.dump(digests, file)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(folder / DIGESTS)


def damage(folder: Path) -> str | None:
    """A description of a file that is missing or differs from its checksums; None if none does.

    A folder without checksums counts as undamaged. Each process checks a folder only once, unless
    the size or time of a file changes.
    """
    names = sorted(p.name for p in folder.iterdir() if p.is_file() and p.name != DIGESTS)
    stats = tuple((name, *_identity(folder / name)) for name in names)
    return _damage(folder, stats)


def adopt(folder: Path) -> None:
    """Write the checksums of a folder that an older version made, if the folder is writable."""
    if not (folder / DIGESTS).exists():
        with contextlib.suppress(OSError):
            _write_digests(folder)


def _identity(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


@functools.lru_cache(maxsize=64)
def _damage(folder: Path, _stats: tuple[tuple[str, int, int], ...]) -> str | None:
    try:
        known = json.loads((folder / DIGESTS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        return f"{folder / DIGESTS} cannot be read ({error})"
    for name, digest in known.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if _digest(path) != digest:
            return f"{path} is damaged: its checksums are not those it was written with"
    return None


def _digest(path: Path) -> list[int]:
    """The size in bytes, then the CRC-32 of each block."""
    size = path.stat().st_size
    if not size:
        return [0]
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        view = memoryview(data)
        starts = range(0, size, _BLOCK)
        with ThreadPoolExecutor(min(_MAX_THREADS, len(starts))) as threads:
            sums = list(threads.map(lambda start: _checksum(view, start), starts))
        view.release()
    return [size, *sums]


def _checksum(view: memoryview, start: int) -> int:
    with view[start : start + _BLOCK] as block:
        return zlib.crc32(block)
