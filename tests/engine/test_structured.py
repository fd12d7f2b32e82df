"""Structured outputs through the whole engine: a random model, whose every token is noise, still
writes what it was asked for; and the real one."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from compiledllm import (
    Engine,
    ReasoningTokens,
    RequestOutput,
    SamplingParams,
    StructuredOutputsParams,
)
from compiledllm.types import SchedulerOutput

EOS, VOCAB, END = 2, 300, 3  # END is "!", which no form has
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[A-Z][a-z]{1,8}$"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
COLOURS = ["red", "green", "blue and white"]
FORMS: list[dict[str, Any]] = [
    {"json": PERSON, "disable_any_whitespace": True},
    {"regex": r"[a-f]{3}-\d{2,4}"},
    {"choice": COLOURS},
    {"grammar": 'root ::= "(" x ")"\nx ::= [0-9] | "(" x ")"'},
]


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, with a tokenizer whose tokens are bytes."""
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("bytes") / "model"
    shutil.copytree(tiny_llama(vocab_size=VOCAB, eos_token_id=EOS), folder)
    vocab = {text: i for i, text in enumerate(("<pad>", "<bos>", "<eos>"))}
    for piece in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[piece] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text) for text in ("<pad>", "<bos>", "<eos>")])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    return folder


def make(model: Path, device: str = "cpu", **options: Any) -> Engine:
    fixed = {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 2**24}
    return Engine(model, device=device, **(fixed | options))


@pytest.fixture(scope="module")
def engine(model: Path) -> Engine:
    return make(model)


def params(form: dict[str, Any], **more: Any) -> SamplingParams:
    fixed = {"max_tokens": 200, "structured_outputs": form}
    return SamplingParams(**(fixed | more))  # type: ignore[arg-type]


def run(engine: Engine, prompts: list[str], asked: Any) -> list[RequestOutput]:
    return engine.generate(prompts, asked, use_tqdm=False)


def check(form: dict[str, Any], text: str) -> None:
    if "json" in form:
        jsonschema.validate(json.loads(text), form["json"])
        assert " " not in text
    elif "regex" in form:
        assert re.fullmatch(form["regex"], text)
    elif "choice" in form:
        assert text in form["choice"]
    else:
        depth = text.count("(")
        assert re.fullmatch(rf"\({{{depth}}}[0-9]\){{{depth}}}", text)


def check_all(outputs: list[RequestOutput], forms: list[dict[str, Any]]) -> None:
    for output, form in zip(outputs, forms, strict=True):
        for completion in output.outputs:
            assert completion.finish_reason == "stop", (completion, form)
            assert completion.token_ids[-1] == EOS
            check(form, completion.text)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("temperature", [0, 1])
def test_noise_takes_every_form(temperature: float, device: str, model: Path) -> None:
    engine = make(model, device, enforce_eager=device == "cpu")
    for form in FORMS:
        asked = [params(form, temperature=temperature, seed=seed) for seed in range(4)]
        check_all(run(engine, [f"p{i}" for i in range(4)], asked), [form] * 4)


def test_several_outputs_have_streams_of_their_own(engine: Engine) -> None:
    (output,) = run(engine, ["x"], params(FORMS[0], n=5, seed=1))
    check_all([output], [FORMS[0]])
    assert len({completion.text for completion in output.outputs}) == 5
    (again,) = run(engine, ["x"], params(FORMS[0], seed=3))
    assert again.outputs[0].text == output.outputs[2].text


def test_reasoning_is_what_it_would_be_without_the_form(engine: Engine) -> None:
    plain = SamplingParams(n=3, max_tokens=60, seed=2)
    without = run(engine, ["x"], plain)[0].outputs
    thought = without[0].token_ids
    end = next(i for i in thought[5:] if i not in thought[:5])
    form = FORMS[1] | {"reasoning": ReasoningTokens(end)}
    (output,) = run(engine, ["x"], params(form, n=3, seed=2, max_tokens=60))
    for other, one in zip(without, output.outputs, strict=True):
        if end not in other.token_ids:
            assert (one.token_ids, one.finish_reason) == (other.token_ids, other.finish_reason)
            continue
        length = other.token_ids.index(end) + 1
        assert one.token_ids[:length] == other.token_ids[:length] and one.finish_reason == "stop"
        check(FORMS[1], engine.tokenizer.decode(one.token_ids[length:]))  # type: ignore[union-attr]
    ends = params(form, logit_bias={EOS: 100})  # as any text without a form
    assert run(engine, ["x"], ends)[0].outputs[0].token_ids == [EOS]


def test_logprobs_are_the_models_own(engine: Engine) -> None:
    """The mask hides nothing from them: most of the likeliest tokens were not allowed."""
    (output,) = run(engine, ["x"], params(FORMS[1], logprobs=3, temperature=0))
    plain = run(engine, ["x"], SamplingParams(max_tokens=1, logprobs=3, temperature=0))[0]
    found, expected = output.outputs[0].logprobs, plain.outputs[0].logprobs
    assert found is not None and expected is not None
    best = {i: entry.logprob for i, entry in expected[0].items()}
    told = {i: entry.logprob for i, entry in found[0].items() if (entry.rank or 9) <= 3}
    assert told == pytest.approx(best) and all(math.isfinite(value) for value in told.values())
    assert any(next(iter(position.values())).rank != 1 for position in found)


