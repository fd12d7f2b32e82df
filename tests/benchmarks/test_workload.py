"""The work: the same seed gives the same requests everywhere; a bad file is named by its line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compiledllm.benchmarks.workload import (
    SampleRequest,
    fingerprint,
    random_requests,
    requests_from_file,
    sharegpt_like_requests,
    with_token_ids,
)


def test_random_requests_are_pinned_by_their_seed() -> None:
    first, second = random_requests(2, 128, 5, 49152, seed=7)
    assert isinstance(first.prompt, list) and first.prompt[:4] == [21232, 9896, 25885, 42669]
    assert second.prompt[-2:] == [35607, 1782]
    assert {len(r.prompt) for r in (first, second)} == {128} and first.output_len == 5


def test_sharegpt_like_requests_are_the_fixed_mix() -> None:
    requests = sharegpt_like_requests(512, 151936, seed=4242)
    assert sum(len(r.prompt) for r in requests) == 143_094
    assert sum(r.output_len for r in requests) == 98_263
    assert (len(requests[0].prompt), requests[0].output_len) == (515, 66)
    assert requests[0].prompt[:4] == [7468, 102315, 99349, 84155]
    assert all(4 <= n <= 1024 for r in requests for n in (len(r.prompt), r.output_len))


def test_fingerprint_tells_requests_apart() -> None:
    requests = random_requests(3, 8, 2, 100, seed=1)
    longer = [*requests[:2], SampleRequest(requests[2].prompt, 3)]
    assert fingerprint(requests) == fingerprint(random_requests(3, 8, 2, 100, seed=1))
    assert len({fingerprint(r) for r in (requests, longer, requests[:2])}) == 3


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_json_lines(tmp_path: Path) -> None:
    lines = [{"prompt": "Hello"}, {"prompt_token_ids": [3, 4], "output_len": 7}]
    more = [{"prompt": "a", "max_tokens": 2}, {"prompt": "b", "output_tokens": 3}]
    path = write(tmp_path / "x.jsonl", "\n\n".join(map(json.dumps, lines + more)) + "\n")
    expected = [
        SampleRequest("Hello", 5),
        SampleRequest([3, 4], 7),
        SampleRequest("a", 2),
        SampleRequest("b", 3),
    ]
    assert requests_from_file(path, None, 5) == expected
    assert requests_from_file(path, 2, 5) == expected[:2]
    encoded = with_token_ids(expected, lambda text: [len(text)])
    assert [r.prompt for r in encoded] == [[5], [3, 4], [1], [1]]


def test_only_line_feeds_end_json_lines(tmp_path: Path) -> None:
    prompt = "one\u2028two\x85three"  # JSON strings may hold these, and str.splitlines splits there
    line = json.dumps({"prompt": prompt}, ensure_ascii=False)
    path = write(tmp_path / "x.jsonl", f"{line}\r\n{line}\n")
    assert requests_from_file(path, None, 5) == 2 * [SampleRequest(prompt, 5)]


def test_sharegpt_takes_the_first_two_turns(tmp_path: Path) -> None:
    def conversation(*values: str) -> dict[str, object]:
        return {"id": "x", "conversations": [{"from": "human", "value": v} for v in values]}

    entries = [conversation("ask", "an answer", "more"), conversation("alone"), conversation()]
    path = write(tmp_path / "x.json", json.dumps(entries))
    assert requests_from_file(path, None, 9) == [SampleRequest("ask", 9)]
    counted = requests_from_file(path, None, 9, encode=lambda text: [0] * len(text.split()))
    assert counted == [SampleRequest("ask", 2)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a"}\n{"prompt": \n', r"x\.jsonl, line 2: "),
        ('{"prompt": "a"}\n\n7\n', r"line 3: a request is a JSON object, got int"),
        ('{"text": "a"}', r"line 1: a request needs 'prompt' .* got keys \['text'\]"),
        ('{"prompt_token_ids": [1, "a"]}', r"line 1: prompt_token_ids must be a list of token ids"),
        ('{"prompt_token_ids": [1, -2]}', r"line 1: prompt_token_ids must be a list of token ids"),
        ('{"prompt": ""}', r"line 1: the prompt is empty"),
        ('{"prompt": "a", "output_len": 0}', r"line 1: output_len must be an integer >= 1, got 0"),
        ('{"prompt": "a", "output_len": "9"}', r"output_len must be an integer >= 1, got '9'"),
        ("\n", r"has no requests"),
        ('[{"turns": []}]', r"entry 0: no 'conversations'"),
        ('[{"conversations": [{"value": 3}, {"value": "x"}]}]', r"entry 0: a turn has no text"),
        ("[{", r"is not valid JSON"),
    ],
)
def test_a_broken_file_is_refused_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        requests_from_file(write(tmp_path / "x.jsonl", text), None, 5)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no_such.*cannot be read"):
        requests_from_file(tmp_path / "no_such", None, 5)
