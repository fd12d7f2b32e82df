"""The sampler against slow references, transformers' warpers and the exact distribution."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from compiledllm.kernels.sampling import SamplingRows, draw_tokens, gumbel_noise, threshold
from compiledllm.runner.request_table import RequestTable
from compiledllm.runner.sampler import Sampler
from compiledllm.sampling_params import SamplingParams
from compiledllm.types import ScheduledRequest, SchedulerOutput
from tests.support.requests import make_new_request

VOCAB_SIZE = 97
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def make_table(
    *params: SamplingParams,
    seeds: list[int] | None = None,
    stop_token_ids: frozenset[int] = frozenset(),
    num_prompt_tokens: int = 3,
) -> RequestTable:
    """A table whose rows 0, 1, ... hold requests with these parameters."""
    table = RequestTable(len(params), 4, VOCAB_SIZE, torch.device("cpu"))
    requests = [
        make_new_request(
            f"r{index}",
            [1] * num_prompt_tokens,
            params=each,
            stop_token_ids=stop_token_ids,
            seed=seeds[index] if seeds else index,
        )
        for index, each in enumerate(params)
    ]
    scheduled = [
        ScheduledRequest(r.spec.request_id, 0, num_prompt_tokens, [], True) for r in requests
    ]
    table.apply(SchedulerOutput(requests, scheduled, []))
    assert table.rows_of([f"r{n}" for n in range(len(params))]).tolist() == list(range(len(params)))
    return table


def sample(table: RequestTable, logits: Tensor, rows: list[int], positions: list[int]) -> list[int]:
    sampler, at = Sampler(table, VOCAB_SIZE), (np.array(rows), np.array(positions))
    drawn = draw_tokens(logits, torch.tensor(rows), torch.tensor(positions), table.sampling)
    last = table.last_token_ids[torch.tensor(rows)]
    sampler.finish(drawn, logits, *at, last, [f"r{row}" for row in rows])
    tokens: list[int] = drawn.tolist()
    return tokens


def random_logits(rows: int, vocab: int = VOCAB_SIZE, seed: int = 0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


# -- top-k, top-p and min-p ------------------------------------------------------------------------


def reference_filter(scores: Tensor, top_k: int, top_p: float, min_p: float) -> set[int]:
    """Ids that stay, one token at a time in float64."""
    values = scores.double()
    order = values.argsort(descending=True).tolist()
    if top_k:
        kth = values[order[min(top_k, len(order)) - 1]]
        order = [token_id for token_id in order if values[token_id] >= kth]
    weights = [math.exp(values[token_id] - values[order[0]]) for token_id in order]
    kept, mass = set(), 0.0
    for token_id, weight in zip(order, weights, strict=True):
        if top_p < 1 and kept and mass >= top_p:
            break
        if weight >= min_p:
            kept.add(token_id)
        mass += weight / sum(weights)
    return kept


def sampling_rows(
    count: int, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> SamplingRows:
    params = SamplingRows.zeros(count, "cpu")
    for values, value in zip(params, (1.0, 7, top_k, top_p, min_p), strict=True):
        values[:] = value
    return params


def run_filter(scores: Tensor, *filters: float) -> Tensor:
    least = threshold(scores, sampling_rows(len(scores), *filters))  # type: ignore[arg-type]
    return scores.masked_fill(scores < least[:, None], -math.inf)


def kept_ids(filtered: Tensor) -> list[set[int]]:
    return [set(row.isfinite().nonzero().flatten().tolist()) for row in filtered]


FILTERS = [
    (0, 1.0, 0.0),
    (1, 1.0, 0.0),
    (5, 1.0, 0.0),
    (VOCAB_SIZE, 1.0, 0.0),
    (VOCAB_SIZE + 50, 1.0, 0.0),
    (0, 0.01, 0.0),
    (0, 0.5, 0.0),
    (0, 0.9, 0.0),
    (0, 0.999, 0.0),
    (7, 0.6, 0.0),
    (40, 0.9, 0.0),
    (2, 0.99, 0.0),
    (0, 1.0, 0.05),
    (0, 1.0, 1.0),
    (0, 0.9, 0.02),
    (30, 0.95, 0.01),
]


@pytest.mark.parametrize("filters", FILTERS)
def test_filter_keeps_what_a_slow_search_keeps(filters: tuple[int, float, float]) -> None:
    scores = random_logits(64)
    filtered = run_filter(scores, *filters)
    assert kept_ids(filtered) == [reference_filter(row, *filters) for row in scores]


@pytest.mark.parametrize("filters", FILTERS)
def test_filter_masks_what_transformers_masks(filters: tuple[int, float, float]) -> None:
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    top_k, top_p, min_p = filters
    scores = random_logits(64, seed=1)
    expected, no_ids = scores.clone(), torch.empty(64, 0, dtype=torch.int64)
    if top_k:
        expected = TopKLogitsWarper(top_k)(no_ids, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(no_ids, expected)
    if min_p:
        expected = MinPLogitsWarper(min_p)(no_ids, expected)
    assert torch.equal(run_filter(scores, *filters), expected)


def test_a_large_vocabulary_is_sorted_only_where_it_must_be() -> None:
    """The border is looked for among the likeliest tokens first; flat rows need them all."""
    scores = torch.cat((random_logits(3, 5000) * 2, random_logits(3, 5000) / 100))
    for top_p in (0.3, 0.9, 0.999):
        expected = [reference_filter(row, 0, top_p, 0.0) for row in scores]
        found = kept_ids(run_filter(scores, 0, top_p))
        for kept, reference in zip(found, expected, strict=True):
            assert len(kept ^ reference) <= 2  # rounding at the border
        assert kept_ids(run_filter(scores[:3], 0, top_p)) == found[:3]


def test_every_row_has_its_own_filter() -> None:
    scores = random_logits(4, seed=2)
    params = sampling_rows(4)
    params.top_k[:] = torch.tensor([0, 3, 0, 5])
    params.top_p[:] = torch.tensor([1.0, 1.0, 0.4, 0.7])
    params.min_p[:] = torch.tensor([0.1, 0.0, 0.0, 0.0])
    together = threshold(scores, params)
    for row in range(4):
        alone = threshold(scores[[row]], params.take(torch.tensor([row])))
        assert together[row] == alone[0]


def test_ties_with_the_last_token_kept_all_stay() -> None:
    from transformers import TopKLogitsWarper

    scores = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]])
    assert kept_ids(run_filter(scores, 2)) == [{1, 2, 3, 4}]
    assert torch.equal(
        run_filter(scores, 2), TopKLogitsWarper(2)(torch.empty(1, 0), scores.clone())
    )
    assert kept_ids(run_filter(scores, 0, 0.5)) == [{1, 2, 3, 4}]


def test_top_p_keeps_the_token_that_reaches_it() -> None:
    scores = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    assert kept_ids(run_filter(scores, 0, 0.4)) == [{0}]
    assert kept_ids(run_filter(scores, 0, 0.6)) == [{0, 1}]
    assert kept_ids(run_filter(scores, 0, 0.8)) == [{0, 1, 2, 3}]  # the last two tie


@pytest.mark.parametrize("top_p", [1e-9, 0.0])  # 0: what a tiny top_p becomes in float32
def test_most_likely_token_always_stays(top_p: float) -> None:
    assert kept_ids(run_filter(random_logits(8), 0, top_p)) == [
        {token_id} for token_id in random_logits(8).argmax(-1).tolist()
    ]


def test_banned_tokens_stay_banned_through_the_filter() -> None:
    scores = random_logits(1)
    scores[0, 10:] = -math.inf
    for filters in FILTERS:
        assert kept_ids(run_filter(scores, *filters))[0] <= set(range(10))


# -- the drawn distribution -----------------------------------------------------------------------


def chi_square_limit(degrees: int) -> float:
    """What the statistic exceeds with probability 1e-6 (Wilson and Hilferty's approximation)."""
    spread = 2 / (9 * degrees)
    return degrees * (1 - spread + 4.753 * math.sqrt(spread)) ** 3


NUM_DRAWS = 100_000


@dataclass(frozen=True)
class Shape:
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "shape",
    [
        Shape(),
        Shape(temperature=0.5),
        Shape(temperature=2.0),
        Shape(top_k=4),
        Shape(top_p=0.8),
        Shape(min_p=0.1),
        Shape(temperature=1.7, top_k=6, top_p=0.9),
        Shape(temperature=0.8, top_p=0.9, min_p=0.05),
        Shape(temperature=1.5, top_k=8, top_p=0.95, min_p=0.1),
    ],
    ids=str,
)
def test_draws_follow_the_exact_distribution(shape: Shape, device: str) -> None:
    logits = random_logits(1, vocab=12, seed=3) / 2
    params = sampling_rows(1, shape.top_k, shape.top_p, shape.min_p)
    params.temperature[:] = shape.temperature
    there = SamplingRows(*(values.to(device) for values in params))
    rows = torch.zeros(NUM_DRAWS, dtype=torch.int64, device=device)
    positions = torch.arange(3, 3 + NUM_DRAWS, device=device)
    wide = logits.expand(NUM_DRAWS, -1).contiguous().to(device)
    drawn = draw_tokens(wide, rows, positions, there).cpu()

    scores = logits[0] / shape.temperature
    kept = sorted(reference_filter(scores, shape.top_k, shape.top_p, shape.min_p))
    expected = scores[kept].double().softmax(-1).numpy() * NUM_DRAWS
    counts = np.bincount(drawn, minlength=12)
    assert counts.sum() == counts[kept].sum(), "a filtered token was drawn"
    statistic = float(((counts[kept] - expected) ** 2 / expected).sum())
    assert statistic < chi_square_limit(max(len(kept) - 1, 1))


