"""The compiled block: equal to eager, one graph for all layers, no cache copy, no recompile."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch._inductor.config
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

from compiledllm import Engine, SamplingParams, bytecode_file
from compiledllm.engine import build
from compiledllm.graphs.variants import Variant, variants_for
from compiledllm.runner import model_runner
from compiledllm.runner.input_batch import InputBatch, StepLayout
from compiledllm.types import ScheduledRequest, SchedulerOutput
from tests.support.artifacts import wait_until_kept
from tests.support.requests import make_new_request

PARAMS = SamplingParams(temperature=0, max_tokens=4)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the fixture `engine` leaves its artifact."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def engine(tiny_llama: Callable[..., Path], cache: Path) -> Engine:
    """Its code is generated anew: the others find what an earlier run left on disk."""
    before = counters["inductor"]["fxgraph_cache_hit"]
    no_graphs = torch._inductor.config.patch(fx_graph_cache=False)
    no_autograd = torch._functorch.config.patch(enable_autograd_cache=False)
    with no_graphs, no_autograd, pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMPILEDLLM_CACHE_DIR", str(cache))
        patch.delenv("COMPILEDLLM_DISABLE_CACHE")
        engine = Engine(
            tiny_llama(),
            device="cpu",
            skip_tokenizer_init=True,
            compile_when="start",
            num_kv_blocks=4096,
        )
        wait_until_kept()
    assert engine.core.runner.compiler.is_ready
    assert counters["inductor"]["fxgraph_cache_hit"] == before
    return engine


def step_of(lengths: list[int], prefix: str) -> SchedulerOutput:
    """A step that prefills new requests of these lengths, each in blocks of its own."""
    new, lines, block = [], [], 1
    for index, length in enumerate(lengths):
        name, count = f"{prefix}{index}", -(-length // 16)
        ids = [(7 * index + i) % 120 + 3 for i in range(length)]
        new.append(make_new_request(name, ids, params=PARAMS))
        lines.append(ScheduledRequest(name, 0, length, [list(range(block, block + count))], True))
        block += count
    return SchedulerOutput(new, lines, [])


# Answers requests of random lengths, from the artifact of another process.
PROGRAM = """
import json, random, sys
from compiledllm import Engine, SamplingParams
model, options = json.loads(sys.argv[1])
engine = Engine(model, **options)
compiler = engine.core.runner.compiler
print(engine.core.report["compile"], file=sys.stderr)
draw = random.Random(5)
lengths = [draw.choice([1, 2, 3, 17, 60]) for _ in range(24)]
prompts = [[draw.randrange(3, 120) for _ in range(length)] for length in lengths]
params = [SamplingParams(temperature=0, max_tokens=draw.randrange(1, 9)) for _ in prompts]
found = engine.generate(prompts, params, use_tqdm=False)
found += [engine.generate(prompts[i], params[i], use_tqdm=False)[0] for i in range(4)]
heavy = [name for name in ("torch._dynamo", "torch._inductor") if name in sys.modules]
for module in list(sys.modules.values()):  # some programs read the files of all modules
    file = getattr(module, "__file__", None)
    assert not file or not file.startswith("/proc"), file
