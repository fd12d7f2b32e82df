"""Maps an architecture to the family module that implements it, and a checkpoint to its spec."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from compiledllm.config import ConfigError
from compiledllm.models.spec import ModelSpec

# Architecture name in config.json -> module in compiledllm.models.families.
FAMILIES = {
    "CohereForCausalLM": "cohere",
    "FalconForCausalLM": "falcon",
    "GPT2LMHeadModel": "gpt2",
    "GPTNeoXForCausalLM": "gpt_neox",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma2",
    "Gemma3ForConditionalGeneration": "gemma3_multimodal",
    "GemmaForCausalLM": "gemma",
    "GptOssForCausalLM": "gpt_oss",
    "GraniteForCausalLM": "granite",
    "LlamaForCausalLM": "llama",
    "MinistralForCausalLM": "mistral",
    "MistralForCausalLM": "mistral",
    "MixtralForCausalLM": "mixtral",
    "OPTForCausalLM": "opt",
    "Olmo2ForCausalLM": "olmo2",
    "Phi3ForCausalLM": "phi3",
    "PhiForCausalLM": "phi",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen2MoeForCausalLM": "qwen_moe",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen_moe",
    "SmolLM3ForCausalLM": "smollm3",
    "StableLmForCausalLM": "stablelm",
    "Starcoder2ForCausalLM": "starcoder2",
}


def family_of(architecture: str) -> ModuleType:
    """The family module of an architecture. Raises ConfigError if there is none.

    Every module has `spec_from_hf` and NAMES. Optional: `prepare`, `unpack`; IGNORED, the names of
    tensors that the engine does not use; FORMATS, the values of `quant_method` that `unpack` turns
    into ordinary weights.
    """
    if architecture not in FAMILIES:
        raise ConfigError(
            f"architecture '{architecture}' is not supported; supported: {', '.join(FAMILIES)}"
        )
    return import_module(f"compiledllm.models.families.{FAMILIES[architecture]}")


def load_spec(checkpoint: Path, model_impl: str = "auto") -> ModelSpec:
    """The ModelSpec of a checkpoint directory, from its config.json alone.

    model_impl: "compiledllm", "transformers", or "auto", which means "compiledllm" if a family
    implements the architecture and "transformers" otherwise. Raises ConfigError if `model_impl`
    cannot run the model.
    """
    raw = _read_json(checkpoint / "config.json")
    names = raw.get("architectures") or [f"(none; model_type={raw.get('model_type')!r})"]
    architecture = names if isinstance(names, str) else str(names[0])
    is_ours = architecture in FAMILIES
    if model_impl == "transformers" or (model_impl == "auto" and not is_ours):
        return _spec_by_probing(checkpoint, raw, architecture)
    family = family_of(architecture)
    _check_format(checkpoint, raw.get("quantization_config"), getattr(family, "FORMATS", ()))
    with _as_config_errors(checkpoint):
        spec: ModelSpec = family.spec_from_hf(_hf_config(checkpoint))
    return spec


def _spec_by_probing(checkpoint: Path, raw: dict[str, Any], architecture: str) -> ModelSpec:
    """The ModelSpec of a model that transformers runs."""
    from compiledllm.models.transformers_probe import spec_by_probing

    _check_format(checkpoint, raw.get("quantization_config"), ())
    if "auto_map" in raw and architecture not in FAMILIES:
        raise ConfigError(
            f"architecture '{architecture}' needs code of its own (auto_map in {checkpoint}), "
            "which is never run; use a checkpoint of an architecture that transformers has"
        )
    try:
        with _as_config_errors(checkpoint):
            return spec_by_probing(_hf_config(checkpoint), architecture)
    except ConfigError as error:
        if architecture in FAMILIES:
            raise
        raise ConfigError(
            f"architecture '{architecture}' is not supported; supported: {', '.join(FAMILIES)}; "
            f"others as transformers runs them, but {error}"
        ) from error


def _hf_config(checkpoint: Path) -> Any:
    from transformers import AutoConfig  # takes a second, so not at the top of the module

    hf = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    _check_sizes(hf.get_text_config())
    return hf


def _check_sizes(hf: Any) -> None:
    """Raise ConfigError for sizes that no model has, before they cost time and memory."""
    limits = {"num_hidden_layers": 10_000, "vocab_size": 2**31, "hidden_size": 2**31}
    for name, limit in limits.items():
        size = getattr(hf, name, None)
        if size is not None and not (isinstance(size, int) and 1 <= size <= limit):
            raise ConfigError(f"{hf.model_type}: {name} must be in [1, {limit}], got {size!r:.40}")


@contextmanager
def _as_config_errors(checkpoint: Path) -> Iterator[None]:
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{checkpoint}/config.json is not a valid config: {error}") from error


def _check_format(checkpoint: Path, quantization: Any, formats: tuple[str, ...]) -> None:
    method = quantization.get("quant_method") if isinstance(quantization, dict) else "unknown"
    if quantization and method not in formats:
        raise ConfigError(
            f"{checkpoint}: quantised checkpoints ({method}) are not supported yet; "
            "use the unquantised model or a .gguf file"
        )


# Name in generation_config.json -> name of the sampling parameter.
_GENERATION_DEFAULTS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


def generation_defaults(checkpoint: Path) -> dict[str, Any]:
    """The sampling parameters that generation_config.json sets; empty if there is no such file."""
    found = _generation_config(checkpoint)
    defaults = {ours: found.get(theirs) for theirs, ours in _GENERATION_DEFAULTS.items()}
    return {name: value for name, value in defaults.items() if value is not None}


def generation_eos_token_ids(checkpoint: Path) -> tuple[int, ...]:
    """End-of-sequence ids of generation_config.json, as transformers' `generate` uses them."""
    path = checkpoint / "generation_config.json"
    eos = _generation_config(checkpoint).get("eos_token_id")
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(isinstance(token_id, int) for token_id in ids):
        raise ConfigError(f"{path}: eos_token_id must be a token id or a list of them, got {eos!r}")
    return tuple(ids)


def _generation_config(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / "generation_config.json"
    return _read_json(path) if path.exists() else {}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist: not a model directory") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content
