"""JSON Schema's keywords and formats, grouped by how they are treated."""

from __future__ import annotations

from typing import Any

Schema = bool | dict[str, Any]

TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
KINDS = tuple(name for name in TYPES if name != "integer")

# These keywords describe a value without restricting it, or only name other schemas.
ANNOTATIONS = {"$schema", "$id", "id", "$anchor", "$dynamicAnchor", "$recursiveAnchor", "$defs"}
ANNOTATIONS |= {"definitions", "$vocabulary", "$comment", "title", "description", "default", "xml"}
ANNOTATIONS |= {"example", "examples", "deprecated", "readOnly", "writeOnly", "contentEncoding"}
ANNOTATIONS |= {"contentMediaType", "contentSchema", "discriminator", "externalDocs", "nullable"}
# These are handled with the keyword that they qualify, and mean nothing without it.
QUALIFIERS = frozenset(("then", "else", "additionalItems", "minContains", "maxContains"))

# Formats that llguidance enforces.
FORMATS = frozenset(("duration", "email", "hostname", "ipv4", "ipv6", "uri"))

_YEAR_LEAP = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_YEAR = "(?:[1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])"
_MONTH_DAY = (
    "(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    "|02-(?:0[1-9]|1[0-9]|2[0-8]))"
)
_DATE = f"(?:{_YEAR}-{_MONTH_DAY}|{_YEAR_LEAP}-02-29)"
_ZONE = "(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_TIME = f"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\\.[0-9]{{1,9}})?{_ZONE}"
_HEX = "[0-9a-fA-F]"
# Stricter than llguidance's own date and time, which allow the 29th of February in every year and
# 61 seconds in a minute, values that date parsers reject.
FORMAT_PATTERNS = {
    "date": f"^{_DATE}$",
    "time": f"^{_TIME}$",
    "date-time": f"^{_DATE}T{_TIME}$",
    "uuid": f"^{_HEX}{{8}}-(?:{_HEX}{{4}}-){{3}}{_HEX}{{12}}$",
}
for _version in range(1, 9):
    _rest = f"{_version}{_HEX}{{3}}-[89abAB]{_HEX}{{3}}-{_HEX}{{12}}"
    FORMAT_PATTERNS[f"uuid{_version}"] = f"^{_HEX}{{8}}-{_HEX}{{4}}-{_rest}$"

# llguidance uses 64-bit floats, which cannot tell neighbouring integers beyond this one apart.
MAX_EXACT = 2**53
MAX_BOUND = 2**63 - 1024  # the largest 64-bit float inside the range of llguidance's integers
