"""The folders in which this user's compiled code and converted models are kept. Knows no torch.

Whoever can write to a folder of compiled code can run code as this user, so a folder is used only
if nobody else can. A folder that cannot be used costs a warning and a cold start, never the engine.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from compiledllm.log import log

# The compilers' variables, and their folders in ours. Inductor sets Triton's variable for the whole
# process, to a folder in the system's temporary directory, where a reboot would lose all kernels.
COMPILERS = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
_MIN_FREE_BYTES = 64 * 2**20  # a compiler needs some room even for a small model
_ABANDONED_S = 3600.0  # the writer of an unfinished file of this age has died


def cache_dir() -> Path:
    """$COMPILEDLLM_CACHE_DIR, or else `compiledllm` in $XDG_CACHE_HOME or in ~/.cache."""
    if chosen := os.environ.get("COMPILEDLLM_CACHE_DIR"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "compiledllm"


def compiled_dir() -> Path:
    """Where compiled code is kept."""
    return cache_dir() / "compiled"


def is_disabled() -> bool:
    """Whether the user has disabled caching: starts neither use nor keep files of other starts."""
    return os.environ.get("COMPILEDLLM_DISABLE_CACHE", "") not in ("", "0")


def use_compiler_caches() -> None:
    """Make Inductor and Triton keep their files in our folder, unless the user chose folders.

    Both compilers read their variable at each use, so the call must only precede the first compile.
    """
    for variable, name in COMPILERS.items():
        if not os.environ.get(variable):
            with contextlib.suppress(OSError):  # the compilers themselves report a full disk
                os.environ[variable] = str(writable_folder(name))


def writable_folder(name: str) -> Path:
    """The folder `name` of compiled code, or a temporary folder of this process, with a warning.

    Raises OSError if there is no room even for a temporary folder.
    """
    return _usable(compiled_dir() / name)


@functools.cache
def _usable(folder: Path) -> Path:
    reason = why_not_writable(folder)
    if reason is None:
        return folder
    _warn_once(reason)
    return temporary_folder(folder.name)


def temporary_folder(name: str) -> Path:
    """A new private folder, which the end of the process removes. Raises OSError."""
    temporary = tempfile.mkdtemp(prefix=f"compiledllm-{name}-")
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    return Path(temporary)


def why_not_writable(folder: Path) -> str | None:
    """Make a private folder, if it does not exist. Returns why it cannot be used, or None."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if reason := why_not_trusted(folder):
            return reason
        if not os.access(folder, os.W_OK | os.X_OK):
            return f"{folder} is read-only"
        free = shutil.disk_usage(folder).free
    except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home
        return str(error)
    return None if free >= _MIN_FREE_BYTES else f"the disk of {folder} is full"


def why_not_trusted(path: Path, any_owner: bool = False) -> str | None:
    """The reason why code in this file or folder may be another user's, or None.

    Only the owner may have write access, and must be this user or the administrator. any_owner: the
    user has named the folder, so its owner may be anybody. Raises OSError if there is no such path.
    """
    found = path.stat()
    if not any_owner and found.st_uid not in (os.geteuid(), 0):
        return f"{path} belongs to another user (uid {found.st_uid})"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others may write to {path} (chmod go-w would mend that)"
    return None


class Folder(NamedTuple):
    """A folder of kept files. is_named: the user has named it, so files may have any owner."""

    path: Path
    is_named: bool = False


def folders_of(named: str | None, *ours: Path) -> list[Folder]:
    """Where kept files are looked for: the folder that the user names, if any, then `ours`."""
    return [*([Folder(Path(named), is_named=True)] if named else []), *map(Folder, ours)]


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, which replaces `path` once it is complete and on the disk. Raises OSError.

    Until then, the file's name begins with a dot and ends in the suffix of `path`.
    """
    unfinished = path.with_name(f".{os.getpid()}.{os.urandom(4).hex()}{path.suffix}")
    try:
        file = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        with open(file, "wb") as writer:
            yield writer
            writer.flush()
            os.fsync(writer.fileno())
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def remove_surplus(folder: Path, suffix: str, max_files: int) -> None:
    """Keep the `max_files` files of this suffix that were used last; remove all others.

    Unfinished files are removed if they are abandoned.
    """
    with contextlib.suppress(OSError):
        found = [(path.stat().st_mtime, path) for path in folder.glob(f"*{suffix}")]
        finished = sorted(pair for pair in found if not pair[1].name.startswith("."))
        old = time.time() - _ABANDONED_S
        left = [path for used, path in found if path.name.startswith(".") and used < old]
        for path in [*left, *(path for _, path in finished[:-max_files])]:
            path.unlink(missing_ok=True)


@functools.cache
def _warn_once(reason: str) -> None:
    log.warning("what is compiled is not kept for the next start: %s", reason)
