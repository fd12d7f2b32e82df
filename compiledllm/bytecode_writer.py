"""A program: compiles all modules of packages to bytecode, in several processes.

    python -I -S -X pycache_prefix=FOLDER bytecode_writer.py NUM_PROCESSES PACKAGE_FOLDER...

Imports the standard library only. `compileall` cannot be used: its processes do not inherit -X
pycache_prefix, and write beside the packages.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib.util import cache_from_source
from py_compile import PycInvalidationMode, compile

# Folders that no start imports; those with hyphens lie in the folder of the standard library.
_NOT_IMPORTED = {"test", "tests", "testing", "onnx", "benchmarks", "idlelib", "lib2to3"}
_NOT_IMPORTED |= {"site-packages", "dist-packages", "ensurepip", "tkinter", "turtledemo"}
_LATER = {"_dynamo", "_inductor", "_functorch", "distributed"}  # not needed by `import torch`


def modules_of(folders: list[str]) -> list[str]:
    """The paths of all modules, those of a package's first imports first."""
    found = [path for folder in folders for path in _modules_below(folder)]
    return sorted(found, key=lambda path: not _LATER.isdisjoint(path.split(os.sep)))


def _modules_below(folder: str) -> Iterator[str]:
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(set(folders) - _NOT_IMPORTED)
        yield from (os.path.join(parent, name) for name in files if name.endswith(".py"))


def write(paths: list[str]) -> None:
    """Write the bytecode of modules that have none. Errors are ignored: imports report them."""
    for path in paths:
        if not os.path.exists(cache_from_source(path)):
            compile(path, quiet=2, invalidation_mode=PycInvalidationMode.TIMESTAMP)


def main(num_processes: int, folders: list[str]) -> None:
    assert sys.pycache_prefix, "nothing must be written beside the packages"
    paths = modules_of(folders)
    children = []
    for index in range(1, num_processes):
        if not (child := os.fork()):
            write(paths[index::num_processes])
            os._exit(0)
        children.append(child)
    write(paths[::num_processes])
    for child in children:
        os.waitpid(child, 0)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
