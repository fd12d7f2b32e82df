"""Resolves a schema's references: JSON pointers, anchors, and ids of embedded schemas."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote, urldefrag, urljoin

from compiledllm.grammars.schemas.refusal import refuse


def step(at: str, *names: str) -> str:
    """The JSON pointer of a part inside the part at `at`. names: the keys on the way to it."""
    return at + "".join("/" + name.replace("~", "~0").replace("/", "~1") for name in names)


class References:
    """The references of one schema. Pointers are JSON pointers from the root, as "#/$defs/a"."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._pointers: dict[str, str] | None = None  # address -> pointer; made on first use
        self._bases: dict[str, str] = {}  # pointer -> address, of schemas with an $id

    def at(self, pointer: str) -> Any:
        """The schema at a pointer."""
        found = self._root
        for name in pointer[2:].split("/") if len(pointer) > 1 else ():
            name = name.replace("~1", "/").replace("~0", "~")
            found = found[int(name)] if isinstance(found, list) else found[name]
        return found

    def pointer(self, schema: Mapping[str, Any], at: str) -> str:
        """The pointer to the target of a schema's reference. `at`: the schema's own pointer.

        A dynamic reference is resolved like any other one.
        """
        keyword = next(k for k in ("$ref", "$dynamicRef", "$recursiveRef") if k in schema)
        text = schema[keyword]
        if not isinstance(text, str):
            refuse(at, keyword, text, "must be a string")
        if text.startswith("#") and self._base_of(at) == self._base_of("#"):
            address, fragment = "", unquote(text[1:])
        else:
            address, fragment = urldefrag(urljoin(self._base_of(at), text))
            fragment = unquote(fragment)
        start = self._found(address) if address else "#"
        if start is not None and fragment and not fragment.startswith("/"):
            start, fragment = self._found(f"{address}#{fragment}"), ""
        pointer = None if start is None else start + fragment.rstrip("/") * (fragment != "/")
        if pointer is None or not self._exists(pointer):
            refuse(
                at, keyword, text, "leads to nothing in the schema", "put its target under $defs"
            )
        return pointer

    def _exists(self, pointer: str) -> bool:
        try:
            return isinstance(self.at(pointer), (bool, Mapping))
        except (KeyError, IndexError, ValueError, TypeError):
            return False

    def _base_of(self, at: str) -> str:
        self._found("")
        fits = [p for p in self._bases if at == p or at.startswith(p + "/")]
        return self._bases[max(fits, key=len)] if fits else ""

    def _found(self, address: str) -> str | None:
        if self._pointers is None:
            self._pointers = {}
            self._walk(self._root, "#", "")
        return self._pointers.get(address)

    def _walk(self, value: Any, at: str, base: str) -> None:
        """Collect the addresses of a schema and of everything inside it."""
        assert self._pointers is not None
        if isinstance(value, Mapping):
            name = value.get("$id", value.get("id") if "$schema" in value else None)
            if isinstance(name, str) and not name.startswith("#"):
                base = urldefrag(urljoin(base, name))[0]
                self._bases[at] = base
                self._pointers.setdefault(base, at)
            for keyword in ("$anchor", "$dynamicAnchor", "$id", "id"):
                anchor = value.get(keyword)
                if isinstance(anchor, str) and ("nchor" in keyword or anchor.startswith("#")):
                    self._pointers.setdefault(f"{base}#{anchor.lstrip('#')}", at)
            for key, inner in value.items():
                if key not in ("enum", "const", "default", "examples", "example"):
                    self._walk(inner, step(at, str(key)), base)
        elif isinstance(value, list):
            for i, inner in enumerate(value):
                self._walk(inner, step(at, str(i)), base)
