"""Penalties, bias, bans and processors against a slow reference, one token of the vocabulary at a
time; with the host a token behind the device, as it is when steps are launched ahead."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compiledllm.kernels.sampling import INVALID, draw_tokens
from compiledllm.runner.penalties import Penalties
from compiledllm.runner.processors import num_arguments
from compiledllm.runner.request_table import RequestTable
from compiledllm.runner.rule import Draw
from compiledllm.runner.sampler import Sampler
from compiledllm.sampling_params import SamplingParams
from compiledllm.types import NewRequest, ScheduledRequest, SchedulerOutput
from tests.support.requests import make_new_request

VOCAB = 13


# -- a slow reference -----------------------------------------------------------------------------


def reference(
    logits: list[float],
    params: SamplingParams,
    prompt: list[int],
    output: list[int],
    stops: frozenset[int],
    bad_words: tuple[tuple[int, ...], ...],
) -> list[float]:
    """What the rules leave of one row of logits."""
    counts, seen, edited = Counter(output), set(prompt) | set(output), []
    for token_id, value in enumerate(logits):
        value += (params.logit_bias or {}).get(token_id, 0.0)
        if token_id in seen:
            factor = params.repetition_penalty
            value = value / factor if value > 0 else value * factor
        value -= params.frequency_penalty * counts[token_id]
        value -= params.presence_penalty * (counts[token_id] > 0)
        allowed = params.allowed_token_ids
        is_early_stop = token_id in stops and len(output) < params.min_tokens
        completes = any(
            word[-1] == token_id and tuple(output[len(output) - len(word) + 1 :]) == word[:-1]
            for word in bad_words
            if len(output) >= len(word) - 1
        )
        if (allowed is not None and token_id not in allowed) or is_early_stop or completes:
            value = -math.inf
        edited.append(value)
    return edited


# -- requests in a table, driven token by token ---------------------------------------------------


class Batch:
    """Requests in rows. The host learns of each token one step late."""

    def __init__(self, requests: list[NewRequest], max_num_seqs: int = 6) -> None:
        self.table = RequestTable(max_num_seqs, 4, VOCAB, torch.device("cpu"))
        self.sampler = Sampler(self.table, VOCAB)
        self.sequences: dict[str, list[int]] = {}
        self.requests: dict[str, NewRequest] = {}
        self._unknown: dict[str, int] = {}
        self.admit(requests)

    def admit(self, requests: list[NewRequest], freed: list[str] | None = None) -> None:
        lines = [
            ScheduledRequest(r.spec.request_id, 0, len(r.token_ids), [], True) for r in requests
        ]
        self.table.apply(SchedulerOutput(requests, lines, freed or []))
        for request_id in freed or []:
            del self.sequences[request_id], self.requests[request_id]
            self._unknown.pop(request_id, None)
        for request in requests:
            self.sequences[request.spec.request_id] = list(request.token_ids)
            self.requests[request.spec.request_id] = request

    def at(self) -> tuple[list[str], np.ndarray, np.ndarray]:
        ids = list(self.sequences)
        lengths = np.array([len(self.sequences[i]) for i in ids])
        return ids, self.table.rows_of(ids), lengths

    def edited(self, logits: Tensor) -> Tensor:
        """The rows' logits by the rules, without drawing."""
        _, rows, positions = self.at()
        edited, rules = logits.clone(), self.table.rules
        with_rules = np.flatnonzero(rules.are_edited(rows, positions))
        if len(with_rules):
            index = torch.from_numpy(with_rules)
            chosen = edited[index]
            last = self.table.last_token_ids[torch.from_numpy(rows[with_rules])]
            draw = Draw(rows[with_rules], positions[with_rules], last)
            assert rules.apply(chosen, draw) == {}
            edited[index] = chosen
        return edited

    def expected(self, logits: Tensor) -> Tensor:
        lines = []
        for (request_id, tokens), row in zip(self.sequences.items(), logits.tolist(), strict=True):
            request = self.requests[request_id]
            split = request.spec.num_prompt_tokens
            lines.append(
                reference(
                    row,
                    request.spec.sampling_params,
                    tokens[:split],
                    tokens[split:],
                    request.spec.stop_token_ids,
                    request.spec.bad_words,
                )
            )
        return torch.tensor(lines)

    def step(self, logits: Tensor) -> list[int]:
        """Draw a token for every row; the tokens of the step before come to the host."""
        ids, rows, positions = self.at()
        index = torch.from_numpy(rows)
        drawn = draw_tokens(logits, index, torch.from_numpy(positions), self.table.sampling)
        last = self.table.last_token_ids[index]
        self.sampler.finish(drawn, logits, rows, positions, last, ids)
        self.table.last_token_ids[index] = drawn.clamp(min=0)
        for request_id, token_id in self._unknown.items():
            self.table.record(request_id, token_id)
        self._unknown = dict(zip(ids, drawn.tolist(), strict=True))
        for request_id, token_id in self._unknown.items():
            self.sequences[request_id].append(token_id)
        return list(self._unknown.values())