def test_other_rules_hold_within_the_form(engine: Engine) -> None:
    """Bias, bans and penalties choose among what is allowed; a complete output ends anyway."""
    ids = {c: engine.tokenizer.encode(c)[0] for c in "0123456789abc-"}  # type: ignore[union-attr]
    digits = {"regex": "[0-9]{12}"}
    biased = params(digits, logit_bias={ids["7"]: 100}, temperature=0)
    banned = params(digits, bad_words=["1", "23"])
    few = params(digits, allowed_token_ids=[ids["4"], ids["5"], ids["a"]])
    spread = params({"regex": "[0-9]{10}"}, frequency_penalty=2.0, presence_penalty=2.0)
    outputs = run(engine, ["a", "b", "c", "d"], [biased, banned, few, spread])
    texts = [output.outputs[0].text for output in outputs]
    assert all(output.outputs[0].finish_reason == "stop" for output in outputs)
    assert texts[0] == "7" * 12
    assert len(texts[1]) == 12 and "1" not in texts[1] and "23" not in texts[1]
    assert len(texts[2]) == 12 and set(texts[2]) <= {"4", "5"}
    assert len(texts[3]) == 10 and len(set(texts[3])) > 5
    nothing = params(digits, allowed_token_ids=[ids["a"]])
    failed = run(engine, ["x"], nothing)[0].outputs[0]
    assert failed.finish_reason == "error" and "every token is banned" in str(failed.stop_reason)


def test_max_tokens_and_stop_strings_cut_an_output_off(engine: Engine) -> None:
    (output,) = run(engine, ["x"], params(FORMS[0], max_tokens=5))
    assert output.outputs[0].finish_reason == "length" and len(output.outputs[0].token_ids) == 5
    (output,) = run(engine, ["x"], params(FORMS[1], stop="-"))
    assert output.outputs[0].stop_reason == "-" and len(output.outputs[0].text) == 3


def crowd(count: int) -> tuple[list[str], list[SamplingParams]]:
    """Requests of all forms and of none, some with reasoning before the form."""
    rng, prompts, asked = random.Random(5), [], []
    for i in range(count):
        prompts.append("".join(rng.choice("abcdefgh ") for _ in range(rng.randrange(1, 60))))
        temperature = rng.choice([0, 0.7, 1.5])
        if i % 3 == 2:
            asked.append(SamplingParams(max_tokens=30, seed=i, temperature=temperature))
        else:
            asked.append(params(rng.choice(FORMS), max_tokens=120, seed=i, temperature=temperature))
        if i % 3 == 1:
            thinks(asked[-1])
    return prompts, asked


def thinks(asked: SamplingParams) -> None:
    """Let the output begin with reasoning, which ends after some tokens."""
    form = asked.structured_outputs
    assert form is not None
    asked.structured_outputs = dataclasses.replace(form, reasoning=ReasoningTokens(END))
    asked.temperature, asked.logit_bias = 1, {END: 4, EOS: -100}


def results(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def expected(engine: Engine) -> list[list[int]]:
    """Of the crowd, one after the other."""
    prompts, asked = crowd(18)
    pairs = zip(prompts, asked, strict=True)
    outputs = [run(engine, [prompt], one)[0] for prompt, one in pairs]
    lengths: list[int] = []  # of reasoning
    for output, one in zip(outputs, asked, strict=True):
        if one.structured_outputs is not None:
            form = {f: getattr(one.structured_outputs, f) for f in ("json", "regex", "choice")}
            form = {name: value for name, value in form.items() if value is not None}
            if one.structured_outputs.reasoning is not None:
                completion = output.outputs[0]
                thought, _, completion.text = completion.text.partition("!")
                lengths.append(len(thought))
            check_all([output], [form or FORMS[3]])
    assert len(lengths) == 6 and max(lengths) > 3
    return results(outputs)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"async_scheduling": True},
        {"num_kv_blocks": 14, "max_num_seqs": 8},
        {"num_kv_blocks": 14, "async_scheduling": True, "enable_prefix_caching": False},
        {"max_num_batched_tokens": 16, "max_num_seqs": 16},
    ],
    ids=["together", "ahead", "preempted", "preempted_ahead", "in_chunks"],
)
def test_a_crowd_gets_what_each_gets_alone(
    options: dict[str, Any], model: Path, expected: list[list[int]]
) -> None:
    engine = make(model, **options)
    assert results(run(engine, *crowd(18))) == expected
    if "num_kv_blocks" in options:
        assert engine.core.scheduler.num_preemptions > 1
    engine.core.scheduler.check_invariants()
    check_nothing_is_left(engine)


