"""Sampler: rules equal transformers', draws follow the exact distribution, rows do not know each other."""

import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor
from transformers.generation import logits_process as hf

from ganglion.engine.sampler import (
    MAX_BIASES,
    MAX_STOP_STRINGS,
    Sampled,
    Sampler,
    SamplerState,
    check_sampling,
    score_tokens,
)
from ganglion.errors import FieldError, GanglionError, InternalError
from ganglion.generation import LanguageSpec, Sampling

VOCAB = 1000
SPEC = LanguageSpec(
    name="toy",
    family="llama",
    version="0",
    vocab_size=VOCAB,
    max_tokens=512,
    num_layers=1,
    width=1,
    eos_ids=(2, 3),
    dtype="float32",
)
SAMPLER = Sampler(SPEC)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def normal(seed: int, num_rows: int, vocab_size: int = VOCAB, spread: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(num_rows, vocab_size, generator=generator)


def state(
    sampling: Sampling, prompt: Sequence[int] = (), generated: Sequence[int] = (), choice: int = 0
) -> SamplerState:
    made = SamplerState(sampling, prompt_ids=prompt, choice=choice)
    for token_id in generated:
        made.accept(token_id)
    return made


def drawn(result: Sampled | GanglionError) -> int:
    assert isinstance(result, Sampled), result
    return result.token_id


def draws(logits: Tensor, sampling: Callable[[int], Sampling], num_draws: int) -> Counter[int]:
    """Tokens of one row of logits, drawn by as many choices as draws."""
    states = [state(sampling(seed)) for seed in range(num_draws)]
    return Counter(drawn(one) for one in SAMPLER.sample(logits.expand(num_draws, -1), states))


def processed(
    logits: Tensor, sampling: Sampling, prompt: Sequence[int] = (), generated: Sequence[int] = ()
) -> Tensor:
    """Probabilities [vocab] of transformers' processors and warpers, in its order, beside OpenAI's two penalties."""
    scores = logits[None].clone()
    ids = torch.tensor([[*prompt, *generated]], dtype=torch.int64)
    if sampling.repetition_penalty != 1.0:
        scores = hf.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(ids, scores)
    for token_id, count in Counter(generated).items():
        scores[0, token_id] -= sampling.frequency_penalty * count + sampling.presence_penalty
    for token_id, bias in sampling.logit_bias.items():
        scores[0, token_id] += bias
    scores = hf.TemperatureLogitsWarper(float(sampling.temperature))(ids, scores)
    if sampling.top_k:
        scores = hf.TopKLogitsWarper(sampling.top_k)(ids, scores)
    if sampling.top_p < 1.0:
        scores = hf.TopPLogitsWarper(sampling.top_p)(ids, scores)
    if sampling.min_p:
        scores = hf.MinPLogitsWarper(sampling.min_p)(ids, scores)
    return scores[0].double().softmax(-1)


RULES = (
    {},
    {"temperature": 0.6},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 20},
    {"top_k": 300},
    {"top_k": VOCAB + 5},
    {"top_p": 0.2},
    {"top_p": 0.9},
    {"top_p": 0.999},
    {"min_p": 0.05},
    {"temperature": 0.7, "top_k": 40, "top_p": 0.8, "min_p": 0.02},
    {"temperature": 3.0, "top_k": 400, "top_p": 0.95},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.8, "top_p": 0.9},
    {"presence_penalty": 1.5, "frequency_penalty": 0.7},
    {"presence_penalty": -1.0, "frequency_penalty": -0.5, "repetition_penalty": 1.1, "top_k": 30},
    {"logit_bias": {0: 5.0, 7: -100.0, VOCAB - 1: 3.5}, "top_k": 50},
)


