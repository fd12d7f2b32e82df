"""`compiledllm run-batch` with a fake engine: every line gets one line, whatever happens to it."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("msgspec")

from compiledllm import cli
from compiledllm.remote.engine_client import EngineClient
from compiledllm.server import batch, batch_lines, run_batch
from compiledllm.server.batch_answers import AnswerFile
from tests.support.server import free_port, wait_for

FAKE = [sys.executable, str(Path(__file__).with_name("fake_engine.py"))]
KILL = 901  # a prompt that ends the engine
OK, STOPPED, WRONG, SOME_FAILED = 0, 1, 2, 3
Run = Callable[..., tuple[int, list[Any]]]


def completion(custom_id: Any, prompt: Any = 5, **more: Any) -> dict[str, Any]:
    body = {"prompt": [prompt, 6], "max_tokens": 3, **more}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}


def as_line(given: Any) -> bytes:
    return given if isinstance(given, bytes) else json.dumps(given).encode()


def records_in(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_bytes().splitlines() if line]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """run(lines, *options) -> exit status, all lines of the output."""
    monkeypatch.setenv("COMPILEDLLM_CACHE_DIR", str(tmp_path / "cache"))
    fake = functools.partial(EngineClient, command=FAKE)
    monkeypatch.setattr(run_batch, "EngineClient", fake)
    monkeypatch.setattr(run_batch, "spare_collector", lambda: None)  # freezes the whole process

    def call(lines: list[Any] | bytes, *options: str) -> tuple[int, list[Any]]:
        source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        raw = lines if isinstance(lines, bytes) else b"".join(as_line(x) + b"\n" for x in lines)
        source.write_bytes(raw)
        words = ["run-batch", "-i", str(source), "-o", str(output), *options]
        status = cli.main([*words, "--model", "fake", "--skip-tokenizer-init"])
        return status, records_in(output) if output.exists() else []

    return call


def by_id(records: list[Any]) -> dict[str, Any]:
    found = {record["custom_id"]: record for record in records}
    assert len(found) == len(records), "one line an id"
    return found


def tokens_of(record: Any) -> int:
    count: int = record["response"]["body"]["usage"]["completion_tokens"]
    return count


# -- lines ----------------------------------------------------------------------------------------


def test_answers_have_the_form_of_openai(run: Run) -> None:
    status, records = run([completion("a"), completion("b", max_tokens=7)])
    assert status == OK
    found = by_id(records)
    assert (tokens_of(found["a"]), tokens_of(found["b"])) == (3, 7)
    record = found["a"]
    assert list(record) == ["id", "custom_id", "response", "error"]
    assert record["id"] == f"batch_req_{record['response']['request_id']}"
    assert record["response"]["status_code"] == 200 and record["error"] is None
    assert record["response"]["body"]["object"] == "text_completion"
    assert found["a"]["id"] != found["b"]["id"]


NO_REQUESTS: list[tuple[Any, str, str | None]] = [
    (b"nonsense", "invalid_json_line", None),
    (b"[1]", "invalid_json_line", None),
    (b'"text"', "invalid_json_line", None),
    (b'{"custom_id": "x"', "invalid_json_line", None),
    (b"\xff\xfe{}", "invalid_json_line", None),
    (b"[" * 100_000, "invalid_json_line", None),
    (b"{}", "missing_required_parameter", None),
    (completion(5), "invalid_custom_id", None),
    (completion(None), "missing_required_parameter", None),
    (completion(""), "invalid_custom_id", None),
    (completion("x" * 513), "invalid_custom_id", None),
    (completion("m") | {"method": "GET"}, "invalid_method", "m"),
    (completion("n") | {"method": None}, "missing_required_parameter", "n"),
    (completion("u") | {"url": "/v1/nothing"}, "invalid_url", "u"),
    (completion("v") | {"url": ["/v1/completions"]}, "invalid_url", "v"),
    (completion("w") | {"body": None}, "missing_required_parameter", "w"),
    (
        {"custom_id": "y", "method": "POST", "url": "/v1/completions"},
        *("missing_required_parameter", "y"),
    ),
    (completion("good"), "duplicate_custom_id", "good"),
    (completion("u"), "duplicate_custom_id", "u"),  # of a line that was refused
    (b'{"custom_id": "\\ud800", "method": "POST"}', "invalid_json_line", None),
    (b'{"custom_id": "z", "method": "POST", "url": "\xff", "body": {}}', "invalid_url", "z"),
    (b'{"\xff": 1}', "invalid_json_line", None),
    (b'{"custom_id": "\xff"}', "invalid_custom_id", None),
    (b"{" + b",".join(b'"%d":1' % i for i in range(300)) + b"}", "invalid_json_line", None),
]


def test_a_line_that_is_no_request_gets_an_error_that_names_it(run: Run) -> None:
    lines = [completion("good"), *(line for line, _, _ in NO_REQUESTS), completion("last")]
    status, records = run(lines)
    assert status == SOME_FAILED
    errors = {r["error"]["line"]: r for r in records if r["error"]}
    for number, (line, code, custom_id) in enumerate(NO_REQUESTS, start=2):
        record = errors.pop(number)
        assert (record["error"]["code"], record["custom_id"]) == (code, custom_id), line
        assert record["response"] is None and len(record["error"]["message"]) < 600
    assert not errors
    answered = [r["custom_id"] for r in records if r["response"]]
    assert sorted(answered) == ["good", "last"]
    assert len({record["id"] for record in records}) == len(lines)


BAD_BODIES: list[tuple[str, Any, int, str]] = [
    ("/v1/completions", [1], 400, "the body must be an object"),
    ("/v1/completions", {"prompt": [5], "stream": True}, 400, "stream must be false in a batch"),
    ("/v1/completions", {"prompt": [5], "model": "gpt-4o"}, 404, "model 'gpt-4o' does not exist"),
    ("/v1/completions", {"prompt": [5] * 3000}, 400, "3000 tokens"),
    ("/v1/completions", {"prompt": [5], "temperature": 9}, 400, "temperature"),
    ("/v1/completions", {}, 400, "prompt is missing"),
    ("/v1/chat/completions", {"messages": []}, 400, "messages"),
    ("/v1/messages", {"max_tokens": "x"}, 400, "max_tokens must be an integer"),
    ("/v1/responses", {"input": 5}, 400, "input must be"),
    ("/v1/embeddings", {"input": []}, 400, "input must be"),
    ("/v1/score", {"queries": "a"}, 400, "documents is missing"),
    ("/v1/rerank", {"query": "a", "documents": []}, 400, "at least 1 item"),
]


def test_a_body_that_is_wrong_gets_the_answer_of_the_server(run: Run) -> None:
    lines = [
        completion(str(index)) | {"url": url, "body": body}
        for index, (url, body, _, _) in enumerate(BAD_BODIES)
    ]
    status, records = run([*lines, completion("good")])
    found = by_id(records)
    assert status == SOME_FAILED and found.pop("good")["response"]["status_code"] == 200
    for index, (url, body, expected, message) in enumerate(BAD_BODIES):
        response, error = found[str(index)]["response"], found[str(index)]["error"]
        assert (response["status_code"], error) == (expected, None), (url, body)
        assert message in response["body"]["error"]["message"], (url, body)
    assert found["7"]["response"]["body"]["type"] == "error", "Anthropic's format"


def test_lines_end_and_begin_as_editors_write_them(run: Run) -> None:
    lines = [as_line(completion(name)) for name in ("a", "b", "c")]
    raw = b"\xef\xbb\xbf" + lines[0] + b"\r\n\n  \n" + lines[1] + b"\n\t" + lines[2]
    status, records = run(raw)
    assert status == OK and set(by_id(records)) == {"a", "b", "c"}
    assert run(b"") == (OK, records)


def test_a_line_that_is_too_long_is_skipped_without_being_kept(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_lines, "MAX_LINE_BYTES", 3 * 2**20)
    long = as_line(completion("long", user="x" * 9 * 2**20))
    status, records = run([completion("a"), long, completion("b")])
    assert status == SOME_FAILED
    (error,) = [record["error"] for record in records if record["error"]]
    assert (error["code"], error["line"]) == ("line_too_long", 2)
    assert {r["custom_id"] for r in records if r["response"]} == {"a", "b"}


def test_more_lines_than_fit_at_once_are_answered(run: Run) -> None:
    lines = [completion(f"{i}", max_tokens=1 + i % 5) for i in range(300)]
    status, records = run(lines, "--max-num-seqs", "8")
    found = by_id(records)
    assert status == OK and len(found) == 300
    assert all(tokens_of(found[f"{i}"]) == 1 + i % 5 for i in range(300))


def test_prompts_of_a_line_wait_for_room(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_batch, "MAX_QUEUED_REQUESTS", 12)
    monkeypatch.setattr(batch, "RETRY_S", 0.01)
    lines = [completion(f"{i}") for i in range(9)]
    for line in lines:
        line["body"]["prompt"] = [[5, 6]] * 10
    status, records = run(lines, "--max-num-seqs", "4")
    assert status == OK and all(tokens_of(record) == 30 for record in records)


# -- going on --------------------------------------------------------------------------------------


def test_what_is_answered_is_not_computed_again(run: Run, tmp_path: Path) -> None:
    lines = [completion("a"), b"nonsense", completion("b"), completion("b"), completion("c", 10**9)]
    status, first = run(lines)
    assert status == SOME_FAILED and len(first) == 5
    assert run(lines) == (SOME_FAILED, first), "not even the engine is started"
    assert run([*lines, completion("d")])[1][:-1] == first
    output = tmp_path / "out.jsonl"
    kept = [line for line in output.read_bytes().splitlines(True) if b'"d"' not in line]
    output.write_bytes(b"\n".join(kept))  # as after an editor
    *others, last = run([*lines, completion("d")])[1]
    assert others == first and last["custom_id"] == "d", "it was taken out"


@pytest.mark.parametrize("num_bytes", [1, 12, 30, 200])
def test_a_torn_last_line_is_cut_off_and_answered_again(
    num_bytes: int, run: Run, tmp_path: Path
) -> None:
    lines = [completion(name) for name in ("a", "b", "c")]
    _, records = run(lines)
    output = tmp_path / "out.jsonl"
    whole = output.read_bytes().splitlines(True)
    output.write_bytes(b"".join(whole[:2]) + whole[2][:num_bytes] + b"\0" * 3)
    status, again = run(lines)
    assert status == OK and again[:2] == records[:2]
    assert set(by_id(again)) == {"a", "b", "c"}


@pytest.mark.parametrize(
    "text",
    [
        "my notes\n",
        "my notes",
        '{"id": "x"}\n',
        '{"id":"vllm-1","custom_id":"a","response":{},"error":null}\n',
    ],
)
def test_files_of_others_are_not_touched(
    text: str, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text(text)
    monkey = [completion("a")]
    source = tmp_path / "in.jsonl"
    source.write_bytes(as_line(monkey[0]))
    words = ["run-batch", "-i", str(source), "-o", str(output), "--model", "fake"]
    assert cli.main(words) == WRONG
    assert "line 1, is not an answer of a batch" in capsys.readouterr().err
    assert output.read_text() == text
    assert run(monkey, "--overwrite")[0] == OK
    assert set(by_id(records_in(output))) == {"a"}


def test_answers_to_other_requests_are_not_taken_for_these(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    _, first = run([completion("a"), completion("b")])
    for changed, more in (
        (completion("b", 7), ()),
        (completion("b"), ("--served-model-name", "other")),
    ):
        status, records = run([changed], *more)
        assert (status, records) == (WRONG, first)
        assert "answers another request, or another model's, with custom_id 'b' (line 1)" in (
            capsys.readouterr().err
        )
    status, records = run([completion("b", 7)], "--overwrite")
    assert status == OK and set(by_id(records)) == {"b"}


@pytest.mark.parametrize(
    ("source", "output", "message"),
    [
        ("/none/in", "{}/out", "/none/in cannot be read: No such file"),
        ("{}", "{}/out", "cannot be read: Is a directory"),
        ("{}/in.jsonl", "{}", "cannot be written: Is a directory"),
        ("{}/in.jsonl", "/none/out", "/none/out cannot be written: No such file"),
        ("{}/in.jsonl", "{}/in.jsonl", "is both input and output"),
        ("http://x/in.jsonl", "{}/out", "use: curl http://x/in.jsonl | compiledllm run-batch -i -"),
    ],
)
def test_wrong_files_are_named_before_anything_is_started(
    source: str, output: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.jsonl").write_bytes(as_line(completion("a")))
    paths = [text.format(tmp_path) for text in (source, output)]
    assert cli.main(["run-batch", "fake", "-i", paths[0], "-o", paths[1]]) == WRONG
    assert message in capsys.readouterr().err
    assert cli.main(["run-batch", "fake"]) == WRONG
    assert "a batch needs -i INPUT and -o OUTPUT" in capsys.readouterr().err


def test_two_batches_do_not_write_to_one_file(run: Run, tmp_path: Path) -> None:
    answers = AnswerFile(str(tmp_path / "out.jsonl"))
    assert run([completion("a")]) == (WRONG, [])
    answers.close()
    assert run([completion("a")])[0] == OK


# -- the engine ------------------------------------------------------------------------------------


def test_an_engine_that_dies_is_started_again_and_only_the_cause_fails(run: Run) -> None:
    lines = [completion(f"{i}", KILL if i == 5 else 5) for i in range(12)]
    status, records = run(lines, "--max-num-seqs", "4")
    found = by_id(records)
    assert status == SOME_FAILED and len(found) == 12
    assert found.pop("5")["response"]["status_code"] == 500
    assert all(record["response"]["status_code"] == 200 for record in found.values())


@pytest.mark.parametrize(("deed", "expected"), [("raise", STOPPED), ("config", WRONG)])
def test_an_engine_that_does_not_start_leaves_the_lines_open(
    deed: str,
    expected: int,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("FAKE_DEED", deed)
        status, records = run([b"nonsense", completion("a")])
    assert status == expected
    assert [record["custom_id"] for record in records] == [None]
    assert ("the same command continues from there" in capsys.readouterr().err) == (deed == "raise")
    status, records = run([b"nonsense", completion("a")])
    assert status == SOME_FAILED and [record["custom_id"] for record in records] == [None, "a"]


def test_a_full_disk_ends_the_batch(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out.jsonl").symlink_to("/dev/full")
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"".join(as_line(completion(f"{i}")) + b"\n" for i in range(9)))
    words = ["run-batch", "-i", str(source), "-o", str(tmp_path / "out.jsonl")]
    assert cli.main([*words, "--model", "fake", "--skip-tokenizer-init"]) == STOPPED
    shown = capsys.readouterr().err
    assert "out.jsonl cannot be written: No space left on device" in shown
    assert "the same command continues" in shown and "Traceback" not in shown


# -- a process of its own --------------------------------------------------------------------------

PROGRAM = f"""
import functools, sys
from compiledllm import cli
from compiledllm.server import run_batch
run_batch.EngineClient = functools.partial(run_batch.EngineClient, command={FAKE!r})
sys.exit(cli.main(["run-batch", "--model", "fake", "--skip-tokenizer-init", *sys.argv[1:]]))
"""


def start(folder: Path, *options: str, **more: Any) -> subprocess.Popen[bytes]:
    environment = os.environ | {"COMPILEDLLM_CACHE_DIR": str(folder / "cache")}
    command = [sys.executable, "-c", PROGRAM, *options]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, **more)


def test_a_pipe_is_answered_while_it_is_open(tmp_path: Path) -> None:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = start(tmp_path, "-i", "-", "-o", "-", **pipes)
    assert process.stdin is not None and process.stdout is not None
    for name in ("a", "b"):
        process.stdin.write(as_line(completion(name)) + b"\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["custom_id"] == name
    process.stdin.close()
    assert process.stdout.read() == b"" and process.wait(150) == OK


def test_metrics_are_served_while_the_batch_runs(tmp_path: Path) -> None:
    port = str(free_port())
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = start(tmp_path, "-i", "-", "-o", "-", "--enable-metrics", "--port", port, **pipes)
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(as_line(completion("a")) + b"\n")
    process.stdin.flush()
    process.stdout.readline()
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as response:
        text = response.read().decode()
    assert 'compiledllm:engine_ready{model_name="fake"} 1.0' in text
    assert 'compiledllm:generation_tokens_total{model_name="fake"} 3.0' in text
    process.stdin.close()
    assert process.wait(150) == OK


def test_a_reader_that_leaves_ends_the_batch(tmp_path: Path) -> None:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = start(tmp_path, "-i", "-", "-o", "-", **pipes)
    assert process.stdin is not None and process.stdout is not None
    process.stdout.close()
    process.stdin.write(as_line(completion("a")) + b"\n")
    process.stdin.flush()  # and stays open
    assert process.wait(150) == 141
    assert process.stderr is not None and b"Traceback" not in process.stderr.read()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_batch_that_is_stopped_goes_on(number: signal.Signals, run: Run, tmp_path: Path) -> None:
    lines = [completion(f"{i}", max_tokens=40) for i in range(60)]
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(b"".join(as_line(line) + b"\n" for line in lines))
    process = start(tmp_path, "-i", str(source), "-o", str(output), "--max-num-seqs", "4")
    wait_for(lambda: output.exists() and output.read_bytes().count(b"\n") >= 8, 60)
    process.send_signal(number)
    status = process.wait(150)
    assert process.stderr is not None
    shown = process.stderr.read().decode()
    if number != signal.SIGKILL:
        assert status == 128 + number and "Traceback" not in shown
        assert f"stopped by {number.name}" in shown and "the same command continues" in shown
    before = output.read_bytes()
    assert 8 <= before.count(b"\n") < 60
    status, records = run(lines)
    assert status == OK and len(by_id(records)) == 60
    assert output.read_bytes().startswith(before)


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler of its own for a signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    mask = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(mask, 16) >> (number - 1) & 1)


def test_a_stop_does_not_wait_for_a_silent_pipe(tmp_path: Path) -> None:
    process = start(tmp_path, "-i", "-", "-o", str(tmp_path / "out"), stdin=subprocess.PIPE)
    wait_for(lambda: (tmp_path / "out").exists(), 60)
    wait_for(lambda: catches(process.pid, signal.SIGTERM), 60)
    process.send_signal(signal.SIGTERM)
    assert process.wait(150) == 128 + signal.SIGTERM
