"""Loads safetensors into a Decoder: renames, fuses and converts tensors, and accounts for each one.

Every checkpoint tensor must be used exactly once and every parameter filled exactly once; otherwise
loading fails and names the tensors.

A family's NAMES maps checkpoint names to parameter names of the Decoder. `*` matches one name
segment and stands for the same text on the right; `**`, in IGNORED, matches several segments.
`:part` names a slice of a fused parameter, and `:a,b` says that the checkpoint tensor is the
concatenation of the slices a and b. A family's `prepare(name, tensor, spec)` reorders or transposes
a tensor that is stored differently. Its `unpack(tensors, spec)` merges several stored tensors into
one, or splits one into several. Before `unpack`, `formats.gather` replaces the tensors of each
quantised matrix by one `QuantizedMatrix`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from compiledllm.config import ConfigError
from compiledllm.log import log
from compiledllm.models.checkpoint import (
    are_equal,
    files_by_tensor,
    read_tensors,
    shape_in,
    weight_files,
)
from compiledllm.models.decoder import Decoder
from compiledllm.models.formats.gather import Gatherer
from compiledllm.models.formats.kv_scales import parse_name
from compiledllm.models.formats.mixed import Mixed
from compiledllm.models.formats.plain import Plain
from compiledllm.models.formats.quantized import MatrixSlot, Quantized
from compiledllm.models.formats.slicing import Content, shape_of, split_rows
from compiledllm.models.formats.stacked import StackedExperts
from compiledllm.models.formats.weight_format import ShardSlot, Slot, TensorSlot
from compiledllm.models.layers.linear import Matrix, SharedExpert
from compiledllm.models.names import NameRules, slots_of
from compiledllm.models.registry import family_of, scheme_of_checkpoint
from compiledllm.models.spec import ModelSpec
from compiledllm.models.staging import Copier, make_copier

_NUMBER = re.compile(r"\.\d+\.")


def load_weights(model: Decoder, checkpoint: Path) -> None:
    """Copy the checkpoint's tensors into `model`, converted to the model's dtype and device.

    An output head that the config ties is untied if the checkpoint stores a head that differs from
    the embedding. Raises ConfigError for missing, unexpected or misshapen tensors.
    """
    family = family_of(model.spec.architecture)
    rules = NameRules.of(family, model.spec)
    files = weight_files(checkpoint)
    if model.spec.tie_word_embeddings:
        _settle_head(model, rules, files)
    missing = _destinations(model)
    unexpected: list[str] = []
    with closing(make_copier(model.embedding.device)) as copier:
        for name, stored in _stored(model, family, files, rules, missing):
            slots = _match(rules.target_of(name), missing)
            if slots is None:
                unexpected.append(name)
            else:
                _check(checkpoint, name, stored, slots)
                _fill(checkpoint, name, stored, slots, copier)
    _report(checkpoint, "unexpected tensors", unexpected, f"; {_OTHER_CHECKPOINT}")
    absent = [rules.source_of(target) for target in missing]
    way_out = _HOW_TO_TIE if list(missing) == ["lm_head.weight"] else "; download them again"
    _report(checkpoint, "missing tensors", absent, way_out)


def paths_of_layers(spec: ModelSpec, checkpoint: Path) -> set[str]:
    """What stands before the layers' numbers in the names of tensors, such as "model.layers".

    Empty for a model that transformers' modules run, as only they know their names.
    """
    if spec.implementation == "transformers":
        return set()
    rules = NameRules.of(family_of(spec.architecture), spec)
    names = files_by_tensor(weight_files(checkpoint))
    of_layers = (name for name in names if rules.target_of(name).startswith("layers."))
    return {name[: number.start()] for name in of_layers if (number := _NUMBER.search(name))}


def _stored(
    model: Decoder,
    family: ModuleType,
    files: list[Path],
    rules: NameRules,
    slots: Mapping[str, Slot],
) -> Iterator[tuple[str, Content]]:
    """The checkpoint's used tensors, by name, after the family's `unpack` and `prepare`."""
    tensors: Iterator[tuple[str, Content]] = read_tensors(files)
    scheme = scheme_of_checkpoint(files[0].parent)
    if scheme is not None:
        quantized = {name for name, slot in slots.items() if _is_quantized(slot)}

        def is_matrix(name: str) -> bool:
            return quantized.issuperset(slots_of(rules.target_of(f"{name}.weight")))

        names, device = files_by_tensor(files), model.embedding.device
        stacked = StackedExperts(names, scheme, model.spec.whole, lambda n: shape_in(names[n], n))
        parts = set(stacked.names(names))
        gatherer = Gatherer(files[0].parent, scheme, parts, is_matrix, device)
        tensors = gatherer.gather(stacked.one_by_one(read_tensors(files)))
    for name, tensor in _by_family(family, tensors, rules, model.spec.whole, files[0].parent):
        if scheme is None or not _is_empty_bias(name, tensor, rules, slots):
            yield name, tensor


def _by_family(
    family: ModuleType,
    tensors: Iterator[tuple[str, Content]],
    rules: NameRules,
    spec: ModelSpec,
    checkpoint: Path,
) -> Iterator[tuple[str, Content]]:
    """The used tensors after the family's `unpack` and `prepare`.

    Both run before the shapes of tensors are checked. Raises ConfigError, naming the tensor, if
    they fail on a damaged tensor.
    """
    latest = ""

    def watched() -> Iterator[tuple[str, Content]]:
        nonlocal latest
        for name, tensor in tensors:
            latest = name
            yield name, tensor

    unpack = getattr(family, "unpack", lambda tensors, _: tensors)
    prepare = getattr(family, "prepare", lambda _, tensor, __: tensor)
    try:
        for name, tensor in unpack(watched(), spec):
            if rules.is_used(name) and parse_name(name) is None:  # see `formats.kv_scales`
                yield name, prepare(name, tensor, spec)
    except (ConfigError, torch.OutOfMemoryError):
        raise
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        cause = str(error).partition("\n")[0]
        raise ConfigError(
            f"{checkpoint}: tensor '{latest}' cannot be taken apart ({cause}); {_OTHER_CHECKPOINT}"
        ) from error


def _is_quantized(slot: Slot) -> bool:
    return isinstance(slot.slot if isinstance(slot, ShardSlot) else slot, MatrixSlot)


def _is_empty_bias(name: str, stored: Content, rules: NameRules, slots: Mapping[str, Slot]) -> bool:
    """Whether the tensor is a bias of zeros for a layer without a bias, as in some GPTQ files."""
    if not isinstance(stored, Tensor) or not name.endswith(".bias"):
        return False
    has_slot = any(slot in slots for slot in slots_of(rules.target_of(name)))
    return not has_slot and not bool(stored.any())


def _match(target: str, missing: dict[str, Slot]) -> list[Slot] | None:
    """Take the slots of a target out of `missing`; None if the model lacks one of them."""
    slots = [missing.pop(slot, None) for slot in slots_of(target)]
    found = [slot for slot in slots if slot is not None]
    return found if len(found) == len(slots) else None


def _check(checkpoint: Path, name: str, stored: Content, slots: list[Slot]) -> None:
    """Raise ConfigError unless the tensor is in 16 bits or more and has the shape of the slots.

    The expected shape has the rows of all slots, one slot after the other.
    """
    is_number = isinstance(stored, Tensor) and stored.is_floating_point() and stored.itemsize > 1
    if isinstance(stored, Tensor) and not is_number:
        dtype = str(stored.dtype).removeprefix("torch.")
        raise ConfigError(
            f"{checkpoint}: tensor '{name}' has dtype {dtype}, expected a floating-point dtype of "
            f"16 bits or more, as the config gives it no scales; {_OTHER_CHECKPOINT}"
        )
    expected = [sum(slot.shape[0] for slot in slots), *slots[0].shape[1:]]
    if shape_of(stored) != expected:
        raise ConfigError(
            f"{checkpoint}: tensor '{name}' has shape {shape_of(stored)}, the config asks "
            f"for {expected}; {_OTHER_CHECKPOINT}"
        )


def _fill(checkpoint: Path, name: str, stored: Content, slots: list[Slot], copier: Copier) -> None:
    parts = split_rows(stored, [slot.shape[0] for slot in slots])
    try:
        for slot, part in zip(slots, parts, strict=True):
            if isinstance(slot, TensorSlot) and isinstance(part, Tensor) and part.is_cpu:
                copier.copy(slot.tensor, part)
            else:
                slot.put(part)
    except ValueError as error:
        raise ConfigError(f"{checkpoint}: tensor '{name}': {error}") from error


_OTHER_CHECKPOINT = "config.json (with its quantization_config) and weights must be of one model"
_HOW_TO_TIE = "; if the model's head is its embedding, set tie_word_embeddings in config.json"


def _settle_head(model: Decoder, rules: NameRules, files: list[Path]) -> None:
    """Decide how to load the output head if the config ties it, as transformers does.

    A stored head that equals the embedding stays tied; a different one is loaded as a matrix of its
    own, as is any head beside a quantised embedding. If the checkpoint stores a head but no
    embedding, the head is loaded as the embedding.
    """
    is_quantized = not isinstance(model.embedding.format, Plain)
    stored = files_by_tensor(files)
    heads, embeddings = (
        [(stored[name], name) for name in rules.sources_of(target) if name in stored]
        for target in ("lm_head.weight", "embedding")
    )
    for path, name in heads:
        if not embeddings and not is_quantized:
            rules.rename(name, "embedding")
        elif embeddings and are_equal((path, name), embeddings[0], model.embedding.dtype):
            rules.ignore(name)
        else:
            model.untie_head()
            log.warning(
                "the config ties the head to the embedding, but %s in %s differs from %s: it is "
                "used, as in transformers (tie_word_embeddings=false would say so)",
                *(name, path.name, rules.source_of("embedding")),
            )


def fill_with_random_weights(model: Decoder, seed: int) -> None:
    """Fill with dummy weights: normal with the spec's `initializer_range`, norms 1, biases 0.

    Quantised matrices get random codes, with scales that give their values the same deviation.
    """
    spread = model.spec.initializer_range
    done: set[str] = set()
    for index, (name, parameter) in enumerate(model.named_parameters()):
        generator = torch.Generator(parameter.device).manual_seed((seed * 100_003 + index) % 2**63)
        path = name.rpartition(".")[0]
        module = model.get_submodule(path)
        if name.endswith("bias"):
            parameter.fill_(0.0)
        elif isinstance(module, Matrix) and isinstance(module.format, Quantized | Mixed):
            if path not in done:
                module.format.randomize(module.params, spread, generator)
            done.add(path)
        elif parameter.dim() > 1:
            parameter.normal_(0, spread, generator=generator)
        else:
            parameter.fill_(1.0)


def _destinations(model: Decoder) -> dict[str, Slot]:
    """Every slot of the model: "path.weight" or, for fused parameters, "path.weight:part"."""
    slots: dict[str, Slot] = {}
    for path, module in model.named_modules():
        if isinstance(module, Matrix | SharedExpert):
            found = module.slots()
        else:
            own = module.named_parameters(recurse=False)
            found = {name: TensorSlot(parameter.data) for name, parameter in own}
            shards = getattr(module, "shards", {}) if model.spec.num_ranks > 1 else {}
            found |= {n: ShardSlot(found[n], s, 0) for n, s in shards.items() if n in found}
        slots |= {".".join(filter(None, (path, name))): slot for name, slot in found.items()}
    return slots


def _report(checkpoint: Path, what: str, names: list[str], way_out: str = "") -> None:
    if names:
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        raise ConfigError(f"{checkpoint}: {what}: {shown}{way_out}")
