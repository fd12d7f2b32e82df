"""The table in models/README.md is the real one, families are tested, and their files are short.

The table is made from the code: a docstring's first line, the tests' variants, whether a family can
read quantised matrices, and the values its `expect` calls allow.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import pytest

from compiledllm.models.gguf.convert import ARCHITECTURES as GGUF_ARCHITECTURES
from compiledllm.models.registry import FAMILIES, family_of
from tests.support.families import IN_ENGINE, VARIANTS

ROOT = Path(__file__).parents[2]
README = (ROOT / "models" / "README.md").read_text(encoding="utf-8")
MODULES = sorted(set(FAMILIES.values()))
MAX_LINES = 110


def families_of(model_types: Iterable[str]) -> list[str]:
    """The families' modules that transformers' model types go to."""
    from transformers.models.auto import modeling_auto as auto

    multimodal = auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    names = multimodal | auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return [FAMILIES[names[model_type]] for model_type in model_types]


def only(module: ModuleType) -> str:
    """What a config must say, by the family's `expect(hf, field, *allowed)` calls."""
    found = []
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "expect":
            field, *allowed = (ast.literal_eval(argument) for argument in node.args[1:])
            values = " or ".join(str(value) for value in allowed if value is not None) or "None"
            found.append(f"`{field}={values}`")
    return ", ".join(found)


def formats(module: ModuleType, architectures: list[str]) -> str:
    has_gguf = set(architectures) & set(GGUF_ARCHITECTURES.values())
    packed = [] if hasattr(module, "prepare") else ["quantised"]
    return ", ".join(["safetensors", *packed, *(["GGUF"] if has_gguf else [])])


def table() -> str:
    lines = [
        "| family | architectures | variants tested | formats | only |",
        "|---|---|---|---|---|",
    ]
    variants = families_of(family for family, _ in VARIANTS)
    for name in MODULES:
        architectures = [
            architecture for architecture in FAMILIES if FAMILIES[architecture] == name
        ]
        module = family_of(architectures[0])
        title = str(module.__doc__).splitlines()[0].removesuffix(".")
        shown = ", ".join(f"`{architecture}`" for architecture in architectures)
        cells = title, shown, variants.count(name), formats(module, architectures), only(module)
        lines.append(f"| {' | '.join(map(str, cells))} |".replace("  ", " "))
    return "\n".join(lines)


def test_table_of_families_is_the_real_one() -> None:
    assert table() in README, f"put this into models/README.md:\n{table()}"


@pytest.mark.parametrize("name", MODULES)
def test_every_family_is_tested_for_its_logits_and_in_the_engine(name: str) -> None:
    assert name in families_of(family for family, _ in VARIANTS)
    assert name in families_of(IN_ENGINE)


@pytest.mark.parametrize("name", MODULES)
def test_family_files_are_short_or_say_why_not(name: str) -> None:
    source = (ROOT / "models" / "families" / f"{name}.py").read_text(encoding="utf-8")
    docstring = str(ast.get_docstring(ast.parse(source)))
    is_short = source.count("\n") <= MAX_LINES
    assert is_short or re.search(r"\bLong because\b", docstring), f"{name}.py is too long"
