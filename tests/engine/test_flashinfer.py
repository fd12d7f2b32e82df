"""The FlashInfer backend: planned step by step, and replaced by Triton where it cannot be had."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from compiledllm import Engine, SamplingParams
from compiledllm.choices import Choice
from compiledllm.config import ConfigError
from compiledllm.kernels import paged_attention_torch as oracle
from compiledllm.kernels.backend import AttentionMetadata, ScoreOptions
from compiledllm.models.registry import load_spec
from compiledllm.platform import Platform
from compiledllm.resolved_config import StepLimits
from compiledllm.runner.choose_backend import choose_backend

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
SHAPE = {"hidden_size": 128, "head_dim": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
PROMPTS = [[5, 9, 11], [7] * 40, list(range(3, 60)), [8]]


class OracleWrapper:
    """Takes what FlashInfer's wrapper takes, and computes it with the torch oracle."""

    def __init__(self, workspace: Tensor, layout: str, backend: str, **fixed: Any) -> None:
        assert layout == "NHD"

    def plan(
        self, starts: Tensor, page_starts: Tensor, pages: Tensor, last_page: Tensor, **options: Any
    ) -> None:
        self._starts, self._options = starts, options
        counts = page_starts.diff()
        self._lengths = (counts - 1) * options["page_size"] + last_page
        self._tables = torch.zeros(len(counts), int(counts.max()), dtype=torch.int32)
        for row, (first, count) in enumerate(zip(page_starts, counts, strict=False)):
            self._tables[row, :count] = pages[first : first + count]

    def run(self, query: Tensor, kv_cache: tuple[Tensor, Tensor], out: Tensor) -> None:
        options = self._options
        assert query.shape[1:] == (options["num_qo_heads"], options["head_dim_qk"])
        window, cap = options["window_left"] + 1, options["logits_soft_cap"]
        form = ScoreOptions(options["sm_scale"], window, cap)
        slots = torch.empty(0)
        attn = AttentionMetadata(slots, self._tables, self._lengths, self._starts)
        out.copy_(oracle.paged_attention(query, torch.stack(kv_cache), attn, form))


@pytest.fixture
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    stand_in = ModuleType("flashinfer")
    stand_in.BatchPrefillWithPagedKVCacheWrapper = OracleWrapper  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flashinfer", stand_in)
    return stand_in


def ask_for_flashinfer(patch: pytest.MonkeyPatch) -> None:
    """As if there were a GPU: what is chosen, not what computes."""
    choice = Choice("flashinfer", "as asked")
    patch.setattr(Platform, "choose_attention_backend", lambda *_: choice)


