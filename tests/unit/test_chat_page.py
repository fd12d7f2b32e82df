"""The chat page as it is served, without a browser: `tests/server/test_page.py` has one."""

from __future__ import annotations

import base64
import gzip
import hashlib
import re
from pathlib import Path

import pytest

pytest.importorskip("fastapi")

import compiledllm.server
from compiledllm.server.chat_page import chat_page

VENDOR = Path(compiledllm.server.__file__).parent / "page" / "vendor"
TAG = re.compile(r"<(style|script)\b([^>]*)>(.*?)</\1>", re.DOTALL)


def test_the_page_is_one_file_whose_parts_its_policy_allows_by_hash() -> None:
    page = chat_page()
    text = page.document.decode()
    parts = TAG.findall(text)
    assert len(parts) >= 3 and all(attributes == "" for _, attributes, _ in parts)
    allowed = dict(
        re.findall(r"(script|style)-src ([^;]*);", page.headers["content-security-policy"])
    )
    for tag, _, content in parts:
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in allowed[tag]
        assert not re.search(r"<!--|<script|sourceMappingURL", content, re.IGNORECASE)
    markup = TAG.sub("", text)
    assert not re.search(r'(src|href)="(?!#|data:|docs")', markup), "nothing is loaded"
    assert len(page.document) < 250_000
    assert gzip.decompress(page.compressed) == page.document


def test_vendored_files_are_those_that_the_readme_names() -> None:
    readme = (VENDOR / "README.md").read_text()
    rows = re.findall(
        r"^\| `([\w.]+)` \| \S+ \| ([\d.]+) \| [\w -]+, `([\w.]+)` \| `(\w+)` \|$",
        readme,
        re.MULTILINE,
    )
    named = {name for file, _, licence, _ in rows for name in (file, licence)}
    assert {path.name for path in VENDOR.iterdir()} == named | {"README.md"} and len(rows) == 2
    for file, version, _, digest in rows:
        content = (VENDOR / file).read_bytes()
        assert version.encode() in content[:500]
        assert hashlib.sha256(content).hexdigest()[:16] == digest
