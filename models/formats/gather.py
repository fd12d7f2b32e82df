"""Collects the tensors of each quantised matrix from a checkpoint's stream of tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from compiledllm.config import ConfigError
from compiledllm.models.formats.codes import QuantizedMatrix, dequantize
from compiledllm.models.formats.stored import Scheme, Stored

# Scales of a quantised KV cache are dropped here; `formats.kv_scales` reads them from the files.
_KV_SCALE = re.compile(
    r".+\.(self_attn|attn|attention)(\.attn)?\.(q|k|v|kv|prob)_(scale|zero_point)"
)


_WAY_OUT = "the file is damaged, or the quantization_config belongs to another checkpoint"


class Gatherer:
    """Reads the quantised matrices of one checkpoint.

    names: names of all tensors of the checkpoint. is_matrix: whether the model has a quantised
    matrix of the given name (without ".weight"). device: the device on which codes are unpacked.
    """

    def __init__(
        self,
        checkpoint: Path,
        scheme: Scheme,
        names: Collection[str],
        is_matrix: Callable[[str], bool],
        device: torch.device,
    ) -> None:
        self._checkpoint, self._scheme, self._names = checkpoint, scheme, names
        self._is_matrix, self._device = is_matrix, device
        self._suffixes = sorted(set(scheme.suffixes), key=len, reverse=True)
        self._pending: dict[str, dict[str, Tensor]] = {}

    def gather(
        self, tensors: Iterable[tuple[str, Tensor]]
    ) -> Iterator[tuple[str, Tensor | QuantizedMatrix]]:
        """Yield (matrix name + ".weight", matrix) after its last tensor; other tensors unchanged.

        Scales of a KV cache and `Stored.unused` tensors are dropped. Raises ConfigError for missing
        or malformed tensors of a matrix.
        """
        for name, tensor in tensors:
            matrix, suffix, stored = self._owner_of(name)
            if stored is None:
                if not _KV_SCALE.fullmatch(name):
                    yield name, tensor
            elif suffix not in stored.unused:
                found = self._pending.setdefault(matrix, {})
                found[suffix] = tensor
                if len(found) == len(self._expected(matrix, stored)):
                    yield f"{matrix}.weight", self._read(matrix, stored)

    def _owner_of(self, name: str) -> tuple[str, str, Stored | None]:
        """The matrix that a tensor belongs to, the rest of its name, and the matrix's format."""
        for suffix in self._suffixes:
            matrix = name.removesuffix(suffix)
            if matrix != name and (suffix.startswith("_") or self._is_matrix(matrix)):
                stored = self._scheme.stored(matrix)
                if stored is not None and suffix in stored.suffixes:
                    return matrix, suffix, stored
        return "", "", None

    def _expected(self, matrix: str, stored: Stored) -> list[str]:
        """Suffixes of the tensors to wait for. Raises ConfigError if a required one is missing."""
        present = [s for s in stored.suffixes if matrix + s in self._names]
        if missing := stored.missing_of(present):
            names = ", ".join(matrix + suffix for suffix in missing)
            raise ConfigError(
                f"{self._checkpoint}: missing tensors: {names}; the quantization_config asks for "
                "them: download the checkpoint again"
            )
        return [suffix for suffix in present if suffix not in stored.unused]

    def _read(self, matrix: str, stored: Stored) -> QuantizedMatrix:
        tensors = self._pending.pop(matrix)
        found = {suffix[1:]: tensor.to(self._device) for suffix, tensor in tensors.items()}
        try:
            read = stored.read(found)
            fields = [field for field in found if "scale" in field]
            _expect_scales(read, min(fields, key=len, default="scale"))
        except ValueError as error:
            text = f"{self._checkpoint}: matrix '{matrix}': {error}"
            raise ConfigError(text if ";" in str(error) else f"{text}; {_WAY_OUT}") from error
        return read


def _expect_scales(matrix: QuantizedMatrix, field: str) -> None:
    """Raise ValueError if all scales are zero although not all codes are. field: their name."""
    if matrix.minima is not None:
        return  # in such formats, a matrix of zeros may have any codes
    if not bool(matrix.scales.float().any()):
        numbers = dequantize(replace(matrix, scales=torch.ones_like(matrix.scales)))
        if bool(numbers.any()):
            raise ValueError(
                f"its {field} holds only zeros, and its codes do not; the file is damaged"
            )