@pytest.mark.parametrize("rules", RULES, ids=str)
@pytest.mark.parametrize("spread", [0.3, 4.0])
def test_kept_tokens_and_their_shares_equal_transformers(
    rules: dict[str, float], spread: float
) -> None:
    """Uniform numbers on a grid read the distribution off: each token's share, up to a step of the grid."""
    num_points = 2500
    prompt, generated = tuple(range(0, 200, 3)), (5, 5, 5, 9, 30, 999)
    logits = normal(1, 1, spread=spread)[0]
    want = processed(logits, Sampling(**rules), prompt, generated)

    class Point(SamplerState):
        at = 0.0

        def uniform(self, purpose: int = 0) -> float:
            return self.at

    states = []
    for i in range(num_points):
        one = Point(Sampling(**rules), prompt_ids=prompt)
        for token_id in generated:
            one.accept(token_id)
        one.at = (i + 0.5) / num_points
        states.append(one)
    got = torch.zeros(VOCAB, dtype=torch.float64)
    for result in SAMPLER.sample(logits.expand(num_points, -1), states):
        got[drawn(result)] += 1.0 / num_points
    assert (got - want).abs().max().item() <= 1.001 / num_points
    assert not bool(((got > 0) & (want == 0)).any())


@pytest.mark.parametrize(
    "rules", [{}, {"temperature": 1.7}, {"top_k": 12}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str
)
def test_draws_follow_the_exact_distribution(rules: dict[str, float]) -> None:
    num_draws, vocab_size = 20_000, 40
    logits = normal(2, 1, vocab_size, spread=1.5)[0]
    want = processed(logits, Sampling(**rules)).numpy()
    counts = draws(logits, lambda seed: Sampling(seed=seed, **rules), num_draws)
    kept = np.flatnonzero(want)
    assert set(counts) <= set(kept.tolist())
    got = np.array([counts[int(token_id)] for token_id in kept])
    assert chisquare(got, want[kept] / want[kept].sum() * num_draws).pvalue > 1e-3


def test_successive_draws_of_one_choice_are_independent() -> None:
    """Pairs of neighbouring draws fill the table of a uniform distribution evenly; so do two choices of one seed."""
    logits = torch.zeros(8)
    one, two = (state(Sampling(seed=11), choice=choice) for choice in (0, 1))
    tokens = [
        [drawn(r) for r in SAMPLER.sample(logits.expand(2, -1), [one, two])] for _ in range(3200)
    ]
    pairs = Counter(zip([a for a, _ in tokens], [a for a, _ in tokens[1:]], strict=False))
    assert chisquare([pairs[i, j] for i in range(8) for j in range(8)]).pvalue > 1e-3
    both = Counter(map(tuple, tokens))
    assert chisquare([both[i, j] for i in range(8) for j in range(8)]).pvalue > 1e-3


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    vocab_size=st.sampled_from([1, 2, 63, 64, 65, 300, 5000]),
    kind=st.sampled_from(["float32", "tied"]),
)
def test_a_row_draws_the_same_whatever_is_beside_it(
    data: st.DataObject, vocab_size: int, kind: str
) -> None:
    """Also where logits are tied, as those of a bfloat16 model are."""
    num_rows = data.draw(st.integers(2, 8))
    logits = normal(data.draw(st.integers(0, 99)), num_rows, vocab_size)
    if kind == "tied":
        logits = logits.round()
    samplings = [
        Sampling(
            temperature=data.draw(st.sampled_from([0.0, 0.5, 1.0, 9.0])),
            top_k=data.draw(st.sampled_from([0, 1, 5, 255, 256, 257, 2000])),
            top_p=data.draw(st.sampled_from([1.0, 0.99, 0.5, 0.01])),
            min_p=data.draw(st.sampled_from([0.0, 0.2])),
            repetition_penalty=data.draw(st.sampled_from([1.0, 1.2])),
            num_logprobs=data.draw(st.sampled_from([None, 0, 3])),
            seed=data.draw(st.integers(-(2**63), 2**63 - 1)),
        )
        for _ in range(num_rows)
    ]

    def fresh(row: int) -> SamplerState:
        return state(samplings[row], prompt=(0,))

    together = SAMPLER.sample(logits, [fresh(row) for row in range(num_rows)])
    alone = [SAMPLER.sample(logits[row : row + 1], [fresh(row)])[0] for row in range(num_rows)]
    assert [drawn(one) for one in together] == [drawn(one) for one in alone]
    order = data.draw(st.permutations(range(num_rows)))
    shuffled = SAMPLER.sample(logits[list(order)], [fresh(row) for row in order])
    assert [drawn(shuffled[order.index(row)]) for row in range(num_rows)] == [
        drawn(one) for one in alone
    ]


