"""The tokenizer loaded past AutoTokenizer is the one that AutoTokenizer loads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from compiledllm.engine.tokenizer_class import load_tokenizer
from compiledllm.engine.tokenizer_snapshot import open_tokenizer
from tests.support.tiny import copy_tokenizer

TEXTS = [
    "The capital of France is",
    " two  spaces\n\ttab",
    "<|im_start|>user\nHi<|im_end|>",
    "日本 🙂 é",
    "",
]


def write(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(fields))


def test_tokenizer_of_the_default_model_is_that_of_auto_tokenizer(default_model: Path) -> None:
    from transformers import AutoTokenizer

    ours, theirs = load_tokenizer(default_model), AutoTokenizer.from_pretrained(default_model)
    assert type(ours) is type(theirs)
    assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    assert ours.init_kwargs.keys() == theirs.init_kwargs.keys()
    for name in ("chat_template", "special_tokens_map", "eos_token_id", "padding_side"):
        assert getattr(ours, name) == getattr(theirs, name)
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert ours.decode(ids) == theirs.decode(ids)


CLASSES = ["Qwen2Tokenizer", "LlamaTokenizerFast", "GemmaTokenizer", "GPT2Tokenizer", "Unknown"]
CLASSES += ["PreTrainedTokenizerFast", None]
TYPES = ["qwen3", "llama", "mistral", "gemma3_text", "gpt_oss", "qwen3_5", "of_no_class"]


@pytest.mark.parametrize(("name", "model_type"), zip(CLASSES, TYPES, strict=True))
def test_class_is_chosen_as_auto_tokenizer_chooses(
    name: str | None, model_type: str, default_model: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    copy_tokenizer(default_model, tmp_path)
    stored = json.loads((default_model / "tokenizer_config.json").read_text())
    write(tmp_path / "tokenizer_config.json", **{**stored, "tokenizer_class": name})
    write(tmp_path / "config.json", model_type=model_type)
    found = []
    for load in (load_tokenizer, AutoTokenizer.from_pretrained):
        try:
            tokenizer = load(tmp_path)
            found.append((type(tokenizer), tokenizer.backend_tokenizer.to_str()))
        except Exception as error:
            found.append((type(error), str(error)))
    assert found[0] == found[1]


def test_start_imports_neither_transformers_nor_a_compiler(
    default_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where an earlier start has kept the tokenizer; in a process of the server not even torch.

    A class of a tokenizer's own imports no compiler either.
    """
    monkeypatch.setenv("COMPILEDLLM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("COMPILEDLLM_DISABLE_CACHE", "0")
    open_tokenizer(default_model)
    copy_tokenizer(default_model, tmp_path)
    write(tmp_path / "config.json", model_type="llama")
    write(tmp_path / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    program = f"""
import pathlib, sys
from compiledllm import Engine, SamplingParams
from compiledllm.engine.tokenizer import Tokenizer
from compiledllm.engine.tokenizer_class import load_tokenizer
from compiledllm.engine.tokenizer_snapshot import warm_up
def imported(*names): return sorted(set(names) & set(sys.modules))
model, other = pathlib.Path({str(default_model)!r}), pathlib.Path({str(tmp_path)!r})
warm_up()
talk = [{{"role": "user", "content": "Hi"}}]
Tokenizer(model).encode_chat(talk)
print(imported("transformers", "torch", "numpy"))
Engine(model, device="cpu", max_model_len=64).chat(talk, SamplingParams(max_tokens=1))
print(imported("transformers"))
load_tokenizer(other)
print(imported("torch._dynamo", "torch._inductor", "triton"))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == ["[]"] * 3, done.stdout + done.stderr


def test_a_tokenizer_can_be_loaded_while_its_modules_are_imported(default_model: Path) -> None:
    code = f"""
import sys, threading, time
from pathlib import Path
from compiledllm.engine.tokenizer_class import load_tokenizer, warm_up
thread = threading.Thread(target=warm_up)
thread.start()
while "transformers" not in sys.modules:
    time.sleep(0.001)
load_tokenizer(Path({str(default_model)!r}))
thread.join()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
