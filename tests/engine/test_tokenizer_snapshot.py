"""A tokenizer from a snapshot does what transformers' tokenizer of the same directory does."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from compiledllm.config import ConfigError, EngineConfig
from compiledllm.engine import build, tokenizer_snapshot
from compiledllm.engine.pieces import Pieces
from compiledllm.engine.plain_tokenizer import PlainTokenizer
from compiledllm.engine.token_stream import TokenStream
from compiledllm.engine.tokenizer import Tokenizer
from compiledllm.engine.tokenizer_snapshot import folder_of_snapshots, key_of, open_tokenizer
from tests.support.tokenizers import (
    SPECIAL,
    WORDS,
    byte_level,
    metaspace,
    sentencepiece,
    word_ends,
    wordpiece,
)

TEMPLATE = "{% for m in messages %}{{ bos_token }}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def save(folder: Path, backend: Backend, model_type: str, **config: Any) -> Path:
    """A tokenizer's files, with added tokens of all kinds."""
    backend.add_special_tokens(SPECIAL)
    backend.add_tokens(
        [
            AddedToken("<|left|>", lstrip=True, special=True),
            AddedToken("<|right|>", rstrip=True, normalized=True),
            AddedToken("word", single_word=True),
            AddedToken("  ", normalized=False),
        ]
    )
    backend.save(str(folder / "tokenizer.json"))
    shared = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(shared | config))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


def with_ends(backend: Backend) -> Backend:
    """Adds tokens, and truncates and pads, as encoding for training would."""
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    backend.enable_truncation(4)
    backend.enable_padding(length=9)
    return backend


