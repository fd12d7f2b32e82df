"""The serving client against a small OpenAI-like server whose timing and answers are known."""

from __future__ import annotations

import asyncio
import json
import statistics
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from compiledllm import cli
from compiledllm.benchmarks.client import Load, Outcome, Target, _read_line, deal
from compiledllm.benchmarks.report import load_report
from compiledllm.benchmarks.serve import checked_url, summarise
from compiledllm.benchmarks.workload import SampleRequest
from compiledllm.config import ConfigError


class StubServer:
    """Streams `max_tokens` pieces; prompts of length 3 get an HTTP error, of 5 a broken stream."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.in_flight = self.most_in_flight = 0
        self.says_usage = True
        self.url = ""

    async def models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "stub"}]})

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        prompt = body.get("prompt") or body["messages"][0]["content"]
        prompt = prompt.split() if isinstance(prompt, str) else prompt
        if len(prompt) == 3:
            return web.Response(status=400, text="prompts of three are bad luck")
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for index in range(body["max_tokens"]):
            piece = {"text": "x"} if "prompt" in body else {"delta": {"content": "x"}}
            await self.send(response, {"choices": [piece]})
            if len(prompt) == 5 and index == 1:
                await self.send(response, {"error": {"message": "step failed"}})
            await asyncio.sleep(0.002)
        if self.says_usage:
            usage = {"completion_tokens": body["max_tokens"], "prompt_tokens": len(prompt)}
            await self.send(response, {"choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")
        self.in_flight -= 1
        return response

    async def send(self, response: web.StreamResponse, event: dict[str, Any]) -> None:
        await response.write(b": comment\ndata: " + json.dumps(event).encode() + b"\n\n")


@pytest.fixture
def server() -> Iterator[StubServer]:
    stub, loop, started = StubServer(), asyncio.new_event_loop(), threading.Event()

    async def start() -> web.AppRunner:
        app = web.Application()
        app.router.add_get("/v1/models", stub.models)
        app.router.add_post("/v1/completions", stub.complete)
        app.router.add_post("/v1/chat/completions", stub.complete)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        stub.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        return runner

    def serve() -> None:
        runner = loop.run_until_complete(start())
        started.set()
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())

    thread = threading.Thread(target=serve)
    thread.start()
    assert started.wait(10)
    yield stub
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def bench(*arguments: str) -> int:
    return cli.main(["bench", "serve", *arguments])


def test_a_run_against_a_server(server: StubServer, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    lengths = ["--num-prompts", "12", "--input-len", "7", "--output-len", "4"]
    load = ["--request-rate", "inf", "200", "--max-concurrency", "4", "--goodput", "e2el:60000"]
    assert bench("--base-url", server.url + "/v1/", *lengths, *load, "--output-json", str(out)) == 0
    report = load_report(out)
    assert report.work["model"] == "stub" and len(report.rows) == 2
    for row, rate in zip(report.rows, (None, 200.0), strict=True):
        assert (row["completed"], row["failed"], row["request_rate"]) == (12, 0, rate)
        assert (row["input_tokens"], row["output_tokens"]) == (84, 48)
        assert row["goodput_per_s"] == row["requests_per_s"]
        assert 0 < row["ttft_ms"]["p50"] < row["e2el_ms"]["p50"]
        assert row["itl_ms"]["p50"] > 0 and row["tpot_ms"]["p50"] > 0
    assert server.most_in_flight == 4
    body = server.bodies[-1]
    assert body["model"] == "stub" and body["stream"] and body["ignore_eos"]
    assert body["max_tokens"] == 4 and len(body["prompt"].split()) == 7


def test_several_clients_share_the_load(server: StubServer, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    work = ["--num-prompts", "11", "--input-len", "7", "--output-len", "4", "--num-clients", "3"]
    load = ["--max-concurrency", "6", "--output-json", str(out), "--plot", f"{out}.svg"]
    assert bench("--base-url", server.url, *work, *load) == 0
    (row,) = load_report(out).rows
    assert (row["num_clients"], row["completed"], row["failed"]) == (3, 11, 0)
    assert (row["output_tokens"], row["output_pieces"]) == (44, 44)
    assert row["mean_concurrency"] <= 6 and server.most_in_flight <= 6
    assert 0 < row["ttft_ms"]["p50"] < row["e2el_ms"]["p50"] < 1e3 * row["seconds"]


def test_requests_and_slots_are_dealt_in_turn() -> None:
    requests = [SampleRequest([n], 1) for n in range(7)]
    target = Target("http://h", "/v1/completions", None, 1.0)
    load = Load(10.0, 6, seed=1)
    shares = deal(target, "m", requests, load, 3)
    assert [[r.prompt[0] for r in share.requests] for share in shares] == [
        [0, 3, 6], [1, 4], [2, 5]
    ]  # fmt: skip
    assert [share.max_concurrency for share in shares] == [2, 2, 2]
    times = load.arrivals(7)
    assert [list(share.arrivals) for share in shares] == [times[0::3], times[1::3], times[2::3]]
    for most, count in ((1, 1), (4, 2), (5, 1), (None, 3)):  # as many in flight for each
        assert len(deal(target, "m", requests, Load(10.0, most), 3)) == count


@pytest.mark.parametrize(
    ("line", "pieces", "tokens"),
    [
        (b'data: {"choices": [{"text": " a"}]}', 1, 0),
        (b'data:{"choices":[{"delta":{"content":"\\"text\\":\\"x"},"usage":null}]}\r', 1, 0),
        (b'data: {"choices":[{"delta":{"reasoning":"hm"}}]}', 1, 0),
        (b'data: {"choices":[{"text":""}],"usage":{"completion_tokens":3}}', 0, 3),
        (b'data: {"choices":[{"text":"\\"usage\\": {}, \\"error\\""}]}', 1, 0),
        (b'data: {"choices":[{"text":"error"}]}', 1, 0),
        (b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}', 0, 0),
        (b"data: [DONE]", 0, 0),
        (b': "text":"comment"', 0, 0),
        (b"", 0, 0),
    ],
)
def test_a_line_is_text_or_usage_or_nothing(line: bytes, pieces: int, tokens: int) -> None:
    outcome = Outcome()
    _read_line(line, outcome, 1.5)
    assert (outcome.stamps, outcome.tokens) == ([1.5] * pieces, tokens)


def test_chat_without_usage_counts_pieces(
    server: StubServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.says_usage = False
    chat = ["--endpoint", "/v1/chat/completions", "--model", "named"]
    assert bench("--base-url", server.url, *chat, "--num-prompts", "2", "--output-len", "3") == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["rows"][0]["output_tokens"] == 6
    assert {body["model"] for body in server.bodies} == {"named"}
    assert server.bodies[-1]["messages"][0]["role"] == "user"


def test_a_local_model_gives_token_ids_and_floors(
    server: StubServer, tiny_llama: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    local = ["--local-model", str(tiny_llama()), "--num-prompts", "2", "--input-len", "9"]
    assert bench("--base-url", server.url, *local, "--output-len", "3") == 0
    assert all(10 <= i < 118 for body in server.bodies for i in body["prompt"])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0 < report["rows"][0]["tpot_floor_ms"]["percent"] < 100 and report["ceilings"]


def test_failures_are_counted_with_their_cause(
    server: StubServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    prompts = [[7] * 4, [7] * 5, [7] * 3, [7] * 6]
    data, out = tmp_path / "x.jsonl", tmp_path / "out.json"
    data.write_text("\n".join(json.dumps({"prompt_token_ids": p}) for p in prompts))
    where = ["--dataset-name", "file", "--dataset-path", str(data), "--output-json", str(out)]
    local = ["--base-url", server.url, "--output-len", "4"]
    assert bench(*local, *where) == 0
    (row,) = load_report(out).rows
    assert (row["completed"], row["failed"]) == (2, 2)
    assert any("HTTP 400: prompts of three" in error for error in row["errors"])
    assert any("step failed" in error for error in row["errors"])
    assert server.headers[-1]["Authorization"] == "Bearer secret-key"
    assert "secret-key" not in out.read_text()
    assert sorted(body["prompt"] for body in server.bodies[1:]) == sorted(prompts)
    assert bench(*local, *where, "--endpoint", "/v1/chat/completions") == 2
    assert "text prompts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--base-url", "http://127.0.0.1:9"], "cannot be reached"),
        (["--base-url", "http://127.0.0.1:9", "--model", "m"], "is the server running?"),
        (["--base-url", "localhost:8000"], "must look like http://host:port, got 'localhost:8000'"),
        (["--base-url", "http://h/x"], "must look like http://host:port"),
        (["--dataset-name", "file"], "go together"),
        (["--dataset-path", "x"], "go together"),
        (["--output-json", "/no/such/dir/x.json"], "the folder /no/such/dir does not exist"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(*arguments) == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.startswith("error: ") and shown.count("\n") == 1


def test_a_wrong_endpoint_is_shown_with_the_servers_answer(
    server: StubServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench("--base-url", server.url, "--endpoint", "/v1/nothing") == 2
    assert "/v1/nothing: HTTP 404" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value"),
    [("--request-rate", "0"), ("--goodput", "itl:5"), ("--goodput", "ttft"), ("--timeout", "x")],
)
def test_bad_values_are_refused_by_the_parser(
    option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        bench(option, value)
    assert exit_.value.code == 2 and f"argument {option}" in capsys.readouterr().err


@pytest.mark.parametrize("burstiness", [1.0, 0.5, 4.0])
def test_gaps_have_the_rate_and_the_burstiness(burstiness: float) -> None:
    times = Load(50.0, None, burstiness, seed=3).arrivals(20_000)
    gaps = [after - before for before, after in zip(times, times[1:], strict=False)]
    assert times[0] == 0 and statistics.mean(gaps) == pytest.approx(1 / 50, rel=0.05)
    variation = statistics.pstdev(gaps) / statistics.mean(gaps)
    assert variation == pytest.approx(burstiness**-0.5, rel=0.05)
    assert Load(float("inf"), None).arrivals(3) == [0.0, 0.0, 0.0]


def test_goodput_counts_what_stays_within_every_limit() -> None:
    fast = Outcome(sent=0.0, stamps=[0.1, 0.2, 0.3], ended=0.3, tokens=3)
    slow = Outcome(sent=0.0, stamps=[0.1, 1.1, 2.1], ended=2.1, tokens=3)
    late = Outcome(sent=0.0, stamps=[0.9, 1.0, 1.1], ended=1.1, tokens=3)
    load = Load(float("inf"), None, goodput={"ttft": 500.0, "tpot": 150.0})
    row = summarise([fast, slow, late], load, wall_s=4.0)
    assert row["goodput_per_s"] == 0.25 and row["requests_per_s"] == 0.75
    assert row["tpot_ms"]["p50"] == pytest.approx(100.0)
    assert row["mean_concurrency"] == pytest.approx((0.3 + 2.1 + 1.1) / 4)


def test_all_requests_failing_is_an_error() -> None:
    outcomes = [Outcome(error="HTTP 503: busy"), Outcome(error="HTTP 503: busy")]
    with pytest.raises(ConfigError, match="all 2 requests failed, 2 of them with: HTTP 503: busy"):
        summarise(outcomes, Load(1.0, None), 1.0)


def test_urls() -> None:
    assert checked_url("https://h:1/v1/") == "https://h:1"
