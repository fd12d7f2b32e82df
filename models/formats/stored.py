"""How a quantised checkpoint stores its matrices: the interface between config and loader.

A method of `methods.py` reads a quantization_config into a `Scheme`, which knows for each matrix,
by its name in the checkpoint without ".weight", whether and how it is quantised.
"""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from compiledllm.config import ConfigError
from compiledllm.models.formats.codes import QuantizedMatrix
from compiledllm.models.json_file import read_json
from compiledllm.models.matrices import QuantSpec


@dataclass(frozen=True)
class Stored:
    """The tensors of one matrix in a checkpoint, and how they are read.

    required: suffixes that the matrix's name needs, each with its alternatives: ((".weight",),
    (".scale", ".scale_inv")). optional: suffixes that `read` takes if they exist. unused: suffixes
    of tensors that a product with 16-bit activations does not need. read: makes the matrix of the
    tensors by suffix, without the dot; raises ValueError naming the field. spec: how the matrix is
    kept in memory.
    """

    spec: QuantSpec
    required: tuple[tuple[str, ...], ...]
    read: Callable[[Mapping[str, Tensor]], QuantizedMatrix]
    optional: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()

    @property
    def suffixes(self) -> tuple[str, ...]:
        """The suffixes of all tensors of a matrix, the longest first."""
        needed = (suffix for alternatives in self.required for suffix in alternatives)
        return tuple(sorted((*needed, *self.optional, *self.unused), key=len, reverse=True))

    def missing_of(self, found: Iterable[str]) -> list[str]:
        """First alternatives of the required suffixes that `found` lacks."""
        present = set(found)
        return [names[0] for names in self.required if not present.intersection(names)]


_MAX_GROUP = 2**31  # no matrix has as many inputs, and torch's integers end at 2^63
# Last segments of the names that checkpoints give to token embeddings, per-layer ones included.
_EMBEDDINGS = (
    *("embed_tokens", "embed_tokens_per_layer", "word_embeddings", "wte", "embed_in"),
    *("tok_embeddings", "embeddings", "embedding"),
)


def is_embedding(name: str) -> bool:
    """Whether a matrix is an embedding and not a linear layer, by its name in a checkpoint."""
    return name.rpartition(".")[2] in _EMBEDDINGS


class Scheme(Protocol):
    """Which matrices of a checkpoint are quantised, and how.

    title: the scheme's name in reports, such as "gptq int4".
    """

    @property
    def title(self) -> str: ...

    @property
    def suffixes(self) -> tuple[str, ...]:
        """The suffixes of the tensors of all formats."""

    def stored(self, name: str) -> Stored | None:
        """How the matrix `name` is stored; None: in a floating-point dtype, not quantised."""


@dataclass(frozen=True)
class Uniform:
    """A scheme in which all quantised matrices have the same format."""

    title: str
    format: Stored
    is_quantized: Callable[[str], bool]

    @property
    def suffixes(self) -> tuple[str, ...]:
        return self.format.suffixes

    def stored(self, name: str) -> Stored | None:
        return self.format if self.is_quantized(name) else None


