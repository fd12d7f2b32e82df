"""Reads metadata and tensors of a GGUF file, and checks every read against the file's size.

The module does not use gguf.GGUFReader, which loops forever on some damaged files and takes 3 s for
a vocabulary. The gguf package dequantises the tensors. The module knows no architecture.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

FloatArray: TypeAlias = "np.ndarray[Any, np.dtype[np.float32]]"
ByteArray: TypeAlias = "np.ndarray[Any, np.dtype[np.uint8]]"

_STRING, _ARRAY, _UINT64 = 8, 9, 10  # types of metadata values
_SCALARS = dict(zip((*range(8), 10, 11, 12), "BbHhIif?Qqd", strict=True))  # type -> struct format
# Limit of the number of keys, tensors, array items or string bytes; real files stay far below.
_MAX_COUNT = 2**24


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Location of a tensor in the data. `shape` has numpy's order, the reverse of the file's."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    """The checked header, and the memory-mapped tensor data after the header (`data`)."""

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    data: memoryview

    @property
    def num_embeddings(self) -> int:
        """Rows of the embedding matrix: vocabulary size with padding."""
        if "token_embd.weight" not in self.tensors:
            raise ValueError("tensor 'token_embd.weight' is missing")
        return self.tensors["token_embd.weight"].shape[0]

    def raw(self, name: str) -> ByteArray:
        """One tensor's bytes as in the file, uint8 [..., bytes of a row]; read-only."""
        tensor = self.tensors[name]
        raw = np.frombuffer(self.data, np.uint8, tensor.num_bytes, tensor.offset)
        return raw.reshape(*tensor.shape[:-1], -1)

    def load(self, name: str) -> FloatArray:
        """Dequantise one tensor into a new float32 array."""
        tensor = self.tensors[name]
        try:
            values = dequantize(self.raw(name), tensor.kind)
        except NotImplementedError:
            raise ValueError(
                f"tensor '{name}' is stored as {tensor.kind.name}, which the gguf package cannot "
                "dequantise; use another quantisation of the model, such as Q8_0"
            ) from None
        return np.array(values, dtype=np.float32)

    def number(self, key: str, default: float | None = None) -> float:
        """Read a positive number from the metadata."""
        value = self.metadata.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"metadata key '{key}' must be a number, got {brief(value)}")
        if not 0 < value < 2**31:
            raise ValueError(f"metadata key '{key}' must be in (0, 2^31), got {value}")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        """Read a positive integer from the metadata."""
        value = self.number(key, default)
        if not isinstance(value, int):
            raise ValueError(f"metadata key '{key}' must be an integer, got {value}")
        return value

    def strings(self, key: str) -> list[str]:
        """Read a list of strings from the metadata."""
        value = self.metadata.get(key)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ValueError(f"metadata key '{key}' must be a list of strings, got {brief(value)}")
        return value

    def token_id(self, role: str) -> int | None:
        """The id of a special token such as `eos` or `padding`, None if the metadata has none."""
        value = self.metadata.get(f"tokenizer.ggml.{role}_token_id")
        num_tokens = len(self.strings("tokenizer.ggml.tokens"))
        if value is not None and (not isinstance(value, int) or not 0 <= value < num_tokens):
            raise ValueError(f"the {role} token must be in [0, {num_tokens}), got {brief(value)}")
        return value

    def token(self, role: str) -> str | None:
        """The text of a special token, None if the metadata has none."""
        index = self.token_id(role)
        return None if index is None else self.strings("tokenizer.ggml.tokens")[index]


def brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


