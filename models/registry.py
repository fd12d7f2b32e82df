"""Maps an architecture to the family module that implements it, and a checkpoint to its spec."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from compiledllm.config import ConfigError
from compiledllm.engine_options import ONLINE, STORED
from compiledllm.models.checkpoint import files_by_tensor, opened, weight_files
from compiledllm.models.formats.assign import quantized_as_stored, quantized_online
from compiledllm.models.formats.methods import make_scheme
from compiledllm.models.formats.stacked import StackedExperts
from compiledllm.models.formats.stored import Scheme, quantization_config
from compiledllm.models.json_file import read_json
from compiledllm.models.names import NameRules
from compiledllm.models.plain_config import plain_config
from compiledllm.models.spec import ModelSpec
from compiledllm.models.spec_checks import check_spec

# Architecture name in config.json -> module in compiledllm.models.families.
FAMILIES = {
    "ApertusForCausalLM": "apertus",
    "CohereForCausalLM": "cohere",
    "Ernie4_5ForCausalLM": "ernie4_5",
    "Ernie4_5_MoeForCausalLM": "ernie4_5",
    "Exaone4ForCausalLM": "exaone4",
    "FalconForCausalLM": "falcon",
    "GPT2LMHeadModel": "gpt2",
    "GPTNeoXForCausalLM": "gpt_neox",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma2",
    "Gemma3ForConditionalGeneration": "gemma3_multimodal",
    "Gemma3nForCausalLM": "gemma3n",
    "Gemma3nForConditionalGeneration": "gemma3n",
    "Gemma4ForCausalLM": "gemma4",
    "Gemma4ForConditionalGeneration": "gemma4",
    "Gemma4UnifiedForCausalLM": "gemma4",
    "Gemma4UnifiedForConditionalGeneration": "gemma4",
    "GemmaForCausalLM": "gemma",
    "Glm46VForConditionalGeneration": "glm4v",
    "Glm4ForCausalLM": "glm4",
    "Glm4MoeForCausalLM": "glm4_moe",
    "Glm4vForConditionalGeneration": "glm4v",
    "Glm4vMoeForConditionalGeneration": "glm4v",
    "GlmForCausalLM": "glm4",
    "GptOssForCausalLM": "gpt_oss",
    "GraniteForCausalLM": "granite",
    "GraniteMoeHybridForCausalLM": "granite_hybrid",
    "HunYuanDenseV1ForCausalLM": "hunyuan",
    "Lfm2ForCausalLM": "lfm2",
    "Lfm2MoeForCausalLM": "lfm2",
    "Llama4ForCausalLM": "llama4",
    "Llama4ForConditionalGeneration": "llama4",
    "LlamaForCausalLM": "llama",
    "MiniMaxM2ForCausalLM": "minimax_m2",
    "Ministral3ForCausalLM": "mistral",
    "MinistralForCausalLM": "mistral",
    "Mistral3ForConditionalGeneration": "mistral3",
    "MistralForCausalLM": "mistral",
    "MixtralForCausalLM": "mixtral",
    "OPTForCausalLM": "opt",
    "Olmo2ForCausalLM": "olmo2",
    "Olmo3ForCausalLM": "olmo2",
    "Phi3ForCausalLM": "phi3",
    "PhiForCausalLM": "phi",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen2MoeForCausalLM": "qwen_moe",
    "Qwen2_5_VLForConditionalGeneration": "qwen_vl",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen_moe",
    "Qwen3NextForCausalLM": "qwen3_next",
    "Qwen3VLForConditionalGeneration": "qwen_vl",
    "Qwen3VLMoeForConditionalGeneration": "qwen_vl",
    "Qwen3_5ForCausalLM": "qwen3_5",
    "Qwen3_5ForConditionalGeneration": "qwen3_5",
    "Qwen3_5MoeForCausalLM": "qwen3_5",
    "Qwen3_5MoeForConditionalGeneration": "qwen3_5",
    "SeedOssForCausalLM": "seed_oss",
    "SmolLM3ForCausalLM": "smollm3",
    "StableLmForCausalLM": "stablelm",
    "Starcoder2ForCausalLM": "starcoder2",
}


# Names of encoders, whose tokens attend to later tokens; the engine runs decoders only. (Ettin's
# ModernBertDecoder is a decoder.)
_ENCODERS = re.compile(
    r"(?i)(?!modernbertdecoder)"
    r".*(bert|electra|mpnet|deberta|t5encoder|erniem?model|newmodel|gtemodel)"
)
# Endings of architectures that are a decoder without its output head.
_HEADLESS = ("Model", "ForSequenceClassification")


def family_of(architecture: str) -> ModuleType:
    """The family module of an architecture. Raises ConfigError if there is none.

    Every module has `spec_from_hf` and NAMES. Optional: `prepare`, `unpack`; `names(spec)`, instead
    of NAMES; IGNORED, the names of tensors that the engine does not use; TIES_MISSING_HEAD, whether
    a head that the files do not store is the embedding if the whole model's config says so,
    whatever the text's config says.
    """
    if architecture not in FAMILIES:
        raise ConfigError(
            f"architecture '{architecture}' is not supported; supported: {', '.join(FAMILIES)}"
        )
    return import_module(f"compiledllm.models.families.{FAMILIES[architecture]}")


def load_spec(
    checkpoint: Path, model_impl: str = "auto", quantization: str | None = None
) -> ModelSpec:
    """The ModelSpec of a checkpoint directory, from its config and its weight files' headers.

    model_impl: "compiledllm", "transformers", or "auto", which means "compiledllm" if a family
    implements the architecture and "transformers" otherwise. quantization: a method by which 16-bit
    weights are quantised while loading, a key of `formats.assign.ONLINE`; or the method of a
    quantised checkpoint, which must then be the checkpoint's. Raises ConfigError if `model_impl`
    cannot run the model, and for unsupported quantised checkpoints.
    """
    raw = read_json(checkpoint / "config.json")
    stored = _architecture_in(checkpoint, raw)
    _refuse_looking_ahead(raw, stored)
    architecture = _with_head(stored, is_wrapper="text_config" in raw)
    has_family = architecture in FAMILIES
    if model_impl == "transformers" or (model_impl == "auto" and not has_family):
        _refuse_quantized(checkpoint, architecture, quantization)
        return _spec_by_probing(checkpoint, raw, architecture)
    family = family_of(architecture)
    with _as_config_errors(checkpoint):
        hf = _config(checkpoint, raw)
        spec: ModelSpec = family.spec_from_hf(hf)
        check_spec(spec)
        if architecture != stored or _lacks_tied_head(family, hf, checkpoint):
            spec = replace(spec, tie_word_embeddings=True)  # the checkpoint stores no output head
        return _with_formats(spec, family, checkpoint, quantization)


def _architecture_in(checkpoint: Path, raw: dict[str, Any]) -> str:
    names = raw.get("architectures") or [f"(none; model_type={raw.get('model_type')!r:.40})"]
    name = names[0] if isinstance(names, list) else names
    if not isinstance(name, str) or not name.isprintable():
        raise ConfigError(
            f"{checkpoint}/config.json: architectures must list a class, got {names!r:.60}"
        )
    return name


def _with_head(architecture: str, is_wrapper: bool) -> str:
    """The architecture that a family implements, if `architecture` only lacks its output head."""
    heads = ("ForConditionalGeneration",) if is_wrapper else ("ForCausalLM", "LMHeadModel")
    for ending in _HEADLESS:
        if architecture.endswith(ending):
            stem = architecture.removesuffix(ending).removesuffix("Text")
            known = (f"{stem}{head}" for head in heads)
            return next((name for name in known if name in FAMILIES), architecture)
    return architecture


def _refuse_looking_ahead(raw: dict[str, Any], architecture: str) -> None:
    """Raise ConfigError, by name, for encoders and for decoders that run as encoders."""
    if _ENCODERS.match(architecture):
        raise ConfigError(
            f"architecture '{architecture:.80}' is an encoder, and compiledllm runs decoders only; "
            "use an embedding model that is a decoder, such as Qwen/Qwen3-Embedding-0.6B"
        )
    parts = [part for part in (raw, raw.get("text_config")) if isinstance(part, dict)]
    allowed = (("is_causal", True), ("use_bidirectional_attention", False))
    for part, (field, causal) in itertools.product(parts, allowed):
        value = part.get(field)
        if isinstance(value, bool) and value is not causal:
            raise ConfigError(
                f"config.json has {field}={value}: each token of this {architecture:.80} attends "
                "to later tokens, which is not supported; use a model with causal attention"
            )


def _lacks_tied_head(family: ModuleType, hf: Any, checkpoint: Path) -> bool:
    """Whether the weight files store no head and TIES_MISSING_HEAD lets the config tie it."""
    if not getattr(family, "TIES_MISSING_HEAD", False) or not hf.tie_word_embeddings:
        return False
    names = _names_of_tensors(checkpoint)
    return bool(names) and not any("lm_head." in name for name in names)


def _with_formats(
    spec: ModelSpec, family: ModuleType, checkpoint: Path, quantization: str | None
) -> ModelSpec:
    scheme = scheme_of_checkpoint(checkpoint)
    if scheme is None:
        if quantization in STORED:
            raise ConfigError(
                f"quantization='{quantization}' needs a checkpoint that is stored in this format, "
                f"but {checkpoint} is not quantised; use {', '.join(ONLINE)}, or leave it out"
            )
        return spec if quantization is None else quantized_online(spec, quantization)
    if quantization not in (None, _method_of(checkpoint)):
        raise ConfigError(
            f"quantization='{quantization}' quantises 16-bit weights, but {checkpoint} is "
            f"quantised already ({scheme.title}); leave it out"
        )
    if hasattr(family, "prepare"):
        raise ConfigError(
            f"{checkpoint}: quantised checkpoints ({scheme.title}) of {spec.architecture} are not "
            "supported, as it stores matrices in an order of its own; use the unquantised model"
        )
    rules = NameRules.of(family, spec)
    names = _names_of_tensors(checkpoint)
    return quantized_as_stored(
        spec, scheme, rules, StackedExperts(names, scheme, spec).names(names)
    )


def scheme_of_checkpoint(checkpoint: Path) -> Scheme | None:
    """The scheme of a quantised checkpoint, from its config; None for an unquantised one."""
    fields = quantization_config(checkpoint)
    return None if fields is None else make_scheme(fields, _dtype_of_scales(checkpoint))


def _method_of(checkpoint: Path) -> str:
    """A quantised checkpoint's `quant_method`, under the name of the option `quantization`."""
    method = (quantization_config(checkpoint) or {}).get("quant_method")
    return str(method).removesuffix("_fp4")


