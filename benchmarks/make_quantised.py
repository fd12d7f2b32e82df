"""Makes quantised checkpoints of a small model with llm-compressor, on a CPU.

    python -P benchmarks/make_quantised.py CHECKPOINT FOLDER [SCHEME ...]

-P keeps the modules beside the script, such as profile.py, from shadowing those of other packages.

The script runs in an environment of its own, because llm-compressor pins the versions of
transformers and compressed-tensors; it imports nothing of compiledllm.
`compiledllm.benchmarks.quantised` reads the folder. benchmarks/README.md has the versions and the
commands.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

# The presets have groups of 128, of which the widths of small models are no multiples.
_GROUPS: dict[str, dict[str, Any]] = {
    "w4a16-g64": {"num_bits": 4, "strategy": "group", "group_size": 64},
    "w4a16-g32-asym": {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False},
    "w3a16-g64": {"num_bits": 3, "strategy": "group", "group_size": 64},
    "w8a16-g64": {"num_bits": 8, "strategy": "group", "group_size": 64},
    "w8a16-channel-asym": {"num_bits": 8, "strategy": "channel", "symmetric": False},
}
_PRESETS = ("FP8_DYNAMIC", "FP8_BLOCK", "W8A8", "NVFP4A16", "MXFP4A16")
_CALIBRATED = ("FP8", "NVFP4")
SCHEMES = (*_GROUPS, *_PRESETS, *_CALIBRATED, "mixed")
# Calibration has few and random tokens: the checkpoints test the file's layout, not quality.
_NUM_SAMPLES, _SAMPLE_LEN = 4, 128


def recipe(scheme: str) -> Any:
    """The modifier that quantises the model."""
    from llmcompressor.modifiers.quantization import QuantizationModifier

    head = ["lm_head"]
    if scheme == "mixed":
        groups = {
            "group_0": _group("w4a16-g64", "re:.*(q|k|v)_proj$"),
            "group_1": _group("w8a16-channel-asym", "re:.*down_proj$"),
        }
        return QuantizationModifier(config_groups=groups, ignore=[*head, "re:.*layers\\.3\\..*"])
    if scheme == "FP8":
        cache = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
        return QuantizationModifier(
            targets="Linear", scheme=scheme, ignore=head, kv_cache_scheme=cache
        )
    if scheme in _GROUPS:
        return QuantizationModifier(config_groups={"group_0": _group(scheme)}, ignore=head)
    return QuantizationModifier(targets="Linear", scheme=scheme, ignore=head)


def _group(scheme: str, target: str = "Linear") -> dict[str, Any]:
    weights = {"type": "int", "symmetric": True, **_GROUPS[scheme]}
    return {"targets": [target], "weights": weights}


def calibration(vocab_size: int) -> dict[str, Any]:
    """The arguments of `oneshot` for schemes that measure activations."""
    import torch
    from datasets import Dataset

    generator = torch.Generator().manual_seed(0)
    shape = _NUM_SAMPLES, _SAMPLE_LEN
    input_ids = torch.randint(vocab_size, shape, generator=generator).tolist()
    mask = [[1] * _SAMPLE_LEN] * _NUM_SAMPLES
    dataset = Dataset.from_dict({"input_ids": input_ids, "attention_mask": mask})
    sizes = {"num_calibration_samples": _NUM_SAMPLES, "max_seq_length": _SAMPLE_LEN}
    return {"dataset": dataset, **sizes}


def make(checkpoint: Path, folder: Path, scheme: str) -> float:
    """Write folder/scheme. Returns the seconds it took."""
    import torch
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM, AutoTokenizer

    start = time.monotonic()
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    data = calibration(model.config.vocab_size) if scheme in _CALIBRATED else {}
    oneshot(model=model, recipe=recipe(scheme), **data)
    model.save_pretrained(folder / scheme, save_compressed=True)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(folder / scheme)
    return time.monotonic() - start


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("llmcompressor", "transformers", "torch")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("checkpoint", type=Path, help="a directory with 16-bit weights")
    parser.add_argument("folder", type=Path, help="where each scheme gets a directory")
    parser.add_argument("schemes", nargs="*", default=SCHEMES, help=f"of {', '.join(SCHEMES)}")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for scheme in arguments.schemes:
        duration_s = make(arguments.checkpoint, arguments.folder, scheme)
        print(f"{scheme}: {duration_s:.0f} s", flush=True)
        made = {"scheme": scheme, "seconds": round(duration_s, 1), "versions": versions()}
        (arguments.folder / scheme / "made.json").write_text(json.dumps(made))


if __name__ == "__main__":
    main()
