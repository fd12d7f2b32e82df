"""The command that runs kernel tests under compute-sanitizer, with a script in its place."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.kernels import sanitize
from tests.support import one_of_each

SCRIPT = """#!/bin/sh
echo "$PYTORCH_NO_CUDA_MEMORY_CACHING $*" >> "$LOG"
echo "========= ERROR SUMMARY: $ERRORS errors"
exit $STATUS
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "bin" / "compute-sanitizer"
    path.parent.mkdir()
    path.write_text(SCRIPT)
    path.chmod(0o755)
    for name, value in {"LOG": tmp_path / "log", "ERRORS": 0, "STATUS": 0}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return path


def test_each_tool_runs_the_tests(program: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sanitize.main(["-k", "grid"]) == 0
    assert capsys.readouterr().out.count(": clean") == 2
    lines = (program.parents[1] / "log").read_text().splitlines()
    for tool, line in zip(("memcheck", "racecheck"), lines, strict=True):
        assert line.startswith(f"1 --tool {tool} ") and line.endswith("-k grid")
        assert all(file in line and Path(file).is_file() for file in sanitize.FILES)


@pytest.mark.parametrize(("errors", "status"), [(3, 9), (3, 0), (0, 9), (0, 1)])
def test_what_is_found_is_reported(
    errors: int, status: int, program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ERRORS", str(errors))
    monkeypatch.setenv("STATUS", str(status))
    assert sanitize.main(["tests/kernels/test_skinny.py", "--tool", "memcheck"]) == 1


def test_without_the_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert sanitize.main([]) == 2
    assert "compute-sanitizer is not installed" in capsys.readouterr().out


def test_one_case_of_each_test_is_kept() -> None:
    ids = ["t.py::a[1]", "t.py::a[2]", "t.py::b", "t.py::a_captured_step[1]", "u.py::a[1]"]
    items: list[Any] = [SimpleNamespace(nodeid=nodeid) for nodeid in ids]
    dropped: list[Any] = []
    hook = SimpleNamespace(pytest_deselected=lambda items: dropped.extend(items))
    config: Any = SimpleNamespace(hook=hook)
    one_of_each.pytest_collection_modifyitems(config, items)
    assert [item.nodeid for item in items] == ["t.py::a[1]", "t.py::b", "u.py::a[1]"]
    assert [item.nodeid for item in dropped] == ["t.py::a[2]", "t.py::a_captured_step[1]"]