_SCALES = (".scales", ".weight_scale", ".weight_scale_inv")
_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}


def _dtype_of_scales(checkpoint: Path) -> str:
    """A dtype that holds all scales of the weight files exactly; float16 without files or scales.

    Groups of modules that were quantised one after the other may have scales of several dtypes.
    """
    found: set[str] = set()
    for path in _files(checkpoint):
        with opened(path) as file:
            names = (name for name in file.keys() if name.endswith(_SCALES))  # noqa: SIM118
            found |= {_DTYPES.get(file.get_slice(n).get_dtype(), "float32") for n in names}
    return found.pop() if len(found) == 1 else "float32" if found else "float16"


def _names_of_tensors(checkpoint: Path) -> Collection[str]:
    return files_by_tensor(_files(checkpoint))


def _files(checkpoint: Path) -> list[Path]:
    """The weight files; [] for a directory without safetensors."""
    return weight_files(checkpoint) if any(checkpoint.glob("*.safetensors")) else []


def _spec_by_probing(checkpoint: Path, raw: dict[str, Any], architecture: str) -> ModelSpec:
    """The ModelSpec of a model that transformers runs."""
    from compiledllm.models.transformers_probe import spec_by_probing

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
            f"other architectures run as transformers' modules, but {error}"
        ) from error


