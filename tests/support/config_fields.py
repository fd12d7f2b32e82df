"""Writes models/config_fields.json: the fields of transformers' config classes, as data.

    python -m tests.support.config_fields [FOLDER ...]

FOLDER: where another version of transformers is unpacked (`pip install --no-deps --target`). A
default that differs between the versions is left out of the file, so that a config has to name the
field. To be run, with some versions, when a family is added or the test of the file fails.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
import subprocess
import sys
import types
import typing
from pathlib import Path
from typing import Any

import torch

from compiledllm.models.registry import FAMILIES

MODELS = Path(__file__).parents[2] / "models"
FILE = MODELS / "config_fields.json"
# Model types that share an architecture with a family, but are configured differently.
_OTHERS = {"exaone", "glmga", "internlm3", "iquestcoder", "sarvam_moe", "shieldgemma2"}
# Fields that `plain_config` and `plain_rope` read by rules of their own, not by type and default.
_BY_RULE = {"dtype", "rope_parameters", "text_config", "vision_config", "audio_config"}
_BY_RULE |= {"time_step_limit"}
_READS = (
    r"\bhf(?:\.text_config)?\.(\w+)",
    r'\b(?:getattr|expect|activation_of|positive|of_layer)\(hf, "(\w+)"',
    r'\bfields\["(\w+)"\]',
)
_BY_METHOD = {"get_text_config", "per_layer_config", "text_config"}
_NAMES: dict[Any, str] = {bool: "bool", int: "int", float: "float", str: "str", type(None): "null"}
_NAMES |= {list[int]: "ints", list[float]: "floats", list[str]: "strs", dict: "dict"}
_UNKNOWN = "?"

Fields = dict[
    str, list[Any]
]  # name -> its types, joined by "|", and its default if that is certain


def installed() -> dict[str, Any]:
    """The config classes of the families, of the transformers that is installed."""
    from transformers import __version__

    return {"version": __version__, "types": {t: _type(cls) for t, cls in _classes().items()}}


def _classes() -> dict[str, Any]:
    from transformers.models.auto import modeling_auto as auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    names = [*auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()]
    names += auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items()
    found = {}
    for model_type, name in names:
        if FAMILIES.keys() & ({name} if isinstance(name, str) else {*name}):
            config = CONFIG_MAPPING[model_type]
            text = dict(getattr(config, "sub_configs", None) or {}).get("text_config")
            found[config.model_type] = config
            if model_type in _OTHERS:
                del found[model_type]
            elif text is not None and text.__name__ != "AutoConfig":
                found[text.model_type] = text
    return dict(sorted(found.items()))


def _type(cls: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"fields": _fields(cls), "aliases": dict(cls.attribute_map)}
    theta = getattr(cls, "default_theta", 10000.0)
    properties = (name for name, value in vars(cls).items() if isinstance(value, property))
    return found | {
        "refused": sorted(properties),
        "rope_theta": theta if isinstance(theta, float) else None,
    }


def _fields(cls: Any) -> Fields:
    hints = (
        typing.get_type_hints(cls, localns={"torch": torch})
        if dataclasses.is_dataclass(cls)
        else {}
    )
    if "vocab_size" in hints or "text_config" in hints:
        found = {f.name: (hints[f.name], f.default) for f in dataclasses.fields(cls)}
    else:  # in older versions, config classes are no dataclasses and have no types
        parameters = inspect.signature(cls.__init__).parameters.values()
        found = {p.name: (None, p.default) for p in parameters if p.kind is not p.VAR_KEYWORD}
    return {
        name: [_types(hint), *_default(default)]
        for name, (hint, default) in sorted(found.items())
        if name not in {*_BY_RULE, "self"}
    }


def _types(hint: Any) -> str:
    if hint is None:
        return _UNKNOWN
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    parts = typing.get_args(hint) if is_union else (hint,)
    names = {_NAMES.get(part) for part in parts}
    names |= {repr(x) for p in parts if _is_literal(p) for x in typing.get_args(p)}
    return "|".join(sorted(name for name in names if name is not None))


def _is_literal(hint: Any) -> bool:
    return typing.get_origin(hint) is typing.Literal


def _default(default: Any) -> list[Any]:
    """A list of the default, if JSON has its type. An empty list means the same as none."""
    if default == []:
        return [None]
    is_plain = default is None or isinstance(default, bool | int | float | str)
    return [default] if is_plain else []


def read_names() -> set[str]:
    """The fields of configs that families and rules of `plain_config` read, by their source."""
    paths = [*(MODELS / "families").glob("*.py"), *MODELS.glob("plain_*.py")]
    sources = "\n".join(path.read_text() for path in paths)
    return {name for pattern in _READS for name in re.findall(pattern, sources)} - _BY_METHOD


def merged(versions: list[dict[str, Any]]) -> dict[str, Any]:
    """What all versions agree on. Defaults are kept only for fields that families read."""
    read = sorted(read_names())
    names = sorted({name for version in versions for name in version["types"]})
    found = {n: [v["types"][n] for v in versions if n in v["types"]] for n in names}
    return {"read": read, "types": {n: _merged(of_type, read) for n, of_type in found.items()}}


def _merged(found: list[dict[str, Any]], read: list[str]) -> dict[str, Any]:
    thetas = {one["rope_theta"] for one in found}
    return _fields_and_aliases(found, read) | {
        "refused": sorted({name for one in found for name in one["refused"]}),
        "rope_theta": thetas.pop() if len(thetas) == 1 else None,
    }


def _fields_and_aliases(found: list[dict[str, Any]], read: list[str]) -> dict[str, Any]:
    """aliases: name -> the field that it stands for. uncertain: aliases of some versions only."""
    pairs = [{a for a in one["aliases"].items() if {*a} & {*read}} for one in found]
    certain = set.intersection(*pairs)
    fields = {}
    for name in sorted({name for one in found for name in one["fields"]}):
        types, *default = _agreed([one["fields"][name] for one in found if name in one["fields"]])
        fields[name] = [types, *(default if name in read else [])]
    uncertain = {name for pair in set.union(*pairs) - certain for name in pair}
    return {
        "fields": fields,
        "aliases": dict(sorted(certain)),
        "uncertain": sorted(uncertain - fields.keys()),
    }


def _agreed(found: list[list[Any]]) -> list[Any]:
    """The types that all versions with known types allow, and the default if all have the same."""
    allowed = [set(types.split("|")) for types, *_ in found if types != _UNKNOWN]
    names = set.intersection(*allowed) if allowed else set()
    defaults = {json.dumps(default) for _, *default in found}
    return ["|".join(sorted(names)), *(json.loads(defaults.pop()) if len(defaults) == 1 else [])]


def _of_folder(folder: str) -> dict[str, Any]:
    """`installed` of the version in a folder, from a process of its own."""
    code = "import json, tests.support.config_fields as c; print(json.dumps(c.installed()))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([folder, *sys.path])}
    child = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    found: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return found


def main(folders: list[str]) -> None:
    versions = [*map(_of_folder, folders), installed()]
    print("versions:", ", ".join(version["version"] for version in versions))
    FILE.write_text(as_text(merged(versions)))


def as_text(table: dict[str, Any]) -> str:
    """JSON with a line for each model type."""
    lines = [
        f"{json.dumps(name)}: {json.dumps(of_type)}" for name, of_type in table["types"].items()
    ]
    read = json.dumps(table["read"])
    return f'{{"read": {read},\n"types": {{\n' + ",\n".join(lines) + "\n}}\n"


if __name__ == "__main__":
    main(sys.argv[1:])
