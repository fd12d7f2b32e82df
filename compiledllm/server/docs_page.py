"""`/docs`: the routes and the fields of their bodies, as a page without scripts or other hosts."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Any

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;"
    "color-scheme:light dark}table{border-collapse:collapse;width:100%}td{padding:.2rem .8rem "
    ".2rem 0;vertical-align:top;border-top:1px solid #8884}code{font-size:13px}b{font-weight:600}"
)


def docs_page(schema: dict[str, Any]) -> str:
    """HTML for an OpenAPI schema."""
    title = f"{schema['info']['title']} {schema['info']['version']}"
    body = "".join(_route(path, method, route, schema) for path, method, route in _routes(schema))
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title>"
        f"<style>{_STYLE}</style><h1>{escape(title)}</h1>"
        f"<p>The same for programs: <a href=openapi.json>openapi.json</a></p>{body}</html>"
    )


def _routes(schema: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in schema["paths"].items():
        for method, route in methods.items():
            yield path, method.upper(), route


def _route(path: str, method: str, route: dict[str, Any], schema: dict[str, Any]) -> str:
    text = f"<h2><code>{method} {escape(path)}</code></h2>"
    if description := route.get("description"):
        text += f"<p>{escape(description)}</p>"
    content = route.get("requestBody", {}).get("content", {}).get("application/json", {})
    fields = _resolved(content.get("schema", {}), schema)
    required = set(fields.get("required", []))
    rows = [
        f"<tr><td><code>{escape(name)}</code>{' <b>required</b>' * (name in required)}<td>"
        f"{escape(_kind(field))}<td>{escape(str(field.get('description', '')))}"
        for name, field in fields.get("properties", {}).items()
    ]
    return text + (f"<table>{''.join(rows)}</table>" if rows else "")


def _resolved(part: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    name = part.get("$ref", "").rpartition("/")[2]
    found: dict[str, Any] = schema.get("components", {}).get("schemas", {}).get(name, part)
    return found


def _kind(field: dict[str, Any]) -> str:
    """A field's type in words, its alternatives joined."""
    if "$ref" in field:
        return str(field["$ref"]).rpartition("/")[2]
    if "enum" in field:
        return ", ".join(map(str, field["enum"]))
    for several in ("anyOf", "oneOf"):
        if several in field:
            kinds = dict.fromkeys(_kind(part) for part in field[several])
            return " or ".join(kind for kind in kinds if kind != "null")
    kind = str(field.get("type", "any"))
    return f"array of {_kind(field.get('items', {}))}" if kind == "array" else kind
