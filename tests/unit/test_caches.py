"""Compiled code is kept where nobody but this user can write, or not at all."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from compiledllm import caches
from compiledllm.caches import COMPILERS, cache_dir, use_compiler_caches, writable_folder


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("COMPILEDLLM_CACHE_DIR", str(tmp_path / "ours"))
    monkeypatch.setattr("compiledllm.log.log.propagate", True)
    for variable in COMPILERS:
        monkeypatch.setenv(variable, "")
    caches._warn_once.cache_clear()
    yield tmp_path / "ours" / "compiled"
    caches._usable.cache_clear()


def test_cache_lies_where_the_user_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPILEDLLM_CACHE_DIR", "~/c")
    assert cache_dir() == Path.home() / "c"
    monkeypatch.delenv("COMPILEDLLM_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_dir() == Path("/x/compiledllm")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "compiledllm"


def test_compilers_keep_their_files_in_private_folders_of_ours(home: Path) -> None:
    """Inductor alone would put both into the system's temporary directory."""
    use_compiler_caches()
    for variable, name in COMPILERS.items():
        assert os.environ[variable] == str(home / name)
        assert (home / name).stat().st_mode & 0o077 == 0


def test_folders_of_the_user_stay(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "/somewhere")
    use_compiler_caches()
    assert os.environ["TRITON_CACHE_DIR"] == "/somewhere"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(home / "inductor")
    assert not (home / "triton").exists()


def no_access(home: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(os, "access", lambda *_: False)


def full_disk(home: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=4096))


def file_in_the_way(home: Path, patch: pytest.MonkeyPatch) -> None:
    home.parent.mkdir()
    home.write_text("")


def world_writable(home: Path, patch: pytest.MonkeyPatch) -> None:
    (home / "nvrtc").mkdir(parents=True)
    (home / "nvrtc").chmod(0o777)


def another_owner(home: Path, patch: pytest.MonkeyPatch) -> None:
    (home / "nvrtc").mkdir(parents=True)
    patch.setattr(os, "geteuid", lambda: 4242)
    if (home / "nvrtc").stat().st_uid == 0:  # the administrator's folders are trusted
        os.chown(home / "nvrtc", 4243, -1)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (no_access, "is read-only"),
        (full_disk, "is full"),
        (file_in_the_way, "File exists|Not a directory"),
        (world_writable, "others may write to .*chmod"),
        (another_owner, "belongs to another user"),
    ],
)
def test_folder_that_cannot_be_used_is_replaced_with_one_warning(
    spoil: object,
    reason: str,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert callable(spoil)
    spoil(home, monkeypatch)
    folder = writable_folder("nvrtc")
    assert folder == writable_folder("nvrtc")
    assert home not in folder.parents and folder.stat().st_mode & 0o077 == 0
    (record,) = caplog.records
    assert "not kept for the next start" in record.message
    assert re.search(reason, record.message)
