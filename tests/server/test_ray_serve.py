"""The server as a Ray Serve application, against the real `openai` client."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import AsyncIterator, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from compiledllm import AsyncEngine, ConfigError, SamplingParams
from compiledllm.server.ray_serve import parse
from tests.support.server import free_port, wait_for

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray")
MESSAGES: Any = [{"role": "user", "content": "Name three colours."}]
CHAT: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_tokens": 8, "seed": 3}
ENDLESS: dict[str, Any] = {"model": "tiny", "prompt": "Once", "max_tokens": 1900}
ENDLESS["extra_body"] = {"ignore_eos": True}


@pytest.fixture(scope="module")
def client(tiny_chat_model: Path) -> Iterator[OpenAI]:
    import ray
    from ray import serve

    from compiledllm.server.ray_serve import app

    port = free_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")
        patch.setenv("OMP_NUM_THREADS", "1")  # of the replica's engine
        ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False)
        serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config=None)
        options = {"model": str(tiny_chat_model), "served_model_name": "tiny"}
        options |= {"enforce_eager": "true", "kv-cache-memory-bytes": str(2**26)}
        serve.run(app(options))
        yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        serve.shutdown()
        ray.shutdown()


def server_load(client: OpenAI) -> int:
    url = str(client.base_url).replace("/v1/", "/load")
    with urllib.request.urlopen(url) as answer:
        load: int = json.load(answer)["server_load"]
        return load


@needs_ray
@pytest.mark.real_model
def test_whole_answers_and_streams_are_those_of_the_server(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    whole = client.chat.completions.create(**CHAT)
    assert whole.usage is not None and whole.usage.completion_tokens == 8
    chunks = list(client.chat.completions.create(**CHAT, stream=True))
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(texts) == whole.choices[0].message.content
    assert len(chunks) > 4 and chunks[-1].choices[0].finish_reason == "length"
    answer = client.completions.create(model="tiny", prompt=["Once", "Twice"], max_tokens=4)
    assert [choice.index for choice in answer.choices] == [0, 1]


@needs_ray
@pytest.mark.real_model
def test_errors_are_those_of_openai(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="'nope' does not exist; there is tiny"):
        client.chat.completions.create(**CHAT | {"model": "nope"})
    with pytest.raises(openai.BadRequestError, match="temperature must be"):
        client.chat.completions.create(**CHAT, temperature=9)
    with pytest.raises(openai.NotFoundError) as found:
        client.get("/nothing", cast_to=object)
    assert json.loads(found.value.response.text)["error"]["code"]


@needs_ray
@pytest.mark.real_model
@pytest.mark.parametrize("is_stream", [True, False])
def test_a_client_that_leaves_ends_its_request(is_stream: bool, client: OpenAI) -> None:
    assert server_load(client) == 0
    if is_stream:
        stream = client.completions.create(**ENDLESS, stream=True)
        next(iter(stream))
        assert server_load(client) == 1
        stream.close()
    else:
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.2).completions.create(**ENDLESS)
    wait_for(lambda: server_load(client) == 0, seconds=5)


@needs_ray
@pytest.mark.real_model
def test_an_async_engine_in_a_deployment_of_ones_own(client: OpenAI, tiny_chat_model: Path) -> None:
    from ray import serve

    @serve.deployment
    class Continuation:
        def __init__(self, model: Path) -> None:
            options: dict[str, Any] = {"enforce_eager": True, "kv_cache_memory_bytes": 2**26}
            self.engine = AsyncEngine(model, **options)

        async def __call__(self, prompt: str) -> AsyncIterator[str]:
            params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
            async for output in self.engine.generate(prompt, params):
                yield output.outputs[0].text

    handle = serve.run(Continuation.bind(tiny_chat_model), name="own", route_prefix=None)
    texts = list(handle.options(stream=True).remote("Once"))
    whole = client.completions.create(**ENDLESS | {"max_tokens": 100}, temperature=0)
    assert texts[-1] == whole.choices[0].text and len(texts) > 1
    serve.delete("own")


def test_options_are_those_of_the_command_line() -> None:
    found = parse({"model": "m", "max_num_seqs": "8", "enforce-eager": True, "api_key": ["a", "b"]})
    assert (found.model, found.max_num_seqs, found.enforce_eager) == ("m", 8, True)
    assert found.api_key == ["a", "b"]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"modle": "m"}, "unknown option 'modle'; did you mean --model"),
        ({"max_num_seqs": "many"}, "max-num-seqs"),
        ({"block_size": 7}, "block_size must be"),
        ({"port": 8000}, "port is for Ray Serve to decide"),
        ({"ssl-keyfile": "k"}, "ssl-keyfile is for Ray Serve to decide"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        parse(options)
