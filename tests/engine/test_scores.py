"""Scores equal those of transformers: cosines, and the judgement of rerankers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compiledllm import ConfigError, Engine, SamplingParams
from tests.support.tiny import CHAT, copy_tokenizer, save_random_model

pytestmark = pytest.mark.real_model  # its tokenizer

QWEN3_RERANKER = CHAT | {"head_dim": 32, "tie_word_embeddings": True}
OPTIONS: dict[str, Any] = {"dtype": "float32", "max_model_len": 512, "enforce_eager": True}
QUERY = "What is the capital of China?"
DOCUMENTS = ["The capital of China is Beijing.", "Gravity attracts bodies.", ""]
TASK = "Given a web search query, retrieve relevant passages that answer the query"
BEGINNING = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and "
    'the Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
    "<|im_start|>user\n"
)
END = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory, default_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("models") / "Tiny-Reranker"
    save_random_model(folder, "qwen3", **QWEN3_RERANKER)
    copy_tokenizer(default_model, folder)
    return folder


@pytest.fixture(scope="module")
def classifier(reranker: Path) -> Path:
    """The same model with a head of one label in place of its vocabulary."""
    import torch
    from transformers import AutoModelForSequenceClassification

    folder = reranker.with_name("Tiny-seq-cls")
    model = AutoModelForSequenceClassification.from_pretrained(
        reranker, num_labels=1, pad_token_id=0, dtype=torch.float32
    )
    torch.manual_seed(3)
    model.score.weight.data.normal_(0, 0.15)
    model.save_pretrained(folder)
    copy_tokenizer(reranker, folder)
    return folder


@pytest.fixture(scope="module")
def engine(reranker: Path) -> Engine:
    return Engine(reranker, **OPTIONS)


def prompts_of(engine: Engine, task: str = TASK, room: int | None = None) -> list[list[int]]:
    """The prompts of the model card: beginning, pair and end are tokenised one by one."""

    def encode(text: str) -> list[int]:
        ids: list[int] = engine.get_tokenizer().encode(text, add_special_tokens=False)
        return ids

    return [
        encode(BEGINNING)
        + encode(f"<Instruct>: {task}\n<Query>: {QUERY}\n<Document>: {document}")[:room]
        + encode(END)
        for document in DOCUMENTS
    ]


def judged_by_transformers(checkpoint: Path, engine: Engine, **how: Any) -> list[float]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    no, yes = engine.get_tokenizer().convert_tokens_to_ids(["no", "yes"])
    with torch.inference_mode():
        logits = [model(torch.tensor([ids])).logits[0, -1] for ids in prompts_of(engine, **how)]
    return [float(line[[no, yes]].softmax(0)[1]) for line in logits]


def scores(engine: Engine, *texts: Any, **more: Any) -> list[float]:
    return [output.outputs.score for output in engine.score(*texts, use_tqdm=False, **more)]


def test_a_reranker_judges_as_in_transformers(reranker: Path, engine: Engine) -> None:
    expected = judged_by_transformers(reranker, engine)
    assert scores(engine, QUERY, DOCUMENTS) == pytest.approx(expected, abs=1e-5)
    assert scores(engine, [QUERY] * 3, DOCUMENTS) == pytest.approx(expected, abs=1e-5)
    assert len({round(score, 4) for score in expected}) == 3


def test_the_task_and_a_limit_change_the_prompt(reranker: Path, engine: Engine) -> None:
    expected = judged_by_transformers(reranker, engine, task="Find a joke")
    found = scores(engine, QUERY, DOCUMENTS, instruction="Find a joke")
    assert found == pytest.approx(expected, abs=1e-5)
    around = len(prompts_of(engine, room=0)[0])
    expected = judged_by_transformers(reranker, engine, room=9)
    found = scores(engine, QUERY, DOCUMENTS, truncate_prompt_tokens=around + 9)
    assert found == pytest.approx(expected, abs=1e-5)
    long = QUERY + " a b" * 2000
    assert len(scores(engine, long, DOCUMENTS[0], truncate_prompt_tokens=-1)) == 1
    with pytest.raises(ValueError, match="tokens"):
        engine.score(long, DOCUMENTS[0])


def test_a_query_may_bring_the_prompt(engine: Engine) -> None:
    pair = f"<Instruct>: {TASK}\n<Query>: {QUERY}\n<Document>: "
    whole = scores(engine, BEGINNING + pair, [text + END for text in DOCUMENTS[:2]])
    assert whole == pytest.approx(scores(engine, QUERY, DOCUMENTS[:2]), abs=1e-5)


def test_a_classifier_judges_as_in_transformers(classifier: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(classifier, dtype=torch.float32)
    engine = Engine(classifier, **OPTIONS)
    with torch.inference_mode():
        expected = [
            float(model(torch.tensor([ids])).logits[0, 0].sigmoid()) for ids in prompts_of(engine)
        ]
    assert scores(engine, QUERY, DOCUMENTS) == pytest.approx(expected, abs=1e-5)


def test_other_models_score_by_cosine(classifier: Path, tmp_path: Path) -> None:
    folder = tmp_path / "embedding"
    save_random_model(folder, "qwen3", **QWEN3_RERANKER)
    copy_tokenizer(classifier, folder)
    engine = Engine(folder, **OPTIONS)
    texts = [QUERY, *DOCUMENTS[:2]]
    query, *documents = [np.array(o.outputs.embedding) for o in engine.embed(texts)]
    expected = [float(query @ document) for document in documents]
    assert scores(engine, QUERY, DOCUMENTS[:2]) == pytest.approx(expected, abs=1e-5)
    assert scores(engine, QUERY, QUERY) == pytest.approx([1], abs=1e-5)
    with pytest.raises(ValueError, match="instruction is for rerankers"):
        engine.score(QUERY, QUERY, instruction="Find a joke")
    assert not engine.core.has_unfinished()


def test_texts_that_make_no_pairs_are_refused(engine: Engine) -> None:
    with pytest.raises(ValueError, match="2 queries and 3 documents make no pairs"):
        engine.score([QUERY] * 2, DOCUMENTS)
    with pytest.raises(ValueError, match="at least one query and one document"):
        engine.score(QUERY, [])


def test_rerankers_of_other_models_are_refused_by_name(tmp_path: Path, default_model: Path) -> None:
    folder = tmp_path / "llama-reranker"
    save_random_model(folder, "llama", **CHAT)
    copy_tokenizer(default_model, folder)
    engine = Engine(folder, **OPTIONS)
    with pytest.raises(ConfigError, match="model_type 'llama' are not supported"):
        engine.score(QUERY, DOCUMENTS)


def test_the_config_may_say_that_a_model_judges(engine: Engine, tmp_path: Path) -> None:
    """As vLLM's overrides for the original Qwen3-Reranker do."""
    for path in engine.model_path.iterdir():
        (tmp_path / path.name).symlink_to(path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    more = {"classifier_from_token": ["no", "yes"]}
    (tmp_path / "config.json").write_text(json.dumps(config | more))
    found = scores(Engine(tmp_path, **OPTIONS), QUERY, DOCUMENTS)
    assert found == pytest.approx(scores(engine, QUERY, DOCUMENTS), abs=1e-5)


def test_a_reranker_still_writes(engine: Engine) -> None:
    (output,) = engine.generate([QUERY], SamplingParams(max_tokens=2), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 2
