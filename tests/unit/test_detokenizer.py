"""Tokens to text: whole characters only, and nothing of a stop string is ever shown.

Two small tokenizers are trained here: byte-level BPE (GPT-2, Llama 3, Qwen), whose characters break
into bytes, and a sentencepiece-like one (Llama 2) with "▁" for spaces and byte tokens for the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.decoders import DecodeStream

from compiledllm.config import ConfigError
from compiledllm.engine.detokenizer import Detokenizer
from compiledllm.engine.token_stream import TokenStream
from compiledllm.engine.tokenizer import Tokenizer
from compiledllm.sampling_params import SamplingParams

CORPUS = [
    "the cat sat on the mat and the dog said hello to the world",
    "stop the end, END of the story. hello world, the end",
    "naïve café, straße, 世界 你好 and 😀 of the 世界",
] * 4
BOS, EOS = "<s>", "</s>"
SPECIAL = [BOS, EOS]


def byte_level_backend() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def sentencepiece_like_backend() -> Backend:
    """As Llama 2's: spaces are "▁", one is put in front, unknown characters become byte tokens."""
    backend = Backend(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    byte_tokens = [f"<0x{n:02X}>" for n in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=360, special_tokens=["<unk>", *SPECIAL, *byte_tokens], show_progress=False
    )
    backend.train_from_iterator(CORPUS[:2], trainer)
    plain = Backend(backend.model)  # here byte tokens are ordinary tokens, as in Llama 2
    plain.normalizer, plain.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    plain.decoder = backend.decoder
    return plain


def metaspace_backend() -> Backend:
    backend = Backend(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=120, special_tokens=["<unk>", *SPECIAL], show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def load(backend: Backend, folder: Path) -> Tokenizer:
    """Through the real door: saved as a checkpoint's tokenizer files and loaded again."""
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BOS, eos_token=EOS)
    fast.save_pretrained(folder)
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load(byte_level_backend(), tmp_path_factory.mktemp("byte_level"))


@pytest.fixture(scope="module")
def sentencepiece_like(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load(sentencepiece_like_backend(), tmp_path_factory.mktemp("sentencepiece_like"))


@pytest.fixture(scope="module")
def metaspace(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load(metaspace_backend(), tmp_path_factory.mktemp("metaspace"))


class WithoutBackend:
    """A tokenizer written in Python only, as transformers has them: it can decode, no more."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._hf = tokenizer.hf

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        text: str = self._hf.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text


def make_stream(tokenizer: Tokenizer, prompt: Sequence[int], has_backend: bool) -> TokenStream:
    if has_backend:
        return tokenizer.stream(prompt, skip_special_tokens=True)
    return TokenStream(WithoutBackend(tokenizer), prompt, skip_special_tokens=True)


def pieces(stream: TokenStream, token_ids: Sequence[int]) -> list[str]:
    return [stream.push(token_id) for token_id in token_ids]


# Characters of one to four bytes; words that the tokenizers know; joined emoji. U+FFFD itself looks
# like half a character to everyone.
WORDS = [" the", " end", "hello", " ", "é", "世界", "😀", "👩\u200d👧", "🇩🇪", "\n"]
texts = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=12),
    st.lists(st.sampled_from(WORDS), max_size=10).map("".join),
)


# -- whole characters -----------------------------------------------------------------------------


@pytest.mark.parametrize("has_backend", [True, False])
@given(prompt=texts, text=texts)
def test_streamed_pieces_are_whole_characters_and_join_to_the_text(
    byte_level: Tokenizer, prompt: str, text: str, has_backend: bool
) -> None:
    stream = make_stream(byte_level, byte_level.encode(prompt), has_backend)
    shown = pieces(stream, byte_level.encode(text))
    assert "".join(shown) == text
    assert all("\ufffd" not in piece for piece in shown)


@pytest.mark.parametrize("has_backend", [True, False])
@given(prompt=texts, text=texts)
@example(prompt="日本語", text="the cat")
def test_byte_fallback_characters_are_whole_too(
    sentencepiece_like: Tokenizer, prompt: str, text: str, has_backend: bool
) -> None:
    prompt_ids, ids = sentencepiece_like.encode("a" + prompt), sentencepiece_like.encode(text)
    shown = pieces(make_stream(sentencepiece_like, prompt_ids, has_backend), ids)
    assert "".join(shown) == (" " + text if ids else "")
    assert all("\ufffd" not in piece for piece in shown)


def test_character_is_shown_with_its_last_byte(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("🇩")
    assert len(ids) > 2
    stream = byte_level.stream(byte_level.encode("hello"), skip_special_tokens=True)
    assert pieces(stream, ids) == [""] * (len(ids) - 1) + ["🇩"]


def test_character_that_the_end_cuts_is_dropped(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("the ") + byte_level.encode("🇩")[:-1]
    stream = byte_level.stream([], skip_special_tokens=True)
    assert "".join(pieces(stream, ids)) == "the "


@given(data=st.data())
def test_no_sequence_of_tokens_makes_the_stream_fail(
    byte_level: Tokenizer, sentencepiece_like: Tokenizer, data: st.DataObject
) -> None:
    """A model may well generate broken UTF-8; what comes after it is shown again."""
    for tokenizer in (byte_level, sentencepiece_like):
        ids = data.draw(st.lists(st.integers(0, len(tokenizer.hf) - 1), max_size=20))
        for has_backend in (True, False):
            stream = make_stream(tokenizer, ids[:5], has_backend)
            pieces(stream, ids[5:])
            ending = pieces(stream, tokenizer.encode("the end the end"))
            assert "".join(ending).endswith("end the end")


@pytest.mark.parametrize("has_backend", [True, False])
@pytest.mark.parametrize("ending", ["\ufffd", "broken"])
def test_prompt_that_ends_in_half_a_character_is_not_repeated(
    byte_level: Tokenizer, ending: str, has_backend: bool
) -> None:
    """Prompts are cut at a token limit, also inside a character, and may hold U+FFFD itself."""
    tail = byte_level.encode("\ufffd") if ending == "\ufffd" else byte_level.encode("🇩")[:2]
    stream = make_stream(byte_level, byte_level.encode("hello the") + tail, has_backend)
    shown = "".join(pieces(stream, byte_level.encode(" cat sat")))
    assert shown.lstrip("\ufffd") == " cat sat"


# -- what is no character --------------------------------------------------------------------------


@pytest.mark.parametrize("has_backend", [True, False])
@given(data=st.data())
def test_any_tokens_give_the_text_of_a_whole_decode(
    byte_level: Tokenizer, data: st.DataObject, has_backend: bool
) -> None:
    """But for one character that the end cuts."""
    parts = st.one_of(
        st.lists(st.integers(0, len(byte_level.hf) - 1), max_size=6),
        st.lists(st.sampled_from(byte_level.encode("🇩é世")), max_size=30),
        st.sampled_from([byte_level.encode(" the end")]),
    )
    ids = [i for part in data.draw(st.lists(parts, max_size=5)) for i in part]
    stream = make_stream(byte_level, [], has_backend)
    text, whole = "".join(pieces(stream, ids)) + stream.finish(), byte_level.decode(ids)
    assert text == whole or text + "\ufffd" == whole


class Counting:
    """Stands for a backend and its stream; counts the tokens that they decode."""

    def __init__(self, backend: Any) -> None:
        self.backend, self.count, self.num_held = backend, 0, 0

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        self.count += len(token_ids)
        text: str = self.backend.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    def stream(self, context: list[int], skip_special_tokens: bool) -> Any:
        real, counting = DecodeStream(context, skip_special_tokens), self
        self.num_held = len(context)

        class Stream:
            def step(self, backend: Any, token_id: int) -> str | None:
                counting.num_held += 1
                counting.count += counting.num_held
                text = real.step(backend.backend, token_id)
                counting.num_held = 0 if text else counting.num_held
                return text

        return Stream()


def lone_bytes(tokenizer: Tokenizer) -> list[int]:
    """Tokens of a byte that begins a character, of one inside, and of the two in turn."""
    first, *_, last = tokenizer.encode("🇩")
    return [first] * 40 + [last] * 40 + [first, last] * 20


@pytest.mark.parametrize("has_backend", [True, False])
@pytest.mark.parametrize("kind", ["bytes", "special tokens"])
@pytest.mark.parametrize("name", ["byte_level", "sentencepiece_like"])
def test_tokens_without_characters_are_decoded_a_few_times_each(
    name: str,
    kind: str,
    has_backend: bool,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Decoding all of a run again for each of its tokens would be quadratic."""
    tokenizer: Tokenizer = request.getfixturevalue(name)
    run = lone_bytes(tokenizer) * 3 if kind == "bytes" else [tokenizer.hf.eos_token_id] * 360
    ids = [*tokenizer.encode("hello the"), *run, *tokenizer.encode("the world")]
    counting = Counting(tokenizer.hf.backend_tokenizer)
    stream = make_stream(tokenizer, [], has_backend)
    if has_backend:
        monkeypatch.setattr("tokenizers.decoders.DecodeStream", counting.stream)
        monkeypatch.setattr(stream, "_backend", counting)
        stream._start([])
    else:
        monkeypatch.setattr(stream._hf, "decode", counting.decode)
    shown = pieces(stream, ids)
    assert counting.count < 40 * len(ids)
    assert stream._stream is not None or not has_backend, "back on the fast path"
    assert "".join(shown) + stream.finish() == tokenizer.decode(ids)
    if kind == "bytes":  # and they are shown on the way
        assert all(any(shown[at : at + TokenStream.MAX_HELD]) for at in range(10, 300))


def test_bytes_that_are_no_character_are_shown_at_the_end(byte_level: Tokenizer) -> None:
    inside = byte_level.encode("🇩")[-1]
    for ids in ([inside] * 2, [inside] * 9, [inside] * 10):
        detokenizer = Detokenizer(byte_level.stream([], True), SamplingParams(stop="x"))
        for token_id in ids:
            detokenizer.push(token_id)
        assert detokenizer.visible_text(finished=True) == "\ufffd" * len(ids)
        assert detokenizer.visible_text(finished=True) == "\ufffd" * len(ids)  # as often as asked


# -- spaces ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_backend", [True, False])
@given(
    prompt=st.lists(st.sampled_from(["the", "cat", "hello", "at", " "]), min_size=1, max_size=6),
    text=st.lists(st.sampled_from(["the", "cat", "hello", "at", " ", "  "]), max_size=8),
)
def test_continuation_has_the_spaces_of_a_whole_decode(
    sentencepiece_like: Tokenizer,
    metaspace: Tokenizer,
    prompt: list[str],
    text: list[str],
    has_backend: bool,
) -> None:
    for tokenizer in (sentencepiece_like, metaspace):
        prompt_ids = tokenizer.encode("the " + " ".join(prompt))
        ids = tokenizer.encode(" ".join(text))
        whole = tokenizer.hf.decode(prompt_ids + ids)
        stream = make_stream(tokenizer, prompt_ids, has_backend)
        assert tokenizer.hf.decode(prompt_ids) + "".join(pieces(stream, ids)) == whole


@pytest.mark.parametrize("has_backend", [True, False])
def test_word_that_continues_a_prompt_keeps_its_leading_space(
    sentencepiece_like: Tokenizer, metaspace: Tokenizer, has_backend: bool
) -> None:
    for tokenizer in (sentencepiece_like, metaspace):
        stream = make_stream(tokenizer, tokenizer.encode("hello"), has_backend)
        assert "".join(pieces(stream, tokenizer.encode("world"))) == " world"


@pytest.mark.parametrize("has_backend", [True, False])
def test_first_word_after_nothing_but_special_tokens_has_no_space(
    sentencepiece_like: Tokenizer, metaspace: Tokenizer, has_backend: bool
) -> None:
    for tokenizer in (sentencepiece_like, metaspace):
        stream = make_stream(tokenizer, [tokenizer.hf.bos_token_id], has_backend)
        assert "".join(pieces(stream, tokenizer.encode("the world"))) == "the world"


@pytest.mark.parametrize("has_backend", [True, False])
def test_special_tokens_are_left_out_only_when_asked(
    byte_level: Tokenizer, has_backend: bool
) -> None:
    ids = [*byte_level.encode("the"), byte_level.hf.eos_token_id, *byte_level.encode(" end")]
    assert "".join(pieces(make_stream(byte_level, [], has_backend), ids)) == "the end"
    stream = byte_level.stream([], skip_special_tokens=False)
    assert "".join(pieces(stream, ids)) == "the</s> end"


# -- stop strings ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What a caller saw: the text after each token, and how it ended."""

    visible: list[str]
    text: str
    stop: str | None


def run(tokenizer: Tokenizer, ids: Sequence[int], params: SamplingParams) -> Outcome:
    detokenizer = Detokenizer(tokenizer.stream([], skip_special_tokens=True), params)
    visible: list[str] = []
    for token_id in ids:
        stop = detokenizer.push(token_id)
        if stop is not None:
            return Outcome(visible, detokenizer.visible_text(finished=True), stop)
        visible.append(detokenizer.visible_text(finished=False))
    return Outcome(visible, detokenizer.visible_text(finished=True), None)


def reference(tokenizer: Tokenizer, ids: Sequence[int], params: SamplingParams) -> Outcome:
    """The same, slowly: every prefix decoded and searched anew."""
    visible: list[str] = []
    first, text = 0, ""
    for count in range(1, len(ids) + 1):
        decoded = tokenizer.hf.decode(ids[:count])
        if not decoded.endswith("\ufffd"):  # inside a character nothing is added
            text = decoded
        if count < params.min_tokens:
            first = len(text)  # stop strings that end before here do not count
        found = [(text.find(s, max(0, first - len(s) + 1)), s) for s in params.stop_strings]
        hits = [(index, s) for index, s in found if index >= 0]
        if hits:
            index, stop = min(hits)
            end = index + len(stop) if params.include_stop_str_in_output else index
            return Outcome(visible, text[:end], stop)
        held = (n for s in params.stop_strings for n in range(len(s)) if text.endswith(s[:n]))
        visible.append(text[: len(text) - max(held, default=0)])
    return Outcome(visible, text, None)


ALPHABET = ["a", "b", "é", "😀", " the", "\n"]
short_texts = st.lists(st.sampled_from(ALPHABET), max_size=14).map("".join)
stop_lists = st.lists(
    st.lists(st.sampled_from(ALPHABET), min_size=1, max_size=4).map("".join), min_size=1, max_size=3
)


def encode_in_pieces(tokenizer: Tokenizer, parts: Sequence[str]) -> list[int]:
    """Token borders at the parts' borders and wherever the tokenizer puts more."""
    return [token_id for part in parts for token_id in tokenizer.encode(part)]


@given(
    parts=st.lists(short_texts, max_size=4),
    stops=stop_lists,
    include=st.booleans(),
    min_tokens=st.sampled_from([0, 0, 1, 2, 5]),
)
@example(parts=["aab"], stops=["ab"], include=False, min_tokens=0)
@example(parts=["a", "b"], stops=["ab", "b"], include=False, min_tokens=0)
@example(parts=["😀😀b"], stops=["😀b"], include=True, min_tokens=0)
def test_stops_and_visible_text_are_as_in_a_slow_search(
    byte_level: Tokenizer, parts: list[str], stops: list[str], include: bool, min_tokens: int
) -> None:
    params = SamplingParams(stop=stops, include_stop_str_in_output=include, min_tokens=min_tokens)
    ids = encode_in_pieces(byte_level, parts)
    assert run(byte_level, ids, params) == reference(byte_level, ids, params)


@given(before=short_texts, stop=short_texts.filter(bool), after=short_texts, cut=st.integers(0, 9))
def test_nothing_of_a_stop_string_is_ever_visible_and_the_text_before_is_exact(
    byte_level: Tokenizer, before: str, stop: str, after: str, cut: int
) -> None:
    text = before + stop + after
    expected = text[: text.index(stop)]
    ids = encode_in_pieces(byte_level, [text[:cut], text[cut:]])
    outcome = run(byte_level, ids, SamplingParams(stop=stop))
    assert outcome.stop == stop
    assert outcome.text == expected
    for earlier, later in pairwise([*outcome.visible, expected]):
        assert later.startswith(earlier)  # never taken back


@given(parts=st.lists(short_texts, max_size=4), stops=stop_lists)
def test_only_what_may_become_a_stop_string_is_held_back(
    byte_level: Tokenizer, parts: list[str], stops: list[str]
) -> None:
    detokenizer = Detokenizer(byte_level.stream([], True), SamplingParams(stop=stops))
    for token_id in encode_in_pieces(byte_level, parts):
        if detokenizer.push(token_id) is not None:
            break
        shown = detokenizer.visible_text(finished=False)
        held = detokenizer.text[len(shown) :]
        assert detokenizer.text.startswith(shown)
        assert any(stop.startswith(held) and stop != held for stop in stops)


def test_held_back_text_is_shown_at_the_end(byte_level: Tokenizer) -> None:
    detokenizer = Detokenizer(byte_level.stream([], True), SamplingParams(stop="</answer>"))
    for token_id in byte_level.encode("the </ans"):
        assert detokenizer.push(token_id) is None
    assert detokenizer.visible_text(finished=False) == "the "
    assert detokenizer.visible_text(finished=True) == "the </ans"


def test_stop_string_in_the_middle_of_a_token_cuts_the_token(byte_level: Tokenizer) -> None:
    ids = byte_level.encode(" hello")
    assert len(ids) == 1
    outcome = run(byte_level, ids, SamplingParams(stop="ll"))
    assert (outcome.text, outcome.stop) == (" he", "ll")


def test_earliest_stop_string_wins(byte_level: Tokenizer) -> None:
    ids = byte_level.encode(" hello")
    outcome = run(byte_level, ids, SamplingParams(stop=["o", "ll", "el"]))
    assert (outcome.text, outcome.stop) == (" h", "el")


def test_stop_string_is_kept_when_asked_and_what_follows_it_is_not(byte_level: Tokenizer) -> None:
    ids = byte_level.encode(" hello")
    params = SamplingParams(stop="ll", include_stop_str_in_output=True)
    outcome = run(byte_level, ids, params)
    assert (outcome.text, outcome.stop) == (" hell", "ll")


def test_stop_string_of_the_prompt_does_not_count(byte_level: Tokenizer) -> None:
    prompt = byte_level.encode("the END")
    detokenizer = Detokenizer(byte_level.stream(prompt, True), SamplingParams(stop="END of"))
    assert all(detokenizer.push(token_id) is None for token_id in byte_level.encode(" of END"))


def test_stop_string_before_min_tokens_is_text(byte_level: Tokenizer) -> None:
    ids = encode_in_pieces(byte_level, ["a", "b", "a", "b"])
    params = SamplingParams(stop="a", min_tokens=3)
    outcome = run(byte_level, ids, params)
    assert outcome.visible == ["a", "ab"]
    assert (outcome.text, outcome.stop) == ("ab", "a")


def test_hidden_token_leaves_no_text(byte_level: Tokenizer) -> None:
    detokenizer = Detokenizer(byte_level.stream([], True), SamplingParams(stop="end"))
    ids = byte_level.encode("the end")
    for token_id in ids[:-1]:
        detokenizer.push(token_id)
    before = detokenizer.text
    assert detokenizer.push(ids[-1], hidden=True) is None
    assert detokenizer.visible_text(finished=True) == before


def test_without_detokenising_the_text_stays_empty() -> None:
    detokenizer = Detokenizer(None, SamplingParams(detokenize=False))
    assert detokenizer.push(5) is None
    assert detokenizer.visible_text(finished=False) == ""
    assert detokenizer.visible_text(finished=True) == ""


# -- the tokenizer's door -------------------------------------------------------------------------


def test_folder_without_a_tokenizer_is_refused_with_a_way_out(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no tokenizer could be loaded.*skip_tokenizer_init"):
        Tokenizer(tmp_path)


def test_chat_without_a_template_is_refused(byte_level: Tokenizer) -> None:
    with pytest.raises(ValueError, match="no chat template; pass chat_template"):
        byte_level.encode_chat([{"role": "user", "content": "hello"}])


def test_chat_goes_through_the_given_template(byte_level: Tokenizer) -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    text, ids = byte_level.encode_chat([{"role": "user", "content": "hello"}], template)
    assert byte_level.hf.decode(ids) == text == "user: hello\n"


@pytest.mark.parametrize(
    ("message", "template", "error"),
    [
        ({"role": 5, "content": "x"}, "x", "role must be a string, got 5"),
        ({"role": "user"}, "x", "content must be a string or a list of text parts, got None"),
        ({"role": "user", "content": [{"type": "image"}]}, "x", "content must be a string"),
        ({"role": "user", "content": "x"}, "{{ raise_exception('no') }}", "template failed: no"),
        ({"role": "user", "content": "x"}, "{% for %}", "the chat template failed"),
        ({"role": "user", "content": "\ud800"}, "{{ messages[0].content }}", "not valid Unicode"),
    ],
)
def test_bad_conversation_is_a_value_error(
    byte_level: Tokenizer, message: dict[str, Any], template: str, error: str
) -> None:
    with pytest.raises(ValueError, match=error):
        byte_level.encode_chat([message], template)


def test_text_that_is_not_unicode_is_a_value_error(byte_level: Tokenizer) -> None:
    with pytest.raises(ValueError, match="not valid Unicode"):
        byte_level.encode("a\ud800b")


def test_end_of_sequence_id_is_the_tokenizers(byte_level: Tokenizer) -> None:
    assert byte_level.eos_token_id == byte_level.hf.convert_tokens_to_ids(EOS)
