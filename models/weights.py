"""Fills a Decoder from safetensors: rename, fuse, convert, and account for every tensor.

Each checkpoint tensor is used exactly once and each parameter filled exactly once, else the load
fails with the names. A family's NAMES maps checkpoint names to ours; `*` matches one name segment
and stands for the same text on the right (`**`, in IGNORED, matches several), `:part` names a slice
of a fused parameter; `:a,b` says that the tensor holds several, one after the other. What is stored
in another order or transposed, a family's `prepare(name, tensor, spec)` puts right; where several
stored tensors make one or one makes several, its `unpack(tensors, dtype, device)` does.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from compiledllm.config import ConfigError
from compiledllm.models.decoder import Decoder
from compiledllm.models.layers.linear import Linear
from compiledllm.models.layers.moe import ExpertLinear
from compiledllm.models.registry import family_of


def load_weights(model: Decoder, checkpoint: Path) -> None:
    """Copy the checkpoint's tensors into `model`, converting to its dtype and device."""
    family = family_of(model.spec.architecture)
    rules = _NameRules(family.NAMES, family.IGNORED)
    prepare = getattr(family, "prepare", None)
    missing = _destinations(model)
    if model.spec.tie_word_embeddings:
        rules.ignore("lm_head.weight")  # some checkpoints store the tied matrix a second time
    unexpected: list[str] = []
    seen: set[str] = set()
    tensors = _read_tensors(checkpoint)
    if (unpack := getattr(family, "unpack", None)) is not None:
        tensors = unpack(tensors, model.embedding.dtype, model.embedding.device)
    for name, tensor in tensors:
        if name in seen:
            raise ConfigError(f"{checkpoint}: tensor '{name}' is stored twice")
        seen.add(name)
        target = rules.target_of(name)
        if target is None:
            continue
        if prepare is not None:
            tensor = prepare(name, tensor, model.spec)
        destinations = [missing.pop(slot, None) for slot in _slots_of(target)]
        wanted = [slot.shape for slot in destinations if slot is not None]
        if len(wanted) < len(destinations):
            unexpected.append(name)
            continue
        if wanted[0][1:] != tensor.shape[1:] or sum(s[0] for s in wanted) != len(tensor):
            asked = [sum(s[0] for s in wanted), *wanted[0][1:]]
            raise ConfigError(
                f"{checkpoint}: tensor '{name}' has shape {list(tensor.shape)}, the config asks "
                f"for {asked}"
            )
        for slot, part in zip(
            destinations, torch.split(tensor, [s[0] for s in wanted]), strict=True
        ):
            assert slot is not None
            slot.copy_(part)
    _report(checkpoint, "unexpected tensors", unexpected)
    _report(checkpoint, "missing tensors", [rules.source_of(target) for target in missing])


def fill_with_random_weights(model: Decoder, seed: int) -> None:
    """Dummy weights: normal with the config's spread, norms one, biases zero."""
    for index, (name, parameter) in enumerate(model.named_parameters()):
        if parameter.dim() > 1 and not name.endswith("bias"):
            generator = torch.Generator(parameter.device).manual_seed(
                (seed * 100_003 + index) % 2**63
            )
            parameter.normal_(0, model.spec.initializer_range, generator=generator)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)


class _NameRules:
    """A family's NAMES, in both directions."""

    def __init__(self, names: dict[str, str], ignored: tuple[str, ...]) -> None:
        self._names = names
        self._patterns = [(_compile(source), target) for source, target in names.items()]
        self._ignored = [_compile(source) for source in ignored]

    def ignore(self, source: str) -> None:
        self._ignored.append(_compile(source))

    def target_of(self, name: str) -> str | None:
        """Where a checkpoint tensor goes; "" when no rule knows it, None when it is ignored."""
        if any(pattern.fullmatch(name) for pattern in self._ignored):
            return None
        for pattern, target in self._patterns:
            match = pattern.fullmatch(name)
            if match:
                return _substitute(target, match.groups())
        return ""

    def source_of(self, target: str) -> str:
        """The checkpoint name that would have filled `target`, for error messages."""
        for source, pattern in self._names.items():
            match = _compile(pattern).fullmatch(target)
            if match:
                return _substitute(source, match.groups())
        return target


def _slots_of(target: str) -> list[str]:
    """ "x:a,b" -> "x:a", "x:b"."""
    name, _, parts = target.partition(":")
    return [f"{name}:{part}" for part in parts.split(",")] if parts else [name]


def _compile(pattern: str) -> re.Pattern[str]:
    pieces = re.split(r"(\*+)", pattern)
    kinds = {"*": "([^.:]+)", "**": ".+"}
    return re.compile("".join(kinds.get(piece) or re.escape(piece) for piece in pieces))


def _substitute(pattern: str, groups: tuple[str, ...]) -> str:
    pieces = pattern.split("*")
    return "".join(p + g for p, g in zip(pieces, [*groups, ""], strict=True))


def _destinations(model: Decoder) -> dict[str, Tensor]:
    """Every slice a tensor may fill: "path.weight" or, where fused, "path.weight:part"."""
    slots: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{leaf}" if path else leaf
            if isinstance(module, ExpertLinear):
                for expert, matrix in enumerate(parameter.data):
                    slots |= _slots_by_part(f"{path}.{expert}.{leaf}", matrix, module.parts)
            elif isinstance(module, Linear):
                slots |= _slots_by_part(name, parameter.data, module.parts)
            else:
                slots[name] = parameter.data
    return slots


def _slots_by_part(name: str, tensor: Tensor, parts: dict[str, int]) -> dict[str, Tensor]:
    """The rows of each part; of a plain layer, whose one part is named "", all of them."""
    pieces = torch.split(tensor, list(parts.values()))
    names = [f"{name}:{part}" if part else name for part in parts]
    return dict(zip(names, pieces, strict=True))


def _read_tensors(checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every tensor in the checkpoint's safetensors files, one at a time."""
    files = weight_files(checkpoint)
    progress = tqdm(files, desc="loading weights", unit="file", disable=not sys.stderr.isatty())
    for path in progress:
        try:
            with safe_open(path, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118  (safe_open is not a mapping)
                    yield name, shard.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{path} is not a readable safetensors file: {error}") from error


def weight_files(checkpoint: Path) -> list[Path]:
    """A checkpoint's safetensors files. Raises ConfigError if there are none, or not all."""
    index = checkpoint / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ConfigError(f"{index} is not a valid shard index: {error}") from error
        files = [checkpoint / name for name in names]
        absent = [path.name for path in files if not path.exists()]
        if absent:
            raise ConfigError(f"{checkpoint}: weight files are missing: {', '.join(absent)}")
        return files
    files = sorted(checkpoint.glob("*.safetensors"))
    if not files:
        raise ConfigError(
            f"{checkpoint} has no .safetensors files (other formats are not loaded); "
            "use load_format='dummy' for random weights"
        )
    return files


def _report(checkpoint: Path, what: str, names: list[str]) -> None:
    if names:
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        raise ConfigError(f"{checkpoint}: {what}: {shown}")
