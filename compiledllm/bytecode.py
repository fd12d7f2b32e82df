"""Caches the bytecode of packages that are installed without it, so that one start compiles them.

    with kept():
        import torch

Images often hold packages without bytecode, in folders that cannot be written or under
PYTHONDONTWRITEBYTECODE. Every process then compiles 700 modules to import torch, and 2400 with
torch's compiler. Within `kept`, Python keeps bytecode in our cache folder, never beside packages.
With a folder of `compiledllm build`, Python looks there first (`bytecode_file.py`), so not even the
first start compiles modules. Where torch has bytecode, nothing changes; where Python can write
bytecode beside torch, our cache folder stays empty.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from importlib.machinery import PathFinder
from pathlib import Path

from compiledllm.caches import compiled_dir, why_not_trusted, why_not_writable

_VARIABLE = "PYTHONPYCACHEPREFIX"
# Packages that torch and its compiler import, and "os" for the standard library.
_PACKAGES = ("os", "torch", "numpy", "triton", "sympy", "mpmath", "networkx", "jinja2")
_MIN_CORES = 4  # on fewer cores, other processes would delay this one
_MAX_PROCESSES = 16
_MIN_FREE_BYTES = 256 * 2**20  # twice as much as all bytecode of these packages


@contextmanager
def kept(artifact_dir: str | None = None) -> Iterator[None]:
    """A context in which this process and its children keep and find bytecode in our folder.

    artifact_dir: a folder of `compiledllm build`, whose bytecode this process uses first.
    """
    folder = _folder()
    if not _torch_lacks_bytecode() or sys.pycache_prefix not in (None, folder):
        yield  # in the second case, the user has chosen a folder
        return
    with _found_in(artifact_dir) as is_found, _kept_in(folder, compiles_ahead=not is_found):
        yield


def _found_in(artifact_dir: str | None) -> AbstractContextManager[bool]:
    if not artifact_dir:
        return nullcontext(False)
    from compiledllm.bytecode_file import found_in

    return found_in(Path(str(artifact_dir)))


@contextmanager
def _kept_in(folder: str | None, compiles_ahead: bool) -> Iterator[None]:
    """Let Python keep bytecode in `folder`; None: change nothing."""
    if folder is None:
        yield
        return
    before = sys.pycache_prefix, sys.dont_write_bytecode
    # On a full disk, older versions of Python leave truncated files, which break later imports.
    has_room = shutil.disk_usage(folder).free >= _MIN_FREE_BYTES
    sys.pycache_prefix, sys.dont_write_bytecode = folder, not has_room
    os.environ[_VARIABLE] = folder
    try:
        if compiles_ahead and has_room:
            _compile_ahead(folder)
        yield
    except EOFError:  # a truncated file
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        sys.pycache_prefix, sys.dont_write_bytecode = before
        if before[0] is None:
            os.environ.pop(_VARIABLE, None)


@functools.cache
def _folder() -> str | None:
    """The folder for bytecode; None if Python needs none, or if the folder cannot be used."""
    source = _source_of("torch")
    if source is None or not _torch_lacks_bytecode():
        return None
    if not sys.dont_write_bytecode and os.access(source.parent, os.W_OK):
        return None
    # Python takes bytecode for current if the source's time and size match. Images may set equal
    # times for all versions of a package, so the folder's name depends on the versions.
    site = source.parent.parent
    versions = sorted(name for name in os.listdir(site) if name.endswith(".dist-info"))
    digest = hashlib.sha256("\n".join([str(site), *versions]).encode()).hexdigest()[:16]
    folder = compiled_dir() / "bytecode" / digest
    with suppress(OSError):
        if why_not_writable(folder) is None or why_not_trusted(folder) is None:
            return str(folder)
    return None


@functools.cache
def _torch_lacks_bytecode() -> bool:
    source = _source_of("torch")
    if source is None:
        return False
    name = f"{source.stem}.{sys.implementation.cache_tag}.pyc"
    return not (source.parent / "__pycache__" / name).exists()


def _source_of(package: str) -> Path | None:
    spec = PathFinder.find_spec(package)
    return Path(spec.origin) if spec is not None and spec.origin else None


def _compile_ahead(folder: str) -> None:
    """Let other processes fill an empty folder, ahead of this process's imports."""
    num_processes = min(_MAX_PROCESSES, len(os.sched_getaffinity(0)))
    if num_processes < _MIN_CORES or next(os.scandir(folder), None) is not None:
        return
    folders = [str(source.parent) for name in _PACKAGES if (source := _source_of(name))]
    writer = str(Path(__file__).with_name("bytecode_writer.py"))
    options = ["-I", "-S", "-X", f"pycache_prefix={folder}"]
    process = subprocess.Popen(
        [sys.executable, *options, writer, str(num_processes), *folders],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    threading.Thread(target=process.wait, name="bytecode", daemon=True).start()
