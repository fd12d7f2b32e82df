"""What of a directory is the checkpoint, and whose head it has: as transformers decides it."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compiledllm.config import ConfigError
from compiledllm.kernels.attention import make_backend
from compiledllm.models.build import build_model
from compiledllm.models.checkpoint import weight_files
from compiledllm.models.decoder import Decoder
from compiledllm.models.registry import load_spec
from compiledllm.models.weights import load_weights

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Model type -> names of embedding and head in a checkpoint of it.
NAMES = {
    "llama": (EMBEDDING, HEAD),
    "gpt2": ("transformer.wte.weight", HEAD),
    "gpt_neox": ("gpt_neox.embed_in.weight", "embed_out.weight"),
    "falcon": ("transformer.word_embeddings.weight", HEAD),
    "opt": ("model.decoder.embed_tokens.weight", HEAD),
    "gemma3": ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"),
    "cohere": (EMBEDDING, HEAD),
    "qwen3": (EMBEDDING, HEAD),
    "cwm": (EMBEDDING, HEAD),  # which transformers runs
}
CHANGES = {
    "gpt2": {"n_positions": 512},
    "falcon": {"ffn_hidden_size": 112},
    "opt": {"ffn_dim": 112, "word_embed_proj_dim": 40, "pad_token_id": 1},
    "gemma3": {"head_dim": 16},
    "cohere": {"pad_token_id": 0},
    "cwm": {"pad_token_id": 0, "head_dim": 16},
}


@pytest.fixture
def tied(tiny_model: Callable[..., Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a tied model of this type, which a test may change."""

    def copy(model_type: str) -> Path:
        source = tiny_model(model_type, tie_word_embeddings=True, **CHANGES.get(model_type, {}))
        return Path(shutil.copytree(source, tmp_path / model_type))

    return copy


