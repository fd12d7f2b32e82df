"""Derives the ModelSpec of a transformers model, or the reason why the model cannot run here.

The probe builds the module on the meta device, without weights or memory, and runs it once. The
attention calls show the number of heads, their sizes and the windows. A forward pass that succeeds
on the meta device never reads values on the host, so the model's steps can be captured. This module
knows transformers' interfaces, but no model.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from compiledllm.config import ConfigError
from compiledllm.models.families.hf import dtype_of, eos_token_ids
from compiledllm.models.spec import (
    AttentionSpec,
    LayerSpec,
    ModelSpec,
    NormSpec,
    OpaqueSpec,
    RopeSpec,
)

_PROBE = "compiledllm_probe"  # name of `_record` in transformers' attention interface
_NUM_TOKENS = 1024  # enough to trigger any compression or selection of keys
# Arguments of attention calls that have no effect here. Windows are read from the masks instead.
_HARMLESS = (
    *("dropout", "position_ids", "use_cache", "sliding_window", "cache_position"),
    *("output_attentions", "output_router_logits", "output_hidden_states", "return_dict"),
)


class _CannotRun(Exception):
    """The reason why the model cannot run, as a message."""


@dataclass
class _Calls:
    """The attention calls of a forward pass, in call order."""

    specs: list[AttentionSpec] = field(default_factory=list)


def spec_by_probing(hf: Any, architecture: str) -> ModelSpec:
    """The ModelSpec of a transformers config whose module can run on the paged KV cache.

    Raises ConfigError with the reason if the module cannot.
    """
    try:
        module = _meta_module(hf, architecture)
        calls = _attention_calls(module, hf)
        return _make_spec(hf, architecture, module, calls)
    except _CannotRun as error:
        raise ConfigError(f"transformers' {architecture} cannot run here: {error}") from None


def _meta_module(hf: Any, architecture: str) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if getattr(hf, "is_encoder_decoder", False):
        raise _CannotRun("it is an encoder-decoder")
    if hf.get_text_config() is not hf:
        raise _CannotRun("it has parts other than a language model")
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(hf.model_type)
    if known != architecture:
        raise _CannotRun(f"the causal model of model_type={hf.model_type!r} is {known}")
    _register(_PROBE, _record, _mark_mask)
    with torch.device("meta"):
        try:
            return AutoModelForCausalLM.from_config(
                hf, attn_implementation=_PROBE, dtype=torch.bfloat16
            ).eval()
        except Exception as error:  # the model may raise anything for an unknown attention
            reason = f"it does not use transformers' attention interface ({_first_line(error)})"
            raise _CannotRun(reason) from error


def _register(name: str, attention: Callable[..., Any], mask: Callable[..., Any] | None) -> None:
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(name, attention)
    if mask is not None:
        AttentionMaskInterface.register(name, mask)


def _attention_calls(module: Any, hf: Any) -> list[AttentionSpec]:
    """The attention spec of each layer, recorded during one forward pass."""
    calls = _Calls()
    ids = torch.zeros(1, _NUM_TOKENS, dtype=torch.int64, device="meta")
    # Without a mask, transformers would read `position_ids` to look for packed sequences.
    mask = torch.ones(1, _NUM_TOKENS, dtype=torch.int64, device="meta")
    try:
        with torch.inference_mode():
            out = module(
                input_ids=ids, attention_mask=mask, position_ids=ids, use_cache=False, paged=calls
            )
    except _CannotRun:
        raise
    except Exception as error:  # e.g. an operator that needs values, or a cache
        reason = f"its forward fails on tensors without values ({_first_line(error)})"
        raise _CannotRun(reason) from error
    if out.logits.shape != (1, _NUM_TOKENS, hf.vocab_size):
        raise _CannotRun(f"its logits have the shape {list(out.logits.shape)}")
    if len(calls.specs) != hf.num_hidden_layers:
        raise _CannotRun(
            f"{len(calls.specs)} of {hf.num_hidden_layers} layers attend through transformers' "
            "attention interface (state-space and linear layers have no paged cache)"
        )
    return calls.specs


def _record(
    module: nn.Module,
    query: Tensor,  # [1, num_heads, tokens, head_dim]
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    paged: _Calls | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Called in place of an attention function: append the layer's spec to `paged.specs`."""
    if paged is None:
        raise _CannotRun("it does not pass keyword arguments on to its attention")
    if getattr(module, "layer_idx", None) != len(paged.specs):
        raise _CannotRun("its layers do not call attention once each, in the order of the layers")
    others = {name: value for name, value in others.items() if name not in _HARMLESS}
    if unknown := [name for name, value in others.items() if value is not None]:
        raise _CannotRun(f"its attention uses {', '.join(unknown)}, which have no kernels here")
    if key.shape != value.shape or key.shape[2] != _NUM_TOKENS or query.shape[3] != key.shape[3]:
        sizes = ", ".join(str(list(t.shape)) for t in (query, key, value))
        raise _CannotRun(f"its queries, keys and values differ in size: {sizes}")
    head_dim = query.shape[3]
    if not isinstance(scaling, (float, int, type(None))):
        raise _CannotRun("its attention scale is not a number")
    paged.specs.append(
        AttentionSpec(
            num_heads=query.shape[1],
            num_kv_heads=key.shape[1],
            head_dim=head_dim,
            scale=head_dim**-0.5 if scaling is None else float(scaling),
            rope=RopeSpec(()),
            sliding_window=_window_of(attention_mask),
            soft_cap=softcap or 0.0,
            has_sinks=s_aux is not None,
        )
    )
    return query.transpose(1, 2), None


