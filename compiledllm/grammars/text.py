"""Writes structured-output parameters as llguidance's grammar text. Runs in the helper process."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from typing import Any

from compiledllm.grammars.endless import endless_rule
from compiledllm.grammars.library import require_llguidance
from compiledllm.grammars.matcher import checked
from compiledllm.grammars.schemas.refusal import SchemaRefused
from compiledllm.grammars.schemas.rewrite import rewrite
from compiledllm.structured_outputs import StructuredOutputsParams

WHITESPACE = r"[\x20\x0A\x0D\x09]{1,32}"  # between JSON tokens: enough to indent, but bounded
MAX_TEXT_BYTES = 2**21  # of a grammar whose schemas have been rewritten
_CONTROL = re.compile(r"\\u00(?:0[^89acdACD]|1|7f)")
_OPTIONS = ("whitespace_flexible", "whitespace_pattern", "item_separator", "key_separator")
# Without \u escapes, in which a model could write the name of a property a second time.
_ESCAPES = {"json_allowed_escapes": 'nrbtf"\\'}


class Writer:
    """Writes the grammar of an output. ignored: the keywords and formats that are not enforced."""

    def __init__(self, tokenizer: Any) -> None:
        self._library = require_llguidance()
        self._tokenizer = tokenizer
        self.ignored: list[str] = []

    def text_of(self, params: StructuredOutputsParams) -> str:
        """The grammar's text. Raises ValueError."""
        try:
            json.dumps(params.fields(), ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError(
                "structured_outputs has half a surrogate pair, which is no character; remove it"
            ) from None
        try:
            text = self._text_of(params)
        except SchemaRefused as error:
            raise ValueError(f"structured_outputs: {error}") from None
        except RecursionError:
            raise ValueError("structured_outputs cannot be compiled: nested too deep") from None
        if len(text) > MAX_TEXT_BYTES:
            raise ValueError(
                f"structured_outputs makes a grammar of {len(text)} characters, more than "
                f"{MAX_TEXT_BYTES}; make it simpler"
            )
        return text

    def _text_of(self, params: StructuredOutputsParams) -> str:
        make = self._library.LLMatcher
        if params.regex is not None:
            return str(checked(make.grammar_from_regex, params.regex))
        if params.choice is not None:
            literals = (json.dumps(choice, ensure_ascii=False) for choice in params.choice)
            return str(checked(make.grammar_from_lark, "start: " + " | ".join(literals)))
        if params.grammar is not None:
            lark = str(checked(self._library.grammar_from, "grammar", params.grammar))
            if (name := endless_rule(lark)) is not None:
                raise ValueError(
                    f"structured_outputs.grammar: rule '{name}' has no end, as each of its "
                    "alternatives leads back to it; give it one that does not"
                )
            return self._with_schemas(lark)
        if params.structural_tag is not None:
            return self._with_schemas(self._structural_tag(params))
        return str(checked(make.grammar_from_json_schema, self._schema(json_schema_of(params))))

    def _schema(self, schema: Any) -> str:
        """The JSON of a schema in the dialect of llguidance."""
        given = schema.get("x-guidance") if isinstance(schema, Mapping) else None
        options = {k: v for k, v in (given or {}).items() if k in _OPTIONS}
        if given is not None:
            schema = {name: value for name, value in schema.items() if name != "x-guidance"}
        found = rewrite(schema)
        self.ignored += found.ignored
        body = found.schema if isinstance(found.schema, dict) else {}
        if not {"whitespace_flexible", "whitespace_pattern"} & set(options):
            options["whitespace_pattern"] = WHITESPACE
        if not _CONTROL.search(json.dumps(body)):
            options |= _ESCAPES
        return json.dumps({"x-guidance": options} | body)

    def _with_schemas(self, lark: str) -> str:
        """A Lark grammar with the schemas inside it rewritten."""
        found, position = [], 0
        for match in re.finditer(r"%json\s+(?=\{)", lark):
            if match.start() < position:
                continue
            try:
                schema, end = json.JSONDecoder().raw_decode(lark, match.end())
            except ValueError:
                continue  # llguidance reports the error
            found += [lark[position : match.end()], self._schema(schema)]
            position = end
        return "".join([*found, lark[position:]])

    def _structural_tag(self, params: StructuredOutputsParams) -> str:
        structures, triggers = params.structures
        make = self._library.StructTag
        tags = [
            make(
                trigger=next(trigger for trigger in triggers if tag["begin"].startswith(trigger)),
                begin=tag["begin"],
                grammar=json.dumps(tag["schema"]),
                end=tag["end"],
            )
            for tag in structures
        ]
        is_special = any(map(self._is_special, triggers))
        return str(checked(make.to_grammar, tags, assume_special=is_special))

    def _is_special(self, text: str) -> bool:
        token_ids = self._tokenizer.tokenize_str(text, parse_special=True)
        return len(token_ids) == 1 and self._tokenizer.is_special_token(token_ids[0])


def _options(params: StructuredOutputsParams) -> dict[str, Any]:
    """llguidance's options for white space in JSON."""
    if params.disable_any_whitespace:
        return {"whitespace_flexible": False}
    if params.whitespace_pattern is not None:
        return {"whitespace_pattern": params.whitespace_pattern}
    return {"whitespace_pattern": WHITESPACE}


def json_schema_of(params: StructuredOutputsParams) -> dict[str, Any]:
    """The schema, with the white-space options under llguidance's own key."""
    schema = dict(params.schema)
    if params.disable_additional_properties:
        schema = copy.deepcopy(schema)
        _close_objects(schema)
    return schema | {"x-guidance": _options(params)}


_MAPS = ("properties", "patternProperties", "$defs", "definitions")  # name -> schema
_SCHEMAS = ("items", "additionalProperties", "prefixItems", "anyOf", "oneOf")


def _close_objects(schema: Any) -> None:
    """Forbid additional properties in objects that list properties, in place.

    A schema's own additionalProperties stays. Parts of an allOf are left out, because each would
    forbid the others' properties.
    """
    if isinstance(schema, list):
        for inner in schema:
            _close_objects(inner)
    if not isinstance(schema, dict):
        return
    if isinstance(schema.get("properties"), Mapping) and "allOf" not in schema:
        schema.setdefault("additionalProperties", False)
    for name in _MAPS:
        if isinstance(schema.get(name), dict):
            _close_objects(list(schema[name].values()))
    for name in _SCHEMAS:
        _close_objects(schema.get(name))
