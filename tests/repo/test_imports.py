"""Imports run downward only, each third party has one door, and nothing is loaded twice or early.

The rules are ARCHITECTURE.md's. Every import statement counts: at the top, inside a function, under
TYPE_CHECKING, and `import_module` of a written-out name.
"""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import compiledllm

ROOT = Path(__file__).parents[2]
FOLDERS = ("compiledllm", "graphs", "kernels", "models", "benchmarks")

LEAVES = {"checks", "structured_outputs", "sampling_params", "outputs", "types", "config"}
LEAVES |= {"platform", "log", "version", "resolved_config", "vllm_options", "engine_args"}
LEAVES |= {"pooling_params", "beam_search_params", "choices", "vllm_features", "caches", "ledger"}
LEAVES |= {"bytecode", "bytecode_file", "bytecode_writer", "engine_options"}
BELOW_ENGINE = {"scheduler", "grammars", "runner", "graphs", "models", "kernels", *LEAVES}
# Layer -> layers it may import, itself aside. "root" is compiledllm/__init__; a name with a dot is
# that module only. "benchmarks" is where `compiledllm bench` ends up.
MAY_IMPORT: dict[str, set[str]] = {
    "root": {"engine.engine", "config", "sampling_params", "outputs", "structured_outputs"}
    | {"version", "remote.async_engine", "remote.errors", "arguments", "engine_args"}
    | {"engine.llm_engine", "engine.prompts", "pooling_params", "beam_search_params"},
    "cli": {"root", "arguments", "terminal_chat", "server", "benchmarks", "engine"}
    | {"environment", "sampling_options", "shell_completion"}
    | BELOW_ENGINE,
    "environment": {"caches", "config", "platform", "version"},
    "shell_completion": set(),
    "terminal_chat": {"engine.engine", "sampling_params", "outputs"},
    "sampling_options": {"arguments", "config", "sampling_params", "structured_outputs"},
    "arguments": {"argument_words", "config", "engine_options", "vllm_options"},
    "argument_words": {"vllm_options"},
    "engine_args": {"arguments", "checks", "config", "vllm_options"},
    "vllm_options": {"vllm_features"},
    "vllm_features": set(),
    "server": {"root", "cli", "arguments", "remote", "engine", *BELOW_ENGINE},
    "remote": {"engine", "grammars", *LEAVES},
    "engine": BELOW_ENGINE,
    "scheduler": {"types", "sampling_params", "outputs", "config", "log"},
    "runner": {"grammars", "graphs", "models", "kernels", *LEAVES},
    "grammars": {"structured_outputs", "log"},
    "graphs": {
        "kernels.machine_code",
        "kernels.late_compiles",
        "kernels.direct_launches",
        *LEAVES,
    },
    "models": {"kernels", *LEAVES},
    "kernels": {"platform", "caches"},
    "benchmarks": {
        "root",
        "arguments",
        "engine",
        "models.formats",
        "models.json_file",
        "models.matrices",
        "models.spec",
        "models.registry",
        "models.sharded_spec",
        "models.source",
        "kernels",
        "remote.replicas",
        "remote.routing",
        *LEAVES,
    },
    "platform": {"choices", "config", "types", "log"},
    "config": {"checks", "engine_options", "vllm_options"},
    "engine_options": set(),
    "resolved_config": {"choices", "config", "engine_options"},
    "choices": set(),
    "types": {"sampling_params", "pooling_params", "structured_outputs", "outputs"},
    "beam_search_params": {"checks", "vllm_options"},
    "pooling_params": {"checks"},
    "sampling_params": {"beam_search_params", "checks", "structured_outputs", "vllm_options"},
    "structured_outputs": {"checks"},
    "outputs": set(),
    "checks": set(),
    "caches": {"log"},
    "bytecode": {"bytecode_file", "caches"},
    "bytecode_file": {"caches", "log"},
    "bytecode_writer": set(),
    "ledger": set(),
    "log": set(),
    "version": set(),
}

