"""Reads the API keys from the command line, a file and the environment."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from compiledllm.config import ConfigError


def read_keys(given: Iterable[str], path: str | None, environment: str | None) -> list[str]:
    """All API keys: given one by one, from a file (one per line) and from the environment (commas).

    Raises ConfigError for a source without any key, since the user expects protection, and for a
    key that no client can send.
    """
    keys = [_checked_key(key.strip(), "--api-key") for key in given]
    if path is not None:
        source = f"--api-key-file {path}"
        try:
            lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, ValueError) as error:
            raise ConfigError(f"{source} cannot be read: {error}") from None
        keys += _checked_keys(lines, source)
    if environment is not None:
        keys += _checked_keys(environment.split(","), "COMPILEDLLM_API_KEY")
    return keys


def _checked_keys(words: Iterable[str], source: str) -> list[str]:
    keys = [word.strip() for word in words if word.strip()]
    return [_checked_key(key, source) for key in keys or [""]]


def _checked_key(key: str, source: str) -> str:
    if not key:
        raise ConfigError(f"{source} has no key in it; give one, or leave it out to serve everyone")
    if not re.fullmatch(r"[\x21-\x7e]+", key):
        raise ConfigError(f"{source}: a key must be of ASCII characters without spaces")
    return key