class Fields:
    """The fields of a quantization_config. Errors name the field, its value and the way out."""

    def __init__(self, fields: Mapping[str, Any], where: str = "quantization_config") -> None:
        self._fields, self.where = fields, where

    def get(self, *names: str, default: Any = None) -> Any:
        """The field under one of several names; a null is an absent field."""
        return self._named(names, default)[1]

    def _named(self, names: tuple[str, ...], default: Any) -> tuple[str, Any]:
        """The name under which the config has a field, and the field's value or the default.

        Raises ConfigError if the config has the field under two names with different values.
        """
        first, *others = [n for n in names if self._fields.get(n) is not None] or [names[0]]
        for other in others:
            if self._fields[other] != self._fields[first]:
                way_out = f"it contradicts {first}={self._fields[first]!r:.40}"
                raise self.refusal(other, self._fields[other], way_out)
        return first, default if self._fields.get(first) is None else self._fields[first]

    def expect(self, names: str | tuple[str, ...], *allowed: Any, default: Any = None) -> Any:
        """The field under one of `names`. Raises ConfigError for a value that is not allowed."""
        name, value = self._named((names,) if isinstance(names, str) else names, default)
        if value not in allowed:
            raise self.refusal(name, value, f"supported: {', '.join(map(repr, allowed))}")
        return value

    def names(self, *fields: str) -> list[str]:
        """All names that the fields list; absent: empty."""
        return [name for field in fields for name in self._names(field)]

    def _names(self, field: str) -> list[str]:
        value = self.get(field, default=[])
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise self.refusal(field, value, "it must be a list of names")
        for name in value:
            if name.startswith("re:"):
                self.pattern(field, name.removeprefix("re:"))
        return value

    def pattern(self, name: str, text: str) -> re.Pattern[str]:
        """A regular expression in the field `name`."""
        try:
            return re.compile(text)
        except re.error as error:
            raise self.refusal(name, text, f"no regular expression: {error}") from None

    def integer(self, *names: str, default: Any = None) -> int:
        name, value = self._named(names, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.refusal(name, value, "it must be an integer")
        return value

    def flag(self, name: str, *, default: bool) -> bool:
        value = self.get(name, default=default)
        if not isinstance(value, bool):
            raise self.refusal(name, value, "it must be true or false")
        return value

    def group(self, *names: str, default: int) -> int:
        """Number of inputs that share a scale; 0: all inputs."""
        value = self.integer(*names, default=default)
        if value != -1 and not 1 <= value < _MAX_GROUP:
            name, _ = self._named(names, default)
            way_out = "it must be positive and less than 2^31, or -1 for all inputs"
            raise self.refusal(name, value, way_out)
        return max(value, 0)

    def section(self, name: str) -> Fields:
        value = self.get(name, default={})
        if not isinstance(value, dict):
            raise self.refusal(name, value, "it must be an object")
        return Fields(value, f"{self.where}.{name}")

    def texts(self) -> dict[str, str]:
        """All fields, which must be texts."""
        for name, value in self._fields.items():
            if not isinstance(value, str):
                raise self.refusal(name, value, "it must be a text")
        return dict(self._fields)

    def sections(self) -> dict[str, Fields]:
        return {name: self.section(name) for name in self._fields}

    def refusal(self, name: str, value: Any, way_out: str) -> ConfigError:
        shown = repr(value)
        shown = shown if len(shown) <= 80 else f"{shown[:80]}..."
        return ConfigError(f"{self.where}: {name}={shown} is not supported ({way_out})")


def quantization_config(checkpoint: Path) -> dict[str, Any] | None:
    """The quantization_config, from wherever tools store it; None if the checkpoint has none.

    Raises ConfigError for checkpoints in MLX's format, whose field is named differently.
    """
    raw = read_json(checkpoint / "config.json")
    of_mlx = raw.get("quantization")
    if isinstance(of_mlx, dict) and {"bits", "group_size"} <= of_mlx.keys():
        raise ConfigError(
            f"{checkpoint}: the weights are quantised for MLX (quantization={of_mlx!r:.60}), whose "
            "format is not supported; use the unquantised model and quantization='int4' or another"
        )
    text = raw.get("text_config")
    for config in (raw, text if isinstance(text, dict) else {}):
        for name in ("quantization_config", "compression_config"):
            found = config.get(name)
            if found is not None and not isinstance(found, dict):
                raise ConfigError(f"{checkpoint}: {name} must be an object, got {found!r:.40}")
            if found:
                return found
    path = checkpoint / "hf_quant_config.json"
    return {"quant_method": "modelopt"} | read_json(path) if path.exists() else None


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a list of module names has `name`.

    A pattern is a regular expression ("re:..."), has wildcards ("model.layers.*.gate"), or is a
    sequence of whole segments of the name: "lm_head", "mlp.gate", "model.layers.0".
    """
    plain, expressions = _compiled(tuple(patterns))
    return any(run in plain for run in runs_of(name)) or any(e.match(name) for e in expressions)


def runs_of(name: str) -> Iterator[str]:
    """All sequences of whole segments of a name, the name itself first."""
    segments = name.split(".")
    for start in range(len(segments)):
        for end in range(len(segments), start, -1):
            yield ".".join(segments[start:end])


def expression_of(pattern: str) -> re.Pattern[str] | None:
    """The regular expression that a pattern stands for; None for a sequence of segments."""
    if pattern.startswith("re:"):
        return re.compile(pattern.removeprefix("re:"))
    stripped = pattern.strip(".")
    if "*" not in stripped:
        return None
    return re.compile(f"{fnmatch.translate(stripped)}|{fnmatch.translate(f'{stripped}.*')}")


@functools.lru_cache(maxsize=64)
def _compiled(patterns: tuple[str, ...]) -> tuple[frozenset[str], tuple[re.Pattern[str], ...]]:
    """Plain names, and regular expressions. Cached, as models have up to 30,000 names to match."""
    found = {pattern: expression_of(pattern) for pattern in patterns}
    plain = {pattern.strip(".") for pattern, expression in found.items() if expression is None}
    return frozenset(plain - {""}), tuple(e for e in found.values() if e is not None)
