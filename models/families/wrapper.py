"""The text model of a multimodal checkpoint. Its parts for images and sound (towers) do not run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor

from compiledllm.models.families.hf import dtype_of, eos_token_ids
from compiledllm.models.formats.slicing import Content
from compiledllm.models.spec import ModelSpec


def tensors_of(*towers: str) -> tuple[str, ...]:
    """The tensors of towers, as transformers stores them today and as before version 4.52."""
    return tuple(f"{prefix}{tower}.**" for prefix in ("model.", "") for tower in towers)


TOWERS = tensors_of("visual", "vision_tower", "audio_tower", "multi_modal_projector")


def wrapped(names: dict[str, str]) -> dict[str, str]:
    """The NAMES of a text model, also under each prefix that multimodal checkpoints use."""
    body = {name[6:]: target for name, target in names.items() if name.startswith("model.")}
    found = {f"model.language_model.{name}": target for name, target in body.items()}
    found |= {f"language_model.model.{name}": target for name, target in body.items()}
    return found | {"language_model.lm_head.*": "lm_head.*"} | names


def make_text_spec(
    hf: Any, spec_from_hf: Callable[[Any], ModelSpec], architecture: str
) -> ModelSpec:
    """The spec that `spec_from_hf` makes of hf.text_config, with the fields of the whole model.

    architecture: the name of the whole model.
    """
    text = spec_from_hf(hf.text_config)
    return replace(
        text,
        architecture=architecture,
        tie_word_embeddings=bool(hf.tie_word_embeddings),
        dtype=text.dtype if getattr(hf, "dtype", None) is None else dtype_of(hf),
        eos_token_ids=eos_token_ids(hf) or text.eos_token_ids,
    )


def experts_one_by_one(
    tensors: Iterable[tuple[str, Content]], _spec: ModelSpec
) -> Iterator[tuple[str, Content]]:
    """Yield each expert's matrices one by one if a tensor holds those of all experts.

    Tensors "X.experts.gate_up_proj" [experts, outputs, inputs] become
    "X.experts.0.gate_up_proj.weight" and so on.
    """
    for name, tensor in tensors:
        prefix, _, matrix = name.rpartition(".experts.")
        if prefix and matrix in ("gate_up_proj", "down_proj") and isinstance(tensor, Tensor):
            for index, expert in enumerate(tensor):
                yield f"{prefix}.experts.{index}.{matrix}.weight", expert
        else:
            yield name, tensor