def tokens(model: Path, **options: Any) -> list[list[int]]:
    engine = Engine(model, skip_tokenizer_init=True, enforce_eager=True, **options)
    outputs = engine.generate(PROMPTS, GREEDY, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-in computes on a CPU")
@pytest.mark.parametrize("limits", [{}, {"max_num_batched_tokens": 16}, {"num_kv_blocks": 8}])
def test_every_step_is_planned_as_it_is(
    limits: dict[str, int],
    tiny_llama: Callable[..., Path],
    flashinfer: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_llama(**SHAPE)
    expected = tokens(model, dtype="float16")
    ask_for_flashinfer(monkeypatch)
    assert tokens(model, dtype="float16", async_scheduling=True, **limits) == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-in computes on a CPU")
def test_layers_with_windows_keep_whole_contexts(
    tiny_model: Callable[..., Path], flashinfer: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = ["sliding_attention", "full_attention"]
    window = {"head_dim": 64, "num_hidden_layers": 2, "sliding_window": 20, "layer_types": kinds}
    model = tiny_model("ministral", **window)
    expected = tokens(model, dtype="float16")
    ask_for_flashinfer(monkeypatch)
    assert tokens(model, dtype="float16", num_kv_blocks=8) == expected
    engine = Engine(model, dtype="float16", skip_tokenizer_init=True, enforce_eager=True)
    assert engine.core.scheduler.kv.windows == (0,)
    assert str(engine.core.report["kv_groups"]) == (
        "1 group of 2 layers (flashinfer reads whole contexts)"
    )


def test_steps_are_not_launched_ahead_of_their_plan(
    tiny_llama: Callable[..., Path], flashinfer: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask_for_flashinfer(monkeypatch)
    engine = Engine(
        tiny_llama(**SHAPE),
        dtype="float16",
        device="cpu",
        skip_tokenizer_init=True,
        enforce_eager=True,
        async_scheduling=True,
    )
    assert engine.config.async_scheduling is False
    assert str(engine.core.report["async_scheduling"]) == "False (flashinfer plans step by step)"


# -- what stands in for it -------------------------------------------------------------------------


def settle(model: Path, name: str, dtype: torch.dtype = torch.float16) -> Choice:
    spec = load_spec(model).with_dtypes(str(dtype).removeprefix("torch."))
    limits = StepLimits(block_size=16, max_num_seqs=3, max_num_batched_tokens=64, max_model_len=256)
    choice, backend = choose_backend(Choice(name, "as asked"), spec, limits, torch.device("cpu"))
    assert backend.name == choice.value
    return choice


def broken(*_: object, **__: object) -> None:
    raise RuntimeError("Could not find nvcc and default cuda_home='/usr/local/cuda' doesn't exist")


def test_no_nvcc_falls_back_with_one_line(
    tiny_llama: Callable[..., Path],
    flashinfer: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(flashinfer, "BatchPrefillWithPagedKVCacheWrapper", broken)
    with caplog.at_level(logging.WARNING, "compiledllm"):
        choice = settle(tiny_llama(**SHAPE), "flashinfer")
    assert choice.value == "triton" and "Could not find nvcc" in choice.reason
    (record,) = caplog.records
    assert "'flashinfer' cannot be used (RuntimeError: Could not find nvcc" in record.getMessage()


def test_a_missing_flashinfer_falls_back(
    tiny_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    choice = settle(tiny_llama(**SHAPE), "flashinfer")
    assert choice.value == "triton" and "ModuleNotFoundError" in choice.reason


@pytest.mark.parametrize(
    ("shape", "dtype", "why"),
    [
        ({"head_dim": 80}, torch.float16, "no kernels for head_dim=80"),
        ({"head_dim": 64}, torch.float32, "no kernels for float32"),
    ],
)
def test_what_flashinfer_lacks_is_named(
    shape: dict[str, int],
    dtype: torch.dtype,
    why: str,
    tiny_llama: Callable[..., Path],
    flashinfer: ModuleType,
) -> None:
    assert settle(tiny_llama(**SHAPE), "flashinfer").value == "flashinfer"
    choice = settle(tiny_llama(**(SHAPE | shape)), "flashinfer", dtype)
    assert choice.value == "triton" and why in choice.reason


def test_a_model_with_sinks_goes_to_triton(
    tiny_model: Callable[..., Path], flashinfer: ModuleType
) -> None:
    choice = settle(tiny_model("gpt_oss", num_local_experts=4, **SHAPE), "flashinfer")
    assert choice.value == "triton" and "attention sinks" in choice.reason


def test_heads_too_large_for_triton_go_to_torch(tiny_llama: Callable[..., Path]) -> None:
    model = tiny_llama(hidden_size=640, head_dim=640, num_attention_heads=1, num_key_value_heads=1)
    choice = settle(model, "triton")
    assert choice.value == "torch" and "head_dim=640" in choice.reason
    assert settle(model, "torch").reason == "as asked"
    with pytest.raises(ConfigError, match=r"deterministic=True cannot be had .* head_dim=640"):
        settle(model, "fixed_order")


# -- on a GPU, the real one ------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("eager", [False, True])
def test_flashinfer_gives_tritons_tokens(eager: bool, tiny_llama: Callable[..., Path]) -> None:
    pytest.importorskip("flashinfer")
    options = {"dtype": "float16", "skip_tokenizer_init": True, "kv_cache_memory_bytes": 2**28}
    prompts = [[(7 * i + j * j) % 120 + 3 for j in range(1 + 9 * i)] for i in range(20)]
    outputs = []
    for backend in ("triton", "flashinfer"):
        engine = Engine(
            tiny_llama(**SHAPE), attention_backend=backend, enforce_eager=eager, **options
        )
        assert engine.core.report["attention_backend"].value == backend
        assert (engine.core.runner.graphs is None) == eager
        results = engine.generate(prompts, GREEDY, use_tqdm=False)
        outputs.append([output.outputs[0].token_ids for output in results])
    agreeing = sum(a[:4] == b[:4] for a, b in zip(*outputs, strict=True))
    assert agreeing >= 18  # of 20: another order of sums may tip a close choice
