"""Our Triton kernels' binaries: which of Triton's cache entries this process used, and given ones.

An entry is a folder with the stages of a kernel or a shared library that launches it. Triton makes
them with its own compiler and a C compiler. Only Triton's file names are used, through the cache
manager that Triton lets users replace.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

_GROUP = "__grp__"  # prefix of files that list the files of a group, with absolute paths
# Stages on the way to machine code, for people. Triton does without those that are not there.
_STAGES = (".source", ".ttir", ".ttgir", ".llir", ".ptx")
_used: set[str] = set()


def note_entries() -> None:
    """From now on, note the entries that Triton reads or writes."""
    from triton import knobs
    from triton.runtime.cache import FileCacheManager

    if knobs.cache.manager_class is not None:
        return  # ours, or the user's

    class NotingManager(FileCacheManager):  # type: ignore[misc]
        def __init__(self, key: str, override: bool = False, dump: bool = False) -> None:
            super().__init__(key, override, dump)
            if not override and not dump:
                _used.add(key)

    knobs.cache.manager_class = NotingManager


def entries() -> dict[str, bytes]:
    """Path below Triton's folder -> content, of what it takes to run all noted entries."""
    folder = _folder()
    files = (path for name in _used for path in (folder / name).glob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in files
        if path.name != "lock" and path.suffix not in _STAGES
    }


def provide(files: Mapping[str, bytes]) -> None:
    """Put entries into Triton's folder, as far as they are not there. Raises OSError."""
    folder = _folder()
    for name, content in files.items():
        path = folder / name
        if path.exists():
            continue
        if path.name.startswith(_GROUP):
            content = _moved(content, path.parent)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(content)
        os.replace(file.name, path)


def _moved(group: bytes, folder: Path) -> bytes:
    """The list of a group's files with their paths in `folder`."""
    listed = json.loads(group)
    listed["child_paths"] = {name: str(folder / name) for name in listed["child_paths"]}
    return json.dumps(listed).encode()


def _folder() -> Path:
    from triton import knobs

    return Path(knobs.cache.dir)