def test_wide_rows_are_independent_across_chunks() -> None:
    logits = normal(3, 9, 150_000, spread=2.0)
    for rules in ({}, {"top_k": 20}, {"top_p": 0.9}, {"top_p": 0.5, "temperature": 0.1}):
        states = [state(Sampling(seed=row, **rules)) for row in range(9)]
        together = [drawn(one) for one in SAMPLER.sample(logits, states)]
        alone = [
            drawn(SAMPLER.sample(logits[row : row + 1], [state(Sampling(seed=row, **rules))])[0])
            for row in range(9)
        ]
        assert together == alone


def test_a_seed_repeats_a_choice_and_choices_differ() -> None:
    logits = normal(4, 1)

    def tokens(choice: int, seed: int | None) -> list[int]:
        one = state(Sampling(seed=seed), choice=choice)
        return [drawn(SAMPLER.sample(logits, [one])[0]) for _ in range(20)]

    assert tokens(0, 5) == tokens(0, 5)
    assert tokens(0, 5) != tokens(1, 5) != tokens(0, 6)
    assert tokens(0, None) != tokens(0, None)


def test_greedy_takes_the_first_of_the_largest() -> None:
    logits = normal(5, 4)
    logits[2, [17, 400]] = 99.0
    greedy = Sampling(temperature=0.0)
    got = [drawn(one) for one in SAMPLER.sample(logits, [state(greedy) for _ in range(4)])]
    assert got == logits.argmax(-1).tolist()
    assert got[2] == 17
    mixed = [state(greedy), state(Sampling(seed=1)), state(greedy), state(Sampling(top_k=1))]
    again = [drawn(one) for one in SAMPLER.sample(logits, mixed)]
    assert [again[0], again[2], again[3]] == [got[0], got[2], got[3]]


def test_extreme_temperatures() -> None:
    logits = normal(6, 1, spread=50.0)
    for temperature in (1e-300, 1e-9, 1e-4):
        got = SAMPLER.sample(logits, [state(Sampling(temperature=temperature, seed=1))])
        assert drawn(got[0]) == int(logits.argmax())
    flat = draws(normal(6, 1, 8, 1.0)[0], lambda s: Sampling(temperature=100.0, seed=s), 4000)
    assert chisquare([flat[i] for i in range(8)]).pvalue > 1e-4


def test_logits_stay_as_they_are() -> None:
    logits = normal(7, 2)
    before = logits.clone()
    busy = Sampling(repetition_penalty=1.5, logit_bias={1: 3.0}, min_tokens=4, top_k=3, seed=1)
    SAMPLER.sample(logits, [state(busy, prompt=(1, 2)), state(busy)])
    assert torch.equal(before, logits)


def test_ends_are_masked_until_the_minimum() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, [2, 3, 9]] = torch.tensor([50.0, 49.0, 48.0])
    one = state(Sampling(temperature=0.0, min_tokens=2, stop_token_ids=(9,)))
    got = [drawn(SAMPLER.sample(logits, [one])[0]) for _ in range(3)]
    assert got == [0, 0, 2]
    ignoring = state(Sampling(temperature=0.0, min_tokens=2, is_eos_ignored=True))
    assert drawn(SAMPLER.sample(logits, [ignoring])[0]) == 2


def test_frequency_penalty_ends_repetition() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 5] = 3.5
    one = state(Sampling(temperature=0.0, frequency_penalty=1.0), prompt=(5,) * 50)
    got = [drawn(SAMPLER.sample(logits, [one])[0]) for _ in range(5)]
    assert got == [5, 5, 5, 5, 0]  # what the prompt repeats is not penalised


def test_many_tokens_are_counted() -> None:
    one = state(
        Sampling(repetition_penalty=1.1), prompt=range(150), generated=[*range(100, 400)] * 2
    )
    ids, counts = one.seen
    assert dict(zip(ids.tolist(), counts.tolist(), strict=True)) == {
        i: 0.0 if i < 100 else 2.0 for i in range(400)
    }


def test_logprobs_are_the_models_own() -> None:
    logits = normal(8, 3)
    want = logits.double().log_softmax(-1)
    masked = Sampling(
        temperature=0.3, logit_bias={int(logits[1].argmax()): -100.0}, num_logprobs=5, seed=3
    )
    got = SAMPLER.sample(
        logits, [state(Sampling(seed=1)), state(masked), state(Sampling(num_logprobs=0, seed=2))]
    )
    first, second, third = (one for one in got if isinstance(one, Sampled))
    assert first.logprob is None
    assert second.logprob is not None
    assert second.logprob.logprob == pytest.approx(want[1, second.token_id].item(), abs=1e-5)
    values, ids = want[1].topk(5)
    assert [token_id for token_id, _ in second.logprob.top] == ids.tolist()
    assert [value for _, value in second.logprob.top] == pytest.approx(values.tolist(), abs=1e-5)
    assert third.logprob is not None
    assert third.logprob.top == ()


