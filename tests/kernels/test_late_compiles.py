"""What is compiled after a start is counted and logged, or an error where the process says so."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from compiledllm.kernels import late_compiles
from compiledllm.kernels.late_compiles import LateCompile, note, starting


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(late_compiles, "num_kernels", 0)
    monkeypatch.setattr("compiledllm.log.log.propagate", True)
    monkeypatch.delenv("COMPILEDLLM_LATE_COMPILE", raising=False)


def test_starts_may_compile_and_steps_may_not(caplog: pytest.LogCaptureFixture) -> None:
    with starting(), starting():
        note("a")
    with pytest.raises(ValueError, match="failed start"), starting():
        raise ValueError("failed start")
    assert late_compiles.num_kernels == 0 and not caplog.records
    note("b")
    assert late_compiles.num_kernels == 1
    assert "the kernel b was compiled after the start: this is a bug" in caplog.text


def test_late_compilation_is_an_error_where_the_process_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COMPILEDLLM_LATE_COMPILE", "error")
    with starting():
        note("a")
    with pytest.raises(LateCompile, match="the kernel a"):
        note("a")


def test_only_what_triton_compiles_counts(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    triton = pytest.importorskip("triton")
    heard: list[bool] = []
    knobs = triton.knobs.compilation
    monkeypatch.setattr(knobs, "listener", lambda *, cache_hit, **_: heard.append(cache_hit))
    late_compiles.watch_triton()
    late_compiles.watch_triton()
    source = SimpleNamespace(
        name="kernel",
        signature={"x": "*fp32", "SIZE": "constexpr"},
        constants={(1,): 8},
        attrs={(0,): [["tt.divisibility", 16]]},
    )
    for cache_hit in (True, False):
        knobs.listener(src=source, metadata={}, metadata_group={}, times=None, cache_hit=cache_hit)
    assert late_compiles.num_kernels == 1 and heard == [True, False]
    assert "kernel (SIZE=8; divisible by 16: x)" in caplog.text


def test_entries_of_tritons_cache_are_moved_to_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton = pytest.importorskip("triton")
    from compiledllm.kernels import triton_cache

    monkeypatch.setattr(triton_cache, "_used", set())
    monkeypatch.setattr(triton.knobs.cache, "manager_class", None)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "a"))
    triton_cache.note_entries()
    make = triton.runtime.cache.get_cache_manager
    one = make("ab12")
    parts = {name: one.put(b"code", name) for name in ("k.cubin", "k.ptx")}
    one.put_group("k.json", parts)
    (tmp_path / "a" / "unused").mkdir()
    (tmp_path / "a" / "unused" / "x").write_bytes(b"")
    files = triton_cache.entries()
    assert sorted(Path(name).name for name in files) == ["__grp__k.json", "k.cubin"]
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "b"))
    for _ in range(2):  # the second time all of it is there
        triton_cache.provide(files)
    found = make("ab12").get_group("k.json")
    assert list(found) == ["k.cubin"]
    assert Path(found["k.cubin"]).read_bytes() == b"code"
    assert Path(found["k.cubin"]).is_relative_to(tmp_path / "b")
