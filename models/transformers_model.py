"""Runs a transformers model on the paged KV cache, for architectures without a family module.

`TransformersModel` has the interface of `Decoder`, so other modules need not tell the two apart.
`block_forward` runs the whole body (everything but the output head), which is compiled as one
block. transformers' attention interface routes attention calls to `_attend`, with the step's
metadata as an argument. `transformers_probe` decides which models can run this way.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from compiledllm.config import ConfigError
from compiledllm.kernels.attention import (
    REFERENCE,
    make_backend,
    paged_attention,
    store_kv,
)
from compiledllm.kernels.backend import AttentionBackend, AttentionMetadata, ScoreOptions
from compiledllm.models.checkpoint import INDEX, is_derived, weight_files
from compiledllm.models.decoder import Decoder
from compiledllm.models.layers.attention import scales_for
from compiledllm.models.spec import AttentionSpec, ModelSpec
from compiledllm.models.weights import fill_with_random_weights

_NAME = "compiledllm"  # name of `_attend` in transformers' attention interface


class _Paged(NamedTuple):
    """The arguments of `_attend` that transformers passes through.

    kv_caches: one per layer, shaped as in `kernels.attention`. specs: one per layer.
    """

    kv_caches: list[Tensor]
    attn: AttentionMetadata
    specs: tuple[AttentionSpec, ...]
    backend: AttentionBackend
    kv_scales: Tensor  # [layers, 2]


def _attend(
    module: nn.Module,
    query: Tensor,  # [1, num_heads, tokens, head_dim]
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    paged: _Paged,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls.

    Returns [1, tokens, num_heads, head_dim], and None in place of the attention weights.
    """
    index: Any = module.layer_idx
    kv_cache, spec, backend = paged.kv_caches[index], paged.specs[index], paged.backend
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    scales = scales_for(kv_cache, paged.kv_scales[index])
    store_kv(k, v, kv_cache, paged.attn.slot_mapping, backend, scales)
    options = ScoreOptions(spec.scale, spec.sliding_window, spec.soft_cap, s_aux, scales)
    out = paged_attention(q, kv_cache, paged.attn, options, backend)
    return out.unsqueeze(0), None


class _Body(nn.Module):
    """The model without its output head: the one block that is compiled."""

    def __init__(self, base: nn.Module, spec: ModelSpec, backend: AttentionBackend) -> None:
        super().__init__()
        self.base = base
        self.spec = spec.architecture  # key of the compiled block: there is just one body
        self._attention = spec.attentions
        self._backend = backend
        self.kv_scales: Tensor
        ones = torch.ones(len(spec.layers), 2, dtype=torch.float32)
        self.register_buffer("kv_scales", ones, persistent=False)

    def forward(
        self, input_ids: Tensor, positions: Tensor, kv_caches: list[Tensor], attn: AttentionMetadata
    ) -> Tensor:
        out = self.base(
            input_ids=input_ids.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            use_cache=False,
            paged=_Paged(kv_caches, attn, self._attention, self._backend, self.kv_scales),
        )
        hidden: Tensor = out[0].squeeze(0)
        return hidden


class _BodyStub(nn.Module):
    """Stands for the body inside the head's module, and returns the hidden states it receives."""

    def forward(self, input_ids: None = None, *, inputs_embeds: Tensor, **_: Any) -> _BodyOutput:
        return _BodyOutput(inputs_embeds)


class _BodyOutput:
    """The body's output for any causal model: every field but the hidden states is None."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class TransformersModel(nn.Module):
    """A transformers module with the interface of `Decoder`.

    module: a causal model whose config names `_NAME` as its attention. The constructor takes the
    body out of `module`. The rest (head, scale, soft cap), which turns hidden states into logits,
    runs unchanged as `head`.
    """

    edges = ()

    def __init__(self, spec: ModelSpec, backend: AttentionBackend, module: Any) -> None:
        super().__init__()
        self.spec = spec
        self.backend = backend
        self.body = _Body(module.base_model, spec, backend)
        setattr(module, module.base_model_prefix, _BodyStub())
        self.head = module
        self.block_forward: Callable[..., Tensor] = _Body.forward
        self.takes_sampled_tokens = False
        self.decode_step = None

    @property
    def kv_scales(self) -> dict[int, Tensor]:
        """See `Decoder.kv_scales`."""
        return dict(enumerate(self.body.kv_scales))

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        kv_caches: list[Tensor],
        attn: list[AttentionMetadata],
    ) -> Tensor:
        """Hidden states, [tokens, hidden]; see `Decoder.forward`. All layers share `attn[0]`."""
        return self.block_forward(self.body, input_ids, positions, kv_caches, attn[0])

    def compute_logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """[tokens, hidden] -> [tokens, vocab], in the model's dtype; written to `out` if given."""
        logits: Tensor = self.head(inputs_embeds=hidden.unsqueeze(0), use_cache=False).logits[0]
        return logits.to(hidden.dtype) if out is None else out.copy_(logits)


