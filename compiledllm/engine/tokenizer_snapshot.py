"""Keeps what transformers made of a checkpoint's tokenizer, so that later starts do not import it.

    tokenizer = open_tokenizer(directory, artifact_dir)

The first start loads a tokenizer by transformers and keeps a snapshot: the tokenizer in the format
of the `tokenizers` library, and the facts that transformers knows in addition. A snapshot's name is
a digest of all files and versions on which the tokenizer depends, so a snapshot is never stale. A
snapshot that is missing, damaged or cannot be written costs time only.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from compiledllm.caches import (
    Folder,
    compiled_dir,
    folders_of,
    is_disabled,
    remove_surplus,
    replaced,
    why_not_trusted,
    why_not_writable,
)
from compiledllm.engine import tokenizer_class
from compiledllm.engine.plain_tokenizer import PlainTokenizer, TokenizerFacts
from compiledllm.engine.tokenizer_class import load_tokenizer, why_not_plain
from compiledllm.log import log
from compiledllm.version import version_of

SUFFIX = ".tokenizer"
_FORMAT = b"compiledllm tokenizer 1\n"  # followed by a checksum, a line of JSON, and the tokenizer
_CHECKSUM_BYTES = 32
_MAX_FILES = 32  # per folder; beyond that, the least recently used files are removed
_MAX_BYTES = 2**28  # larger files are taken for weights; the largest tokenizer file has 2**25
# Packages that read, convert or run a tokenizer.
_PACKAGES = (
    "transformers",
    "tokenizers",
    "sentencepiece",
    "tiktoken",
    "mistral-common",
    "protobuf",
)
# Suffixes of the names of weight files, on which no tokenizer depends.
_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".h5", ".onnx", ".index.json")


class BadSnapshot(Exception):
    """A file that cannot be used, with the reason."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A tokenizer as it is kept in a file.

    key: as `key_of` makes it. label: the checkpoint's name, for people. backend: JSON. created:
    seconds since the epoch.
    """

    key: str
    label: str
    facts: TokenizerFacts
    backend: bytes
    created: float = field(default_factory=time.time)

    def tokenizer(self) -> PlainTokenizer:
        """Raises BadSnapshot."""
        try:
            return PlainTokenizer(self.backend, self.facts)
        except Exception as error:  # tokenizers raises plain Exception
            raise BadSnapshot(f"it cannot be loaded ({error})") from error


def open_tokenizer(directory: Path, artifact_dir: str | None = None) -> Any:
    """The directory's tokenizer: a `PlainTokenizer`, or if it needs more, transformers' own object.

    artifact_dir: a folder that `compiledllm build` has filled. Raises whatever transformers raises.
    """
    key = "" if is_disabled() else _key_or_none(directory)
    if key and (found := _find(key, artifact_dir)):
        return found[1]
    loaded = load_tokenizer(directory)
    made = _make(key, directory, loaded)
    if isinstance(made, str):
        log.debug("the tokenizer of %s stays with transformers: %s", directory, made)
        return loaded
    snapshot, tokenizer = made
    if key and key == _key_or_none(directory):  # the files have not changed meanwhile
        _keep(snapshot)
    return tokenizer


def copy_to(folder: Path, directory: Path) -> None:
    """Write the snapshot of a directory's tokenizer into a folder, if there can be one.

    Raises OSError, and whatever transformers raises.
    """
    if key := _key_or_none(directory):
        made = _find(key) or _make(key, directory, load_tokenizer(directory))
        if not isinstance(made, str) and key == _key_or_none(directory):
            write(made[0], folder)


def warm_up(artifact_dir: str | None = None) -> None:
    """Import the modules that `open_tokenizer` will need; transformers only without snapshots."""
    from compiledllm.engine import chat_rendering  # noqa: F401

    folders = [] if is_disabled() else _folders(artifact_dir)
    if not any(True for folder in folders for _ in folder.path.glob(f"[!.]*{SUFFIX}")):
        tokenizer_class.warm_up()


# -- the key ---------------------------------------------------------------------------------------


def key_of(directory: Path) -> str:
    """A digest of everything on which the tokenizer depends. Raises OSError.

    All files but weights are included, since transformers' classes read files of many names.
    """
    # transformers takes a relative path for a model's name, and has special rules for some names.
    name = "" if directory.is_absolute() else str(directory)
    versions = {package: version_of(package) for package in _PACKAGES}
    digest = hashlib.sha256(json.dumps([_FORMAT.decode(), name, versions]).encode())
    for path in sorted(_files(directory)):
        content = path.read_bytes()
        digest.update(f"\0{path.relative_to(directory)}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()[:32]


def _files(directory: Path) -> Iterator[Path]:
    """The directory's files without weights, and chat templates in its folders."""
    for path in [*directory.glob("[!.]*"), *directory.glob("[!.]*/*.jinja")]:
        is_weights = path.name.endswith(_WEIGHTS) or path.stat().st_size > _MAX_BYTES
        if path.is_file() and not is_weights:
            yield path


def _key_or_none(directory: Path) -> str:
    try:
        return key_of(directory)
    except OSError:
        return ""  # transformers reports what is wrong


