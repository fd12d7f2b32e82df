"""A checkpoint's pooling: which hidden states become the embedding vector of a prompt.

sentence-transformers describes a model as a list of modules (`modules.json`): the transformer, a
pooling with a configuration of its own (`1_Pooling/config.json`), and perhaps a normalisation.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compiledllm.config import ConfigError
from compiledllm.models.json_file import read_json, read_json_objects
from compiledllm.pooling_params import PoolingKind

_KINDS: dict[str, PoolingKind] = {"lasttoken": "last", "mean": "mean"}
_OLD_NAMES = {"pooling_mode_lasttoken": "lasttoken", "pooling_mode_mean_tokens": "mean"}
_WAY_OUT = "compiledllm pools decoders by their last token or by the mean of all tokens"


@dataclass(frozen=True, slots=True)
class StoredPooling:
    """The defaults of `PoolingParams` for a model. max_dimensions: size of a hidden state."""

    max_dimensions: int
    kind: PoolingKind = "last"
    normalize: bool = True


def stored_pooling(checkpoint: Path) -> StoredPooling:
    """A checkpoint's pooling; the normalised last token if the checkpoint has no modules.json.

    Raises ConfigError for modules and poolings that are not supported.
    """
    path, size = checkpoint / "modules.json", _hidden_size(checkpoint)
    if not path.exists():
        return StoredPooling(size)
    kind: PoolingKind = "last"
    normalize = False
    for module in read_json_objects(path):
        name = str(module.get("type")).rpartition(".")[2]
        if name == "Pooling":
            kind = _kind(checkpoint / str(module.get("path", "")) / "config.json")
        elif name == "Normalize":
            normalize = True
        elif name != "Transformer":
            raise ConfigError(f"{path}: the module '{name:.80}' is not supported; {_WAY_OUT}")
    return StoredPooling(size, kind, normalize)


def _hidden_size(checkpoint: Path) -> int:
    """The size of a hidden state, by the names that configs have for it."""
    config = read_json(checkpoint / "config.json")
    text = config.get("text_config")
    places = (config, text if isinstance(text, dict) else {})
    sizes = (place.get(name) for place in places for name in ("hidden_size", "n_embd", "d_model"))
    return next(size for size in sizes if isinstance(size, int))


def _kind(path: Path) -> PoolingKind:
    config = read_json(path)
    named = config.get("pooling_mode")
    if named is None:
        modes = [name for name, value in config.items() if _is_on(name, value)]
    else:
        modes = named if isinstance(named, list) else [named]
    names = [_OLD_NAMES.get(str(mode), str(mode)) for mode in modes]
    if len(names) != 1 or names[0] not in _KINDS:
        raise ConfigError(f"{path}: pooling by {modes!r:.120} is not supported; {_WAY_OUT}")
    kind = _KINDS[names[0]]
    if kind == "mean" and config.get("include_prompt", True) is not True:
        raise ConfigError(f"{path}: include_prompt=false is not supported; {_WAY_OUT}")
    return kind


def _is_on(name: str, value: Any) -> bool:
    return name.startswith("pooling_mode_") and value is True