def whole_words() -> Backend:
    names = ["[UNK]", *SPECIAL, *WORDS]
    backend = Backend(models.WordLevel({n: i for i, n in enumerate(names)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return backend


KINDS: dict[str, tuple[Callable[[], Backend], str, dict[str, Any]]] = {
    "GPT-2": (byte_level, "gpt2", {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}),
    "Qwen": (byte_level, "qwen2", {"tokenizer_class": "Qwen2Tokenizer", "pad_token": "<|left|>"}),
    "Llama 2": (lambda: sentencepiece(True), "llama", {"tokenizer_class": "LlamaTokenizer"}),
    "Gemma": (lambda: sentencepiece(False), "gemma2", {"tokenizer_class": "GemmaTokenizerFast"}),
    "with ends": (
        lambda: with_ends(byte_level()),
        "llama",
        {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": True},
    ),
    "split": (
        byte_level,
        "mistral",
        {"tokenizer_class": "TokenizersBackend", "split_special_tokens": True},
    ),
    "T5": (metaspace, "t5", {"tokenizer_class": "T5Tokenizer"}),
    "Unigram": (
        metaspace,
        "qwen3",
        {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["word", "nowhere"]},
    ),
    "WordPiece": (wordpiece, "llama", {"tokenizer_class": "TokenizersBackend", "unk_token": "a"}),
    "word ends": (
        word_ends,
        "llama",
        {"tokenizer_class": "TokenizersBackend", "image_token": "<|right|>"},
    ),
    "whole words": (whole_words, "llama", {"tokenizer_class": "TokenizersBackend"}),
}


@dataclass(frozen=True)
class Pair:
    """A tokenizer from a snapshot, and that of AutoTokenizer."""

    ours: Tokenizer
    theirs: Any


def kept_in(folder: Path, patch: pytest.MonkeyPatch) -> Path:
    """Let starts keep and use snapshots in a cache of their own. Returns their folder."""
    patch.setenv("COMPILEDLLM_CACHE_DIR", str(folder / "cache"))
    patch.setenv("COMPILEDLLM_DISABLE_CACHE", "0")
    patch.setattr("compiledllm.log.log.propagate", True)
    return folder_of_snapshots()


def without_transformers(patch: pytest.MonkeyPatch) -> None:
    def fail(directory: Path) -> None:
        raise AssertionError(f"transformers would load {directory}")

    patch.setattr(tokenizer_snapshot, "load_tokenizer", fail)


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    from transformers import AutoTokenizer

    make, model_type, config = KINDS[request.param]
    folder = save(tmp_path_factory.mktemp("kind"), make(), model_type, **config)
    with pytest.MonkeyPatch.context() as patch:
        kept_in(folder, patch)
        open_tokenizer(folder)
        without_transformers(patch)
        ours = Tokenizer(folder)
    assert isinstance(ours.inner, PlainTokenizer)
    return Pair(ours, AutoTokenizer.from_pretrained(folder))


TEXTS = st.lists(
    st.sampled_from([*WORDS, *SPECIAL, "<|left|>", "<|right|>", "word", "words", " ", "  ", "\n"])
    | st.sampled_from(["e\u0301", "\u212b", "\u0130", "\ufffd", "\U0001f468\u200d\U0001f469", "\0"])
    | st.text(max_size=3),
    max_size=12,
).map("".join)


@given(data=st.data())
def test_texts_and_tokens_are_those_of_transformers(pair: Pair, data: st.DataObject) -> None:
    ours, theirs = pair.ours, pair.theirs
    text = data.draw(TEXTS, "text")
    for adds in (True, False):
        ids = ours.encode(text, adds)
        assert ids == theirs.encode(text, add_special_tokens=adds)
        assert ours._encode_long(text, adds) == ids
    ids += data.draw(st.lists(st.integers(0, len(theirs) + 1), max_size=6), "ids")
    for skips in (True, False):
        assert ours.decode(ids, skips) == theirs.decode(ids, skip_special_tokens=skips)
        streams = ours.stream(ids[:3], skips), TokenStream(theirs, ids[:3], skips)
        found, expected = ([*map(s.push, ids), s.finish()] for s in streams)
        assert found == expected


def test_vocabulary_is_that_of_transformers(pair: Pair) -> None:
    ours, theirs = pair.ours, pair.theirs
    assert len(ours.inner) == len(theirs) and ours.inner.get_vocab() == theirs.get_vocab()
    assert ours.inner.get_added_vocab() == theirs.get_added_vocab()
    assert ours.eos_token_id == theirs.eos_token_id
    assert set(ours.inner.all_special_ids) == set(theirs.all_special_ids)
    pieces = Pieces(theirs)
    for token_id in range(len(theirs) + 2):
        assert ours.token_bytes(token_id) == pieces.bytes_of(token_id)
    theirs.encode("")  # removes truncation and padding
    assert ours.backend_json() == theirs.backend_tokenizer.to_str()
    messages = [{"role": "user", "content": "hi"}]
    expected = theirs.apply_chat_template(messages, tokenize=False)
    assert ours.encode_chat(messages)[0] == expected
    assert type(ours.hf) is type(theirs)


# -- which tokenizers ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "config", "reason"),
    [
        (byte_level, {"tokenizer_class": "CodeGenTokenizer"}, "has its own decode"),
        (wordpiece, {"clean_up_tokenization_spaces": True}, "removes spaces in Python"),
    ],
)
def test_a_tokenizer_that_does_more_in_python_stays_with_transformers(
    make: Callable[[], Backend],
    config: dict[str, Any],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    kept = kept_in(tmp_path, monkeypatch)
    save(tmp_path, make(), "llama", **{"tokenizer_class": "TokenizersBackend"} | config)
    with caplog.at_level("DEBUG", "compiledllm"):
        tokenizer = Tokenizer(tmp_path)
    assert reason in caplog.text and not kept.exists()
    assert tokenizer.inner is tokenizer.hf and not isinstance(tokenizer.inner, PlainTokenizer)


def test_parts_written_in_python_stay_with_transformers() -> None:
    from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

    from compiledllm.engine.tokenizer_class import why_not_plain

    assert why_not_plain(ByT5Tokenizer()) == "it is written in Python"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level())
    assert why_not_plain(tokenizer) == ""
    tokenizer.backend_tokenizer.decode = lambda *_: "x"
    assert why_not_plain(tokenizer) == "decode of its backend is written in Python"
    custom = pre_tokenizers.PreTokenizer.custom(object())
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level())
    tokenizer.backend_tokenizer.pre_tokenizer = custom
    found = tokenizer_snapshot._make("", Path(), tokenizer)
    assert isinstance(found, str) and "cannot be serialized" in found


@pytest.mark.parametrize("left", ["a", "a b", "#version"])
def test_merges_are_stored_as_strings_where_the_library_reads_them(left: str) -> None:
    """The library takes what begins with "#version" for a comment."""
    from transformers import PreTrainedTokenizerFast

    backend = Backend(models.BPE({left: 0, "c": 1, left + "c": 2}, [(left, "c")]))
    made = tokenizer_snapshot._make("", Path(), PreTrainedTokenizerFast(tokenizer_object=backend))
    assert not isinstance(made, str)
    merges = json.loads(made[0].backend)["model"]["merges"]
    assert merges == (["a c"] if left == "a" else [[left, "c"]])
    assert json.loads(made[1].backend_tokenizer.to_str())["model"]["merges"] == [[left, "c"]]


# -- files -----------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    return save(folder, byte_level(), "qwen2", tokenizer_class="Qwen2Tokenizer")


def test_what_decides_a_tokenizer_changes_the_key(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {key_of(model)}
    (model / "model.safetensors").write_bytes(b"weights")
    (model / ".notes").write_text("x")
    assert key_of(model) in seen
    (model / "additional_chat_templates").mkdir()
    for name in (
        *("tokenizer.json", "tokenizer_config.json", "config.json", "special_tokens_map.json"),
        *("added_tokens.json", "chat_template.jinja", "additional_chat_templates/tool_use.jinja"),
        *("vocab.json", "merges.txt", "tokenizer.model", "tekken.json"),
    ):
        with (model / name).open("a") as file:
            file.write(" ")
        assert key_of(model) not in seen, name
        seen.add(key_of(model))
    (model / "merges.txt").rename(model / "vocab.txt")
    assert key_of(model) not in seen
    seen.add(key_of(model))
    monkeypatch.setattr(tokenizer_snapshot, "version_of", lambda package: f"{package} 9")
    assert key_of(model) not in seen
    seen.add(key_of(model))
    monkeypatch.chdir(model.parent)
    assert key_of(Path(model.name)) not in seen  # may be a name that transformers knows
    monkeypatch.setattr(tokenizer_snapshot, "_MAX_BYTES", 9999)
    (model / "weights.tar").write_bytes(bytes(10_000))  # too large for a tokenizer
    without = key_of(model)
    (model / "weights.tar").write_bytes(bytes(10_001))
    assert key_of(model) == without


def truncate(path: Path, _: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def change(path: Path, _: Path) -> None:
    content = path.read_bytes().replace(b'"eos_token_id": 1', b'"eos_token_id": 2')
    path.write_bytes(content)


def empty(path: Path, _: Path) -> None:
    path.write_bytes(b"")


def swap(path: Path, other: Path) -> None:
    path.write_bytes(other.read_bytes())


def age(path: Path, _: Path) -> None:
    """What another version might have written: other facts, with the right checksum."""
    begin = len(tokenizer_snapshot._FORMAT) + tokenizer_snapshot._CHECKSUM_BYTES
    content = path.read_bytes()[begin:].replace(b'"eos_token_id"', b'"eos"')
    digest = hashlib.sha256(content).digest()
    path.write_bytes(tokenizer_snapshot._FORMAT + digest + content)


def share(path: Path, _: Path) -> None:
    path.chmod(0o666)


@pytest.mark.parametrize("harm", [truncate, change, empty, swap, age, share])
def test_a_file_that_cannot_be_used_is_replaced(
    harm: Callable[[Path, Path], None],
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    kept = kept_in(tmp_path, monkeypatch)
    expected = Tokenizer(model).encode("hello world")
    (path,) = kept.iterdir()
    other = save(tmp_path, metaspace(), "llama", tokenizer_class="TokenizersBackend")
    open_tokenizer(other)
    harm(path, next(found for found in kept.iterdir() if found != path))
    assert len(list(tokenizer_snapshot.listed(None))) == 2  # whatever a file may hold
    assert Tokenizer(model).encode("hello world") == expected
    assert f"{path} is not used" in caplog.text
    without_transformers(monkeypatch)
    assert Tokenizer(model).encode("hello world") == expected


def test_folder_that_cannot_be_written_costs_nothing_else(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("not a folder")
    kept_in(tmp_path, monkeypatch)
    with caplog.at_level("INFO", "compiledllm"):
        assert isinstance(open_tokenizer(model), PlainTokenizer)
    assert "the tokenizer is not kept for the next start" in caplog.text


def test_a_user_without_a_home_loads_by_transformers(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(tokenizer_snapshot, "compiled_dir", fails)
    tokenizer_snapshot.warm_up()
    assert isinstance(open_tokenizer(model), PlainTokenizer)
    assert not list(tokenizer_snapshot.listed(None))


def test_files_that_change_while_they_are_read_leave_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = kept_in(tmp_path, monkeypatch)
    load = tokenizer_snapshot.load_tokenizer

    def load_and_change(directory: Path) -> Any:
        loaded = load(directory)
        (directory / "added.txt").write_text("a file of a download that goes on")
        return loaded

    monkeypatch.setattr(tokenizer_snapshot, "load_tokenizer", load_and_change)
    open_tokenizer(model)
    assert not kept.exists()
    monkeypatch.setattr(tokenizer_snapshot, "load_tokenizer", load)
    open_tokenizer(model)
    assert len(list(kept.iterdir())) == 1


def test_without_a_cache_nothing_is_kept_or_used(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = kept_in(tmp_path, monkeypatch)
    monkeypatch.setenv("COMPILEDLLM_DISABLE_CACHE", "1")
    open_tokenizer(model)
    assert not kept.exists()
    monkeypatch.setenv("COMPILEDLLM_DISABLE_CACHE", "0")
    open_tokenizer(model)
    assert len(list(kept.iterdir())) == 1
    monkeypatch.setenv("COMPILEDLLM_DISABLE_CACHE", "1")
    without_transformers(monkeypatch)
    with pytest.raises(AssertionError, match="transformers would load"):
        open_tokenizer(model)


def test_a_build_holds_the_tokenizer(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a copy of the checkpoint, and for another user."""
    kept = kept_in(tmp_path, monkeypatch)
    built = tmp_path / "built"
    built.mkdir()
    tokenizer_snapshot.copy_to(built, model)
    assert not kept.exists()
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    without_transformers(monkeypatch)
    moved = model.rename(tmp_path / "moved")
    assert isinstance(open_tokenizer(moved, str(built)), PlainTokenizer)
    (line,) = build.lines_of_list(str(built))
    assert line.endswith("model (tokenizer)")


def test_a_build_keeps_the_tokenizer_that_the_options_name(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, out = kept_in(tmp_path, monkeypatch), tmp_path / "out"
    (tmp_path / "empty").mkdir()
    out.mkdir()

    def build_with(folder: Path | None, **options: Any) -> str:
        requested = EngineConfig.from_options(**options)
        planned = SimpleNamespace(
            config=SimpleNamespace(requested=requested), checkpoint=tmp_path / "empty"
        )
        caplog.clear()
        build._write_tokenizer(planned, folder)
        return caplog.text

    assert build_with(out, skip_tokenizer_init=True) == ""
    assert "no tokenizer is kept beside it" in build_with(out)
    assert build_with(out, tokenizer=str(model)) == "" and len(list(out.iterdir())) == 1
    assert build_with(None, tokenizer=str(model)) == "" and len(list(kept.iterdir())) == 1


# -- transformers' own object ----------------------------------------------------------------------


def test_transformers_tokenizer_is_loaded_when_a_caller_wants_it(
    model: Path, tmp_path: Path
) -> None:
    tokenizer = Tokenizer(model, TEMPLATE + "!")
    assert tokenizer.hf is tokenizer.hf and tokenizer.hf.chat_template == TEMPLATE + "!"
    gone = Tokenizer(model)
    model.rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match="no tokenizer could be loaded from '.*/model'"):
        gone.hf  # noqa: B018
    assert gone.encode("hello") == tokenizer.encode("hello")
