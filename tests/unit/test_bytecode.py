"""Packages without bytecode are compiled by one start only, and nothing is written beside them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from compiledllm import Engine, bytecode, bytecode_writer
from compiledllm.cli import _info, _parser, _serve
from compiledllm.config import ConfigError, EngineConfig
from compiledllm.remote.engine_process import load_core

# Prints whether torch was compiled now, and the settings within and behind the context.
PROGRAM = """
import importlib._bootstrap_external as importer, os, sys
compiled = []
source_to_code = importer.SourceLoader.source_to_code
def noting(self, data, path, **options):
    compiled.append(path)
    return source_to_code(self, data, path, **options)
importer.SourceLoader.source_to_code = noting
from compiledllm import bytecode
bytecode._compile_ahead = lambda folder: None
try:
    with bytecode.kept(*sys.argv[1:]):
        import torch
        print(sys.pycache_prefix == os.environ.get("PYTHONPYCACHEPREFIX"), end=" ")
except EOFError:
    print("EOFError", end=" ")
print(sys.pycache_prefix, sys.dont_write_bytecode, any("torch" in path for path in compiled))
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with a package `torch` that has no bytecode."""
    torch = tmp_path / "site" / "torch"
    torch.mkdir(parents=True)
    (torch / "__init__.py").write_text("answer = 42\n")
    return torch.parent


def start(site: Path, *artifact_dirs: Path, **variables: str) -> list[str]:
    return finished(site, PROGRAM, *artifact_dirs, **variables).stdout.split()


def finished(
    site: Path, program: str, *arguments: Path, **variables: str
) -> subprocess.CompletedProcess[str]:
    ours = {"PYTHONPATH": str(site), "COMPILEDLLM_CACHE_DIR": str(site.parent / "cache")}
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"} | ours | variables
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def kept_files(site: Path) -> list[Path]:
    """The kept bytecode of `torch`. There is some of the standard library, too."""
    return list((site.parent / "cache").rglob("site/**/*.pyc"))


def test_second_start_compiles_nothing_and_packages_stay_clean(site: Path) -> None:
    assert start(site) == ["True", "None", "True", "True"]
    assert any(path.name.startswith("__init__") for path in kept_files(site))
    assert start(site) == ["True", "None", "True", "False"]
    assert not list(site.rglob("*.pyc"))


def test_other_versions_of_packages_have_bytecode_of_their_own(site: Path) -> None:
    """Images may give all files one time, and then a changed file may look unchanged."""
    start(site)
    (site / "torch-2.0.dist-info").mkdir()
    assert start(site)[-1] == "True"


@pytest.mark.parametrize("variable", ["PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX"])
def test_python_that_keeps_bytecode_itself_is_left_alone(
    variable: str, site: Path, tmp_path: Path
) -> None:
    """It may write beside the packages, or the user has chosen a folder."""
    value = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path / "chosen")}
    start(site, **{variable: value[variable]})
    assert not kept_files(site)


def test_packages_with_bytecode_are_left_alone(site: Path) -> None:
    cached = site / "torch" / "__pycache__" / f"__init__.{sys.implementation.cache_tag}.pyc"
    cached.parent.mkdir()
    cached.write_bytes(b"")
    start(site)
    assert not kept_files(site)


def test_truncated_file_breaks_one_start_only(site: Path) -> None:
    """Older versions of Python leave one on a full disk."""
    start(site)
    (path,) = (path for path in kept_files(site) if path.parent.name == "torch")
    path.write_bytes(path.read_bytes()[:-8])
    assert start(site)[0] == "EOFError"
    assert start(site)[0] == "True"


def test_full_disk_is_only_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bytecode, "_torch_lacks_bytecode", lambda: True)
    monkeypatch.setattr(bytecode, "_folder", lambda: str(tmp_path))
    monkeypatch.setattr(sys, "pycache_prefix", None)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
    with bytecode.kept():
        assert sys.pycache_prefix == str(tmp_path) and sys.dont_write_bytecode
    assert sys.pycache_prefix is None


def test_folder_that_others_may_write_to_is_not_used(site: Path) -> None:
    cache = site.parent / "cache" / "compiled" / "bytecode"
    start(site)
    (folder,) = cache.iterdir()
    for path in kept_files(site):
        path.unlink()
    folder.chmod(0o777)
    assert start(site)[0] == "True" and not kept_files(site)


def test_writer_writes_into_the_folder_alone(site: Path) -> None:
    torch = site / "torch"
    for name in ("a.py", "_inductor/b.py", "testing/c.py", "broken.py"):
        (torch / name).parent.mkdir(exist_ok=True)
        (torch / name).write_text("x = 1\n" if name != "broken.py" else "x =\n")
    command = [sys.executable, "-I", "-S", "-X", f"pycache_prefix={site.parent / 'cache'}"]
    command += [bytecode_writer.__file__, "3", str(torch)]
    subprocess.run(command, check=True)
    assert sorted(path.name.split(".")[0] for path in kept_files(site)) == ["__init__", "a", "b"]
    assert not list(site.rglob("*.pyc"))
    before = {path: path.stat().st_mtime_ns for path in kept_files(site)}
    subprocess.run(command, check=True)
    assert before == {path: path.stat().st_mtime_ns for path in kept_files(site)}


def test_modules_of_the_first_import_come_first(site: Path) -> None:
    for name in ("_dynamo", "nn"):
        (site / "torch" / name).mkdir()
        (site / "torch" / name / "x.py").touch()
    paths = bytecode_writer.modules_of([str(site / "torch")])
    assert [Path(path).parent.name for path in paths] == ["torch", "nn", "_dynamo"]


def test_several_processes_compile_ahead_of_the_first_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    class Process:
        def __init__(self, command: list[str], **_: object) -> None:
            commands.append(command)

        def wait(self) -> int:
            return 0

    monkeypatch.setattr(subprocess, "Popen", Process)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    bytecode._compile_ahead(str(tmp_path))
    assert len(commands) == 1 and f"pycache_prefix={tmp_path}" in commands[0]
    (tmp_path / "some.pyc").touch()
    bytecode._compile_ahead(str(tmp_path))  # an earlier start has filled the folder
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(2))
    (tmp_path / "some.pyc").unlink()
    bytecode._compile_ahead(str(tmp_path))  # no core is left for other processes
    assert len(commands) == 1


@pytest.mark.parametrize("command", ["Engine", "engine process", "serve", "info"])
def test_starts_keep_bytecode_and_use_that_of_a_build(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And behind them, also behind a failed one, the caller's Python is as before."""
    from compiledllm.engine import startup
    from compiledllm.server import launch

    def fail(_: object) -> None:
        raise ConfigError(f"bytecode in {sys.pycache_prefix} and {folders}")

    folders: list[str | None] = []
    found_in = bytecode._found_in
    monkeypatch.setattr(bytecode, "_found_in", lambda f: (folders.append(f), found_in(f))[1])
    monkeypatch.setattr(startup, "plan", fail)
    monkeypatch.setattr(launch, "serve", fail)
    monkeypatch.setattr(bytecode, "_torch_lacks_bytecode", lambda: True)
    monkeypatch.setattr(bytecode, "_folder", lambda: str(tmp_path))
    monkeypatch.setattr(bytecode, "_compile_ahead", lambda _: None)
    monkeypatch.setattr(sys, "pycache_prefix", None)
    starts = {
        "Engine": lambda: Engine(artifact_dir="built"),
        "engine process": lambda: load_core(EngineConfig.from_options(artifact_dir="built")),
        "serve": lambda: _serve(_parser().parse_args(["serve", "--artifact-dir", "built"])),
        "info": lambda: _info(_parser().parse_args(["info"])),
    }
    with pytest.raises(ConfigError, match=f"bytecode in {tmp_path}"):
        starts[command]()
    assert folders == [None if command == "info" else "built"]
    assert sys.pycache_prefix is None and "PYTHONPYCACHEPREFIX" not in os.environ


