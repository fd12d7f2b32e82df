"""Bodies that are made to hurt: each is answered soon, stops nobody, and costs little memory."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.server import OwnSeconds, memory_mib, peak_memory_mib

pytestmark = pytest.mark.real_model  # its tokenizer

MIB = 2**20
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MESSAGES, COUNT = "/v1/messages", "/v1/messages/count_tokens"
EMBED, SCORE, RERANK = "/v1/embeddings", "/score", "/v2/rerank"
RESPONSES = "/v1/responses"
NUM_MUTATIONS = int(os.environ.get("NUM_MUTATIONS", "400"))
SECONDS_PER_MIB, SPARE_S = 1.0, 3.0
# 0.3 s where the machine has nothing else to do; a slip of the kind these tests are for is seconds.
LONGEST_STANDSTILL_S = 1.2
# What a body may cost, and what Python and glibc take for themselves.
BODIES_OF_MEMORY, SPARE_MIB = 10, 48

START = {
    CHAT: b'{"messages":[{"role":"user","content":"hi"}],"max_tokens":1',
    TEXT: b'{"prompt":"hi","max_tokens":1',
    MESSAGES: b'{"messages":[{"role":"user","content":"hi"}],"max_tokens":1',
    COUNT: b'{"messages":[{"role":"user","content":"hi"}]',
    EMBED: b'{"input":"hi"',
    SCORE: b'{"queries":"hi","documents":"ho"',
    RERANK: b'{"query":"hi","documents":["ho"]',
    RESPONSES: b'{"input":"hi","max_output_tokens":1',
    "/tokenize": b'{"prompt":"hi"',
    "/detokenize": b'{"tokens":[1]',
}


def field(path: str, name: str, value: bytes) -> bytes:
    """A body with this field; the last of a name counts."""
    return START[path] + b',"' + name.encode() + b'":' + value + b"}"


def many(item: bytes, size: int = MIB, first: bytes | None = None) -> bytes:
    """A list of so many bytes, whose first item may differ."""
    return b"[" + (first or item) + (b"," + item) * (size // (len(item) + 1)) + b"]"


def entries(value: bytes, count: int = 80_000) -> bytes:
    return b"{" + b",".join(b'"%d":%s' % (i, value) for i in range(count)) + b"}"


LISTS = {
    "zeros": many(b"0"),
    "negative": many(b"-1", first=b"1"),
    "lists": many(b"[]"),
    "objects": many(b"{}"),
    "texts": many(b'""', first=b'"a"'),
    "texts among ids": many(b'"a"', first=b"1"),
    "ids among texts": many(b"1", first=b'"a"'),
    "nested ids": many(b"[1]"),
    "fractions": many(b"1.5", first=b"1"),
    "switches": many(b"true", first=b"1"),
    "nulls": many(b"null"),
    "entries": entries(b"1"),
    "entries of lists": entries(b"[]"),
    "text": b'"' + b"a" * MIB + b'"',
    "digits": b"9" * MIB,
    "depth": b"[" * MIB,
}
FIELDS = {
    TEXT: ["prompt", "stop", "logit_bias", "stop_token_ids", "bad_words", "temperature", "model"],
    CHAT: ["messages", "tools", "tool_choice", "structured_outputs", "response_format"],
    "/tokenize": ["messages", "chat_template_kwargs"],
    "/detokenize": ["tokens"],
    MESSAGES: ["messages", "system", "tools", "tool_choice", "stop_sequences", "metadata"],
    COUNT: ["messages", "system", "tools"],
    EMBED: ["input", "encoding_format", "dimensions", "truncate_prompt_tokens"],
    SCORE: ["queries", "documents", "instruction"],
    RERANK: ["query", "documents", "top_n"],
    RESPONSES: ["input", "tools", "tool_choice", "text", "metadata", "include", "conversation"],
}
FIELDS[TEXT] += ["stream_options", "unknown"]
FIELDS[CHAT] += ["chat_template_kwargs", "unknown"]


def wrong_items() -> Iterator[tuple[str, str, bytes]]:
    """Each kind of junk in fields of each kind, some inside their objects."""
    for path, names in FIELDS.items():
        for name in names:
            for kind, junk in LISTS.items():
                yield f"{name} {kind}", path, field(path, name, junk)
    for kind, junk in LISTS.items():
        message = b'[{"role":"user","content":%s}]' % junk
        yield f"content {kind}", CHAT, field(CHAT, "messages", message)
        message = b'[{"role":"user","content":"a","extra":%s}]' % junk
        yield f"message {kind}", CHAT, field(CHAT, "messages", message)
        for name in (b"choice", b"json", b"regex"):
            form = b'{"%s":%s}' % (name, junk)
            yield f"{name.decode()} {kind}", CHAT, field(CHAT, "structured_outputs", form)


def large_bodies() -> Iterator[tuple[str, str, Callable[[], bytes]]]:
    """As large as they may be, or of lists that are long in two ways; each is made by its test."""
    size = 31 * MIB
    yield "16M ids", TEXT, lambda: field(TEXT, "prompt", many(b"1", size))
    yield "10M negative ids", TEXT, lambda: field(TEXT, "prompt", many(b"-1", size, b"1"))
    yield "10M texts", TEXT, lambda: field(TEXT, "prompt", many(b'""', size))
    yield "10M unknown lists", CHAT, lambda: field(CHAT, "x", many(b"[]", size))
    yield "2M unknown fields", CHAT, lambda: START[CHAT] + b"," + entries(b"1", 2_000_000)[1:]
    yield "a name of 31 MB", CHAT, lambda: field(CHAT, "x" * size, b"1")
    yield "31 MB of spaces", CHAT, lambda: b" " * size + START[CHAT] + b"}"
    text = b'"' + b"a b " * (size // 4) + b'"'
    yield "a text of 31 MB", TEXT, lambda: field(TEXT, "prompt", text)
    yield "a text of 15 MB", TEXT, lambda: field(TEXT, "prompt", text[: 15 * MIB] + b'"')
    wide = '"\U0001f600'.encode() + b"a" * (15 * MIB) + b'"'
    yield "a text of 15 MB, wide", TEXT, lambda: field(TEXT, "prompt", wide)
    yield "spaces", TEXT, lambda: field(TEXT, "prompt", b'"' + b" " * MIB + b'"')
    cut = b'"' + b"a b " * (MIB // 2) + b'","truncate_prompt_tokens":10'
    yield "a text to be cut", TEXT, lambda: field(TEXT, "prompt", cut)
    message = b'{"role":"user","content":"%s"}' % (b"a b " * 2000)
    yield "4000 messages", CHAT, lambda: field(CHAT, "messages", many(message, size))
    parts = b'{"role":"user","content":%s}' % many(b'{"text":""}', 2**14)
    yield "2M parts", CHAT, lambda: field(CHAT, "messages", many(parts, size))
    calls = b'{"role":"user","content":"","tool_calls":%s}' % many(
        b'{"function":{"name":"f"}}', 2**11
    )
    yield "1M calls", CHAT, lambda: field(CHAT, "messages", many(calls, size))
    call = b'{"type":"function_call","call_id":"a","name":"f","arguments":""}'
    yield "500k items", RESPONSES, lambda: field(RESPONSES, "input", many(call, size))
    item = b'{"role":"user","content":%s}' % many(b'{"type":"input_text","text":""}', 2**14)
    yield "1M parts of items", RESPONSES, lambda: field(RESPONSES, "input", many(item, size))
    yield "1M messages", CHAT, lambda: field(CHAT, "messages", many(b'{"role":"a"}', size))
    prompts = many(b"[5" + b",5" * 1999 + b"]", MIB)
    yield "65k sequences", TEXT, lambda: field(TEXT, "prompt", prompts + b',"n":128')
    yield "16M ids to embed", EMBED, lambda: field(EMBED, "input", many(b"1", size))
    yield "10M texts to embed", EMBED, lambda: field(EMBED, "input", many(b'""', size))
    texts = b"[" + b",".join([b'"a b c"'] * 2048) + b"]"
    yield "2048 texts to embed", EMBED, lambda: field(EMBED, "input", texts)
    yield "2M documents", RERANK, lambda: field(RERANK, "documents", many(b'{"text":""}', size))
    yield "10M texts to score", SCORE, lambda: field(SCORE, "documents", many(b'""', size))
    yield (
        "1M token ids to text",
        "/detokenize",
        lambda: field("/detokenize", "tokens", many(b"5", 2 * MIB)),
    )
    words = b"a b " * (MIB // 8)
    yield (
        "texts of tokens",
        "/tokenize",
        lambda: field("/tokenize", "prompt", b'"' + words + b'","return_token_strs":true'),
    )


class Watch(threading.Thread):
    """Asks /health all the time; `longest` is the longest answer, in seconds of the server."""

    def __init__(self, server: Any) -> None:
        super().__init__(daemon=True)
        self.longest, self.num_answers, self.failures = 0.0, 0, list[Any]()
        self._port, self._pid, self._ends = server.port, server.process.pid, False
        self._is_waited_for = threading.Event()
        self.start()

    def run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        while not self._ends:
            taken = OwnSeconds(self._pid)
            connection.request("GET", "/health")
            response = connection.getresponse()
            response.read()
            if response.status != 200:
                self.failures.append(response.status)
            self.longest = max(self.longest, taken.so_far())
            self.num_answers += 1
            self._is_waited_for.wait(0.02)
            self._is_waited_for.clear()

    def wait(self) -> None:
        """Until what was asked meanwhile is answered."""
        count = self.num_answers
        self._is_waited_for.set()
        while self.num_answers < count + 1 and self.is_alive():
            time.sleep(0.002)

    def end(self) -> None:
        self._ends = True
        self.join(60)


@pytest.fixture(scope="module")
def watch(server: Any) -> Iterator[Watch]:
    made = Watch(server)
    yield made
    made.end()


def check(server: Any, watch: Watch, name: str, path: str, body: bytes) -> int:
    """The status of the answer, which comes within all bounds."""
    pid, size = server.process.pid, len(body) / MIB
    before = memory_mib(pid)
    Path(f"/proc/{pid}/clear_refs").write_text("5")  # VmHWM begins anew
    watch.longest = 0.0
    taken = OwnSeconds(*server.pids().values())
    status, answer = server.post(path, body)
    seconds = taken.so_far()
    watch.wait()
    assert status in (200, 400), (name, status, answer)
    if status == 400:
        assert len(answer["error"]["message"]) <= 1100
    assert seconds < SPARE_S + SECONDS_PER_MIB * size, (name, seconds)
    assert watch.longest < LONGEST_STANDSTILL_S and not watch.failures, (name, watch.longest)
    cost = peak_memory_mib(pid) - before
    assert cost < BODIES_OF_MEMORY * size + SPARE_MIB, (name, cost)
    found: int = status
    return found


def test_wrong_items_of_every_kind_in_every_kind_of_field(server: Any, watch: Watch) -> None:
    server.post(CHAT, START[CHAT] + b"}")
    before, statuses = memory_mib(server.process.pid), set()
    for name, path, body in wrong_items():
        statuses.add(check(server, watch, name, path, body))
    assert statuses == {200, 400}
    assert memory_mib(server.process.pid) - before < 2 * SPARE_MIB


@pytest.mark.parametrize("case", large_bodies(), ids=lambda case: case[0])
def test_the_largest_bodies(
    case: tuple[str, str, Callable[[], bytes]], server: Any, watch: Watch
) -> None:
    name, path, make = case
    body = make()
    before = memory_mib(server.process.pid)
    check(server, watch, name, path, body)
    assert memory_mib(server.process.pid) - before < 2 * len(body) / MIB + SPARE_MIB


def test_long_names_of_fields_are_not_kept(server: Any) -> None:
    before = memory_mib(server.process.pid)
    for number in range(20):
        status, _ = server.post(CHAT, field(CHAT, f"{number}" + "x" * 4_000_000, b"1"))
        assert status == 400
    assert memory_mib(server.process.pid) - before < SPARE_MIB


def test_a_stream_does_not_keep_its_body(server: Any) -> None:
    before = memory_mib(server.process.pid)
    body = {"messages": [{"role": "user", "content": "hi"}], "stream": True, "max_tokens": 1900}
    long = json.dumps(body | {"ignore_eos": True, "user": "x" * 1000}).encode()[:-1]
    with contextlib.ExitStack() as held:
        for _ in range(8):
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
            held.callback(connection.close)
            junk = b',"x":' + many(b"[]", 4 * MIB) + b',"y":"' + b"y" * (4 * MIB) + b'"}'
            connection.request("POST", CHAT, long + junk, {"content-type": "application/json"})
            assert connection.getresponse().status == 200
        assert memory_mib(server.process.pid) - before < 32


def test_texts_whose_clients_have_left_hold_up_nobody(server: Any, watch: Watch) -> None:
    text = field(TEXT, "prompt", b'"' + b" " * 300_000 + b'"')
    start = time.monotonic()
    server.post(TEXT, text)
    alone_s = time.monotonic() - start
    head = {"content-type": "application/json"}
    clients = [http.client.HTTPConnection("127.0.0.1", server.port) for _ in range(12)]
    for client in clients:
        client.request("POST", TEXT, text, head)
    watch.longest = 0.0
    start = time.monotonic()
    assert server.post(CHAT, START[CHAT] + b"}")[0] == 200
    for client in clients:
        client.close()
    assert time.monotonic() - start < max(2, 6 * alone_s)  # it is not behind twelve texts
    assert watch.longest < LONGEST_STANDSTILL_S


# -- mutations -------------------------------------------------------------------------------------

SEEDS: list[tuple[str, dict[str, Any]]] = [
    (TEXT, {"prompt": [1, 2, 3], "max_tokens": 1, "stop": ["a"], "logit_bias": {"5": 1}}),
    (TEXT, {"prompt": ["a", "b"], "max_tokens": 0, "echo": True, "logprobs": 2, "n": 2}),
    (
        CHAT,
        {
            "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
            "max_tokens": 2,
            "stream": True,
            "stream_options": {"include_usage": True},
            "structured_outputs": {"choice": ["a", "b"]},
        },
    ),
    (EMBED, {"input": ["a", "b"], "dimensions": 3, "encoding_format": "base64"}),
    (SCORE, {"queries": ["a"], "documents": ["a", "b"]}),
    (RERANK, {"query": "a", "documents": ["a", {"text": "b"}], "top_n": 1}),
    (
        RESPONSES,
        {
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
                {"type": "reasoning", "summary": [{"type": "summary_text", "text": "a"}]},
                {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c", "output": "a"},
            ],
            "max_output_tokens": 2,
            "stream": True,
            "text": {"format": {"type": "text"}},
            "tools": [{"type": "web_search"}],
        },
    ),
    (
        MESSAGES,
        {
            "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
            "max_tokens": 2,
            "stream": True,
            "stop_sequences": ["a"],
        },
    ),
    ("/tokenize", {"messages": [{"role": "user", "content": "a"}]}),
    ("/detokenize", {"tokens": [1, 2]}),
]
VALUES: list[Callable[[random.Random], Any]] = [
    lambda r: None,
    lambda r: r.choice([True, False]),
    lambda r: r.choice([0, -1, 1, 2**31, 2**63, -(2**70), 1.0, 1e300]),
    lambda r: "".join(
        r.choice("a\0\n\x1b[é\u202e\U0001f600") for _ in range(r.choice([0, 3, 500]))
    ),
    lambda r: [r.choice([1, "a", None, [], {}])] * r.choice([0, 1, 300]),
    lambda r: {r.choice(["1", "a", "type", "json", ""]): r.choice([1, [], {}, "x"])},
]


def mutated(rng: random.Random) -> tuple[str, bytes]:
    path, body = rng.choice(SEEDS)
    body = json.loads(json.dumps(body))
    for _ in range(rng.randrange(1, 4)):
        inner: Any = body
        while rng.random() < 0.7:
            values = list(inner.values()) if isinstance(inner, dict) else inner
            nested = [value for value in values if isinstance(value, dict | list) and value]
            if not nested:
                break
            inner = rng.choice(nested)
        key = rng.choice([*inner, "new"]) if isinstance(inner, dict) else rng.randrange(len(inner))
        inner[key] = rng.choice(VALUES)(rng)
    raw = bytearray(json.dumps(body).encode())
    if rng.random() < 0.3:
        raw[rng.randrange(len(raw))] = rng.randrange(256)
    return path, bytes(raw)


def test_mutations_are_answered_and_stop_nobody(server: Any, watch: Watch) -> None:
    rng, statuses = random.Random(7), set[int]()
    watch.longest = 0.0
    for _ in range(NUM_MUTATIONS):
        path, body = mutated(rng)
        status, answer = server.post(path, body)
        assert status in (200, 400, 404), (path, body, answer)
        statuses.add(status)
    assert {200, 400} <= statuses
    print(f"longest answer of /health: {watch.longest:.3f} s")
    assert watch.longest < LONGEST_STANDSTILL_S and not watch.failures
    assert not [line for line in server.log.splitlines() if "\x1b" in line or "Traceback" in line]