def edit(checkpoint: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = checkpoint / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def load(checkpoint: Path) -> Decoder:
    spec = load_spec(checkpoint)
    if spec.implementation == "transformers":
        return build_model(spec, make_backend("torch"), checkpoint, None)
    model = Decoder(spec, make_backend("torch"))
    load_weights(model, checkpoint)
    return model


def reference_of(checkpoint: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)


def head_weight(model: Decoder) -> torch.Tensor:
    """What the logits are computed with."""
    if model.spec.implementation == "transformers":
        weight: torch.Tensor = model.head.lm_head.weight
        return weight
    return model.lm_head.params[0]


@pytest.mark.parametrize("model_type", NAMES)
def test_a_head_of_its_own_is_used_though_the_config_ties_it(
    model_type: str, tied: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    """As transformers 5 does; an equal head stays tied and takes no memory."""
    checkpoint = tied(model_type)
    embedding, head = NAMES[model_type]
    edit(checkpoint, lambda tensors: tensors.update({head: tensors[embedding].clone()}))
    with caplog.at_level(logging.WARNING):
        model = load(checkpoint)
    assert model.spec.tie_word_embeddings and "differs" not in caplog.text
    num_tied = sum(p.numel() for p in model.parameters())

    edit(checkpoint, lambda tensors: tensors.update({head: torch.randn_like(tensors[embedding])}))
    with caplog.at_level(logging.WARNING):
        model = load(checkpoint)
    stored = load_file(checkpoint / "model.safetensors")
    reference = reference_of(checkpoint)
    wanted = reference.get_output_embeddings().weight
    assert torch.equal(wanted, stored[head]) and torch.equal(head_weight(model), wanted)
    assert not model.spec.tie_word_embeddings
    assert model.spec.num_parameters == num_tied + stored[head].numel()
    if model.spec.implementation == "compiledllm":
        assert f"{head} in model.safetensors differs" in caplog.text


def test_a_head_that_differs_in_its_last_row_only_is_its_own(tied: Callable[[str], Path]) -> None:
    checkpoint = tied("llama")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[HEAD] = tensors[EMBEDDING].clone()
        tensors[HEAD][-1, -1] += 1

    edit(checkpoint, change)
    assert not load(checkpoint).spec.tie_word_embeddings


def test_a_tied_checkpoint_may_store_the_head_alone(tied: Callable[[str], Path]) -> None:
    checkpoint = tied("llama")
    edit(checkpoint, lambda tensors: tensors.update({HEAD: tensors.pop(EMBEDDING)}))
    reference = reference_of(checkpoint)
    model = load(checkpoint)
    assert model.spec.tie_word_embeddings
    assert torch.equal(model.embedding.weight, reference.get_input_embeddings().weight)


def test_a_missing_head_is_refused_and_the_config_named(
    tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    """transformers would fill it with random numbers."""
    checkpoint = Path(shutil.copytree(tiny_llama(), tmp_path / "untied"))
    edit(checkpoint, lambda tensors: tensors.pop(HEAD))
    with pytest.raises(ConfigError, match=f"missing tensors: {HEAD}; .*set tie_word_embeddings"):
        load(checkpoint)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 10**7}, "num_hidden_layers must be in"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be in"),
        ({"hidden_size": 10**9}, r"asks for \d+ parameters and the weight files have \d+ bytes"),
        ({"intermediate_size": 10**9}, "do not belong together"),
        ({"vocab_size": 10**12}, "vocab_size must be in"),
        ({"intermediate_size": 0}, "intermediate_size of an MLP must be at least 1, got 0"),
        ({"architectures": {"a": 1}}, "architectures must list a class, got {'a': 1}"),
        ({"architectures": ["a\nb"]}, r"architectures must list a class, got \['a"),
    ],
)
def test_absurd_sizes_are_refused_before_memory_is_taken(
    changes: dict[str, Any], words: str, tied: Callable[[str], Path]
) -> None:
    checkpoint = tied("llama")
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ConfigError, match=words):
        build_model(load_spec(checkpoint), make_backend("torch"), checkpoint, None)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_local_experts": 10**12}, "num_experts must be in|num_local_experts must be in"),
        (
            {"num_experts_per_tok": 99},
            "experts per token must be in .1, 4., the number of experts, got 99",
        ),
    ],
)
def test_absurd_numbers_of_experts_are_refused(
    changes: dict[str, int], words: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    checkpoint = shutil.copytree(tiny_model("qwen3_moe", **experts), tmp_path / "absurd")
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ConfigError, match=words):
        load_spec(checkpoint)


def test_gemma3s_outer_config_decides_about_its_head(tied: Callable[[str], Path]) -> None:
    checkpoint = tied("gemma3")
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["tie_word_embeddings"] = False
    path.write_text(json.dumps(config))
    reference = reference_of(checkpoint)
    head, embedding = reference.get_output_embeddings(), reference.get_input_embeddings()
    assert load_spec(checkpoint).tie_word_embeddings == (head.weight is embedding.weight)


# Which files


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


BESIDE = ("adapter_model.safetensors", "consolidated.safetensors", "optimizer.safetensors")
BESIDE += ("model.fp16.safetensors", "training_args.bin", "original/model.safetensors")
SHARDS = tuple(f"model-{n:05}-of-00002.safetensors" for n in (1, 2))


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (("model.safetensors", *BESIDE), ("model.safetensors",)),
        (("model.safetensors", *SHARDS), ("model.safetensors",)),
        ((*SHARDS, *BESIDE), SHARDS),
        (("other.safetensors",), ("other.safetensors",)),
        (("x-00001-of-00001.safetensors",), ("x-00001-of-00001.safetensors",)),
    ],
)
def test_files_beside_the_checkpoint_are_not_read(
    files: tuple[str, ...], found: tuple[str, ...], tmp_path: Path
) -> None:
    assert [path.name for path in weight_files(touch(tmp_path, *files))] == list(found)


