"""Finds the weight files of a checkpoint directory and reads their tensors.

The rules are those of transformers: other files in the directory (adapters, optimizer states, a
second copy in another layout) are not read, and buffers that old checkpoints store are ignored. The
module knows no architecture.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from compiledllm.config import ConfigError
from compiledllm.log import log
from compiledllm.models.json_file import read_json

_CHUNK = 2**22  # elements compared at once
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
# Buffers that old versions of transformers stored with the weights: rotary frequencies, positions
# and causal masks. A model derives them from its config.
_BUFFERS = re.compile(
    r"(?:.+\.)?(?:rotary_emb\.(?:inv_freq|original_inv_freq|cos_cached|sin_cached)|position_ids"
    r"|masked_bias|(?:attn|attention|self_attn|crossattention)\.bias|decoder\.version)"
)


def is_derived(name: str) -> bool:
    """Whether the name is that of a buffer in old checkpoints, which a model derives itself."""
    return _BUFFERS.fullmatch(name) is not None


def weight_files(checkpoint: Path) -> list[Path]:
    """The checkpoint's safetensors files. Raises ConfigError if any or all are missing.

    As in transformers, an existing `model.safetensors` is the whole checkpoint, unless the index
    (`model.safetensors.index.json`) names that file; otherwise the files of the index are. Without
    either, the checkpoint is the set of shards `NAME-00001-of-0000N.safetensors`, or else the only
    safetensors file.
    """
    single, index = checkpoint / SINGLE, checkpoint / INDEX
    if index.exists():
        files = _indexed_files(index)
        if single in files or not single.exists():
            return files
        log.warning("%s is the checkpoint; %s and its files are not read", single, INDEX)
    return [single] if single.exists() else _unnamed_files(checkpoint)


def _indexed_files(index: Path) -> list[Path]:
    content = read_json(index)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError(
            f"{index} is not a valid shard index: weight_map must name a file for each tensor, got "
            f"{weight_map!r:.40}; download it again"
        )
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not _is_inside(name):
            raise ConfigError(
                f"{index} is not a valid shard index: {name!r:.80}, named for tensor "
                f"{tensor!r:.80}, is no safetensors file inside the directory; download the "
                "checkpoint again"
            )
    files = sorted(index.parent / name for name in set(weight_map.values()))
    _require(files, f"which {INDEX} names")
    return files


def _is_inside(name: str) -> bool:
    """Whether a file name in an index leads nowhere out of the checkpoint's directory."""
    path = PurePath(name)
    is_relative = not path.is_absolute() and ".." not in path.parts and "\\" not in name
    return is_relative and name.isprintable() and path.suffix == ".safetensors"


def _unnamed_files(checkpoint: Path) -> list[Path]:
    """The weight files of a directory with neither `model.safetensors` nor an index."""
    found = sorted(checkpoint.glob("*.safetensors"))
    if not found:
        raise ConfigError(_no_safetensors(checkpoint))
    sets = {match.group(1, 3) for path in found if (match := _SHARD.fullmatch(path.name))}
    named_model = {shards for shards in sets if shards[0] == "model"}
    sets = named_model or sets
    if len(sets) == 1:
        ((stem, count),) = sets
        width = range(1, int(count) + 1)
        files = [checkpoint / f"{stem}-{n:05}-of-{count}.safetensors" for n in width]
        _require(files, "by the names of the others")
        return files
    if len(found) == 1 and not found[0].name.startswith("adapter_"):
        return found
    names = ", ".join(path.name for path in found[:8])
    raise ConfigError(
        f"{checkpoint}: none of {names} is known to be the model; name the model's file {SINGLE}, "
        "or merge an adapter into its base model first"
    )


def _require(files: list[Path], why: str) -> None:
    absent = [path.name for path in files if not path.exists()]
    if absent:
        shown = ", ".join(absent[:8]) + (" ..." if len(absent) > 8 else "")
        raise ConfigError(
            f"{files[0].parent}: weight files are missing: {shown}, {why}; download them again"
        )


def _no_safetensors(checkpoint: Path) -> str:
    others = sorted(p.name for kind in ("*.bin", "*.pt", "*.pth") for p in checkpoint.glob(kind))
    if not others:
        return f"{checkpoint} has no .safetensors files; use load_format='dummy' for random weights"
    return (
        f"{checkpoint} has no .safetensors files but {others[0]}, a pickle, which may run code and "
        "is not loaded; save the model again with transformers' save_pretrained, which writes "
        "safetensors"
    )


def read_tensors(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    """Read all tensors as (name, tensor), one at a time. ConfigError if a name occurs twice."""
    seen: dict[str, str] = {}
    progress = tqdm(files, desc="loading weights", unit="file", disable=not sys.stderr.isatty())
    for path in progress:
        with opened(path) as shard:
            for name in shard.keys():  # noqa: SIM118  (safe_open is not a mapping)
                if name in seen:
                    where = " and ".join(dict.fromkeys((seen[name], path.name)))
                    raise ConfigError(
                        f"{path.parent}: tensor '{name}' is stored twice, in {where}; delete the "
                        "files that do not belong to the checkpoint, or download it again"
                    )
                seen[name] = path.name
                yield name, shard.get_tensor(name)


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file. Raises ConfigError, naming the file, if the file cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"{path} is not a readable safetensors file: {error}; download it again"
        ) from error


def files_by_tensor(files: list[Path]) -> dict[str, Path]:
    """Tensor name -> file, read from the files' headers alone."""
    found: dict[str, Path] = {}
    for path in files:
        with opened(path) as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


def shape_in(path: Path, name: str) -> list[int]:
    """The shape of a tensor, read from its file's header."""
    with opened(path) as file:
        shape: list[int] = file.get_slice(name).get_shape()
    return shape


def are_equal(first: tuple[Path, str], second: tuple[Path, str], dtype: torch.dtype) -> bool:
    """Whether two tensors, each given as (file, name), are equal after conversion to `dtype`.

    Rows are read in chunks and the first difference ends the comparison.
    """
    with opened(first[0]) as file, opened(second[0]) as other:
        slices = file.get_slice(first[1]), other.get_slice(second[1])
        shape, other_shape = (part.get_shape() for part in slices)
        if shape != other_shape:
            return False
        rows = max(1, _CHUNK // max(math.prod(shape[1:]), 1))
        chunks = (slice(start, start + rows) for start in range(0, shape[0], rows))
        return all(torch.equal(*(part[rows].to(dtype) for part in slices)) for rows in chunks)