def test_draws_over_seeds_follow_the_exact_distribution() -> None:
    """Many requests at the same position are as independent as one request's positions."""
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    seeds = torch.arange(NUM_DRAWS)
    noise = gumbel_noise(seeds, torch.full_like(seeds, 17), 4)
    counts = (probabilities.log() + noise).argmax(-1).bincount(minlength=4).double()
    expected = probabilities.double() * NUM_DRAWS
    assert float(((counts - expected) ** 2 / expected).sum()) < chi_square_limit(3)


def test_consecutive_draws_are_independent() -> None:
    noise = gumbel_noise(torch.full((NUM_DRAWS,), 99), torch.arange(NUM_DRAWS), 3)
    drawn = noise.argmax(-1)
    pairs = (drawn[:-1] * 3 + drawn[1:]).bincount(minlength=9).double()
    expected = (NUM_DRAWS - 1) / 9
    assert float(((pairs - expected) ** 2 / expected).sum()) < chi_square_limit(8)


# -- the noise ------------------------------------------------------------------------------------


def test_noise_is_a_function_of_seed_position_and_token() -> None:
    seeds, positions = torch.tensor([5, 5, 9]), torch.tensor([1, 2, 1])
    noise = gumbel_noise(seeds, positions, 50)
    assert torch.equal(noise, gumbel_noise(seeds, positions, 50))
    assert torch.equal(noise[[2, 0]], gumbel_noise(seeds[[2, 0]], positions[[2, 0]], 50))
    assert torch.equal(noise[:, :20], gumbel_noise(seeds, positions, 20))
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert not torch.isclose(noise[a], noise[b]).any()