# -- of a build on another installation ------------------------------------------------------------

WRITE = """
import pathlib, sys, torch
from compiledllm import bytecode_file
print(bytecode_file.write(pathlib.Path(sys.argv[1])))
"""


@pytest.fixture
def built(site: Path) -> Path:
    """The file of a build. The same sources lie elsewhere there, and are older."""
    other = site.parent / "other"
    shutil.copytree(site, other)
    os.utime(other / "torch" / "__init__.py", (1, 1))
    folder = site.parent / "built"
    folder.mkdir(mode=0o700)
    return Path(finished(other, WRITE, folder).stdout.strip())


def test_bytecode_of_a_build_serves_another_installation(site: Path, built: Path) -> None:
    assert start(site, built.parent) == ["True", "None", "True", "False"]
    assert not kept_files(site) and not list(site.rglob("*.pyc"))
    assert len(list(built.parent.iterdir())) == 1


def test_module_with_another_source_is_compiled_once(site: Path, built: Path) -> None:
    (site / "torch" / "__init__.py").write_text("answer = 43\n")
    assert start(site, built.parent)[-1] == "True"
    assert start(site, built.parent)[-1] == "False"


def test_second_build_leaves_the_modules_of_the_first(site: Path, built: Path) -> None:
    (site / "json.py").write_text("")  # replaces the standard library's module
    finished(site, WRITE.replace("torch", "json"), built.parent)
    assert start(site, built.parent)[-1] == "False"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (cut, "damaged"),
        (flip_a_byte, "damaged"),
        (lambda path: path.write_bytes(b""), "damaged"),
        (lambda path: path.chmod(0o666), "others may write"),
        (lambda path: path.parent.chmod(0o777), "others may write"),
    ],
)
def test_file_that_cannot_be_used_is_named_and_modules_are_compiled(
    spoil: Callable[[Path], None], reason: str, site: Path, built: Path
) -> None:
    spoil(built)
    done = finished(site, PROGRAM, built.parent)
    assert done.stdout.split() == ["True", "None", "True", "True"]
    assert f"{built} is not used: " in done.stderr and reason in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_packages_with_bytecode_need_none_of_a_build(site: Path, built: Path) -> None:
    built.write_bytes(b"")
    cached = site / "torch" / "__pycache__" / f"__init__.{sys.implementation.cache_tag}.pyc"
    cached.parent.mkdir()
    cached.write_bytes(b"")
    assert not finished(site, PROGRAM, built.parent).stderr
