"""Loads safetensors into a Decoder: renames, fuses and converts tensors, and accounts for each one.

Every checkpoint tensor must be used exactly once and every parameter filled exactly once; otherwise
loading fails and names the tensors.

A family's NAMES maps checkpoint names to parameter names of the Decoder. `*` matches one name
segment and stands for the same text on the right; `**`, in IGNORED, matches several segments.
`:part` names a slice of a fused parameter, and `:a,b` says that the checkpoint tensor is the
concatenation of the slices a and b. A family's `prepare(name, tensor, spec)` reorders or transposes
a tensor that is stored differently. Its `unpack(tensors, dtype, device)` merges several stored
tensors into one, or splits one into several.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from compiledllm.config import ConfigError
from compiledllm.log import log
from compiledllm.models.checkpoint import (
    are_equal,
    files_by_tensor,
    is_derived,
    read_tensors,
    weight_files,
)
from compiledllm.models.decoder import Decoder
from compiledllm.models.formats.weight_format import Slot, TensorSlot
from compiledllm.models.layers.linear import Matrix
from compiledllm.models.registry import family_of


def load_weights(model: Decoder, checkpoint: Path) -> None:
    """Copy the checkpoint's tensors into `model`, converted to the model's dtype and device.

    An output head that the config ties is untied if the checkpoint stores a head that differs from
    the embedding. Raises ConfigError for missing, unexpected or misshapen tensors.
    """
    family = family_of(model.spec.architecture)
    rules = _NameRules(family.NAMES, getattr(family, "IGNORED", ()))
    files = weight_files(checkpoint)
    if model.spec.tie_word_embeddings:
        _settle_head(model, rules, files)
    missing = _destinations(model)
    unexpected: list[str] = []
    for name, tensor in _stored_tensors(model, family, files, rules):
        slots = _match(rules.target_of(name), missing)
        if slots is None:
            unexpected.append(name)
        else:
            _check(checkpoint, name, tensor, slots)
            _fill(slots, tensor)
    _report(checkpoint, "unexpected tensors", unexpected)
    absent = [rules.source_of(target) for target in missing]
    way_out = _HOW_TO_TIE if list(missing) == ["lm_head.weight"] else ""
    _report(checkpoint, "missing tensors", absent, way_out)
    for module in model.modules():
        if isinstance(module, Matrix):
            module.finish()


def _stored_tensors(
    model: Decoder, family: ModuleType, files: list[Path], rules: _NameRules
) -> Iterator[tuple[str, Tensor]]:
    """The checkpoint's tensors that are used, by name, as the family's hooks turn them out."""
    tensors = read_tensors(files)
    if (unpack := getattr(family, "unpack", None)) is not None:
        tensors = unpack(tensors, model.embedding.dtype, model.embedding.device)
    prepare = getattr(family, "prepare", None)
    for name, tensor in tensors:
        if rules.is_used(name):
            yield name, tensor if prepare is None else prepare(name, tensor, model.spec)


def _match(target: str, missing: dict[str, Slot]) -> list[Slot] | None:
    """Take the slots of a target out of `missing`; None if the model lacks one of them."""
    slots = [missing.pop(slot, None) for slot in _slots_of(target)]
    found = [slot for slot in slots if slot is not None]
    return found if len(found) == len(slots) else None


def _check(checkpoint: Path, name: str, tensor: Tensor, slots: list[Slot]) -> None:
    """Raise ConfigError if the tensor does not have the slots' rows on top of each other."""
    asked = [sum(slot.shape[0] for slot in slots), *slots[0].shape[1:]]
    if list(tensor.shape) != asked:
        raise ConfigError(
            f"{checkpoint}: tensor '{name}' has shape {list(tensor.shape)}, the config asks "
            f"for {asked}"
        )


def _fill(slots: list[Slot], tensor: Tensor) -> None:
    parts = torch.split(tensor, [slot.shape[0] for slot in slots])
    for slot, part in zip(slots, parts, strict=True):
        slot.put(part)


_HOW_TO_TIE = "; if the model's head is its embedding, set tie_word_embeddings in config.json"


