"""Who calls an attention backend by its name: everybody else asks what it can do."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
NAMES = {"torch", "triton", "flashinfer", "fixed_order"}
PACKAGES = {  # names of packages, and of folders that they write
    "compiledllm/bytecode.py",
    "compiledllm/caches.py",
    "compiledllm/engine/build.py",
    "compiledllm/environment.py",
    "compiledllm/runner/artifact_key.py",
    "compiledllm/runner/start_cache.py",
    "graphs/inductor_output.py",
}
# The option's values, the machine's preference, and the list of backends.
MAY_NAME = {
    "compiledllm/vllm_features.py",
    "compiledllm/vllm_options.py",
    "compiledllm/config.py",
    "compiledllm/engine_options.py",
    "compiledllm/platform.py",
    "kernels/attention.py",
}


def test_only_the_option_the_platform_and_the_list_name_backends() -> None:
    found = set()
    for folder in ("compiledllm", "graphs", "kernels", "models"):
        for path in (ROOT / folder).rglob("*.py"):
            nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if any(isinstance(node, ast.Constant) and node.value in NAMES for node in nodes):
                found.add(path.relative_to(ROOT).as_posix())
    assert found == MAY_NAME | PACKAGES