tokens = [output.outputs[0].token_ids for output in found]
print(json.dumps([compiler.is_ready, compiler.num_compiles, heavy, tokens]))
"""
OPTIONS = {"device": "cpu", "skip_tokenizer_init": True}


def run_program(model: Path, cache: Path, **options: object) -> tuple[object, ...]:
    environment = os.environ | {
        "COMPILEDLLM_CACHE_DIR": str(cache),
        "COMPILEDLLM_DISABLE_CACHE": "",
        "COMPILEDLLM_LATE_COMPILE": "error",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "CXX": "/no/compiler",
        "CC": "/no/compiler",
        "TORCHINDUCTOR_CACHE_DIR": "",
        "TRITON_CACHE_DIR": "",
    }
    request = json.dumps([str(model), OPTIONS | options])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, request], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    is_ready, num_compiles, heavy, tokens = json.loads(done.stdout.splitlines()[-1])
    return is_ready, num_compiles, heavy, tokens


def test_next_start_compiles_nothing_and_imports_no_compiler(
    engine: Engine, cache: Path, tiny_llama: Callable[..., Path]
) -> None:
    """With other numbers of KV blocks, under a random load, without a C++ compiler."""
    warm = run_program(tiny_llama(), cache, num_kv_blocks=1234)
    assert warm[:3] == (True, 0, [])
    # The widths of block tables are constants in what was compiled.
    eager = run_program(tiny_llama(), cache, num_kv_blocks=16)
    assert eager[:3] == (False, 0, [])
    assert warm[3] == eager[3]


def test_build_keeps_the_bytecode_of_what_a_start_from_it_imports(
    engine: Engine, cache: Path, tiny_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMPILEDLLM_DISABLE_CACHE", "")
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    folder = cache / "compiled" / "artifacts"
    options = {"device": "cpu", "model": tiny_llama(), "artifact_dir": str(folder)}
    build._write_bytecode(options)  # there is no tokenizer
    names = bytecode_file._read(bytecode_file.path_in(folder)).keys()
    assert {"torch", "torch.nn", "compiledllm.engine.core"} <= names
    assert not {"torch._dynamo", "torch._inductor", "transformers"} & names


def test_build_without_a_start_from_it_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("compiledllm.log.log.propagate", True)
    ended = subprocess.CompletedProcess([], 1, stderr="Traceback:\n  ...\nValueError: no GPU\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: ended)
    build._write_bytecode({"artifact_dir": str(tmp_path)})
    assert "no bytecode is kept beside it: ValueError: no GPU" in caplog.text


@torch.inference_mode()
@pytest.mark.parametrize("lengths", [[1], [2], [1, 1], [37], [5, 1, 64], [1] * 17])
def test_compiled_equals_eager_at_every_shape(engine: Engine, lengths: list[int]) -> None:
    runner, compiler = engine.core.runner, engine.core.runner.compiler
    runner.reset()
    step = step_of(lengths, "r")
    runner.table.apply(step)
    layout = StepLayout.of(step, runner.table)
    packed = torch.from_numpy(layout.pack(runner.table, layout.shape))
    sizes = runner.block_sizes
    batch = InputBatch.unpack(packed, layout.shape, len(lengths), runner.table, sizes)
    hidden = {}
    for name, forwards in (("eager", compiler.eager), ("compiled", compiler.compiled)):
        compiler.use(forwards)
        for cache in runner.kv_caches:
            cache.zero_()
        hidden[name] = runner.forward(batch)
    runner.reset()
    torch.testing.assert_close(hidden["compiled"], hidden["eager"], atol=1e-5, rtol=1e-5)
    assert compiler.num_recompiles == 0


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("max_tokens", [1, 2, 16, 17, 256, 257, 8192])
def test_variants_cover_every_step_once(max_tokens: int, on_gpu: bool) -> None:
    variants = variants_for(max_tokens, on_gpu)
    assert variants[0].min_tokens == 1
    assert variants[-1].max_tokens >= max_tokens
    for before, after in itertools.pairwise(variants):
        assert after.min_tokens == before.max_tokens + 1
        assert after.min_tokens < after.max_tokens, "a range of one would be static"
    assert all(v.min_tokens <= v.example <= v.max_tokens for v in variants)


def test_all_layers_share_one_graph_of_each_kind(engine: Engine) -> None:
    """Three layers, one LayerSpec: a static graph for a single token, a dynamic one for more.

    And as many for each of the two edges.
    """
    assert len(engine.core.spec.layers) == 3
    assert engine.core.runner.compiler.num_compiles == 2 + 2 * 2


def trace_only(patch: pytest.MonkeyPatch) -> None:
    """Let graphs run as they were traced, where a test is about tracing."""
    patch.setattr("torch._inductor.compile_fx.compile_fx", lambda graph, *_, **__: graph)


def test_every_engine_of_a_process_compiles(
    tiny_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dynamo keeps few graphs for a function, here two: each engine has a function of its own."""
    trace_only(monkeypatch)
    with torch._dynamo.config.patch(recompile_limit=2):
        engines = [
            Engine(tiny_llama(), device="cpu", skip_tokenizer_init=True, compile_when="start")
            for _ in range(2)  # of two graphs each
        ]
    assert all(engine.core.runner.compiler.is_ready for engine in engines)