def test_neighbouring_seeds_do_not_share_shifted_noise() -> None:
    """Else requests with seeds 1, 2, 3 ... would draw each other's tokens one position later."""
    seeds, positions = torch.meshgrid(torch.arange(40), torch.arange(40), indexing="ij")
    first = gumbel_noise(seeds.flatten(), positions.flatten(), 1)
    assert len(first.unique()) == len(first)


def test_noise_is_finite_for_extreme_seeds_and_positions() -> None:
    seeds = torch.tensor([0, -1, 2**63 - 1, -(2**63)])
    noise = gumbel_noise(seeds, torch.tensor([0, 0, 2**31, 10**6]), 1000)
    assert noise.dtype == torch.float32
    assert noise.isfinite().all()
    assert len(noise[:, 0].unique()) == 4


def test_noise_is_standard_gumbel() -> None:
    noise = gumbel_noise(torch.arange(500), torch.arange(500), 400).double()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.03)


# -- rows -----------------------------------------------------------------------------------------

MIXED = [
    SamplingParams(temperature=0),
    SamplingParams(),
    SamplingParams(temperature=0.7, top_k=9),
    SamplingParams(temperature=1.3, top_p=0.8),
    SamplingParams(temperature=0, top_k=3, top_p=0.5),
    SamplingParams(temperature=1.0, top_k=20, top_p=0.6),
    SamplingParams(temperature=0.9, min_p=0.05),
    SamplingParams(temperature=0.9, logit_bias={3: 5.0}, min_tokens=3),
]


def test_request_draws_the_same_token_alone_and_in_a_crowd() -> None:
    table = make_table(*MIXED)
    rows = list(range(len(MIXED)))
    for position in range(10, 40):
        logits = random_logits(len(MIXED), seed=position)
        together = sample(table, logits, rows, [position + row for row in rows])
        for row in rows:
            assert sample(table, logits[[row]], [row], [position + row]) == [together[row]]


