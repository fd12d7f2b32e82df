"""Finds the artifact of an earlier start, and keeps an artifact for the next start.

    cache = StartCache(plan)      # begins to read in a thread
    artifact = cache.artifact()   # waits; None: this start must compile
    cache.keep(artifact)          # writes in a thread

The engine runs without artifacts: one that is missing, damaged or cannot be written costs time
only.
"""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

from compiledllm.caches import (
    compiled_dir,
    folders_of,
    is_disabled,
    temporary_folder,
    why_not_writable,
)
from compiledllm.graphs import artifact as files
from compiledllm.graphs.artifact import Artifact
from compiledllm.graphs.compile import import_compiler
from compiledllm.kernels import cuda_kernel, late_compiles
from compiledllm.kernels.compile_ahead import load_driver
from compiledllm.log import log
from compiledllm.runner.artifact_key import key_of
from compiledllm.runner.plan import Plan

_TRITON, _NVRTC = "triton/", "nvrtc/"  # folders of binaries in an artifact


def artifacts_dir() -> Path:
    return compiled_dir() / "artifacts"


def label_of(plan: Plan) -> str:
    """The model's name, for people: artifacts of equal names are compared."""
    model = plan.config.requested.model.model
    return Path(model).name if model else "the default model"


class StartCache:
    """The artifact of a plan.

    Attributes: `key`, {} if this start neither uses nor leaves an artifact; `reason`, why there is
    none, or its name.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._thread: threading.Thread | None = None
        self._preparation = threading.Thread(target=self._prepare, name="prepare", daemon=True)
        self.key: dict[str, str] = {}
        self._found: Artifact | str = why_not_cached(plan) or self._make_key()
        if self.key:
            if self._has_triton:
                self._watch_triton()
            self._thread = threading.Thread(target=self._read, name="artifact", daemon=True)
            self._thread.start()
        self._preparation.start()

    def _make_key(self) -> str:
        """Set the key. Returns a reason why that failed, or ""."""
        try:
            self.key = key_of(self._plan)
        except Exception as error:  # a start never fails for what only saves time
            log.warning("no artifact is used or left: %s: %s", type(error).__name__, error)
            return str(error)
        return ""

    def _watch_triton(self) -> None:
        """Note which entries of Triton's cache are used, and what it compiles."""
        from compiledllm.kernels import triton_cache

        try:
            triton_cache.note_entries()
            late_compiles.watch_triton()
        except (ImportError, AttributeError) as error:  # another version of Triton
            log.warning("an artifact of this start will lack our kernels: %s", error)

    @property
    def _has_triton(self) -> bool:
        return self._plan.platform.is_cuda

    def artifact(self) -> Artifact | None:
        """Wait for the artifact, and until its binaries are in the kernels' caches."""
        if self._thread is not None:
            self._thread.join()
        return self._found if isinstance(self._found, Artifact) else None

    def _prepare(self) -> None:
        """Import torch's compiler while the start goes on, if this start will need it.

        Not if transformers is imported, too, since its import replaces modules that other threads
        may be reading.
        """
        options = self._plan.config.requested.compile
        compiles = not (options.enforce_eager or options.deterministic)
        is_alone = self._plan.spec.implementation != "transformers"
        if self.artifact() is None and compiles and is_alone and self._has_triton:
            with contextlib.suppress(Exception):  # compiling imports again and reports the error
                import_compiler()

    def wait_for_compiler(self) -> None:
        """Wait for the compiler's import, since two threads must not import it at the same time."""
        self._preparation.join()

    @property
    def reason(self) -> str:
        """Why there is no artifact; with an artifact, the name of its file."""
        found = self._found
        return found if isinstance(found, str) else files.file_name(found.key)

    def _read(self) -> None:
        named = self._plan.config.requested.compile.artifact_dir
        try:
            found = files.find(self.key, label_of(self._plan), folders_of(named, artifacts_dir()))
            if isinstance(found, Artifact):
                self._provide(found)
            elif named:
                log.warning("artifact_dir=%s has nothing for this start: %s", named, found)
            self._found = found
        except Exception as error:  # any file system or file may fail in its own way
            self._found = f"{type(error).__name__}: {error}"
            log.warning("no artifact of an earlier start is used (%s)", self._found)
        if self._has_triton:
            load_driver()  # which an artifact contains

    def _provide(self, artifact: Artifact) -> None:
        """Put the kernels' binaries where the kernels' libraries look for them."""
        cuda_kernel.known_code.update(_within(_NVRTC, artifact.binaries))
        if self._has_triton:
            from compiledllm.kernels import triton_cache

            entries = _within(_TRITON, artifact.binaries)
            try:
                triton_cache.provide(entries)
            except OSError:  # the user's own folder for Triton may be read-only
                os.environ["TRITON_CACHE_DIR"] = str(temporary_folder("triton"))
                triton_cache.provide(entries)

    def keep(self, artifact: Artifact) -> None:
        """Write an artifact into the cache, in a thread that finishes before the process exits."""
        threading.Thread(target=self._keep, args=(artifact,), name="keep").start()

    def _keep(self, artifact: Artifact) -> None:
        folder = artifacts_dir()
        try:
            if reason := why_not_writable(folder):
                log.info("nothing is kept for the next start: %s", reason)
                return
            self.write(artifact, folder)
        except Exception as error:  # whatever fails, this engine runs on
            log.warning("nothing is kept for the next start: %s: %s", type(error).__name__, error)

    def write(self, artifact: Artifact, folder: Path) -> Path:
        """Write an artifact, with the binaries that this process used, into a folder."""
        binaries = {_NVRTC + name: code for name, code in cuda_kernel.known_code.items()}
        if self._has_triton:
            from compiledllm.kernels import triton_cache

            entries = triton_cache.entries()
            binaries |= {_TRITON + name: content for name, content in entries.items()}
        artifact.binaries = binaries
        path = files.write(artifact, folder)
        log.info("kept for the next start: %s", path)
        return path


def why_not_cached(plan: Plan) -> str | None:
    """Why a start neither uses nor leaves an artifact, or None."""
    options = plan.config.requested.compile
    if options.enforce_eager:
        return "enforce_eager"
    if options.deterministic:
        return "deterministic"
    if plan.ranks.are_many:
        return "tensor_parallel_size"
    if is_disabled():
        return "COMPILEDLLM_DISABLE_CACHE is set"
    return None


def _within(prefix: str, binaries: dict[str, bytes]) -> dict[str, bytes]:
    return {n.removeprefix(prefix): code for n, code in binaries.items() if n.startswith(prefix)}