def new(name: str, prompt: list[int], params: SamplingParams, **rest: Any) -> NewRequest:
    fixed = {"stop_token_ids": frozenset[int](), "seed": 7}
    return make_new_request(name, prompt, None, params, **(fixed | rest))


TOKENS = st.integers(0, VOCAB - 1)
PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1.0]),
    presence_penalty=st.sampled_from([0.0, 0.0, 1.5, -1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.7, -0.3]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3, 0.8]),
    logit_bias=st.none() | st.dictionaries(TOKENS, st.floats(-5, 5), max_size=3),
    allowed_token_ids=st.none() | st.lists(TOKENS, min_size=8, max_size=12),
    bad_words=st.none() | st.just(["tokenised elsewhere"]),
    min_tokens=st.integers(0, 4),
)
WORDS = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=3).map(tuple), max_size=4)


@st.composite
def requests(draw: st.DrawFn) -> list[NewRequest]:
    made = []
    for index in range(draw(st.integers(1, 5))):
        params = draw(PARAMS)
        made.append(
            new(
                f"r{index}",
                draw(st.lists(TOKENS, min_size=1, max_size=5)),
                params,
                stop_token_ids=frozenset(draw(st.lists(TOKENS, max_size=2))),
                bad_words=tuple(draw(WORDS)) if params.bad_words else (),
                seed=index,
            )
        )
    return made


