"""What is installed: every package of the project, with the files that it reads."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
SETUP = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def test_every_package_is_listed() -> None:
    found = set()
    for name, folder in SETUP["package-dir"].items():
        for path in (ROOT / folder).rglob("__init__.py"):
            inside = path.parent.relative_to(ROOT / folder).parts
            found.add(".".join((name, *inside)))
    assert found == set(SETUP["packages"])


def test_every_file_that_the_server_reads_is_listed() -> None:
    folder = ROOT / "compiledllm" / "server"
    listed = {
        path for glob in SETUP["package-data"]["compiledllm.server"] for path in folder.glob(glob)
    }
    needed = {path for part in ("page", "examples") for path in (folder / part).rglob("*")}
    assert {path for path in needed if path.is_file()} <= listed