# Package -> the only modules that may import it, with all below them.
DOORS: dict[str, tuple[str, ...]] = {
    "triton": ("compiledllm.kernels",),
    "flashinfer": ("compiledllm.kernels",),
    "transformers": (
        "compiledllm.models.families",
        "compiledllm.models.registry",
        "compiledllm.models.source",
        "compiledllm.models.transformers_model",
        "compiledllm.models.transformers_probe",
        "compiledllm.engine.tokenizer_class",
        "compiledllm.benchmarks",
    ),
    "tokenizers": (
        "compiledllm.models.gguf",
        "compiledllm.engine.plain_tokenizer",
        "compiledllm.engine.token_stream",
        "compiledllm.engine.tokenizer_class",
    ),
    "jinja2": ("compiledllm.engine.chat_rendering",),
    "safetensors": ("compiledllm.models", "compiledllm.benchmarks.quantised"),
    "compressed_tensors": ("compiledllm.benchmarks.quantised",),
    "llmcompressor": ("compiledllm.benchmarks.make_quantised",),
    "gguf": ("compiledllm.models",),
    "huggingface_hub": ("compiledllm.models",),
    "aiohttp": ("compiledllm.benchmarks",),
    "rich": ("compiledllm.benchmarks",),
    "prompt_toolkit": ("compiledllm.terminal_chat",),
    "yaml": ("compiledllm.arguments",),
    "matplotlib": ("compiledllm.benchmarks",),
    "vllm": ("compiledllm.benchmarks",),
    "ray": ("compiledllm.engine.ray_ranks", "compiledllm.server.ray_serve"),
    "fastapi": ("compiledllm.server",),
    "starlette": ("compiledllm.server",),
    "uvicorn": ("compiledllm.server",),
    "pydantic": ("compiledllm.server",),
    "msgspec": ("compiledllm.server", "compiledllm.remote", "compiledllm.engine.rank_frames"),
    "prometheus_client": ("compiledllm.server",),
    "llguidance": ("compiledllm.grammars", "compiledllm.runner.structured"),
}
WITHOUT_TORCH = (
    "compiledllm.types",
    "compiledllm.structured_outputs",
    "compiledllm.sampling_params",
    "compiledllm.beam_search_params",
    "compiledllm.outputs",
    "compiledllm.config",
    "compiledllm.choices",
    "compiledllm.caches",
    "compiledllm.bytecode",
    "compiledllm.bytecode_file",
    "compiledllm.bytecode_writer",
    "compiledllm.ledger",
    "compiledllm.resolved_config",
    "compiledllm.log",
    "compiledllm.cli",
    "compiledllm.arguments",
    "compiledllm.argument_words",
    "compiledllm.sampling_options",
    "compiledllm.shell_completion",
    "compiledllm.engine_args",
    "compiledllm.vllm_options",
    "compiledllm.vllm_features",
    "compiledllm.terminal_chat",
    "compiledllm.benchmarks.cli",
    "compiledllm.scheduler",
    "compiledllm.grammars",
)
# vLLM's names for ours.
ALIASES = {"LLM": "Engine", "AsyncLLM": "AsyncEngine", "EngineDeadError": "EngineError"}
ALIASES |= {"AsyncLLMEngine": "AsyncEngine", "FlexibleArgumentParser": "Parser"}
# The APIs stand below HTTP: they import no package for HTTP, and of the server only these.
WITHOUT_HTTP = ("compiledllm.server.openai", "compiledllm.server.anthropic")
HTTP_PACKAGES = {"fastapi", "starlette", "uvicorn", "httptools", "pydantic"}
BELOW_OPENAI = {"client_left", "lanes", "metrics", "openai", "anthropic"}
UNREADABLE = "?"  # an `import_module` whose argument is computed


@dataclass(frozen=True, order=True)
class Edge:
    """One import: `target` is a module, ours or another's."""

    importer: str
    target: str
    line: int

    def __str__(self) -> str:
        return f"{self.importer}, line {self.line}: imports {self.target}"


def our_modules() -> dict[str, Path]:
    """Module name -> file."""
    found: dict[str, Path] = {}
    for folder in FOLDERS:
        prefix = folder if folder == "compiledllm" else f"compiledllm.{folder}"
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join([prefix, *(part for part in parts if part != "__init__")])
            found[name] = path
    return found


MODULES = our_modules()