def write_index(folder: Path, *files: object) -> None:
    names = {f"tensor{n}": file for n, file in enumerate(files)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def test_the_index_names_the_files(tmp_path: Path) -> None:
    files = ("a.safetensors", "b.safetensors")
    write_index(touch(tmp_path, *files, *BESIDE), *files, *files)
    assert [path.name for path in weight_files(tmp_path)] == list(files)


def test_a_whole_file_comes_before_an_index_as_in_transformers(tmp_path: Path) -> None:
    write_index(touch(tmp_path, *SHARDS, "model.safetensors"), *SHARDS)
    assert [path.name for path in weight_files(tmp_path)] == ["model.safetensors"]
    write_index(tmp_path, "model.safetensors", *SHARDS)
    assert len(weight_files(tmp_path)) == 3


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (SHARDS[:1], f"missing: {SHARDS[1]}"),
        (("pytorch_model.bin",), "pytorch_model.bin, a pickle.*save_pretrained"),
        (("adapter_model.safetensors",), "merge an adapter into its base model"),
        (("one.safetensors", "two.safetensors"), "none of one.safetensors, two.safetensors"),
        ((), "no .safetensors files"),
    ],
)
def test_what_is_no_whole_checkpoint_is_refused_in_a_line(
    files: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        weight_files(touch(tmp_path, *files))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ("", "index.json cannot be read"),
        ("[]", "index.json must hold a JSON object"),
        ('{"weight_map": []}', r"index.json is not a valid shard index: .*got \[\]"),
        ('{"weight_map": {"a": 1}}', "1, named for tensor 'a', is no safetensors file inside"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "'../x.safetensors', named for tensor 'a'"),
        ('{"weight_map": {"a": "b/../../x.safetensors"}}', "no safetensors file inside the direct"),
        ('{"weight_map": {"a": "/x.safetensors"}}', "no safetensors file inside the directory"),
        ('{"weight_map": {"a": "x\\n.safetensors"}}', r"'x\\n.safetensors', named for tensor 'a'"),
    ],
)
def test_a_broken_index_is_named(index: str, words: str, tmp_path: Path) -> None:
    (tmp_path.parent / "x.safetensors").touch()
    (tmp_path / "b").mkdir()
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ConfigError, match=words) as error:
        weight_files(tmp_path)
    assert "\n" not in str(error.value)


OLD_BUFFERS = {
    "llama": ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"],
    "gpt2": ["transformer.h.0.attn.bias", "h.1.attn.masked_bias", "h.1.crossattention.bias"],
    "gpt_neox": ["gpt_neox.layers.0.attention.bias", "gpt_neox.layers.1.attention.masked_bias"],
    "falcon": ["transformer.h.0.self_attention.rotary_emb.inv_freq"],
    "opt": ["decoder.version", "model.decoder.embed_positions.position_ids"],
    "cwm": ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.position_ids"],
}


@pytest.mark.parametrize("model_type", OLD_BUFFERS)
def test_buffers_of_old_checkpoints_are_ignored(
    model_type: str, tied: Callable[[str], Path]
) -> None:
    checkpoint = tied(model_type)
    edit(checkpoint, lambda t: t.update({name: torch.zeros(3) for name in OLD_BUFFERS[model_type]}))
    load(checkpoint)
    edit(checkpoint, lambda tensors: tensors.update({"model.layers.0.odd": torch.zeros(3)}))
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.odd"):
        load(checkpoint)


def test_transformers_reads_the_same_file_and_says_what_is_broken(
    tied: Callable[[str], Path],
) -> None:
    checkpoint = tied("cwm")
    touch(checkpoint, "adapter_model.safetensors")
    load(checkpoint)
    (checkpoint / "adapter_model.safetensors").unlink()
    (checkpoint / "model.safetensors").rename(checkpoint / "other.safetensors")
    load(checkpoint)
    whole = (checkpoint / "other.safetensors").read_bytes()
    for broken in (b"", b"\xff" * 100, whole[:-100]):
        (checkpoint / "other.safetensors").write_bytes(broken)
        with pytest.raises(ConfigError, match="other.safetensors is not a readable|transformers"):
            load(checkpoint)