def test_request_draws_the_same_token_in_another_row_and_order() -> None:
    seeds = [100 + n for n in range(len(MIXED))]
    table = make_table(*MIXED, seeds=seeds)
    backwards = make_table(*reversed(MIXED), seeds=seeds[::-1])
    rows = list(range(len(MIXED)))
    for position in range(10, 40):
        logits = random_logits(len(MIXED), seed=position)
        expected = sample(table, logits, rows, [position] * len(rows))
        assert sample(backwards, logits.flip(0), rows, [position] * len(rows)) == expected[::-1]
        assert sample(table, logits.flip(0), rows[::-1], [position] * len(rows)) == expected[::-1]


def test_draws_change_with_the_seed() -> None:
    logits = random_logits(1).expand(40, -1) / 10
    positions = list(range(3, 43))
    first, same, other = (
        sample(make_table(SamplingParams(), seeds=[seed]), logits, [0] * 40, positions)
        for seed in (1, 1, 2)
    )
    assert first == same
    assert first != other


def test_greedy_rows_of_a_mixed_batch_are_the_argmax() -> None:
    table = make_table(*MIXED)
    for position in range(10, 30):
        logits = random_logits(len(MIXED), seed=position)
        drawn = sample(table, logits, list(range(len(MIXED))), [position] * len(MIXED))
        for row, params in enumerate(MIXED):
            if params.is_greedy:
                assert drawn[row] == logits[row].argmax()


def test_all_greedy_batch_is_the_argmax_in_the_models_dtype() -> None:
    table = make_table(SamplingParams(temperature=0), SamplingParams(temperature=1e-6))
    logits = random_logits(2).bfloat16()
    assert sample(table, logits, [0, 1], [5, 5]) == logits.argmax(-1).tolist()


def test_low_temperature_and_top_k_one_come_close_to_greedy() -> None:
    logits = random_logits(50)
    for params in (SamplingParams(temperature=1e-4), SamplingParams(top_k=1)):
        table = make_table(params)
        drawn = sample(table, logits, [0] * 50, list(range(3, 53)))
        assert drawn == logits.argmax(-1).tolist()


def test_extreme_parameters_draw_tokens_of_the_vocabulary() -> None:
    for params in (
        SamplingParams(temperature=2),
        SamplingParams(temperature=2e-5, top_p=1e-30),
        SamplingParams(top_k=2**40, top_p=0.999999999999),
        SamplingParams(seed=-(2**63)),
    ):
        drawn = sample(make_table(params), random_logits(9) * 30, [0] * 9, list(range(3, 12)))
        assert all(0 <= token_id < VOCAB_SIZE for token_id in drawn)


def test_a_row_with_rules_costs_the_step_no_more_than_a_greedy_draw() -> None:
    table = make_table(*MIXED)
    sampler, rows = Sampler(table, VOCAB_SIZE), np.arange(len(MIXED))
    wanted = [*range(len(MIXED) - 1), table.padding_row]  # the last has a bias
    found = sampler.rows_to_draw(rows, rows + 10)
    assert found is not None and found.tolist() == wanted
    assert table.sampling.temperature[table.padding_row] == 0
    assert sampler.rows_to_draw(rows[:-1], rows[:-1] + 10) is None
    assert (
        Sampler(make_table(SamplingParams()), VOCAB_SIZE).rows_to_draw(rows[:1], rows[:1]) is None
    )


# -- min_tokens -----------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_stop_tokens_are_banned_before_min_tokens_and_free_after(temperature: float) -> None:
    params = SamplingParams(temperature=temperature, min_tokens=4)
    table = make_table(params, stop_token_ids=frozenset({7, 8}), num_prompt_tokens=10)
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, 7], logits[0, 8], logits[0, 9] = 90.0, 65.0, 40.0
    drawn = [sample(table, logits, [0], [10 + num_output])[0] for num_output in range(6)]
    assert drawn == [9, 9, 9, 9, 7, 7]


def test_ban_of_one_request_leaves_the_others_alone() -> None:
    eager, patient = SamplingParams(temperature=0), SamplingParams(temperature=0, min_tokens=9)
    table = make_table(eager, patient, stop_token_ids=frozenset({7}))
    logits = torch.zeros(2, VOCAB_SIZE)
    logits[:, 7], logits[:, 9] = 60.0, 40.0
    assert sample(table, logits, [0, 1], [4, 4]) == [7, 9]
    assert sample(table, logits, [1, 0], [4, 4]) == [9, 7]
