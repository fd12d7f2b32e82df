"""The artifact of a start: one file with the code, measurements and step shapes of the start.

Files are written atomically, under a name that is a hash of the artifact's key. Processes that
build the same artifact at the same time therefore replace one complete file by another that is
equally good. The key is an allow-list of the facts that decide the content. If the keys are equal,
the content fits, on this machine or on another machine of the same kind. If a file cannot be used,
a warning says why, and the start builds the artifact again. Loading an artifact runs its code, so a
file that other users may write is not read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from compiledllm.caches import Folder, remove_surplus, replaced, why_not_trusted
from compiledllm.graphs.saved_graph import Kernel, SavedGraph
from compiledllm.log import log

FORMAT = 2  # version of the layout of files and keys; files of another format are not read
SUFFIX = ".artifact"
_MANIFEST = "manifest.json"
_MAX_FILES = 64  # per folder; beyond that, the least recently used files are removed


class BadArtifact(Exception):
    """A file that cannot be used, with the reason."""


@dataclass(slots=True)
class Artifact:
    """The results of a start that later starts can use again.

    key: each fact that decides the content, name -> value. label: the model's name, for people.
    graphs: the compiled blocks and edges. memory: measured bytes by name. shapes: the step shapes
    that were captured, as in `buckets.StepShape`. max_blocks: width of the block tables, a constant
    in the compiled functions. The width is not in the key, because it may follow from the size of
    the KV cache, which is known only after the artifact has been found. binaries: path -> machine
    code of kernels that no graph contains. created: seconds since the epoch.
    """

    key: dict[str, str]
    label: str
    graphs: list[SavedGraph] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)
    shapes: list[tuple[int, int, int]] = field(default_factory=list)
    max_blocks: int = 0
    binaries: dict[str, bytes] = field(default_factory=dict)
    created: float = field(default_factory=time.time)


def file_name(key: Mapping[str, str]) -> str:
    text = json.dumps([FORMAT, sorted(key.items())])
    return hashlib.sha256(text.encode()).hexdigest()[:32] + SUFFIX


# -- writing ---------------------------------------------------------------------------------------


def write(artifact: Artifact, folder: Path) -> Path:
    """Write an artifact into a folder, and remove surplus old files. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    target = folder / file_name(artifact.key)
    with replaced(target) as writer:
        _write_zip(artifact, writer)
    remove_surplus(folder, SUFFIX, _MAX_FILES)
    return target


def _write_zip(artifact: Artifact, writer: Any) -> None:
    contents = {f"binaries/{path}": code for path, code in artifact.binaries.items()}
    graphs = []
    for index, graph in enumerate(artifact.graphs):
        kernels = {}
        for name, kernel in graph.kernels.items():
            kernels[name] = kernel.launch
            contents[f"kernels/{index}/{name}"] = kernel.code
        graphs.append(asdict(graph) | {"kernels": kernels})
    manifest = {
        "format": FORMAT,
        "key": artifact.key,
        "label": artifact.label,
        "created": artifact.created,
        "memory": artifact.memory,
        "shapes": artifact.shapes,
        "max_blocks": artifact.max_blocks,
        "graphs": graphs,
        "digests": {path: _digest(code) for path, code in contents.items()},
    }
    with zipfile.ZipFile(writer, "w") as file:
        file.writestr(_MANIFEST, json.dumps(manifest))
        for path, code in contents.items():
            file.writestr(path, code)


# -- reading ---------------------------------------------------------------------------------------


def read(path: Path, any_owner: bool = False) -> Artifact:
    """Read an artifact and check its digests. Raises BadArtifact, or FileNotFoundError.

    any_owner: whether the file may belong to another user, because this user has named its folder.
    """
    with _opened(path, any_owner) as file:
        manifest = _manifest(file)
        contents = {}
        for name, digest in manifest["digests"].items():
            contents[name] = file.read(name)
            if _digest(contents[name]) != digest:
                raise BadArtifact(f"{name} differs from its checksum")
        graphs = []
        for index, saved in enumerate(manifest["graphs"]):
            launches = saved.pop("kernels").items()
            kernels = {
                n: Kernel(contents[f"kernels/{index}/{n}"], launch) for n, launch in launches
            }
            graphs.append(SavedGraph(**saved, kernels=kernels))
    prefix = "binaries/"
    # The time of modification is the time of the last use. The folder may be read-only.
    with contextlib.suppress(OSError):
        os.utime(path)
    return Artifact(
        manifest["key"],
        manifest["label"],
        graphs,
        manifest["memory"],
        [tuple(shape) for shape in manifest["shapes"]],
        manifest["max_blocks"],
        {n.removeprefix(prefix): c for n, c in contents.items() if n.startswith(prefix)},
        manifest["created"],
    )


def read_manifest(path: Path, any_owner: bool = False) -> dict[str, Any]:
    """Read the manifest without the rest. Raises BadArtifact, or FileNotFoundError."""
    with _opened(path, any_owner) as file:
        return _manifest(file)


@contextlib.contextmanager
def _opened(path: Path, any_owner: bool) -> Iterator[zipfile.ZipFile]:
    for place in (path, path.parent):
        if reason := why_not_trusted(place, any_owner):
            raise BadArtifact(reason)
    try:
        with zipfile.ZipFile(path) as file:
            yield file
    except FileNotFoundError:
        raise
    except (zipfile.BadZipFile, OSError, EOFError, LookupError, TypeError, ValueError) as error:
        raise BadArtifact(f"it is damaged ({error})") from error


def _manifest(file: zipfile.ZipFile) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads(file.read(_MANIFEST))
    if manifest["format"] != FORMAT:
        raise BadArtifact(f"it has format {manifest['format']}, and this version reads {FORMAT}")
    return manifest


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# -- finding ---------------------------------------------------------------------------------------


def find(key: Mapping[str, str], label: str, folders: Sequence[Folder]) -> Artifact | str:
    """The artifact of this key from the first folder with a usable file, or why there is none."""
    name = file_name(key)
    for folder in folders:
        try:
            return read(folder.path / name, folder.is_named)
        except FileNotFoundError:
            continue
        except BadArtifact as error:
            log.warning("%s is not used: %s", folder.path / name, error)
    return explain(key, label, folders)


def explain(key: Mapping[str, str], label: str, folders: Sequence[Folder]) -> str:
    """One line: which file fits the key, or how the most similar one of this label differs."""
    nearest: tuple[int, str] | None = None
    for path, manifest in listed(folders):
        if not isinstance(manifest, dict) or manifest["label"] != label:
            continue
        if not (differing := differences(key, manifest["key"])):
            return f"{path} fits"
        line = f"{path.name} differs: {'; '.join(differing)}"
        nearest = min(nearest or (len(differing), line), (len(differing), line))
    return nearest[1] if nearest else f"none is kept for {label}"


def differences(key: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """Each fact in which the key of a file, `other`, differs from the needed `key`, as text."""
    names = [name for name in {**key, **other} if key.get(name) != other.get(name)]
    return [f"{name} is {key.get(name)}, not {other.get(name)}" for name in names]


def listed(folders: Sequence[Folder]) -> Iterator[tuple[Path, dict[str, Any] | str]]:
    """All files: the path, and the manifest or the reason why the file cannot be used."""
    for folder in folders:
        with contextlib.suppress(OSError):
            for path in sorted(folder.path.glob(f"[!.]*{SUFFIX}")):
                try:
                    yield path, read_manifest(path, folder.is_named)
                except BadArtifact as error:
                    yield path, str(error)
