"""Converting GGUF: tiny models come out as they went in; what is damaged or unknown is refused."""

from __future__ import annotations

import contextlib
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compiledllm.config import ConfigError
from compiledllm.models.registry import load_spec
from compiledllm.models.source import resolve_checkpoint

gguf = pytest.importorskip("gguf")
convert = pytest.importorskip("compiledllm.models.gguf.convert")
support = pytest.importorskip("tests.support.gguf_files")
TOKENS, gguf_tensors, write_gguf = support.TOKENS, support.gguf_tensors, support.write_gguf

LLAMA: dict[str, Any] = {
    "vocab_size": support.VOCAB,
    "intermediate_size": 96,  # whole blocks of every quantisation here
    "max_position_embeddings": 16384,
    "tie_word_embeddings": True,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


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


def converted(gguf_path: Path) -> Path:
    target = gguf_path.with_suffix("")
    convert.convert_gguf(gguf_path, target)
    return target


@pytest.fixture(scope="module")
def llama(tiny_llama: Callable[..., Path]) -> Any:
    return load(tiny_llama(**LLAMA))


@pytest.fixture(scope="module")
def tiny_gguf(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", gguf_tensors(llama))


# What comes out is the model that went in


@pytest.mark.parametrize("tied", [True, False])
def test_a_float32_gguf_gives_the_same_logits(
    tiny_llama: Callable[..., Path], tmp_path: Path, tied: bool
) -> None:
    model = load(tiny_llama(**LLAMA | {"tie_word_embeddings": tied}))
    path = write_gguf(tmp_path / "x.gguf", gguf_tensors(model))
    checkpoint = converted(path)
    torch.testing.assert_close(logits(load(checkpoint)), logits(model))
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["dtype"], config["tie_word_embeddings"]) == ("float32", tied)
    assert config["rms_norm_eps"] == 1e-5, "not float32's 9.99999975e-06"


def test_llama3_rope_scaling_is_found_in_the_divisors(
    llama: Any, tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    model = load(tiny_llama(**LLAMA, rope_parameters={"rope_theta": 10000.0, **LLAMA3}))
    plain = llama.model.rotary_emb.inv_freq
    tensors = gguf_tensors(model)
    tensors["rope_freqs.weight"] = (plain / model.model.rotary_emb.inv_freq).numpy()
    checkpoint = converted(write_gguf(tmp_path / "x.gguf", tensors))
    assert json.loads((checkpoint / "config.json").read_text())["rope_scaling"] == LLAMA3
    torch.testing.assert_close(logits(load(checkpoint)), logits(model))


@pytest.mark.parametrize("factor", [1.0, 8.0])
@pytest.mark.parametrize("tied", [True, False])
def test_gemma3_knows_its_layers_and_norms(
    tiny_model: Callable[..., Path], tmp_path: Path, tied: bool, factor: float
) -> None:
    """Every sixth layer full and with a RoPE of its own, the others with windows."""
    full = {"rope_type": "linear", "factor": factor} if factor > 1 else {"rope_type": "default"}
    model = load(
        tiny_model(
            "gemma3_text",
            **LLAMA
            | {
                "num_hidden_layers": 7,
                "head_dim": 16,
                "query_pre_attn_scalar": 16,
                "sliding_window": 5,
                "tie_word_embeddings": tied,
                "rope_parameters": {
                    "sliding_attention": {"rope_type": "default", "rope_theta": 700.0},
                    "full_attention": {"rope_theta": 10000.0} | full,
                },
            },
        )
    )

    def edit(writer: Any) -> None:
        writer.add_sliding_window(5)
        writer.add_float32("gemma3.rope.freq_base_swa", 700.0)
        if factor > 1:
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(factor)

    tensors = gguf_tensors(model)
    path = tmp_path / "x.gguf"
    write_gguf(path, tensors, architecture="gemma3", num_layers=7, edit=edit)
    checkpoint = converted(path)
    torch.testing.assert_close(logits(load(checkpoint)), logits(model))
    spec = load_spec(checkpoint)
    assert spec.architecture == "Gemma3ForCausalLM"
    windows = [attn.sliding_window for attn in spec.attentions]
    assert windows == [5, 5, 5, 5, 5, 0, 5]


SP_PIECES = ["a", "b", "▁", "ab", "▁a", "▁ab", "aba"]  # the later, the worse the score
SP_TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>", "<turn>", "  ", "\n\n"]
SP_TOKENS += [f"<0x{byte:02X}>" for byte in range(256)] + SP_PIECES
SP_TYPES = [3, 3, 3, 3, 3, 4, 4] + [6] * 256 + [1] * len(SP_PIECES)
SP_SCORES = [-1000.0] * 7 + [0.0] * 256 + [-float(i) for i in range(len(SP_PIECES))]


def sentence_piece(edit: Callable[[dict[str, Any]], None]) -> Callable[[Any], None]:
    """For `write_gguf`: replaces its tokenizer by a SentencePiece one, which `edit` may change."""
    keys = {
        "model": "llama",
        "tokens": SP_TOKENS,
        "token_type": SP_TYPES,
        "scores": SP_SCORES,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "unknown_token_id": 3,
        "add_space_prefix": False,
    }
    edit(keys)

    def write(writer: Any) -> None:
        data = writer.kv_data[0]
        for name in [name for name in data if name.startswith("tokenizer.ggml.")]:
            del data[name]
        for name, value in keys.items():
            kind = gguf.GGUFValueType.get_type(value)
            writer.add_key_value(f"tokenizer.ggml.{name}", value, kind)

    return write


def test_a_sentence_piece_tokenizer_merges_by_score(llama: Any, tmp_path: Path) -> None:
    edit = sentence_piece(lambda keys: None)
    checkpoint = converted(write_gguf(tmp_path / "x.gguf", gguf_tensors(llama), edit=edit))
    tokenizer = load_tokenizer(checkpoint)

    def pieces(text: str) -> list[str]:
        return tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)

    assert pieces("ab ab") == ["<bos>", "ab", "▁ab"]
    assert pieces("aba") == ["<bos>", "aba"]
    assert pieces(" aba") == ["<bos>", "▁ab", "a"], "which scores better than aba"
    assert pieces("a  b") == ["<bos>", "a", "▁▁", "b"], "a token matched in plain text comes first"
    assert pieces("é") == ["<bos>", "<0xC3>", "<0xA9>"]
    assert pieces("a\n\n<turn>a") == ["<bos>", "a", "\n\n", "<turn>", "a"]
    text = " ab  é\n\na "
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_gemma4s_tokenizer_merges_as_the_file_lists(llama: Any, tmp_path: Path) -> None:
    merges = ["a b", "▁ a", "ab a"]
    edit = sentence_piece(lambda keys: keys.update(model="gemma4", merges=merges))
    checkpoint = converted(write_gguf(tmp_path / "x.gguf", gguf_tensors(llama), edit=edit))
    tokenizer = load_tokenizer(checkpoint)
    ids = tokenizer(" aba é").input_ids
    pieces = ["<bos>", "▁", "aba", "▁", "<0xC3>", "<0xA9>"]  # where the scores make ▁ab and a
    assert tokenizer.convert_ids_to_tokens(ids) == pieces
    assert tokenizer.decode(ids, skip_special_tokens=True) == " aba é"


def test_a_sentence_piece_tokenizer_may_begin_each_text_with_a_space(
    llama: Any, tmp_path: Path
) -> None:
    """As in Llama 2 and Mistral, which is llama.cpp's default."""
    edit = sentence_piece(lambda keys: keys.pop("add_space_prefix"))
    tokenizer = load_tokenizer(
        converted(write_gguf(tmp_path / "x.gguf", gguf_tensors(llama), edit=edit))
    )

    def pieces(text: str) -> list[str]:
        return tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)

    assert pieces("ab ab") == ["<bos>", "▁ab", "▁ab"]
    assert pieces("b<turn>ab") == ["<bos>", "▁", "b", "<turn>", "▁ab"]
    text = "ab é\na "
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_special_tokens_of_phi3_swallow_the_spaces_behind_them(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = load(tiny_model("phi3", **LLAMA | {"pad_token_id": None}))
    edit = sentence_piece(lambda keys: None)
    path = write_gguf(tmp_path / "x.gguf", gguf_tensors(model), architecture="phi3", edit=edit)
    checkpoint = converted(path)
    torch.testing.assert_close(logits(load(checkpoint)), logits(model))
    tokenizer = load_tokenizer(checkpoint)
    ids = tokenizer("<turn>\n ab<unk> ab").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["<bos>", "<turn>", "ab", "<unk>", "▁ab"]


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda k: k.update(remove_extra_whitespaces=True), "remove_extra_whitespaces = True"),
        (lambda k: k.update(scores=SP_SCORES[1:]), "scores' must have a number per token"),
        (lambda k: k.update(token_type=SP_TYPES[:-1]), "token_type' must have a number per token"),
        (lambda k: k.update(token_type=[1] * len(SP_TYPES)), "0 byte tokens are in the vocabulary"),
        (lambda k: k.update(model="t5"), "'t5' is not supported"),
    ],
)
def test_other_sentence_piece_tokenizers_are_refused(
    llama: Any, tmp_path: Path, edit: Callable[[dict[str, Any]], None], match: str
) -> None:
    path = tmp_path / "x.gguf"
    refused(write_gguf(path, gguf_tensors(llama), edit=sentence_piece(edit)), match)


