"""The chat page at `/`: a document made of the files in `page/`, and the policy it is served with.

`page/page.html` names a style sheet and scripts. They are put into the document, and the content
security policy allows these scripts and styles only, by their hashes. The page loads nothing else,
and no text becomes HTML.
"""

from __future__ import annotations

import base64
import functools
import gzip
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

_FOLDER = Path(__file__).with_name("page")
_PART = re.compile(
    r'<link rel="stylesheet" href="(?P<style>[\w./]+)">|<script src="(?P<script>[\w./]+)"></script>'
)
_SOURCE_MAP = re.compile(r"^//# sourceMappingURL=.*\n?", re.MULTILINE)
_COMMENT = re.compile(r"^ *(?://|/\*\*| \* | \*/).*\n", re.MULTILINE)  # on lines of its own
_MARKUP = re.compile(r"<(?=!--|/?script)", re.IGNORECASE)  # an HTML parser would act upon it
_POLICY = (
    "default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'self'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)


@dataclass(frozen=True, slots=True)
class ChatPage:
    """document: HTML in UTF-8. compressed: by gzip. headers: of every response that has either."""

    document: bytes
    compressed: bytes
    headers: dict[str, str]


@functools.cache
def chat_page() -> ChatPage:
    """Make the page, once."""
    hashes: dict[str, list[str]] = {"style": [], "script": []}

    def inlined(match: re.Match[str]) -> str:
        tag = str(match.lastgroup)
        text = _text_of(match[tag])
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        hashes[tag].append(f"'sha256-{digest}'")
        return f"<{tag}>{text}</{tag}>"

    document = _PART.sub(inlined, (_FOLDER / "page.html").read_text(encoding="utf-8")).encode()
    policy = _POLICY.format(**{tag: " ".join(found) for tag, found in hashes.items()})
    return ChatPage(
        document,
        gzip.compress(document, mtime=0),
        {
            "content-security-policy": policy,
            "cache-control": "no-cache",  # browsers may keep the page, but must revalidate it
            "etag": f'W/"{hashlib.sha256(document).hexdigest()[:32]}"',
            "vary": "accept-encoding",
            "referrer-policy": "no-referrer",
            "x-content-type-options": "nosniff",
        },
    )


def _text_of(name: str) -> str:
    text = (_FOLDER / name).read_text(encoding="utf-8")
    if name.endswith(".css"):
        return text
    text = _SOURCE_MAP.sub("", text) if name.startswith("vendor/") else _COMMENT.sub("", text)
    # In strings and regular expressions, where scripts have such text, \x3C is the same.
    return _MARKUP.sub(r"\\x3C", text)
