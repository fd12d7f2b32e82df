"""Reads a checkpoint's JSON files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from compiledllm.config import ConfigError


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ConfigError for a file that is missing or holds none."""
    content = _content(path)
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def read_json_objects(path: Path) -> list[dict[str, Any]]:
    """The list of JSON objects in a file. Raises ConfigError as `read_json` does."""
    content = _content(path)
    if not isinstance(content, list) or not all(isinstance(item, dict) for item in content):
        raise ConfigError(f"{path} must hold a list of JSON objects, got {content!r:.80}")
    return content


def _content(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist: not a model directory") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; download it again") from error