def _config(checkpoint: Path, raw: dict[str, Any]) -> Any:
    """The config, read as data if its meaning is certain, and otherwise by transformers."""
    plain = plain_config(raw)
    if plain is None:
        return _hf_config(checkpoint)
    _check_sizes(plain.get_text_config())
    return plain


def _hf_config(checkpoint: Path) -> Any:
    from transformers import AutoConfig  # takes a second, so not at the top of the module

    hf = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    _check_sizes(hf.get_text_config())
    return hf


# Size in a config -> the smallest and the largest value that is accepted.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_SIZES = {
    "num_hidden_layers": (1, 10_000),
    "vocab_size": (1, 2**31),
    "hidden_size": (1, 2**31),
    "max_position_embeddings": (1, 2**40),
    **dict.fromkeys(_EXPERTS, (0, 2**16)),
}


def _check_sizes(hf: Any) -> None:
    """Raise ConfigError for sizes that no model has, before they cost time and memory."""
    for name, (least, most) in _SIZES.items():
        size = getattr(hf, name, None)
        is_size = isinstance(size, int) and not isinstance(size, bool) and least <= size <= most
        if size is not None and not is_size:
            raise ConfigError(
                f"{hf.model_type}: {name} must be in [{least}, {most}], got {size!r:.40}"
            )


@contextmanager
def _as_config_errors(checkpoint: Path) -> Iterator[None]:
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        cause = " ".join(str(error).split())[:400]
        raise ConfigError(f"{checkpoint}/config.json is not a valid config: {cause}") from error


def _refuse_quantized(checkpoint: Path, architecture: str, quantization: str | None) -> None:
    fields = quantization_config(checkpoint)
    if fields is None and quantization is None:
        return
    method = quantization or (fields or {}).get("quant_method")
    raise ConfigError(
        f"{checkpoint}: quantised weights ({method}) are not supported for {architecture} as "
        "transformers runs it; use unquantised weights"
    )
