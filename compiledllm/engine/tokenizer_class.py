"""Loads transformers' tokenizer of a directory, without importing the model's config class.

For many types of models, importing that class also imports torch's compiler, which takes long.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

# transformers replaces its own module at the end of its import. A thread that waits for the same
# import meanwhile would get the replaced module, which has no tokenizers.
_IMPORT = threading.Lock()

# Attributes that subclasses may override without changing how the tokenizer behaves.
_HARMLESS = {"__init__", "model", "slow_tokenizer_class", "__annotate__", "__annotate_func__"}


def warm_up() -> None:
    """Import the modules that the first tokenizer needs, which takes some seconds."""
    with _IMPORT:
        from transformers import AutoTokenizer  # noqa: F401


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer that AutoTokenizer gives. Raises whatever transformers raises."""
    warm_up()
    from transformers import AutoTokenizer

    config = _config_of_tokenizer(directory)
    return AutoTokenizer.from_pretrained(directory, config=config, trust_remote_code=False)


def _config_of_tokenizer(directory: Path) -> Any:
    """The fields by which AutoTokenizer chooses a class; None if it must read the whole config.

    If no file names the tokenizer's class, AutoTokenizer chooses by the class of the config.
    """
    tokenizer, model = (_fields(directory / f"{n}.json") for n in ("tokenizer_config", "config"))
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


def _fields(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} without one, which transformers reports."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def why_not_plain(tokenizer: Any) -> str:
    """Why a tokenizer of transformers cannot become a `PlainTokenizer`; "" if it can."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    backend, classes = getattr(tokenizer, "backend_tokenizer", None), type(tokenizer).__mro__
    if PreTrainedTokenizerFast not in classes or type(backend) is not Tokenizer:
        return "it is written in Python"
    for cls in classes[: classes.index(PreTrainedTokenizerFast)]:
        for name, value in vars(cls).items():
            does_more = callable(value) or hasattr(value, "__get__")
            if does_more and name not in _HARMLESS and hasattr(PreTrainedTokenizerFast, name):
                return f"{cls.__name__} has its own {name}"
    if patched := getattr(backend, "__dict__", {}):
        return f"{', '.join(patched)} of its backend is written in Python"
    if tokenizer.clean_up_tokenization_spaces and not _ignores_clean_up(tokenizer):
        return "it removes spaces in Python"
    return ""


def _ignores_clean_up(tokenizer: Any) -> bool:
    """Whether transformers ignores the tokenizer's `clean_up_tokenization_spaces`.

    For byte-pair encoding it does, in versions that have the option below, unless the option is
    set.
    """
    insists = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    return (
        type(tokenizer.backend_tokenizer.model).__name__ == "BPE"
        and getattr(tokenizer, insists, True) is False
    )