def random_logits(count: int, seed: int) -> Tensor:
    return torch.randn(count, VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


@given(requests(), st.integers(0, 10**6))
def test_edited_logits_are_those_of_a_slow_reference(made: list[NewRequest], seed: int) -> None:
    batch = Batch(made)
    for step in range(7):
        logits = random_logits(len(batch.sequences), seed + step)
        expected = batch.expected(logits)
        torch.testing.assert_close(batch.edited(logits), expected)
        drawn = batch.step(logits)
        for row, token_id in zip(expected.tolist(), drawn, strict=True):
            assert token_id == INVALID or row[token_id] != -math.inf or max(row) == -math.inf
        if INVALID in drawn:
            break
        if step == 3:  # one leaves, another resumes in its row with the output it had
            name, tokens = next(iter(batch.sequences.items()))
            old = batch.requests[name]
            again = NewRequest(old.spec, list(tokens))
            batch.admit([], [name])
            batch.admit([again])


def test_greedy_tokens_obey_the_rules_step_by_step() -> None:
    params = SamplingParams(temperature=0, frequency_penalty=2.0)
    batch = Batch([new("r", [1], params)])
    logits = torch.zeros(1, VOCAB)
    logits[0, [4, 5]] = torch.tensor([3.0, 2.5])
    assert [batch.step(logits)[0] for _ in range(6)] == [4, 5, 4, 5, 0, 1]


def test_a_bad_word_may_end_anywhere_but_not_complete() -> None:
    params = SamplingParams(temperature=0, bad_words=["x"])
    batch = Batch([new("r", [3, 4], params, bad_words=((3, 4, 5), (9,)))])
    logits = torch.zeros(1, VOCAB)
    drawn = []
    for wanted in (5, 9, 3, 4, 5, 3, 4, 4, 5):
        logits.zero_()
        logits[0, wanted], logits[0, 8] = 2.0, 1.0
        drawn += batch.step(logits)
    # Of the first word's beginning only the output counts; 9 is always banned.
    assert drawn == [5, 8, 3, 4, 8, 3, 4, 4, 5]


def test_rows_without_rules_are_left_alone() -> None:
    plain, biased = SamplingParams(temperature=0), SamplingParams(temperature=0, logit_bias={2: 50})
    batch = Batch([new("a", [1], plain), new("b", [1], biased), new("c", [1], plain)])
    logits = random_logits(3, 0)
    best = logits.argmax(-1).tolist()
    assert batch.step(logits) == [best[0], 2, best[2]]


def test_nothing_left_to_draw_is_an_error_of_that_row_alone() -> None:
    params = SamplingParams(temperature=0, allowed_token_ids=[3], min_tokens=2)
    rest = SamplingParams(temperature=0)
    requests = [new("a", [1], params, stop_token_ids=frozenset({3})), new("b", [1], rest)]
    logits = random_logits(2, 0)
    assert Batch(requests).step(logits) == [INVALID, int(logits[1].argmax())]


def test_slots_of_token_counts_are_used_again() -> None:
    params = SamplingParams(temperature=0, presence_penalty=1.0)
    batch = Batch([new(f"r{n}", [1], params) for n in range(6)])
    for n in range(40):
        batch.admit([], [f"r{n}"])
        batch.admit([new(f"r{n + 6}", [2], params)])
        logits = random_logits(6, n)
        torch.testing.assert_close(batch.edited(logits), batch.expected(logits))
        batch.step(logits)
    assert Penalties.max_bytes(6, VOCAB) == batch.table.rules._penalties._counts.nbytes


class BrokenGrammar:
    def matcher(self, output_token_ids: list[int]) -> Any:
        raise MemoryError("no room for a matcher")


def test_a_request_that_cannot_enter_leaves_no_rules_behind() -> None:
    biased = SamplingParams(temperature=0, logit_bias={2: 50}, presence_penalty=1.0)
    batch = Batch([])
    with pytest.raises(MemoryError):
        batch.admit([new("a", [1], biased, grammar=BrokenGrammar())])
    batch.table.clear()  # as after every failed step
    assert not batch.table.rules.are_used
    batch.admit([new("b", [1], SamplingParams(temperature=0, logit_bias={3: 1e-9}))])
    logits = random_logits(1, 0)
    torch.testing.assert_close(batch.edited(logits), logits)


# -- logits processors ----------------------------------------------------------------------------


def only(token_id: int) -> Any:
    def processor(logits: Tensor) -> Tensor:
        return torch.full_like(logits, -math.inf).index_fill_(0, torch.tensor([token_id]), 0.0)

    return processor


def test_processors_get_what_they_ask_for() -> None:
    calls: list[tuple[Any, ...]] = []

    def three(prompt: list[int], output: list[int], logits: Tensor) -> Tensor:
        calls.append((prompt, output, logits.shape))
        return logits

    def two(output: list[int], logits: Tensor) -> None:
        calls.append((output, logits.shape))
        logits[6] = 90.0

    params = SamplingParams(temperature=0, logits_processors=[three, two])
    batch = Batch([new("r", [1, 2], params)])
    assert batch.step(random_logits(1, 0)) == [6]
    batch.table.record("r", 6)  # it is held back until its token is known
    batch._unknown.clear()
    assert batch.step(random_logits(1, 1)) == [6]
    shape = torch.Size([VOCAB])
    assert calls == [([1, 2], [], shape), ([], shape), ([1, 2], [6], shape), ([6], shape)]


@pytest.mark.parametrize(
    ("processor", "count"),
    [
        (lambda logits: logits, 1),
        (lambda output, logits: logits, 2),
        (lambda prompt, output, logits: logits, 3),
        (lambda output, logits, strength=2.0: logits, 2),
        (lambda *everything: everything[-1], 3),
    ],
)
def test_number_of_arguments_is_read_from_the_signature(processor: Any, count: int) -> None:
    assert num_arguments(processor) == count


def fails(logits: Tensor) -> Tensor:
    raise KeyError("no such token")


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (fails, "logits processor: KeyError: 'no such token'"),
        (lambda logits: logits[:3], r"must return logits \[13\], got \[3\]"),
        (lambda logits: 5, r"must return logits \[13\], got int"),
    ],
)
def test_a_failing_processor_fails_its_own_request(processor: Any, message: str) -> None:
    broken = SamplingParams(temperature=0, logits_processors=[processor])
    good = SamplingParams(temperature=0, logits_processors=[only(4)])
    batch = Batch([new("a", [1], broken), new("b", [1], good)])
    _, rows, positions = batch.at()
    logits = random_logits(2, 0)
    index = torch.from_numpy(rows)
    drawn = draw_tokens(logits, index, torch.from_numpy(positions), batch.table.sampling)
    last = batch.table.last_token_ids[index]
    extras = batch.sampler.finish(drawn, logits, rows, positions, last, ["a", "b"])
    assert drawn.tolist() == [INVALID, 4]
    assert extras is not None and list(extras.errors) == ["a"]
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(extras.errors["a"])


def test_a_processor_that_returns_nan_fails_its_own_request() -> None:
    broken = SamplingParams(logits_processors=[lambda logits: logits * math.nan])
    batch = Batch([new("a", [1], broken), new("b", [1], SamplingParams(temperature=0))])
    logits = random_logits(2, 0)
    assert batch.step(logits) == [INVALID, int(logits[1].argmax())]
