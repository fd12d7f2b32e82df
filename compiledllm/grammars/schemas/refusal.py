"""The error for a schema that cannot be enforced: place, keyword, value and a way out."""

from __future__ import annotations

import json
from typing import Any, NoReturn


class SchemaRefused(ValueError):
    """The schema is invalid or asks for something that cannot be enforced."""


def refuse(at: str, keyword: str, value: Any, *why: str) -> NoReturn:
    """Raise SchemaRefused. at: a JSON pointer. why: what is wrong, and what to do instead."""
    shown = json.dumps(value, ensure_ascii=False, default=str)
    shown = shown if len(shown) <= 100 else shown[:97] + "..."
    place = at if len(at) <= 200 else at[:197] + "..."
    raise SchemaRefused(f"the schema at {place}: {keyword} {shown} {'; '.join(why)}")
