"""Loads transformers' tokenizer of a directory, without the class of the model's config.

For many types of models, transformers imports torch's compiler with that class.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

# Names in tokenizer_config.json of the class that runs tokenizer.json as it stands.
_AS_STORED = ("PreTrainedTokenizerFast", "TokenizersBackend")


# transformers replaces its own module at the end of its import. A thread that meanwhile waits for
# the same import gets the module from before, which has no tokenizers.
_IMPORT = threading.Lock()


def warm_up() -> None:
    """Import the modules that the first tokenizer needs, which takes some seconds."""
    with _IMPORT:
        from transformers import PreTrainedTokenizerFast  # noqa: F401


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer that AutoTokenizer gives. Raises whatever transformers raises."""
    warm_up()
    if is_as_stored(directory):
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(directory)
    from transformers import AutoTokenizer

    config = _config_of_tokenizer(directory)
    return AutoTokenizer.from_pretrained(directory, config=config, trust_remote_code=False)


def _config_of_tokenizer(directory: Path) -> Any:
    """The fields by which AutoTokenizer chooses a class; None if it must read the whole config.

    If no file names the tokenizer's class, AutoTokenizer chooses by the class of the config.
    """
    tokenizer, model = _fields_of(directory)
    named = tokenizer.get("tokenizer_class", model.get("tokenizer_class"))
    if not isinstance(named, str) or not isinstance(model.get("model_type"), str):
        return None
    if "auto_map" in tokenizer or "auto_map" in model:
        return None
    from transformers import PreTrainedConfig

    config: Any = PreTrainedConfig(name_or_path=str(directory))
    for name in {"model_type", "model_name", "tokenizer_class"} & model.keys():
        setattr(config, name, model[name])
    return config


def is_as_stored(directory: Path) -> bool:
    """Whether AutoTokenizer would run tokenizer.json without a class of the model's own.

    Only Llama models are known to mean so: for some other types AutoTokenizer overrides the class.
    """
    tokenizer, model = _fields_of(directory)
    return (
        tokenizer.get("tokenizer_class") in _AS_STORED
        and "auto_map" not in tokenizer
        and model.get("model_type") == "llama"
        and (directory / "tokenizer.json").is_file()
    )


def _fields_of(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The contents of tokenizer_config.json and config.json."""
    return _fields(directory / "tokenizer_config.json"), _fields(directory / "config.json")


def _fields(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} if there is none, about which transformers says more."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