def test_what_other_engines_compiled_changes_nothing(
    tiny_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tracer remembers which sizes differed at a line of code, and makes those dynamic."""
    trace_only(monkeypatch)
    monkeypatch.setattr(model_runner, "variants_for", lambda *_: [Variant(2, 2**30, 2)])
    for shape in ({"hidden_size": 96}, {"head_dim": 32}, {"num_key_value_heads": 1}, {}):
        engine = Engine(
            tiny_llama(**shape), device="cpu", skip_tokenizer_init=True, compile_when="start"
        )
        compiler = engine.core.runner.compiler
        assert compiler.is_ready, compiler.error
        assert compiler.num_compiles == 1 + 2


def test_what_was_compiled_for_fewer_tokens_is_not_found_again(
    tiny_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler's cache on disk does not ask for how many tokens something was compiled."""
    monkeypatch.setattr("compiledllm.graphs.variants._CPU_VARIANTS", (Variant(2, 2**30, 2),))
    for most in (96, 512):
        engine = Engine(
            tiny_llama(num_attention_heads=2),
            device="cpu",
            skip_tokenizer_init=True,
            compile_when="start",
            max_num_batched_tokens=most,
        )
        compiler = engine.core.runner.compiler
        assert compiler.is_ready, compiler.error


@torch.inference_mode()
def test_layers_that_see_unequally_far_are_compiled_once(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In examples as in steps, also in those whose last block runs for the ends of prompts only."""
    example = 64  # tokens, and as many as entries in its block table
    monkeypatch.setattr(model_runner, "variants_for", lambda *_: [Variant(2, 2**30, example)])
    monkeypatch.setattr(model_runner, "_MIN_TOKENS_FOR_SAMPLED_ONLY", 32)
    kinds = ["sliding_attention", "full_attention"]
    shape = {"num_hidden_layers": 2, "head_dim": 64, "sliding_window": 33}
    model = tiny_model("ministral", layer_types=kinds, **shape)
    options = {"device": "cpu", "dtype": "float32", "skip_tokenizer_init": True}
    options |= {"max_model_len": 512, "num_kv_blocks": 512, "compile_when": "start"}
    engine = Engine(model, **options)
    runner = engine.core.runner
    assert 2 * runner.table.block_tables[0].shape[-1] == example and runner.compiler.is_ready
    with torch.inference_mode():
        for size in (example, 65, 9):
            rows = torch.full((size,), runner.table.padding_row)
            runner.forward(InputBatch.decode(rows, runner.table, runner.block_sizes))
    prompts = [{"prompt_token_ids": list(range(5, 5 + n))} for n in (70, 3, 40, 41)]
    found = [o.outputs[0].token_ids for o in engine.generate(prompts, PARAMS, use_tqdm=False)]
    assert runner.compiler.num_recompiles == 0
    eager = Engine(model, **(options | {"enforce_eager": True}))
    expected = [o.outputs[0].token_ids for o in eager.generate(prompts, PARAMS, use_tqdm=False)]
    assert found == expected


def test_no_copy_of_the_cache_in_the_generated_code(engine: Engine) -> None:
    """Mutating ops are functionalised by the compiler; a clone of the cache must not survive."""
    runner = engine.core.runner
    recorded: list[tuple[object, ...]] = []

    def record(*args: object) -> tuple[torch.Tensor, torch.Tensor]:
        recorded.append(args)
        return eager(*args)

    eager = runner.compiler.eager["block_forward"]
    forward, runner.model.block_forward = runner.model.block_forward, record
    runner.run_dummy(4)
    runner.model.block_forward = forward
    torch._dynamo.reset()
    fresh = torch.compile(eager, fullgraph=True)
    _, sources = run_and_get_code(fresh, *recorded[0])
    code = "\n".join(sources)
    num_elements = runner.kv_caches[0].numel()
    shape = ", ".join(map(str, runner.kv_caches[0].shape))
    assert "store_kv" in code and "paged_attention" in code
    assert not re.search(rf"empty_strided\w*\(\({shape}\)", code)
    assert str(num_elements) not in re.sub(r"assert_size_stride.*", "", code)


def test_failing_compiler_leaves_an_eager_engine_after_one_line(
    tiny_llama: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no space left on device")

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", fail)
    monkeypatch.setattr("compiledllm.log.log.propagate", True)
    torch._dynamo.reset()
    with caplog.at_level("WARNING", logger="compiledllm"):
        engine = Engine(tiny_llama(), device="cpu", skip_tokenizer_init=True, compile_when="start")
    warnings = [record.message for record in caplog.records]
    assert len(warnings) == 1 and "running eagerly" in warnings[0]
    (output,) = engine.generate([[5, 6, 7]], PARAMS)
    assert output.finished
