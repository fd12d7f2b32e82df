"""Shared by all tests: tiny random models, the real default model, offline by default."""

from __future__ import annotations

import functools
import gc
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from hypothesis import HealthCheck, settings

from compiledllm.caches import cache_dir
from tests.support import schedule
from tests.support.pairwise import pairwise_cover
from tests.support.tiny import CHAT, copy_tokenizer, save_random_model

# All of these are read when torch or a kernel is imported, which a test file may do first.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as compiledllm/__init__.py does, and why
if schedule.IS_WORKER:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Processes of tests would compile all modules of the package again, each of them.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
# Engines of tests compile, also if an earlier test has kept the same: tests of artifacts use them.
os.environ.setdefault("COMPILEDLLM_DISABLE_CACHE", "1")
# What was compiled is kept between runs. tests/graphs/test_compile.py starts without it.
for name, folder in (("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("TRITON_CACHE_DIR", "triton")):
    os.environ.setdefault(name, str(cache_dir() / "tests" / folder))

# Chosen by HYPOTHESIS_PROFILE, or pytest's --hypothesis-profile.
PLAIN = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("dev", PLAIN, max_examples=30, derandomize=True)
settings.register_profile("ci", PLAIN, max_examples=100, derandomize=True)
settings.register_profile("nightly", PLAIN, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


def pytest_configure(config: pytest.Config) -> None:
    deals_out = getattr(config.option, "numprocesses", None)  # xdist's; it runs no test itself
    if INTERPRETING and not deals_out:
        from tests.support import interpreter

        interpreter.make_faster()
        interpreter.make_conversions_exact()
        interpreter.make_bf16_products_right()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if INTERPRETING:
        dropped = beyond_pairwise(items)
        config.hook.pytest_deselected(items=[item for item in items if item in dropped])
        items[:] = [item for item in items if item not in dropped]
    skip_what_needs_a_gpu(items)
    if schedule.IS_WORKER:
        schedule.put_long_ones_first(items)


def pytest_collection_finish() -> None:
    gc.freeze()  # what collecting has made stays, and the collector of garbage need not look at it
    gc.set_threshold(20_000, 10, 10)  # collecting garbage took 3 % of the CPU time


@pytest.hookimpl(optionalhook=True)  # xdist's
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object | None:
    has_groups = config.getvalue("dist") == "loadscope"
    return schedule.make_scheduler(config, log) if has_groups else None


def beyond_pairwise(items: list[pytest.Item]) -> set[pytest.Item]:
    """Cases of tests marked `pairwise` that the interpreter leaves to a GPU.

    Cases of the torch backend all run, as they are fast.
    """
    grids: dict[tuple[object, ...], list[pytest.Function]] = {}
    for item in items:
        if isinstance(item, pytest.Function) and "pairwise" in item.keywords:
            backend = item.callspec.params.get("backend")
            if backend != "torch":
                grids.setdefault((item.path, item.originalname, backend), []).append(item)
    dropped: set[pytest.Item] = set()
    for grid in grids.values():
        kept = pairwise_cover([tuple(map(repr, item.callspec.params.values())) for item in grid])
        dropped |= {item for index, item in enumerate(grid) if index not in kept}
    return dropped


def skip_what_needs_a_gpu(items: list[pytest.Item]) -> None:
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """tiny_model(model_type, **config) -> directory of a random float32 model, made once each."""
    made: dict[str, Path] = {}

    def make(model_type: str, /, **changes: Any) -> Path:
        key = repr((model_type, sorted(changes.items())))
        if key not in made:
            made[key] = tmp_path_factory.mktemp(f"tiny_{model_type}")
            save_random_model(made[key], model_type, **changes)
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_llama(tiny_model: Callable[..., Path]) -> Callable[..., Path]:
    """tiny_llama(**config) -> directory of a random float32 Llama."""
    return functools.partial(tiny_model, "llama")


@pytest.fixture(scope="session")
def greedy_by_transformers() -> Callable[..., list[list[int]]]:
    """greedy_by_transformers(checkpoint, prompts, count) -> the next `count` tokens of each."""

    from tests.support.greedy import greedy_tokens, load_reference

    def generate(checkpoint: Path, prompts: list[list[int]], count: int) -> list[list[int]]:
        model = load_reference(checkpoint)
        found = [greedy_tokens(model, prompt, count) for prompt in prompts]
        assert len({tuple(tokens) for tokens in found}) > 3, "nearly the same for every prompt"
        return found

    return generate


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The embedded default model, real weights: from the cache, or fetched once."""
    from compiledllm.models.source import resolve_checkpoint

    cache_dir().mkdir(parents=True, exist_ok=True)
    with FileLock(cache_dir() / "tests.lock"):  # two workers of a run ask at the same time
        return resolve_checkpoint(None)


@pytest.fixture(scope="session")
def tiny_chat_model(
    tiny_llama: Callable[..., Path], default_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Random weights, with the default model's tokenizer and chat template."""
    source = tiny_llama(**CHAT)
    folder = tmp_path_factory.mktemp("tiny_chat")
    shutil.copytree(source, folder, dirs_exist_ok=True)
    copy_tokenizer(default_model, folder)
    return folder
