"""Embeddings and heads that a checkpoint stores quantised: rows, logits and bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from compiledllm.kernels.attention import make_backend
from compiledllm.models.build import build_model
from compiledllm.models.decoder import Decoder
from compiledllm.models.formats.packed import PackedFormat
from compiledllm.models.registry import load_spec
from compiledllm.models.weights import load_weights
from tests.models.test_families import logits_in_chunks
from tests.support.cuda_on_cpu import use_cuda_kernels_on_cpu
from tests.support.greedy import load_reference
from tests.support.quantized import KINDS, edit_config, is_quantized, save_quantized

NUM_TOKENS = 20
EVEN = {"intermediate_size": 128}
BLOCKS = {"hidden_size": 256, "intermediate_size": 384}  # all parts are whole blocks
TABLES = ("embed_tokens", "embed_tokens_per_layer")


def with_tables(kind: str, *targets: str, ignore: tuple[str, ...] = ()) -> dict[str, Any]:
    group = KINDS[kind][0]["config_groups"]["group_0"]
    return {
        "config_groups": {"group_0": group | {"targets": list(targets)}},
        "ignore": [*ignore, "re:.*mlp.gate$"],
    }


def is_matrix_or_table(name: str, tensor: Tensor) -> bool:
    return is_quantized(name, tensor) or name.split(".")[-2] in (*TABLES, "lm_head")


def is_all_but_head(name: str, tensor: Tensor) -> bool:
    return is_matrix_or_table(name, tensor) and "lm_head" not in name


def load(checkpoint: Path) -> Decoder:
    model = Decoder(load_spec(checkpoint), make_backend("torch"))
    load_weights(model, checkpoint)
    return model


def assert_equals(model: Decoder, dense: Path) -> None:
    """Rows to the bit, logits but for the order of sums, and the bytes that the spec promises."""
    table = load_file(dense / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(model.embedding(torch.arange(len(table))), table)
    token_ids = torch.randint(0, 128, (NUM_TOKENS,)).tolist()
    with torch.inference_mode():
        expected = load_reference(dense)(torch.tensor([token_ids])).logits[0]
    actual = logits_in_chunks(model, token_ids, [NUM_TOKENS - 1, 1])
    torch.testing.assert_close(actual, expected, atol=2e-4, rtol=1e-4)
    spec = model.spec.with_dtypes("float32")
    assert sum(p.nbytes for p in model.parameters()) == spec.num_bytes(spec.weights)


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize(
    "kind", ["packed 4 bits, asymmetric", "int8", "float blocks", "nvfp4", "mxfp4"]
)
def test_embedding_and_head_stay_quantised(
    kind: str, is_tied: bool, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    sizes = BLOCKS if "blocks" in kind else EVEN
    source = tiny_model("llama", **sizes, tie_word_embeddings=is_tied)
    config = with_tables(kind, "Linear", "Embedding")
    model = load(save_quantized(source, tmp_path, kind, is_matrix_or_table, **config)[0])
    assert model.lm_head.is_tied == is_tied
    assert list(dict(model.spec.formats)) == ["embedding", "lm_head"][: 2 - is_tied]
    assert_equals(model, tmp_path / "dense")


def test_tables_are_named_by_patterns_too(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """Linear layers are not embeddings: without a target for it the embedding has 16 bits."""
    source = tiny_model("llama", **EVEN)
    config = with_tables("int8", "Linear", "re:.*embed_tokens", ignore=("lm_head",))
    packed, dense = save_quantized(source, tmp_path, "int8", is_all_but_head, **config)
    assert_equals(load(packed), dense)
    config = with_tables("int8", "Linear", ignore=("lm_head",))
    packed, dense = save_quantized(source, tmp_path / "plain", "int8", **config)
    model = load(packed)
    assert not model.spec.formats and model.embedding.weight.dtype == torch.float32


def test_a_head_beside_a_quantised_embedding_is_not_tied(
    tiny_model: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = tiny_model("llama", **EVEN, tie_word_embeddings=False)
    config = with_tables("int8", "Linear", "Embedding", ignore=("lm_head",))
    packed, dense = save_quantized(source, tmp_path, "int8", is_all_but_head, **config)
    edit_config(packed, tie_word_embeddings=True)
    model = load(packed)
    assert not model.lm_head.is_tied and "differs from" in caplog.text
    assert_equals(model, dense)


@torch.inference_mode()
def test_a_tied_head_shares_what_the_embedding_becomes_on_a_gpu(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In 16 bits, by the CUDA kernels. Nothing of the layout in files stays."""
    kind = "nvfp4"
    source = tiny_model("llama", **EVEN | {"hidden_size": 128}, tie_word_embeddings=True)
    config = with_tables(kind, "Linear", "Embedding")
    packed, _ = save_quantized(source, tmp_path, kind, is_matrix_or_table, **config)
    ids, unpacked = torch.randint(0, 128, (NUM_TOKENS,)), load(packed)
    rows = unpacked.embedding(ids).bfloat16()
    expected = unpacked.compute_logits(rows.float())
    use_cuda_kernels_on_cpu(monkeypatch)
    torch.set_default_dtype(torch.bfloat16)
    try:
        spec = load_spec(packed).with_dtypes("bfloat16")
        model = build_model(spec, make_backend("torch"), packed, None)
    finally:
        torch.set_default_dtype(torch.float32)
    embedding, head = model.embedding.named_params, model.lm_head.named_params
    assert embedding.keys() == head.keys() and all(head[n] is p for n, p in embedding.items())
    assert isinstance(model.lm_head.format, PackedFormat)
    assert model.embedding.format == model.lm_head.format
    assert set(model.lm_head._parameters) - {"bias"} == set(head)
    assert torch.equal(model.embedding(ids), rows)
    logits = torch.empty(NUM_TOKENS, 128, dtype=torch.bfloat16)
    for found in (model.compute_logits(rows), model.compute_logits(rows, out=logits)):
        torch.testing.assert_close(found.float(), expected, atol=1e-3, rtol=2**-7)