@pytest.mark.parametrize(
    ("kind", "dtype"), [("Q8_0", torch.bfloat16), ("BF16", torch.bfloat16), ("F16", torch.float16)]
)
def test_stored_weights_are_the_dequantised_ones(
    llama: Any, tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    path = write_gguf(tmp_path / "x.gguf", gguf_tensors(llama), kind)
    found = load(converted(path), dtype="auto")
    assert found.dtype == dtype
    stored = gguf.GGMLQuantizationType[kind]
    for name, weight in llama.state_dict().items():
        expected = weight.numpy()
        if expected.ndim > 1:
            expected = gguf.dequantize(gguf.quants.quantize(expected, stored), stored)
        actual = found.state_dict()[name]
        assert torch.equal(actual, torch.tensor(expected).to(dtype)), name


def test_the_tokenizer_is_the_models(tiny_gguf: Path) -> None:
    checkpoint = converted(tiny_gguf)
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
    checkpoint = converted(path)
    tokenizer = load_tokenizer(checkpoint)
    assert tokenizer.convert_ids_to_tokens(tokenizer(" the").input_ids) == ["<|im_start|>", "Ġthe"]
    assert tokenizer(" the", add_special_tokens=False).input_ids == [TOKENS.index("Ġthe")]
    assert tokenizer("xyz").input_ids == [1, TOKENS.index("xyz")], "whole without any merge"
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a 1234")
    assert [piece for piece, _ in pieces] == ["a", "Ġ", "123", "4"]
    generation = json.loads((checkpoint / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 0]


SAMPLE = "They'LL pay 12345€ for HelloWorld's e\u0301 /a/b\n\n  if x:\r\n\t 你好１２ don't  "
PIECES = {  # the parts that differ between the schemes
    "llama-bpe": ["'LL", "Ġ", "123", "45", "ĠHelloWorld", "'s", "Ġ/", "a", "/b"],
    "dbrx": ["'LL", "Ġ", "123", "45", "ĠHelloWorld", "'s", "Ġ/", "a", "/b"],
    "qwen2": ["'LL", "Ġ", "1", "2", "3", "4", "5", "ĠHelloWorld", "'s", "ĠÃ©", "Ġ/", "a", "/b"],
    "gpt-4o": ["They'LL", "Ġ", "123", "45", "ĠHello", "World's", "Ġ/", "a", "/b"],
    "tekken": ["They", "'LL", "1", "2", "ĠHello", "World", "'s", "Ġ/", "a", "/b"],
}


@pytest.mark.parametrize("name", PIECES)
def test_pre_tokenizers_split_words_as_the_models_do(name: str, llama: Any, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", gguf_tensors(llama), pre=name)
    backend = load_tokenizer(converted(path)).backend_tokenizer
    text = backend.normalizer.normalize_str(SAMPLE) if backend.normalizer else SAMPLE
    pieces = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    assert [piece for piece in PIECES[name] if piece not in pieces] == []
    assert ("<|im_start|>" in load_tokenizer(path.with_suffix(""))("a").tokens()) == (
        name in ("llama-bpe", "tekken")
    )
    if name == "qwen2":
        from transformers import Qwen2Tokenizer

        own = Qwen2Tokenizer(vocab={token: i for i, token in enumerate(TOKENS)}, merges=[])
        splits = own.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
        assert pieces == [piece for piece, _ in splits]
        assert own.backend_tokenizer.normalizer.normalize_str(SAMPLE) == text


def test_a_gguf_the_user_names_is_complete_after_one_conversion(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMPILEDLLM_CACHE_DIR", str(tmp_path))
    found = resolve_checkpoint(str(tiny_gguf))
    monkeypatch.setattr(convert, "convert_gguf", lambda *a: pytest.fail("converted again"))
    assert resolve_checkpoint(str(tiny_gguf)) == found


@pytest.mark.real_model
def test_the_default_model_knows_the_capital_of_france(default_model: Path) -> None:
    tokenizer, model = load_tokenizer(default_model), load(default_model)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    assert prompt.input_ids[0, 0] != tokenizer.bos_token_id
    output = model.generate(**prompt, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(output[0]) == "The capital of France is Paris"
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")


# Damaged and unsupported files


def refused(path: Path, match: str) -> None:
    with pytest.raises(ConfigError, match=match) as error:
        converted(path)
    assert str(path) in str(error.value)
    assert not path.with_suffix("").exists(), "refused before anything is written"


@pytest.mark.parametrize("content", [b"", b"GG", b"not a model at all"])
def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    refused(tmp_path / "x.gguf", "it is not a GGUF file")


@pytest.mark.parametrize("share", [0.001, 0.01, 0.05, 0.5, 0.999])
def test_a_truncated_gguf_is_refused(tiny_gguf: Path, tmp_path: Path, share: float) -> None:
    content = tiny_gguf.read_bytes()
    (tmp_path / "x.gguf").write_bytes(content[: int(len(content) * share)])
    refused(tmp_path / "x.gguf", "truncated or damaged.*download it again")


def test_a_tensor_inside_of_another_is_refused_by_name(tiny_gguf: Path, tmp_path: Path) -> None:
    content = tiny_gguf.read_bytes()
    name = b"blk.0.ffn_norm.weight"
    end = content.index(name) + len(name) + 4 + 8 + 4  # dimensions, shape, type
    (tmp_path / "x.gguf").write_bytes(content[:end] + bytes(8) + content[end + 8 :])
    refused(tmp_path / "x.gguf", "'.*' begins at byte 0, inside of tensor '.*'; download it again")


@pytest.mark.parametrize("num_items", [2**63, 2**60, 2**24, 17])
def test_an_array_longer_than_the_file_ends_at_once(tmp_path: Path, num_items: int) -> None:
    """gguf.GGUFReader goes through 2^60 items here."""
    key = struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 4, num_items)
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key + b"\0" * 64)
    refused(tmp_path / "x.gguf", "damaged.*download it again")


def test_a_damaged_header_never_gets_past_config_error(tiny_gguf: Path, tmp_path: Path) -> None:
    """Random bytes in the header: converted (the change was harmless) or refused, nothing else."""
    content, chance = tiny_gguf.read_bytes(), random.Random(0)
    header_size = len(content) - len(convert.read_gguf(tiny_gguf).data)
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
    refused(path, "architecture 'mamba' is not supported; supported: gemma3, gemma4, llama")


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