def _settle_head(model: Decoder, rules: _NameRules, files: list[Path]) -> None:
    """Decide how to load the output head if the config ties it, as transformers does.

    A stored head that equals the embedding stays tied; a different one is loaded as a matrix of its
    own. If the checkpoint stores a head but no embedding, the head is loaded as the embedding.
    """
    stored = files_by_tensor(files)
    heads, embeddings = (
        [(stored[name], name) for name in rules.sources_of(target) if name in stored]
        for target in ("lm_head.weight", "embedding")
    )
    for path, name in heads:
        if not embeddings:
            rules.rename(name, "embedding")
        elif are_equal((path, name), embeddings[0], model.embedding.dtype):
            rules.ignore(name)
        else:
            model.untie_head()
            log.warning(
                "the config ties the head to the embedding, but %s in %s differs from %s: it is "
                "used, as in transformers (tie_word_embeddings=false would say so)",
                *(name, path.name, embeddings[0][1]),
            )


def fill_with_random_weights(model: Decoder, seed: int) -> None:
    """Fill with dummy weights: normal with the spec's `initializer_range`, norms 1, biases 0."""
    for index, (name, parameter) in enumerate(model.named_parameters()):
        if parameter.dim() > 1 and not name.endswith("bias"):
            generator = torch.Generator(parameter.device).manual_seed(
                (seed * 100_003 + index) % 2**63
            )
            parameter.normal_(0, model.spec.initializer_range, generator=generator)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)


class _NameRules:
    """A family's NAMES and IGNORED, for look-ups in both directions."""

    def __init__(self, names: dict[str, str], ignored: tuple[str, ...]) -> None:
        self._names = names
        self._patterns = [(_compile(source), target) for source, target in names.items()]
        self._ignored = [_compile(source) for source in ignored]

    def ignore(self, source: str) -> None:
        self._ignored.append(_compile(source))

    def rename(self, source: str, target: str) -> None:
        """Map the checkpoint tensor `source` to `target`, overriding NAMES."""
        self._patterns.insert(0, (_compile(source), target))

    def sources_of(self, target: str) -> list[str]:
        """The checkpoint names that NAMES maps to `target`, a target without parts."""
        matches = ((source, _compile(t).fullmatch(target)) for source, t in self._names.items())
        return [_substitute(source, match.groups()) for source, match in matches if match]

    def is_used(self, name: str) -> bool:
        """Whether the tensor must have a place: not for IGNORED ones and derived buffers."""
        is_ignored = any(pattern.fullmatch(name) for pattern in self._ignored)
        return not is_ignored and not (is_derived(name) and not self.target_of(name))

    def target_of(self, name: str) -> str:
        """Where a checkpoint tensor goes; "" if no rule matches."""
        for pattern, target in self._patterns:
            match = pattern.fullmatch(name)
            if match:
                return _substitute(target, match.groups())
        return ""

    def source_of(self, target: str) -> str:
        """The checkpoint name that would have filled `target`, for error messages."""
        return next(iter(self.sources_of(target)), target)


def _slots_of(target: str) -> list[str]:
    """Split a target into its slots: "x:a,b" -> "x:a", "x:b"."""
    name, _, parts = target.partition(":")
    return [f"{name}:{part}" for part in parts.split(",")] if parts else [name]


def _compile(pattern: str) -> re.Pattern[str]:
    pieces = re.split(r"(\*+)", pattern)
    kinds = {"*": "([^.:]+)", "**": ".+"}
    return re.compile("".join(kinds.get(piece) or re.escape(piece) for piece in pieces))


def _substitute(pattern: str, groups: tuple[str, ...]) -> str:
    pieces = pattern.split("*")
    return "".join(p + g for p, g in zip(pieces, [*groups, ""], strict=True))


def _destinations(model: Decoder) -> dict[str, Slot]:
    """Every slot a tensor may fill: "path.weight" or, for fused parameters, "path.weight:part"."""
    slots: dict[str, Slot] = {}
    for path, module in model.named_modules():
        if isinstance(module, Matrix):
            found = module.slots()
        else:
            own = module.named_parameters(recurse=False)
            found = {name: TensorSlot(parameter.data) for name, parameter in own}
        prefix = f"{path}." if path else ""
        slots |= {prefix + name: slot for name, slot in found.items()}
    return slots


def _report(checkpoint: Path, what: str, names: list[str], way_out: str = "") -> None:
    if names:
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        raise ConfigError(f"{checkpoint}: {what}: {shown}{way_out}")
