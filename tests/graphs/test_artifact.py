"""The file that a start leaves for the next one: whole, checked, explained, never in the way."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from compiledllm.graphs import artifact as artifacts
from compiledllm.graphs.artifact import Artifact, BadArtifact, Folder, explain, file_name, find
from compiledllm.graphs.saved_graph import Kernel, SavedGraph, restore

KEY = {"torch": "2.11.0", "gpu": "H200"}
LAUNCH = {"entry": "triton_add", "grid": ["1", "1", "1"]}
PYTHON = "import torch\ndef call(inputs):\n    x, n = inputs\n    return (x * n, x + n)\n"


def make_graph(**changes: Any) -> SavedGraph:
    fields: dict[str, Any] = {
        "name": "block_forward",
        "spec": "spec",
        "max_tokens": 16,
        "parameters": ["self", "x"],
        "inputs": ["x", "x.size()[0]"],
        "output": "(out[1], [out[0]])",
        "checked": [],
        "mutated": [],
        "module": PYTHON,
    }
    return SavedGraph(**(fields | changes))


def make_artifact(key: dict[str, str] = KEY, **changes: Any) -> Artifact:
    graph = make_graph(kernels={"a": Kernel(b"cpu"), "b": Kernel(b"gpu", LAUNCH)})
    fields: dict[str, Any] = {
        "graphs": [graph],
        "memory": {"activations": 7},
        "shapes": [(1, 1, 1)],
        "max_blocks": 8,
        "binaries": {"triton/A/kernel.cubin": b"code"},
    }
    return Artifact(key, "llama", **(fields | changes))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("compiledllm.log.log.propagate", True)
    return tmp_path / "artifacts"


def test_what_was_written_is_found_again(folder: Path) -> None:
    written = make_artifact()
    path = artifacts.write(written, folder)
    assert path.stat().st_mode & 0o022 == 0
    assert find(KEY, "llama", [Folder(folder)]) == written
    assert explain(KEY, "llama", [Folder(folder)]) == f"{path} fits"
    assert [p.name for p in folder.iterdir()] == [file_name(KEY)]


def flip_a_byte(path: Path) -> None:
    content = path.read_bytes()
    place = content.index(b"codePK") if b"codePK" in content else content.index(b"code")
    path.write_bytes(content[:place] + b"X" + content[place + 1 :])


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def another_content(path: Path) -> None:
    """A file of the archive that fits its own checksum, but not the manifest's digest."""
    with zipfile.ZipFile(path) as file:
        contents = {name: file.read(name) for name in file.namelist()}
    contents["kernels/0/a"] = b"evil"
    with zipfile.ZipFile(path, "w") as file:
        for name, content in contents.items():
            file.writestr(name, content)


def older(path: Path) -> None:
    change_manifest(path, format=0)


def no_graphs(path: Path) -> None:
    change_manifest(path, graphs=[{"kernels": {"a": None}}])


def change_manifest(path: Path, **changes: Any) -> None:
    with zipfile.ZipFile(path) as file:
        contents = {name: file.read(name) for name in file.namelist()}
    manifest = json.loads(contents["manifest.json"]) | changes
    with zipfile.ZipFile(path, "w") as file:
        for name, content in (contents | {"manifest.json": json.dumps(manifest).encode()}).items():
            file.writestr(name, content)


def others_may_write(path: Path) -> None:
    path.chmod(0o666)


