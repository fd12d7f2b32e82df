"""Sets the scales of an FP8 KV cache: the checkpoint's, or measured on a built-in prompt.

The largest FP8 (e4m3) number is 448, and larger values are clamped. Scales of 1 fit many models and
ruin some, e.g. those whose keys have a large bias, so a layer without scales is always measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from compiledllm.choices import Choice
from compiledllm.kernels.backend import MAX_FP8, AttentionMetadata, make_row_bound
from compiledllm.kernels.collectives import max_over_ranks
from compiledllm.log import log
from compiledllm.models.decoder import Decoder
from compiledllm.resolved_config import StepLimits
from compiledllm.runner.kv_cache import allocate_kv_caches
from compiledllm.runner.kv_layout import whole_contexts
from compiledllm.runner.state_caches import StateCaches

MAX_CLIPPED = 0.001  # fraction of a layer's keys or values that a checkpoint's scales may clamp
_MIN_NORMAL_FP8 = 2.0**-6  # smaller numbers are subnormal: they have fewer bits
_MAX_PROMPT = 512  # tokens
# FP8's largest number divided by the largest measured value, at least. 448 is 28672 times the
# smallest normal number, so headroom costs precision only in values thousands of times smaller than
# the largest.
_HEADROOM = 4.0


@torch.inference_mode()
def set_kv_scales(model: Decoder, stored: Mapping[int, Tensor], limits: StepLimits) -> Choice:
    """Set `model.kv_scales`. Returns the source of the scales, with the reason.

    stored: layer -> [2], the checkpoint's scales. A layer gets measured scales instead, with a
    warning, if its stored scales clamp more than MAX_CLIPPED of the prompt's keys or values, or are
    so large that all keys or all values become subnormal.
    """
    num_stored, many = 0, model.spec.num_ranks > 1
    for layer, cache in _caches_of_prompt(model, limits).items():
        found = stored.get(layer)
        if found is not None and (misfit := _misfit(cache, found, many)):
            log.warning(
                "layer %d: the checkpoint's KV scales %s %s of a test prompt; measured scales are "
                "used",
                *(layer, found.tolist(), misfit),
            )
            found = None
        num_stored += found is not None
        scales = _measured_scales(cache, many) if found is None else found
        model.kv_scales[layer].copy_(scales)
    num_layers = len(model.kv_scales)
    if num_stored == num_layers:
        return Choice("checkpoint", "its scales clamp next to nothing of a test prompt")
    measured = f"measured on a prompt of {_prompt_length(limits)} tokens"
    if not num_stored:
        return Choice("measured", f"the checkpoint has no scales that fit; {measured}")
    reason = f"{num_stored} of {num_layers} layers: the checkpoint's; others: {measured}"
    return Choice("mixed", reason)


def _prompt_length(limits: StepLimits) -> int:
    return min(_MAX_PROMPT, limits.max_num_batched_tokens, limits.max_model_len)


def _caches_of_prompt(model: Decoder, limits: StepLimits) -> dict[int, Tensor]:
    """By layer, keys and values of the built-in prompt in the model's dtype, [2, tokens, ...].

    The prompt consists of random token ids of the whole vocabulary, the same at every start.
    """
    num_tokens, size = _prompt_length(limits), limits.block_size
    num_blocks = -(-num_tokens // size)
    spec = model.spec.with_dtypes(model.spec.dtype)
    device = next(model.parameters()).device
    layout = whole_contexts(spec.layer_caches)
    caches = allocate_kv_caches(layout, num_blocks, size, device)
    generator = torch.Generator("cpu").manual_seed(0)
    ids = torch.randint(spec.vocab_size, (num_tokens,), generator=generator, device="cpu")
    positions = torch.arange(num_tokens, device=device)
    attn = AttentionMetadata(
        slot_mapping=positions + size,  # after the null block
        block_tables=torch.arange(1, num_blocks + 1, dtype=torch.int32, device=device)[None],
        seq_lens=torch.tensor([num_tokens], dtype=torch.int32, device=device),
        query_start_loc=torch.tensor([0, num_tokens], dtype=torch.int32, device=device),
        row_bound=make_row_bound(0, device),
    )
    states = StateCaches(layout, 1, device)
    state_metadata = states.metadata(torch.zeros_like(positions[:1]), attn)
    metadata = layout.in_layer_order([attn] * len(caches), state_metadata)
    model(ids.to(device), positions, layout.in_layer_order(caches, states.tensors), metadata)
    layers = (layer for layer in range(len(metadata)) if layer not in layout.states)
    kept = (cache.flatten(1, 2)[:, size : size + num_tokens] for cache in caches)
    found = dict(zip(layers, kept, strict=True))
    return {layer: found[layer] for layer in model.kv_scales}


def _misfit(cache: Tensor, scales: Tensor, has_ranks: bool) -> str:
    """What is wrong with the scales for these keys and values; "" if they fit."""
    if (clipped := _clipped_fraction(cache, scales, has_ranks)) > MAX_CLIPPED:
        return f"clamp {clipped * 100:.1f} % of the values"
    sizes = zip(_largest(cache, has_ranks), scales.tolist(), strict=True)
    if any(0 < largest < scale * _MIN_NORMAL_FP8 for largest, scale in sizes):
        return "round off all values"
    return ""


def _largest(cache: Tensor, has_ranks: bool) -> list[float]:
    """The largest absolute values of keys and of values."""
    found = [x.abs().max().item() for x in cache]
    return [max_over_ranks(value, cache.device) for value in found] if has_ranks else found


def _clipped_fraction(cache: Tensor, scales: Tensor, has_ranks: bool) -> float:
    """The fraction of the keys or of the values, whichever is larger, that the scales clamp."""
    limits = (scales * MAX_FP8).tolist()
    parts = zip(cache, limits, strict=True)
    fraction = max(float((x.abs() > limit).float().mean()) for x, limit in parts)
    return max_over_ranks(fraction, cache.device) if has_ranks else fraction


def _measured_scales(cache: Tensor, has_ranks: bool) -> Tensor:
    """Scales [2] of keys and values: powers of two, so that dividing by them rounds nothing."""
    return torch.tensor([_power_of_two(value) for value in _largest(cache, has_ranks)])


def _power_of_two(largest: float) -> float:
    if not 0 < largest < math.inf:  # NaN or infinity is the model's fault and shows in its logits
        return 1.0
    return 2.0 ** math.ceil(math.log2(largest * _HEADROOM / MAX_FP8))
