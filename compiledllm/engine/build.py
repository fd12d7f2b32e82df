"""`compiledllm build` and `compiledllm cache`: makes, lists and explains artifacts.

An artifact is a file with what a start compiles and measures, for later starts.
"""

from __future__ import annotations

import contextlib
import gc
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from compiledllm.caches import compiled_dir, folders_of
from compiledllm.config import ConfigError, EngineConfig
from compiledllm.engine import tokenizer_snapshot
from compiledllm.engine.plan_views import size
from compiledllm.engine.startup import plan
from compiledllm.engine.tokenizer import directory_of_tokenizer
from compiledllm.graphs.artifact import explain, file_name, listed
from compiledllm.log import log, show_logs
from compiledllm.runner.artifact_key import key_of
from compiledllm.runner.plan import Plan
from compiledllm.runner.start_cache import artifacts_dir, label_of, why_not_cached


def build(options: Mapping[str, Any], out: Path | None) -> Path:
    """Start an engine, write its artifact into the folder `out` (default: the cache), and end.

    A snapshot of the tokenizer is kept, too. With `out`, a second engine then starts from the
    folder in a process of its own, and the bytecode of the modules that it imports is kept. Raises
    ConfigError if the engine cannot start or its compiled functions cannot be saved.
    """
    show_logs()
    folder = out or artifacts_dir()
    with _writing(folder):  # before minutes of compiling
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    planned = plan(EngineConfig.from_options(**{**options, "compile_when": "start"}))
    if reason := why_not_cached(planned):
        raise ConfigError(f"there is nothing to build with {reason}; leave it out")
    path, num_blocks = _write_artifact(planned, folder)
    _write_tokenizer(planned, out)
    if out is not None:  # starts without `artifact_dir` keep bytecode in the cache themselves
        _write_bytecode({**options, "artifact_dir": str(out), "num_kv_blocks": num_blocks})
    return path


def _write_artifact(planned: Plan, folder: Path) -> tuple[Path, int]:
    """Write the artifact of a plan into a folder.

    Returns the file, and the smallest number of KV blocks with which a start can use the artifact,
    as its block tables then have the same width.
    """
    from compiledllm.engine.core import EngineCore

    worker = EngineCore(planned).worker
    artifact = worker.make_artifact()
    if artifact is None:
        compiler = worker.runner.compiler
        reason = compiler.error or compiler.why_not_saved or "nothing was compiled"
        raise ConfigError(f"the model runs, but what was compiled cannot be kept: {reason}")
    with _writing(folder):
        path = worker.cache.write(artifact, folder)
    return path, min(worker.num_kv_blocks, planned.blocks_per_context)


def _write_tokenizer(planned: Plan, folder: Path | None) -> None:
    """Keep the tokenizer in a folder; None: in the cache."""
    model = planned.config.requested.model
    if model.skip_tokenizer_init:
        return
    try:
        directory = directory_of_tokenizer(model, planned.checkpoint)
        if folder is None:
            tokenizer_snapshot.open_tokenizer(directory)
        else:
            tokenizer_snapshot.copy_to(folder, directory)
    except Exception as error:  # there are checkpoints without a tokenizer
        log.warning("the artifact is complete, but no tokenizer is kept beside it: %s", error)


def _write_bytecode(options: Mapping[str, Any]) -> None:
    """Let a process start from the artifact, and keep the bytecode of what it imports."""
    gc.collect()  # frees the memory of the engine that compiled, for the new process
    torch.cuda.empty_cache()
    program = "compiledllm.engine.recorded_start"
    done = subprocess.run(
        [sys.executable, "-m", program, json.dumps(options, default=str)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        log.warning("the artifact is complete, but no bytecode is kept beside it: %s", last[0])


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"--out {folder} cannot be written: {error}") from None


def lines_of_list(named: str | None) -> Iterator[str]:
    """One line per artifact and tokenizer: its path, size, age, model, dtype, device and torch."""
    for path, manifest in listed(folders_of(named, artifacts_dir())):
        if not isinstance(manifest, dict):
            yield f"{path}  cannot be used: {manifest}"
            continue
        key, hours = manifest["key"], (time.time() - manifest["created"]) / 3600
        facts = ", ".join(key[name] for name in ("dtype", "device", "torch") if name in key)
        yield f"{path}  {size(path.stat().st_size)}  {hours:.1f} h  {manifest['label']} ({facts})"
    for path, found in tokenizer_snapshot.listed(named):
        if isinstance(found, str):
            yield f"{path}  cannot be used: {found}"
            continue
        hours = (time.time() - found.created) / 3600
        yield f"{path}  {size(path.stat().st_size)}  {hours:.1f} h  {found.label} (tokenizer)"


def explanation(options: Mapping[str, Any]) -> str:
    """Whether a start with these options finds its artifact, and if not, what differs."""
    planned = plan(EngineConfig.from_options(**options, load_format="dummy"))
    if reason := why_not_cached(planned):
        return f"miss: {reason}"
    named = planned.config.requested.compile.artifact_dir
    key, folders = key_of(planned), folders_of(named, artifacts_dir())
    found = explain(key, label_of(planned), folders)
    return f"hit: {found}" if file_name(key) in found else f"miss: {found}"


def clear() -> str:
    """Remove all compiled code of the cache. Returns a line that says how much this freed."""
    folder = compiled_dir()
    num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    shutil.rmtree(folder, ignore_errors=True)
    return f"{size(num_bytes)} freed in {folder}"