def others_may_write_the_folder(path: Path) -> None:
    path.parent.chmod(0o777)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (flip_a_byte, "damaged"),
        (truncate, "damaged"),
        (empty, "damaged"),
        (another_content, "differs from its checksum"),
        (no_graphs, "damaged"),
        (older, "format 0"),
        (others_may_write, "others may write"),
        (others_may_write_the_folder, "others may write"),
    ],
)
def test_file_that_cannot_be_used_is_named_with_the_reason_and_made_again(
    spoil: Any, reason: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = artifacts.write(make_artifact(), folder)
    spoil(path)
    assert isinstance(find(KEY, "llama", [Folder(folder)]), str)
    assert f"{path} is not used" in caplog.text and reason in caplog.text
    folder.chmod(0o700)
    artifacts.write(make_artifact(), folder)
    assert isinstance(find(KEY, "llama", [Folder(folder)]), Artifact)


def test_folder_of_another_user_is_read_only_if_it_was_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = artifacts.write(make_artifact(), folder)
    owner = path.stat().st_uid or 4243
    if path.stat().st_uid == 0:  # the administrator's files are trusted
        for place in (path, folder):
            os.chown(place, owner, -1)
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(BadArtifact, match="another user"):
        artifacts.read(path)
    assert artifacts.read(path, any_owner=True).key == KEY


def test_read_only_folder_is_read(folder: Path) -> None:
    path = artifacts.write(make_artifact(), folder)
    path.chmod(0o444)
    folder.chmod(0o555)
    try:
        assert isinstance(find(KEY, "llama", [Folder(folder)]), Artifact)
    finally:
        folder.chmod(0o755)


def test_named_folder_comes_before_the_cache(folder: Path, tmp_path: Path) -> None:
    named = tmp_path / "named"
    artifacts.write(make_artifact(memory={"activations": 1}), folder)
    both = [Folder(named, is_named=True), Folder(folder)]
    found = find(KEY, "llama", both)
    assert isinstance(found, Artifact) and found.memory == {"activations": 1}
    artifacts.write(make_artifact(memory={"activations": 2}), named)
    found = find(KEY, "llama", both)
    assert isinstance(found, Artifact) and found.memory == {"activations": 2}


def test_full_disk_leaves_no_half_a_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifacts.write(make_artifact(), folder)
    before = {path: path.read_bytes() for path in folder.iterdir()}

    def no_space(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        artifacts.write(make_artifact(memory={}), folder)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_two_builders_at_once_leave_one_whole_file(folder: Path) -> None:
    big = {f"triton/{n}": bytes(2**16) for n in range(32)}
    threads = [
        threading.Thread(target=artifacts.write, args=(make_artifact(binaries=big), folder))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert isinstance(find(KEY, "llama", [Folder(folder)]), Artifact | str)
    found = find(KEY, "llama", [Folder(folder)])
    assert isinstance(found, Artifact) and found.binaries == big
    assert len(list(folder.iterdir())) == 1


def test_a_miss_says_what_differs_in_the_nearest_file(folder: Path) -> None:
    places = [Folder(folder)]
    assert find(KEY, "llama", places) == "none is kept for llama"
    artifacts.write(make_artifact(KEY | {"torch": "2.10.0", "gpu": "A100"}), folder)
    near = artifacts.write(make_artifact(KEY | {"torch": "2.10.0"}), folder)
    expected = f"{near.name} differs: torch is 2.11.0, not 2.10.0"
    assert find(KEY, "llama", places) == expected == explain(KEY, "llama", places)
    assert find(KEY, "qwen", places) == "none is kept for qwen"


def test_folder_does_not_grow_without_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = []
    for age in range(3):
        paths.append(artifacts.write(make_artifact({"n": str(age)}), folder))
        os.utime(paths[-1], (age, age))
    left = folder / ".1.abcd.artifact"
    left.write_bytes(b"")
    os.utime(left, (1, 1))
    monkeypatch.setattr(artifacts, "_MAX_FILES", 2)
    artifacts.read(paths[0])  # which makes it the last one used
    artifacts.write(make_artifact({"n": "3"}), folder)
    names = {path.name for path in folder.iterdir()}
    assert names == {file_name({"n": "3"}), paths[0].name}


# -- graphs ----------------------------------------------------------------------------------------


def test_restored_graph_takes_the_arguments_apart_and_puts_outputs_together() -> None:
    import torch

    run = restore(make_graph())
    total, (product,) = run(None, torch.arange(3))
    assert total.tolist() == [3, 4, 5] and product.tolist() == [0, 3, 6]


def test_result_of_any_structure_is_put_together_again() -> None:
    from compiledllm.graphs.inductor_output import CannotSave, _expression

    a, b = object(), object()
    places = {id(a): 0, id(b): 1}
    result = (b, [(a,), []], None)
    text = _expression(result, places)
    assert eval(text, {"out": (a, b)}) == result
    with pytest.raises(CannotSave, match="not an output"):
        _expression((a, object()), places)


def test_reductions_that_can_hold_a_row_do_so_without_a_measurement(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    from compiledllm.graphs.inductor_output import reading_rows_once

    class Launcher:
        def __init__(self, block: int) -> None:
            self.config = SimpleNamespace(kwargs={"XBLOCK": 1, "R0_BLOCK": block})

    class Autotuner:
        def __init__(self, **meta: bool) -> None:
            self.inductor_meta = meta
            self.launchers = list(map(Launcher, (16384, 2048, 1024)))

        def chosen(self) -> int:
            timings = CachingAutotuner.benchmark_all_configs(self)
            return self.launchers.index(min(timings, key=timings.get))

    monkeypatch.setattr(
        CachingAutotuner,
        "benchmark_all_configs",
        lambda self: dict(zip(self.launchers, (3.0, 2.0, 1.0), strict=True)),
    )
    with reading_rows_once():
        assert Autotuner(add_persistent_rblock=True).chosen() == 0
        assert Autotuner().chosen() == 2
        with ThreadPoolExecutor(1) as another:
            assert another.submit(Autotuner(add_persistent_rblock=True).chosen).result() == 2
    assert Autotuner(add_persistent_rblock=True).chosen() == 2


def test_inputs_at_odd_addresses_are_copied_and_written_back() -> None:
    import torch

    module = "def call(inputs):\n    x, = inputs\n    x += 1\n    return (x.data_ptr() % 16,)\n"
    graph = make_graph(inputs=["x"], module=module, output="out[0]", checked=[0], mutated=[0])
    odd = torch.zeros(5)[1:]
    assert odd.data_ptr() % 16 and restore(graph)(None, odd) == 0
    assert odd.tolist() == [1, 1, 1, 1]


def test_start_without_a_cache_folder_runs_and_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from compiledllm.runner import start_cache
    from compiledllm.runner.start_cache import StartCache

    monkeypatch.setattr("compiledllm.log.log.propagate", True)
    monkeypatch.setenv("COMPILEDLLM_CACHE_DIR", str(tmp_path))
    cache = StartCache.__new__(StartCache)
    cache._plan = SimpleNamespace(platform=SimpleNamespace(is_cuda=False))
    with caplog.at_level("INFO", logger="compiledllm"):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1))
        cache._keep(make_artifact())
        assert "nothing is kept for the next start: the disk of" in caplog.text
        monkeypatch.undo()
        monkeypatch.setattr("compiledllm.log.log.propagate", True)
        monkeypatch.setenv("COMPILEDLLM_CACHE_DIR", str(tmp_path))

        def fail(*_: object) -> None:
            raise OSError("no space")

        monkeypatch.setattr(start_cache.files, "write", fail)
        cache._keep(make_artifact())
        assert "nothing is kept for the next start: OSError: no space" in caplog.text