def edges_of(importer: str, source: str, is_package: bool = False) -> Iterator[Edge]:
    """Every import in a module's source, wherever it stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = absolute_base(importer, is_package, node)
            targets = [
                f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base
                for alias in node.names
            ]
        elif isinstance(node, ast.Call) and called_name(node) in ("import_module", "__import__"):
            targets = [written_out_name(node.args[0])]
        else:
            continue
        for target in targets:
            yield Edge(importer, target, node.lineno)


def absolute_base(importer: str, is_package: bool, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    package = importer.split(".")
    package = package[: len(package) - node.level + is_package]
    return ".".join([*package, *([node.module] if node.module else [])])


def called_name(node: ast.Call) -> str:
    function = node.func
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def written_out_name(argument: ast.expr) -> str:
    """The module named by a literal, or the package at the front of an f-string."""
    if isinstance(argument, ast.JoinedStr) and argument.values:
        argument = argument.values[0]
        if isinstance(argument, ast.Constant) and str(argument.value).endswith("."):
            return str(argument.value).rstrip(".")
    elif isinstance(argument, ast.Constant):
        return str(argument.value)
    return UNREADABLE


@functools.cache  # as collecting the tests needs none
def all_edges() -> list[Edge]:
    return sorted(
        edge
        for name, path in MODULES.items()
        for edge in edges_of(name, path.read_text(encoding="utf-8"), path.name == "__init__.py")
    )


def is_ours(module: str) -> bool:
    return module.split(".")[0] == "compiledllm"


def layer_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "root"


def is_within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def points_down(edge: Edge) -> bool:
    importer, target = layer_of(edge.importer), layer_of(edge.target)
    if importer == target:
        return True
    inside = edge.target.removeprefix("compiledllm.")
    return target in MAY_IMPORT[importer] or is_within(inside, tuple(MAY_IMPORT[importer]))


def listed(edges: list[Edge]) -> str:
    return "\n".join(map(str, edges))


# -- the walker sees what there is ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("import compiledllm.engine.core", "compiledllm.engine.core"),
        ("from compiledllm.engine.core import EngineCore", "compiledllm.engine.core"),
        ("from compiledllm.engine import core", "compiledllm.engine.core"),
        ("from compiledllm import Engine", "compiledllm"),
        ("from compiledllm import types as t", "compiledllm.types"),
        ("from ..engine.core import EngineCore", "compiledllm.engine.core"),
        ("from .. import engine", "compiledllm.engine"),
        ("from . import kv_cache", "compiledllm.runner.kv_cache"),
        ("def f():\n    import compiledllm.engine.core", "compiledllm.engine.core"),
        ("if TYPE_CHECKING:\n    from compiledllm.cli import main", "compiledllm.cli"),
        ("try:\n    import triton.language as tl\nexcept ImportError: ...", "triton.language"),
        ("importlib.import_module('compiledllm.cli')", "compiledllm.cli"),
        ("__import__('triton')", "triton"),
        ("import_module(f'compiledllm.engine.{name}')", "compiledllm.engine"),
        ("import_module(name)", UNREADABLE),
        ("import_module(f'{name}.core')", UNREADABLE),
    ],
)
def test_walker_finds_every_form_of_import(source: str, target: str) -> None:
    edges = list(edges_of("compiledllm.runner.sampler", source))
    assert [edge.target for edge in edges] == [target]


def test_relative_import_of_a_package_starts_at_the_package() -> None:
    edges = list(edges_of("compiledllm.runner", "from .sampler import Sampler", is_package=True))
    assert [edge.target for edge in edges] == ["compiledllm.runner.sampler"]


@pytest.mark.parametrize(
    ("importer", "target", "allowed"),
    [
        ("runner.sampler", "kernels.attention", True),
        ("engine.core", "models.decoder", True),
        ("models.weights", "models.families.llama", True),
        ("benchmarks.serve", "models.spec", True),
        ("benchmarks.serve", "models.decoder", False),
        ("scheduler.scheduler", "runner.sampler", False),
        ("scheduler.scheduler", "platform", False),  # it imports torch
        ("runner.sampler", "scheduler.scheduler", False),
        ("models.decoder", "runner.kv_cache", False),
        ("runner.worker", "scheduler.scheduler", False),
        ("scheduler.scheduler", "runner.worker", False),
        ("kernels.attention", "types", False),
        ("kernels.attention", "platform", True),
        ("graphs.compile", "models.decoder", False),
        ("engine.core", "benchmarks.serve", False),
        ("engine.core", "remote.wire", False),
        ("remote.wire", "types", True),
        ("remote.engine_client", "server.app", False),
        ("remote.engine_loop", "scheduler.scheduler", False),
        ("server.app", "remote.engine_client", True),
        ("cli", "benchmarks.serve", True),
        ("types", "config", False),
    ],
)
def test_rules_are_read_as_they_are_meant(importer: str, target: str, allowed: bool) -> None:
    assert points_down(Edge(f"compiledllm.{importer}", f"compiledllm.{target}", 1)) == allowed


def test_walk_covers_every_folder() -> None:
    layers = {layer_of(name) for name in MODULES}
    assert layers >= {
        "engine",
        "remote",
        "runner",
        "scheduler",
        "graphs",
        "kernels",
        "models",
        "benchmarks",
    }
    assert layers <= set(MAY_IMPORT), "a new layer needs a line in MAY_IMPORT"
    assert any(is_ours(edge.target) for edge in all_edges())


def test_rules_name_only_what_exists() -> None:
    allowed = set(MAY_IMPORT).union(*MAY_IMPORT.values()) - {"root"}
    named = {f"compiledllm.{name}" for name in allowed}
    doors = {module for modules in DOORS.values() for module in modules}
    assert not (named | doors | set(WITHOUT_TORCH)) - set(MODULES)


# -- our imports ----------------------------------------------------------------------------------


def test_imports_run_downward_only() -> None:
    wrong = [edge for edge in all_edges() if is_ours(edge.target) and not points_down(edge)]
    assert not wrong, listed(wrong)


def test_our_folders_are_imported_by_their_installed_names() -> None:
    folders = set(FOLDERS) - {"compiledllm"}
    bare = [edge for edge in all_edges() if edge.target.split(".")[0] in folders]
    assert not bare, listed(bare)


def test_every_imported_module_of_ours_exists() -> None:
    missing = [edge for edge in all_edges() if is_ours(edge.target) and edge.target not in MODULES]
    assert not missing, listed(missing)


def test_computed_import_names_stay_in_the_lazy_package() -> None:
    unreadable = [edge.importer for edge in all_edges() if edge.target == UNREADABLE]
    assert set(unreadable) <= {"compiledllm"}


def test_public_names_come_lazily_from_where_the_rules_allow() -> None:
    for name, home in compiledllm._HOMES.items():
        assert points_down(Edge("compiledllm", home, 0)), f"{name} lives in {home}"
        assert getattr(compiledllm, name).__name__ == ALIASES.get(name, name)
    assert set(compiledllm.__all__) == {"__version__", *compiledllm._HOMES}
    with pytest.raises(AttributeError, match="has no attribute 'Motor'"):
        _ = compiledllm.Motor


# -- third parties --------------------------------------------------------------------------------


@pytest.mark.parametrize("package", DOORS)
def test_third_party_has_one_door(package: str) -> None:
    wrong = [
        edge
        for edge in all_edges()
        if edge.target.split(".")[0] == package and not is_within(edge.importer, DOORS[package])
    ]
    assert not wrong, listed(wrong)


def test_what_decides_and_what_talks_imports_no_torch() -> None:
    wrong = [
        edge
        for edge in all_edges()
        if edge.target.split(".")[0] == "torch" and is_within(edge.importer, WITHOUT_TORCH)
    ]
    assert not wrong, listed(wrong)


def test_answers_know_no_http() -> None:
    wrong = [
        edge
        for edge in all_edges()
        if is_within(edge.importer, WITHOUT_HTTP)
        and (edge.target.split(".")[0] in HTTP_PACKAGES or not is_below_openai(edge.target))
    ]
    assert not wrong, listed(wrong)


def is_below_openai(target: str) -> bool:
    parts = target.split(".")
    return parts[:2] != ["compiledllm", "server"] or parts[2:3] == [] or parts[2] in BELOW_OPENAI


# -- what an import loads -------------------------------------------------------------------------


def python(program: str) -> subprocess.CompletedProcess[str]:
    """Run a program from the repository root, where the folders lie on sys.path."""
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(
    "statement",
    [
        "import compiledllm",
        "from compiledllm import SamplingParams",
        "from compiledllm import Engine; isinstance(0, Engine)",
        "import compiledllm.cli",
    ],
)
def test_light_import_loads_no_heavy_package(statement: str) -> None:
    heavy = "{'torch', 'numpy', 'transformers', 'triton', 'safetensors', 'prompt_toolkit'}"
    done = python(f"import sys\n{statement}\nprint(*sorted({heavy} & set(sys.modules)))")
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_http_process_answers_before_any_torch() -> None:
    done = python("import sys, compiledllm.server.launch; print('torch' in sys.modules)")
    assert (done.returncode, done.stdout.strip()) == (0, "False"), done.stderr


def test_a_batch_knows_neither_torch_nor_http() -> None:
    heavy = "{'torch', 'fastapi', 'starlette', 'uvicorn', 'httptools', 'pydantic'}"
    program = f"import sys, compiledllm.server.run_batch; print({heavy} & set(sys.modules))"
    done = python(program)
    assert (done.returncode, done.stdout.strip()) == (0, "set()"), done.stderr


@pytest.mark.parametrize("folder", ["graphs", "models", "benchmarks"])
def test_folder_under_its_bare_name_is_refused_with_the_right_name(folder: str) -> None:
    done = python(f"import {folder}")
    assert done.returncode != 0
    assert f"installed as compiledllm.{folder}" in done.stderr
    assert f"importing it as '{folder}' would make a second copy" in done.stderr


def test_bare_kernels_is_an_empty_module_that_gives_nothing() -> None:
    """transformers imports a package of that name if it finds one, and asks for its version."""
    program = """
import kernels
assert not hasattr(kernels, "__version__")
for statement in (
    "import kernels.attention",
    "from kernels import attention",
    "from kernels.attention import paged_attention",
    "kernels.attention",
):
    try:
        exec(statement)
    except ImportError as error:
        print(type(error).__name__)
import sys
assert [name for name in sys.modules if name.startswith("kernels.")] == []
assert "torch" not in sys.modules
"""
    done = python(program)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 4


def test_ops_are_registered_once_beside_a_bare_kernels_module() -> None:
    done = python("import kernels, compiledllm.kernels.attention as a; print(a.__name__)")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "compiledllm.kernels.attention"