# -- making ----------------------------------------------------------------------------------------


def _make(key: str, directory: Path, loaded: Any) -> tuple[Snapshot, PlainTokenizer] | str:
    """The snapshot of a tokenizer of transformers, and its tokenizer, or why there is none."""
    if reason := why_not_plain(loaded):
        return reason
    backend = loaded.backend_tokenizer
    backend.no_truncation()  # as transformers' `encode` does
    backend.no_padding()
    try:
        facts = TokenizerFacts(
            loaded.eos_token_id,
            dict(loaded.special_tokens_map),
            list(loaded.all_special_ids),
            loaded.chat_template,
            bool(loaded.split_special_tokens),
        )
        text: str = backend.to_str()
        for stored in (_with_merges_as_strings(text), text):
            snapshot = Snapshot(key, _label_of(directory), facts, stored.encode())
            tokenizer = snapshot.tokenizer()
            if tokenizer.backend_tokenizer.to_str() == text:
                return snapshot, tokenizer
    except Exception as error:  # parts written in Python cannot be stored
        return str(error)
    return "it changes when it is stored"


def _with_merges_as_strings(text: str) -> str:
    """A tokenizer's JSON, with merges "a b" in the place of ["a", "b"].

    Strings, the library's older format, take up to 40 % less time to read. Parts that contain
    spaces can only be written as lists.
    """
    content = json.loads(text)
    merges = content["model"].get("merges") or []
    if not merges or any(" " in part for merge in merges for part in merge):
        return text
    content["model"]["merges"] = [" ".join(merge) for merge in merges]
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"))


def _label_of(directory: Path) -> str:
    is_from_hub = directory.parent.name == "snapshots"  # in a folder with the model's name
    return directory.parent.parent.name if is_from_hub else directory.name


# -- files -----------------------------------------------------------------------------------------


def folder_of_snapshots() -> Path:
    return compiled_dir() / "tokenizers"


def _folders(named: str | None) -> list[Folder]:
    try:
        return folders_of(named, folder_of_snapshots())
    except RuntimeError:  # a user without a home
        return folders_of(named)


def _find(key: str, named: str | None = None) -> tuple[Snapshot, PlainTokenizer] | None:
    for folder in _folders(named):
        path = folder.path / f"{key}{SUFFIX}"
        try:
            snapshot = read(path, folder.is_named)
            if snapshot.key != key:
                raise BadSnapshot("it is another tokenizer's")
            # The time of modification is the time of the last use. The folder may be read-only.
            with contextlib.suppress(OSError):
                os.utime(path)
            return snapshot, snapshot.tokenizer()
        except FileNotFoundError:
            continue
        except Exception as error:  # any file system or file may fail in its own way
            log.warning("%s is not used: %s", path, error)
    return None


def _keep(snapshot: Snapshot) -> None:
    try:
        folder = folder_of_snapshots()
        if reason := why_not_writable(folder):
            log.info("the tokenizer is not kept for the next start: %s", reason)
        else:
            write(snapshot, folder)
    except Exception as error:  # whatever fails, this engine runs on
        log.warning("the tokenizer is not kept for the next start: %s", error)


def write(snapshot: Snapshot, folder: Path) -> Path:
    """Write a snapshot into a folder, and remove surplus old ones. Raises OSError."""
    header = asdict(snapshot)
    del header["backend"]
    content = json.dumps(header).encode() + b"\n" + snapshot.backend
    path = folder / f"{snapshot.key}{SUFFIX}"
    with replaced(path) as writer:
        writer.write(_FORMAT + hashlib.sha256(content).digest() + content)
    remove_surplus(folder, SUFFIX, _MAX_FILES)
    return path


def read(path: Path, any_owner: bool = False) -> Snapshot:
    """Read a snapshot and check its checksum. Raises BadSnapshot, or OSError."""
    for place in (path, path.parent):
        if reason := why_not_trusted(place, any_owner):
            raise BadSnapshot(reason)
    content = path.read_bytes()
    begin = len(_FORMAT) + _CHECKSUM_BYTES
    if content[: len(_FORMAT)] != _FORMAT:
        raise BadSnapshot("it is damaged, or of another version")
    rest = memoryview(content)[begin:]
    if content[len(_FORMAT) : begin] != hashlib.sha256(rest).digest():
        raise BadSnapshot("it is damaged (its content differs from its checksum)")
    try:
        end = content.index(b"\n", begin)
        header = json.loads(content[begin:end])
        facts = TokenizerFacts(**header.pop("facts"))
        return Snapshot(**header, facts=facts, backend=content[end + 1 :])
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise BadSnapshot(f"it is of another version ({error})") from error


def listed(named: str | None) -> Iterator[tuple[Path, Snapshot | str]]:
    """All files: the path, and the snapshot or the reason why the file cannot be used."""
    for folder in _folders(named):
        for path in sorted(folder.path.glob(f"[!.]*{SUFFIX}")):
            try:
                yield path, read(path, folder.is_named)
            except (BadSnapshot, OSError) as error:
                yield path, str(error)
