"""One file with the bytecode of all modules that a start imports, for another machine.

    path = write(folder)          # in a process that has started as others will
    with found_in(folder): ...    # in the processes that start

Python's own bytecode files hold the modification time of the source, which differs between
installations. This file holds hashes of the sources instead (PEP 552), and names of modules instead
of paths, so that it fits any installation with equal sources. Modules with other sources are
imported as if there were no file. Importing runs the code in the file, so a file that other users
may write is not read.
"""

from __future__ import annotations

import marshal
import sys
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import MAGIC_NUMBER, cache_from_source, source_hash
from pathlib import Path
from types import ModuleType

from compiledllm.caches import replaced, why_not_trusted
from compiledllm.log import log

_FORMAT = b"compiledllm bytecode 1\n"  # followed by a checksum of the rest, and the entries
_CHECKSUM_BYTES = 4
# An entry is what Python's own file would be: format, flags of PEP 552, hash of the source, code.
_HASH = slice(8, 16)
_UNCHECKED = (1).to_bytes(4, "little")  # Python need not compare the hash, because `_Finder` does


class _BadFile(Exception):
    """A file that cannot be used, with the reason."""


def path_in(folder: Path) -> Path:
    """The file for this version of Python, and for its option -O."""
    return folder / Path(cache_from_source("modules.py")).with_suffix(".bytecode").name


# -- writing ---------------------------------------------------------------------------------------


def write(folder: Path, names: Collection[str] | None = None) -> Path:
    """Write the bytecode of these modules, which this process has imported. Raises OSError.

    names: default: all modules. Other modules of an earlier file stay, because starts of other
    models may need them.
    """
    path = path_in(folder)
    entries: dict[str, bytes] = {}
    with suppress(FileNotFoundError, _BadFile):
        entries = _read(path)
    content = marshal.dumps(entries | dict(_imported(sys.modules if names is None else names)))
    with replaced(path) as writer:
        writer.write(_FORMAT + _checksum(content) + content)
    return path


def _imported(names: Collection[str]) -> Iterator[tuple[str, bytes]]:
    for name in list(names):
        spec = getattr(sys.modules[name], "__spec__", None) or _spec_of(name)
        if spec is not None and spec.name == name and isinstance(spec.loader, SourceFileLoader):
            with suppress(OSError, ImportError):  # the source has been removed since
                digest = source_hash(spec.loader.get_data(spec.loader.path))
                code = marshal.dumps(spec.loader.get_code(name))
                yield name, MAGIC_NUMBER + _UNCHECKED + digest + code


def _spec_of(name: str) -> ModuleSpec | None:
    """The spec of a module that replaced itself in `sys.modules` by an object without a spec."""
    package = name.rpartition(".")[0]
    path = getattr(sys.modules.get(package), "__path__", None)
    return PathFinder.find_spec(name, path) if path or not package else None


# -- reading ---------------------------------------------------------------------------------------


def _read(path: Path) -> dict[str, bytes]:
    """The entries by the modules' names. Raises _BadFile, or FileNotFoundError."""
    try:
        for place in (path, path.parent):
            # The folder may have any owner, because this user has named it.
            if reason := why_not_trusted(place, any_owner=True):
                raise _BadFile(reason)
        content = memoryview(path.read_bytes())
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _BadFile(str(error)) from error
    begin = len(_FORMAT) + _CHECKSUM_BYTES
    if content[: len(_FORMAT)] != _FORMAT:
        raise _BadFile("it is damaged, or of another version")
    if content[len(_FORMAT) : begin] != _checksum(content[begin:]):
        raise _BadFile("it is damaged (its content differs from its checksum)")
    entries: dict[str, bytes] = marshal.loads(content[begin:])
    return entries


def _checksum(content: bytes | memoryview) -> bytes:
    return zlib.crc32(content).to_bytes(_CHECKSUM_BYTES, "little")


# -- importing -------------------------------------------------------------------------------------


@contextmanager
def found_in(folder: Path) -> Iterator[bool]:
    """A context in which Python finds the folder's bytecode. Yields whether there is any."""
    path = path_in(folder)
    try:
        finder = _Finder(_read(path))
    except (FileNotFoundError, _BadFile) as error:
        if isinstance(error, _BadFile):
            log.warning("%s is not used: %s", path, error)
        yield False
        return
    # Replaces the list instead of changing it, since other threads may be iterating over it.
    place = sys.meta_path.index(PathFinder)
    sys.meta_path = [*sys.meta_path[:place], finder, *sys.meta_path[place:]]
    try:
        yield True
    finally:
        sys.meta_path = [other for other in sys.meta_path if other is not finder]


class _Finder:
    """Finds modules where Python does, and loads them from known bytecode if the source matches."""

    def __init__(self, entries: Mapping[str, bytes]) -> None:
        self._entries = entries

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if (entry := self._entries.get(name)) is None:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            with suppress(OSError):  # the import itself reports a source that cannot be read
                if entry[_HASH] == source_hash(spec.loader.get_data(spec.loader.path)):
                    spec.loader = _Loader(name, spec.loader.path, entry)
        return spec


class _Loader(SourceFileLoader):
    """Loads a module from known bytecode, and drops the bytecode, since modules keep loaders."""

    def __init__(self, name: str, path: str, entry: bytes) -> None:
        super().__init__(name, path)
        self._entry: bytes | None = entry

    def get_data(self, path: str) -> bytes:
        """The bytecode if Python asks for the module's .pyc file; otherwise the file's content."""
        if self._entry is None or not path.endswith(".pyc"):
            return super().get_data(path)
        entry, self._entry = self._entry, None
        return entry