def _mark_mask(*, mask_function: Callable[..., Any], device: Any, **arguments: Any) -> Tensor:
    """Called in place of a mask function: return a mask whose `window` names the kind.

    window: number of latest positions that a token sees, 0 for all; None for any other mask.
    """
    window = arguments.get("local_size") or 0
    mask = torch.ones(1, 1, _NUM_TOKENS, _NUM_TOKENS, dtype=torch.bool, device=device)
    mask.window = window if _is_window(mask_function, window) else None  # type: ignore[attr-defined]
    return mask


def _is_window(mask_function: Callable[..., Any], window: int) -> bool:
    """Whether the mask is causal within `window` tokens (0: without a window)."""
    query = window + window // 2 + 3
    first = query + 1 - window if window else 0
    expected = {0: first == 0, first - 1: False, first: True, query: True, query + 1: False}
    zero = torch.zeros((), dtype=torch.int64, device="cpu")
    return all(
        bool(mask_function(zero, zero, zero + query, zero + key)) == is_seen
        for key, is_seen in expected.items()
        if key >= 0
    )


def _window_of(mask: Tensor | None) -> int:
    window = getattr(mask, "window", None)
    if window is None:
        raise _CannotRun("its attention mask is neither causal nor a sliding window")
    return int(window)


def _make_spec(hf: Any, architecture: str, module: Any, calls: list[AttentionSpec]) -> ModelSpec:
    max_position = getattr(hf, "max_position_embeddings", None)
    if not isinstance(max_position, int):
        raise _CannotRun("its config gives no max_position_embeddings")
    sizes = _parameters_by_layer(module, hf)
    layers = []
    for index, attn in enumerate(calls):
        bare = LayerSpec(hf.hidden_size, attn, OpaqueSpec(0, 0), NormSpec(0.0, "none"))
        total, used = (size - bare.num_parameters for size in sizes[index])
        size = getattr(hf, "intermediate_size", None) or 0
        size = max(size) if isinstance(size, list) else size  # Gemma 3n names each layer's
        layers.append(LayerSpec(hf.hidden_size, attn, OpaqueSpec(total, used, size), bare.norm))
    spec = ModelSpec(
        architecture=architecture,
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        layers=tuple(layers),
        final_norm=NormSpec(0.0, "none"),
        tie_word_embeddings=bool(hf.tie_word_embeddings),
        max_position=max_position,
        dtype=dtype_of(hf),
        eos_token_ids=eos_token_ids(hf),
        initializer_range=getattr(hf, "initializer_range", None) or 0.02,
        implementation="transformers",
    )
    missing = sum(p.numel() for p in module.parameters()) - spec.num_parameters
    return replace(spec, num_other_parameters=missing)


def _parameters_by_layer(module: Any, hf: Any) -> list[tuple[int, int]]:
    """Per layer, the numbers of (all parameters, parameters that one token uses).

    A three-dimensional parameter with `num_experts` matrices counts as the experts' weights.
    """
    count, top_k = (getattr(hf, name, None) for name in ("num_experts", "num_experts_per_tok"))
    sizes = [(0, 0)] * hf.num_hidden_layers
    for name, parameter in module.named_parameters():
        index = re.search(r"\.(\d+)\.", name)
        if index is None:
            continue
        size = parameter.numel()
        is_expert = parameter.dim() == 3 and count and top_k and parameter.shape[0] == count
        total, used = sizes[int(index[1])]
        sizes[int(index[1])] = total + size, used + (size // count * top_k if is_expert else size)
    return sizes


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160] if lines else ''}"