class _Header:
    """Reads the header front to back and checks every read against the end of the file."""

    def __init__(self, data: mmap.mmap, position: int) -> None:
        self.data = data
        self.position = position

    def take(self, num_bytes: int) -> bytes:
        start, self.position = self.position, self.position + num_bytes
        if self.position > len(self.data):
            raise ValueError(
                f"the file is truncated or damaged: its header reaches byte {self.position}, the "
                f"file has {len(self.data)}; download it again"
            )
        return self.data[start : self.position]

    def u32(self) -> int:
        return int.from_bytes(self.take(4), "little")

    def u64(self) -> int:
        return int.from_bytes(self.take(8), "little")

    def count(self) -> int:
        value = self.u64()
        if value > _MAX_COUNT:
            raise ValueError(
                f"the header is damaged: it announces {value} items; download it again"
            )
        return value

    def string(self) -> str:
        try:
            return self.take(self.count()).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"the header is damaged: {error}; download it again") from error

    def value(self) -> Any:
        kind = self.u32()
        if kind == _ARRAY:
            return self.items(self.u32(), self.count())
        return self.items(kind, 1)[0]

    def items(self, kind: int, count: int) -> list[Any]:
        if kind == _STRING:
            return [self.string() for _ in range(count)]
        if kind not in _SCALARS:
            raise ValueError(f"the header is damaged: a metadata value is of unknown type {kind}")
        layout = struct.Struct(f"<{count}{_SCALARS[kind]}")
        return list(layout.unpack(self.take(layout.size)))

    def tensor(self) -> tuple[str, GgufTensor]:
        name, num_dims = self.string(), self.u32()
        if not 1 <= num_dims <= 4:
            raise ValueError(f"tensor '{name}' has {num_dims} dimensions (1 to 4 are possible)")
        shape = tuple(reversed(self.items(_UINT64, num_dims)))
        number, offset = self.u32(), self.u64()
        if number not in GGML_QUANT_SIZES:
            raise ValueError(f"tensor '{name}' is of unknown type {number}")
        kind = GGMLQuantizationType(number)
        block_size, block_bytes = GGML_QUANT_SIZES[kind]
        if min(shape) < 1 or shape[-1] % block_size:
            raise ValueError(f"tensor '{name}' has shape {shape}, impossible in {kind.name}")
        num_bytes = math.prod(shape) // block_size * block_bytes
        return name, GgufTensor(shape, kind, offset, num_bytes)


def read_gguf(path: Path) -> GgufFile:
    """Map a GGUF file (version 2 or 3, little endian) into memory. Raises ValueError for damage."""
    with path.open("rb") as opened:
        if (magic := opened.read(4)) != b"GGUF":
            raise ValueError("it is not a GGUF file (those begin with the letters GGUF)")
        data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    header = _Header(data, position=len(magic))
    if (version := header.u32()) not in (2, 3):
        raise ValueError(f"GGUF version {version:#x} is not supported (2 and 3 are, little endian)")
    num_tensors, num_keys = header.count(), header.count()
    metadata = {header.string(): header.value() for _ in range(num_keys)}
    tensors = dict(header.tensor() for _ in range(num_tensors))
    if len(metadata) != num_keys or len(tensors) != num_tensors:
        raise ValueError("the header is damaged: a metadata key or tensor name occurs twice")
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment must be a positive integer, got {brief(alignment)}")
    start = -(-header.position // alignment) * alignment
    _check_places(tensors, start, len(data), alignment)
    return GgufFile(metadata, tensors, memoryview(data)[start:])


def _check_places(
    tensors: dict[str, GgufTensor], start: int, file_size: int, alignment: int
) -> None:
    """Raise ValueError for tensors that are not aligned, overlap or end after the file.

    start: the byte of the file at which the data begin.
    """
    last, last_end = "", 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
        if tensor.offset % alignment:
            raise ValueError(
                f"the header is damaged: tensor '{name}' begins at byte {tensor.offset}, which is "
                f"no multiple of {alignment}; download it again"
            )
        if tensor.offset < last_end:
            raise ValueError(
                f"the header is damaged: tensor '{name}' begins at byte {tensor.offset}, inside of "
                f"tensor '{last}'; download it again"
            )
        last, last_end = name, tensor.offset + tensor.num_bytes
        if (end := start + last_end) > file_size:
            raise ValueError(
                f"the file is truncated or damaged: tensor '{name}' ends at byte {end}, the file "
                f"has {file_size}; download it again"
            )