def build_transformers_model(
    spec: ModelSpec, backend: AttentionBackend, checkpoint: Path, dummy_seed: int | None
) -> TransformersModel:
    """Build the model with the checkpoint's weights, or with random ones of `dummy_seed`.

    Uses torch's default device and dtype. Raises ConfigError for missing or unexpected weights, and
    for a model that mixes tokens outside its attention.
    """
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(_NAME, _attend)
    if dummy_seed is None:
        module = _load(checkpoint)
        spec = replace(spec, tie_word_embeddings=_is_tied(module))
        model = TransformersModel(spec, backend, module)
    else:
        model = TransformersModel(spec, backend, _empty(checkpoint))
        fill_with_random_weights(cast("Decoder", model), dummy_seed)
    _check_rows_are_apart(model.eval())
    return model


def _is_tied(module: Any) -> bool:
    """Whether head and embedding share a matrix; transformers unties a stored head that differs."""
    head, embedding = module.get_output_embeddings(), module.get_input_embeddings()
    return head is not None and embedding is not None and head.weight is embedding.weight


def _options() -> dict[str, Any]:
    dtype = torch.get_default_dtype()
    return {"attn_implementation": _NAME, "dtype": dtype, "trust_remote_code": False}


def _empty(checkpoint: Path) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    return AutoModelForCausalLM.from_config(config, **_options())


def _load(checkpoint: Path) -> Any:
    """Load the module with transformers, which renames and fuses tensors, from safetensors only."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    config.transformers_weights = _name_of_weights(checkpoint)
    device = torch.get_default_device()
    files = {"use_safetensors": True, "local_files_only": True, "config": config}
    try:
        with torch.device("cpu"):
            module, report = AutoModelForCausalLM.from_pretrained(
                checkpoint, output_loading_info=True, **files, **_options()
            )
    except (OSError, SafetensorError) as error:
        cause = str(error).strip().partition("\n")[0]
        raise ConfigError(f"{checkpoint}: transformers cannot read the weights: {cause}") from error
    if getattr(module, "_hf_peft_config_loaded", False):
        raise ConfigError(
            f"{checkpoint}: transformers would add the adapter beside the model; move "
            "adapter_config.json away"
        )
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(map(str, report[what]))
        if what == "unexpected_keys":
            names = [name for name in names if not is_derived(name)]
        if names:
            raise ConfigError(f"{checkpoint}: {what.replace('_', ' ')}: {', '.join(names[:8])}")
    return module.to(device)


def _name_of_weights(checkpoint: Path) -> str:
    """The single file or the index that transformers must read; ConfigError if there is neither."""
    files = weight_files(checkpoint)
    if len(files) == 1:
        return str(files[0].relative_to(checkpoint))
    if not (checkpoint / INDEX).exists():
        raise ConfigError(
            f"{checkpoint}: transformers needs {INDEX} to read shards; download it again"
        )
    return INDEX


# -- the check at load -----------------------------------------------------------------------------

_ROWS = (tuple(range(3, 8)), tuple(range(9, 18)))  # token ids of two requests
_BLOCK = 16


@torch.inference_mode()
def _check_rows_are_apart(model: TransformersModel) -> None:
    """Raise ConfigError if a token's hidden state depends on other requests or on chunking.

    A convolution or a shift over the tokens, or positions that are not taken from `position_ids`,
    would otherwise go unnoticed. The check runs two requests, then runs them again in reverse order
    with one of them split into two chunks.
    """
    (first, second), spec = map(len, _ROWS), model.spec
    run = _TwoRows(_Body(model.body.base, spec, make_backend(REFERENCE)), spec)
    wanted = torch.cat(run((0, 0, first), (1, 0, second)))
    beginning, whole = run((1, 0, 4), (0, 0, first))
    (rest,) = run((1, 4, second))
    actual = torch.cat((whole, beginning, rest))
    change = ((actual - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max().item()
    # The order of sums varies with the batch; in 16 bits even the choice of experts may vary.
    if not change < (1e-2 if torch.get_default_dtype() == torch.float32 else 0.3):
        raise ConfigError(
            f"transformers' {spec.architecture} cannot run here: a token's result changed by "
            f"{change:.0%} with the other requests in the step, so something other than attention "
            "mixes tokens; use another model"
        )


class _TwoRows:
    """Runs a body over parts of `_ROWS`, on a KV cache with one block per row."""

    def __init__(self, body: _Body, spec: ModelSpec) -> None:
        self._body, self._vocab_size = body, spec.vocab_size
        shapes = [spec.kv_of(attn).shape(len(_ROWS) + 1, _BLOCK) for attn in spec.attentions]
        self._kv_caches = [torch.zeros(shape) for shape in shapes]

    def __call__(self, *parts: tuple[int, int, int]) -> list[Tensor]:
        """Run one step of (row, first token, end) parts. Returns float32 [tokens, hidden] each."""
        counts = [end - first for _, first, end in parts]
        ids = itertools.chain(*(_ROWS[row][first:end] for row, first, end in parts))
        positions = torch.cat([torch.arange(first, end) for _, first, end in parts])
        blocks = torch.tensor([row + 1 for row, _, _ in parts])
        attn = AttentionMetadata(
            slot_mapping=blocks.repeat_interleave(torch.tensor(counts)) * _BLOCK + positions,
            block_tables=blocks.int().unsqueeze(1),
            seq_lens=torch.tensor([end for _, _, end in parts], dtype=torch.int32),
            query_start_loc=torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32),
        )
        input_ids = torch.tensor(list(ids)) % self._vocab_size
        hidden: Tensor = self._body(input_ids, positions, self._kv_caches, attn)
        return list(torch.split(hidden.float(), counts))