def check_nothing_is_left(engine: Engine) -> None:
    run(engine, ["x"], SamplingParams(max_tokens=1))  # rows are released with the next step
    assert not engine.core.runner.table.rules.are_used


def test_only_requests_with_a_form_wait_for_their_token(model: Path) -> None:
    engine = make(model, async_scheduling=True)
    steps: list[int] = []
    launch = engine.core.runner.launch

    def counted(step: SchedulerOutput) -> Any:
        steps.append(len(step.scheduled))
        return launch(step)

    engine.core.runner.launch = counted  # type: ignore[method-assign]
    plain = SamplingParams(max_tokens=20, ignore_eos=True)
    run(engine, ["x", "y"], [plain, params({"regex": "[a-z]{20}"}, max_tokens=20)])
    assert steps.count(2) >= 8 and len(steps) > 30  # the one with a form is in every second step


def test_a_failed_step_is_taken_up_again(model: Path, expected: list[list[int]]) -> None:
    """Rows are made again from the tokens that there are."""
    engine = make(model)
    engine.core.isolate_failures()
    launch, calls = engine.core.runner.launch, 0

    def fails(step: SchedulerOutput) -> Any:
        nonlocal calls
        calls += 1
        if calls in (7, 40):
            raise RuntimeError("once")
        return launch(step)

    engine.core.runner.launch = fails  # type: ignore[method-assign]
    assert results(run(engine, *crowd(18))) == expected


def test_a_row_of_nan_is_started_over(model: Path, expected: list[list[int]]) -> None:
    engine = make(model)
    compute, calls = engine.core.runner.model.compute_logits, 0

    def spoilt(hidden: torch.Tensor, *rest: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        logits = compute(hidden, *rest)
        if calls == 9:
            logits[0] = math.nan
        return logits

    engine.core.runner.model.compute_logits = spoilt  # type: ignore[method-assign]
    assert results(run(engine, *crowd(18))) == expected
    assert engine.core.scheduler.num_failed_rows == 0


def test_streams_grow_and_can_be_left(engine: Engine) -> None:
    texts = [output.outputs[0].text for output in engine.stream("x", params(FORMS[0], seed=2))]
    assert all(b.startswith(a) for a, b in zip(texts, texts[1:], strict=False))
    check(FORMS[0], texts[-1])
    stream = engine.stream("x", params(FORMS[0], seed=2))
    next(stream)
    stream.close()
    assert not engine.core.has_unfinished()
    check_nothing_is_left(engine)


def test_tools_reach_the_chat_template(engine: Engine) -> None:
    template = (
        "{% for tool in tools %}{{ tool.function.name }};{% endfor %}"
        "{% for message in messages %}{{ message.role }}:{{ message.content }};{% endfor %}"
    )
    conversation = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]},
        {"role": "tool", "content": "42"},
    ]
    tools = [{"type": "function", "function": {"name": "f"}}]
    asked = SamplingParams(max_tokens=1)
    (output,) = engine.chat(conversation, asked, False, template, tools=tools)
    assert output.prompt == "f;user:hi;assistant:;tool:42;"


def test_a_bad_form_starts_nothing(engine: Engine) -> None:
    for form, message in (
        ({"regex": "(?=a)"}, "look-around"),
        (FORMS[1] | {"reasoning": ReasoningTokens(VOCAB)}, "reasoning has 300"),
        (
            {"json": {"type": "object", "minProperties": "x"}},
            'minProperties "x" must be an integer',
        ),
    ):
        with pytest.raises(ValueError, match=message):
            run(engine, ["a", "b"], [SamplingParams(), params(form)])
        assert not engine.core.has_unfinished()


def test_what_a_form_needs_is_said(model: Path) -> None:
    without = make(model, skip_tokenizer_init=True)
    with pytest.raises(ValueError, match="structured_outputs needs a tokenizer"):
        without.generate([[5, 6]], params(FORMS[0]), use_tqdm=False)


# -- the real model -------------------------------------------------------------------------------


@pytest.mark.real_model
def test_the_real_model_fills_in_a_schema_and_chooses(default_model: Path) -> None:
    engine = Engine(default_model, device="cpu", dtype="float32", enforce_eager=True)
    question = [{"role": "user", "content": "What is the capital of France? Answer in JSON."}]
    schema = {
        "type": "object",
        "properties": {"capital": {"type": "string", "maxLength": 20}},
        "required": ["capital"],
        "additionalProperties": False,
    }
    asked = SamplingParams(
        temperature=0, max_tokens=40, structured_outputs=StructuredOutputsParams(json=schema)
    )
    (answer,) = engine.chat(question, asked, use_tqdm=False)
    assert answer.outputs[0].finish_reason == "stop"
    assert json.loads(answer.outputs[0].text) == {"capital": "Paris"}
    choice = SamplingParams(temperature=0, structured_outputs={"choice": ["Berlin", "Paris"]})  # type: ignore[arg-type]
    (answer,) = engine.generate(["The capital of France is the city of "], choice, use_tqdm=False)
    assert answer.outputs[0].text == "Paris"
