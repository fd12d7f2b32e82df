"""Reads and writes Triton's cache on disk, so that an artifact can contain our Triton kernels.

`note_entries` records which cache entries this process uses, `entries` reads these entries for an
artifact, and `provide` puts the entries of an artifact into the cache of a later process.

An entry is a folder with a kernel's intermediate representations and machine code, or with a shared
library that launches kernels. Triton makes entries with its own compiler and a C compiler. This
module relies only on Triton's file names and on the cache manager class, which Triton lets users
replace.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

_GROUP = "__grp__"  # prefix of files that list the files of a group by absolute path
# Suffixes of the source and the intermediate representations, which Triton does not need to launch.
_STAGES = (".source", ".ttir", ".ttgir", ".llir", ".ptx")
_used: set[str] = set()  # names of the noted entries


def note_entries() -> None:
    """From now on, note the cache entries that Triton reads or writes.

    Does nothing if the user has replaced Triton's cache manager.
    """
    from triton import knobs
    from triton.runtime.cache import FileCacheManager

    if knobs.cache.manager_class is not None:
        return  # replaced already, by an earlier call or by the user

    class NotingManager(FileCacheManager):  # type: ignore[misc]
        def __init__(self, key: str, override: bool = False, dump: bool = False) -> None:
            super().__init__(key, override, dump)
            if not override and not dump:
                _used.add(key)

    knobs.cache.manager_class = NotingManager


def entries() -> dict[str, bytes]:
    """The files that are needed to run all noted entries: path in Triton's folder -> content."""
    folder = _folder()
    files = (path for name in _used for path in (folder / name).glob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in files
        if path.name != "lock" and path.suffix not in _STAGES
    }


def provide(files: Mapping[str, bytes]) -> None:
    """Write the files of `entries` into Triton's folder unless they exist. Raises OSError."""
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
    """The content of a group's file, with the paths of the group's files in `folder`."""
    listed = json.loads(group)
    listed["child_paths"] = {name: str(folder / name) for name in listed["child_paths"]}
    return json.dumps(listed).encode()


def _folder() -> Path:
    from triton import knobs

    return Path(knobs.cache.dir)