def test_scores_of_given_tokens() -> None:
    logits = normal(9, 4)
    logits[0, 7] = -math.inf
    scores = score_tokens(logits, [7, 1, 2, 3], [0, 2, 0, VOCAB + 1])
    assert scores[0].logprob == -9999.0
    assert [len(one.top) for one in scores] == [0, 2, 0, VOCAB]
    assert scores[1].logprob == pytest.approx(logits[1].log_softmax(-1)[1].item(), abs=1e-5)
    assert score_tokens(logits[:0], [], []) == []


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_ends_alone(bad: float, temperature: float) -> None:
    logits = normal(10, 3)
    logits[1, 500] = bad
    states = [state(Sampling(temperature=temperature, seed=1)) for _ in range(3)]
    got = SAMPLER.sample(logits, states)
    assert isinstance(got[1], InternalError)
    assert [one.num_tokens for one in states] == [1, 0, 1]
    alone = SAMPLER.sample(logits[2:], [state(Sampling(temperature=temperature, seed=1))])
    assert drawn(got[2]) == drawn(alone[0])


def test_masked_logits_of_the_model_are_never_drawn() -> None:
    logits = normal(11, 1, 100)
    logits[0, 10:] = -math.inf
    for rules in ({}, {"top_k": 50}, {"top_p": 0.99}, {"temperature": 50.0}):
        assert max(draws(logits[0], lambda s, r=rules: Sampling(seed=s, **r), 500)) < 10  # type: ignore[misc]
    logits[:] = -math.inf
    assert isinstance(SAMPLER.sample(logits, [state(Sampling())])[0], InternalError)


def test_no_rows() -> None:
    assert SAMPLER.sample(torch.zeros(0, VOCAB), []) == []


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("temperature", math.nan, "nan"),
        ("temperature", -0.1, "0 to 100"),
        ("temperature", math.inf, "inf"),
        ("top_p", 0.0, "more than 0"),
        ("top_p", 1.01, "0 to 1"),
        ("min_p", math.nan, "nan"),
        ("top_k", -1, "from 0"),
        ("repetition_penalty", 0.0, "0.01 to 100"),
        ("presence_penalty", 2.1, "-2 to 2"),
        ("frequency_penalty", -math.inf, "-inf"),
        ("max_tokens", 0, "1 to 512"),
        ("max_tokens", 513, "513"),
        ("min_tokens", 17, "0 to 16"),
        ("seed", 2**63, str(2**63)),
        ("num_logprobs", 21, "0 to 20"),
        ("logit_bias", {VOCAB: 1.0}, "0 to 999 (toy)"),
        ("logit_bias", {3: math.nan}, "nan"),
        ("logit_bias", {3: 101.0}, "-100 to 100"),
        ("logit_bias", dict.fromkeys(range(MAX_BIASES + 1), 0.0), "1025"),
        ("stop", ("x",) * 10_000, f"at most {MAX_STOP_STRINGS}"),
        ("stop", ("",), "one of 0"),
        ("stop", ("x" * 2000,), "one of 2000"),
        ("stop_token_ids", (-1,), "-1"),
        ("stop_token_ids", (1,) * 65, "65"),
    ],
)
def test_what_cannot_be_sampled_is_refused_with_numbers(
    field: str, value: object, says: str
) -> None:
    with pytest.raises(FieldError) as caught:
        check_sampling(Sampling(**{field: value}), SPEC)  # type: ignore[arg-type]
    assert says in str(caught.value)
    assert caught.value.advice


def test_what_can_be_sampled_is_not_refused() -> None:
    check_sampling(Sampling(), SPEC)
    check_sampling(
        Sampling(
            temperature=0,
            top_k=VOCAB * 2,
            seed=-(2**63),
            max_tokens=512,
            stop=("a",) * MAX_STOP_STRINGS,
            logit_bias={0: -100, 999: 100},
        ),
        SPEC,
    )
