"""The real `openai` client against a running server."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import openai
import pytest
import requests
from openai import AsyncOpenAI, OpenAI

pytestmark = pytest.mark.real_model  # its tokenizer

MESSAGES: Any = [{"role": "user", "content": "Name three colours."}]


@pytest.fixture(scope="module")
def client(server: Any) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def chat(client: OpenAI, **fields: Any) -> Any:
    fixed = {"model": "tiny", "messages": MESSAGES, "max_completion_tokens": 8, "seed": 3}
    return client.chat.completions.create(**(fixed | fields))


def complete(client: OpenAI, **fields: Any) -> Any:
    fixed = {"model": "tiny", "prompt": "Once upon a time", "max_tokens": 8, "seed": 3}
    return client.completions.create(**(fixed | fields))


def test_models_are_listed_by_every_name(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "other-name"]
    assert client.models.retrieve("other-name").id == "other-name"
    with pytest.raises(openai.NotFoundError, match="'nope' does not exist; there is tiny"):
        client.models.retrieve("nope")


def test_chat_answers_with_usage(client: OpenAI) -> None:
    answer = chat(client)
    (choice,) = answer.choices
    assert choice.message.role == "assistant" and choice.finish_reason == "length"
    assert answer.usage.completion_tokens == 8
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 8
    assert chat(client).usage.prompt_tokens_details.cached_tokens > 0


def test_seeds_fix_the_answer_alone_and_in_a_crowd(client: OpenAI) -> None:
    first, again, other = chat(client), chat(client), chat(client, seed=4)
    assert first.choices[0].message.content == again.choices[0].message.content
    assert first.choices[0].message.content != other.choices[0].message.content
    many = chat(client, n=3)
    assert [choice.index for choice in many.choices] == [0, 1, 2]
    assert many.choices[0].message.content == first.choices[0].message.content
    assert many.choices[1].message.content == other.choices[0].message.content
    assert many.usage.completion_tokens == 24


@pytest.mark.parametrize("n", [1, 3])
def test_streams_add_up_to_the_whole_answer(n: int, client: OpenAI) -> None:
    whole = chat(client, n=n, logprobs=True, top_logprobs=2)
    texts, tokens = [""] * n, [0] * n
    reasons: list[Any] = [None] * n
    usage = None
    options = {"include_usage": True}
    for chunk in chat(
        client, n=n, stream=True, stream_options=options, logprobs=True, top_logprobs=2
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            tokens[choice.index] += len(choice.logprobs.content) if choice.logprobs else 0
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.message.content for choice in whole.choices]
    assert tokens == [8] * n and reasons == ["length"] * n
    assert usage is not None and usage.completion_tokens == 8 * n


def test_logprobs_of_a_chat(client: OpenAI) -> None:
    answer = chat(client, temperature=0, logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    assert len(content) == 8
    for position in content:
        assert position.logprob <= 0 and len(position.top_logprobs) == 3
        assert position.top_logprobs[0].logprob == position.logprob  # it was the best
        assert bytes(position.bytes).decode() == position.token


def test_stop_strings_end_the_text(client: OpenAI) -> None:
    whole = complete(client, temperature=0, max_tokens=30).choices[0].text
    stop = whole[10:14]
    choice = complete(client, temperature=0, max_tokens=30, stop=[stop]).choices[0]
    assert choice.finish_reason == "stop" and choice.stop_reason == stop
    assert choice.text == whole[: whole.index(stop)]
    streamed = complete(client, temperature=0, max_tokens=30, stop=[stop], stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == choice.text


def test_many_prompts_in_one_request(client: OpenAI) -> None:
    answer = complete(client, prompt=["One", "Two", "Three"], n=2, temperature=0)
    assert [choice.index for choice in answer.choices] == list(range(6))
    alone = complete(client, prompt="Three", temperature=0).choices[0].text
    assert answer.choices[4].text == answer.choices[5].text == alone
    texts = [""] * 6
    for chunk in complete(client, prompt=["One", "Two", "Three"], n=2, temperature=0, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in answer.choices]


def test_prompts_may_be_token_ids(client: OpenAI) -> None:
    ids = [504, 3575, 282]
    one = complete(client, prompt=ids, temperature=0)
    assert one.usage.prompt_tokens == 3
    many = complete(client, prompt=[ids, ids[:2]], temperature=0)
    assert many.choices[0].text == one.choices[0].text


def embed(client: OpenAI, given: Any, **fields: Any) -> Any:
    return client.embeddings.create(model="tiny", input=given, **fields)


def test_embeddings_are_the_same_in_every_form(client: OpenAI) -> None:
    """The client asks for base64 unless told otherwise, and returns floats either way."""
    texts = ["Once upon a time", "Name three colours."]
    both = embed(client, texts)
    assert [item.index for item in both.data] == [0, 1]
    ids = requests.post(f"{client.base_url}../tokenize", json={"prompt": texts[0]}).json()["tokens"]
    for given in (texts[0], [texts[0]], ids, [ids]):
        for form in ({}, {"encoding_format": "float"}):
            answer = embed(client, given, **form)
            assert answer.usage.prompt_tokens == answer.usage.total_tokens == len(ids)
            assert answer.data[0].embedding == pytest.approx(both.data[0].embedding, abs=1e-5)
    assert sum(value**2 for value in both.data[0].embedding) == pytest.approx(1)


def test_dimensions_cut_a_vector_which_stays_of_length_one(client: OpenAI) -> None:
    whole, cut = (
        embed(client, "Hello", **more).data[0].embedding for more in ({}, {"dimensions": 8})
    )
    length = math.sqrt(sum(value**2 for value in whole[:8]))
    assert cut == pytest.approx([value / length for value in whole[:8]], abs=1e-5)
    raw = embed(client, "Hello", extra_body={"normalize": False}).data[0].embedding
    assert sum(value**2 for value in raw) != pytest.approx(1)


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"input": [], "model": "tiny"}, "input", "input must be"),
        ({"input": "a", "dimensions": 65}, "dimensions", "dimensions must be at most 64, got 65"),
        ({"input": "a", "extra_body": {"stream": True}}, "stream", "stream must be false"),
        ({"input": [1] * 2049}, "input", "the prompt has 2049 tokens"),
        ({"input": [[1], [50000]]}, "input", "token id 50000"),
        ({"input": ["a"] * 2049}, "input", "at most 2048, got 2049 items"),
    ],
)
def test_bad_inputs_to_embed_are_named(
    fields: dict[str, Any], param: str, message: str, client: OpenAI
) -> None:
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        client.embeddings.create(**({"model": "tiny"} | fields))
    assert caught.value.param == param


def test_embeddings_beside_answers_that_are_generated(client: OpenAI) -> None:
    alone = embed(client, "Hello").data[0].embedding
    stream = complete(client, max_tokens=200, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    vectors = [item.embedding for item in embed(client, ["Hello"] * 40).data]
    assert vectors == [pytest.approx(alone, abs=1e-5)] * 40
    stream.close()


@pytest.mark.parametrize("max_tokens", [0, 3])
def test_echo_with_logprobs_scores_the_prompt(max_tokens: int, client: OpenAI) -> None:
    prompt = "The capital of France is"
    answer = complete(client, prompt=prompt, echo=True, logprobs=2, max_tokens=max_tokens)
    choice, found = answer.choices[0], answer.choices[0].logprobs
    assert choice.text.startswith(prompt)
    count = answer.usage.prompt_tokens + max_tokens
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == count
    assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
    assert all(value <= 0 and math.isfinite(value) for value in found.token_logprobs[1:])
    assert "".join(found.tokens[: answer.usage.prompt_tokens]) == prompt
    assert [prompt[start] for start in found.text_offset[: answer.usage.prompt_tokens]]
    assert answer.usage.completion_tokens == max_tokens
    streamed = complete(
        client, prompt=prompt, echo=True, logprobs=2, max_tokens=max_tokens, stream=True
    )
    pieces = [chunk.choices[0] for chunk in streamed]
    assert "".join(piece.text for piece in pieces) == choice.text
    values = [v for piece in pieces if piece.logprobs for v in piece.logprobs.token_logprobs]
    assert values == pytest.approx(found.token_logprobs, nan_ok=True) or values[1:] == (
        pytest.approx(found.token_logprobs[1:])
    )


def test_other_servers_sampling_fields_work(client: OpenAI) -> None:
    more = {"top_k": 1, "min_tokens": 5, "ignore_eos": True, "repetition_penalty": 1.2}
    answer = chat(client, extra_body=more)
    assert answer.usage.completion_tokens == 8
    only = chat(client, extra_body={"allowed_token_ids": [504, 505]}, temperature=1.0)
    again = chat(client, logit_bias={"504": 100}, temperature=0)
    assert set(only.choices[0].message.content) and again.choices[0].message.content


def test_sixteen_clients_at_once(server: Any) -> None:
    async def run() -> list[str]:
        client = AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)

        async def one(seed: int) -> str:
            text = ""
            stream = await client.chat.completions.create(
                model="tiny", messages=MESSAGES, max_tokens=20, seed=seed % 4, stream=True
            )
            async for chunk in stream:
                text += chunk.choices[0].delta.content or ""
            return text

        return list(await asyncio.gather(*(one(seed) for seed in range(16))))

    texts = asyncio.run(run())
    assert len(set(texts)) == 4
    assert texts[:4] * 4 == texts


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": 2.5}, "temperature must be a number >= 0 and <= 2, got 2.5"),
        ({"top_p": 0}, "top_p must be a number above 0 and <= 1, got 0"),
        ({"n": 200}, "n must be an integer >= 1 and <= 128, got 200"),
        ({"stop": ["a"] * 129}, "stop must be a list of texts, at most 128 items, got 129"),
        ({"messages": []}, "messages"),
        ({"top_logprobs": 3}, "top_logprobs needs logprobs=true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"response_format": {"type": "nope"}}, "response_format.type"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "template knows no tools"),
        ({"logit_bias": {"99999": 1}}, "logit_bias has 99999; the vocabulary has ids 0 to 49151"),
        ({"logit_bias": {"a": 1}}, "logit_bias must be keyed by token ids"),
        ({"extra_body": {"chat_template_kwargs": {"tokenize": False}}}, "must not have"),
        ({"extra_body": {"chat_template": "x"}}, "chat_template in a request is not allowed"),
        ({"messages": [{"role": "user", "content": "word " * 3000}]}, "max_model_len=2048 leaves"),
    ],
)
def test_bad_fields_are_answered_with_their_name(
    fields: dict[str, Any], message: str, client: OpenAI
) -> None:
    with pytest.raises(openai.BadRequestError, match=message) as refused:
        chat(client, **fields)
    assert refused.value.type == "invalid_request_error"


def test_what_text_completions_lack_is_said(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="suffix is not supported"):
        complete(client, suffix="the end")
    with pytest.raises(openai.BadRequestError, match="best_of cannot be streamed"):
        complete(client, best_of=3, stream=True)
    assert complete(client, best_of=3, n=2).usage.completion_tokens == 24
