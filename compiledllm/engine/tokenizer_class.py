"""Loads transformers' tokenizer of a directory, past AutoTokenizer where the class is certain.

AutoTokenizer reads the model's config first, for which transformers imports torch's compiler.
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

    return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)


def is_as_stored(directory: Path) -> bool:
    """Whether AutoTokenizer would run tokenizer.json without a class of the model's own.

    Only Llama models are known to mean so: for some other types AutoTokenizer overrides the class.
    """
    tokenizer, model = (
        _fields(directory / f"{name}.json") for name in ("tokenizer_config", "config")
    )
    return (
        tokenizer.get("tokenizer_class") in _AS_STORED
        and "auto_map" not in tokenizer
        and model.get("model_type") == "llama"
        and (directory / "tokenizer.json").is_file()
    )


def _fields(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} if there is none, about which transformers says more."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
