"""Speculation without an engine: drafts change no token, are shared out for the best rate, and stop where they do not pay."""

import itertools
import random
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ganglion.engine.grammar import GrammarCompiler
from ganglion.engine.sampler import Sampled, Sampler, SamplerState
from ganglion.engine.verify import verify
from ganglion.errors import InternalError
from ganglion.generation import Grammar, GrammarKind, LanguageSpec, Sampling
from ganglion.models.speculate import (
    MAX_SHARE,
    Acceptance,
    NgramIndex,
    Pace,
    StepCosts,
    share_out,
)

VOCAB = 257
SPEC = LanguageSpec(
    name="toy",
    family="llama",
    version="0",
    vocab_size=VOCAB,
    max_tokens=512,
    num_layers=1,
    width=1,
    eos_ids=(256,),
    dtype="float32",
)
SAMPLER = Sampler(SPEC)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def model(tokens: Sequence[int]) -> Tensor:
    """Logits [vocab] after some tokens: a function of the last one, peaked enough to fall into loops."""
    generator = torch.Generator().manual_seed(hash(tuple(tokens[-1:])) % 2**31)
    logits = 2.5 * torch.randn(VOCAB, generator=generator)
    logits[256] = -5.0
    return logits


def plain(prompt: list[int], state: SamplerState, num_tokens: int) -> list[int]:
    tokens = list(prompt)
    while len(tokens) - len(prompt) < num_tokens and not state.is_done:
        (drawn,) = SAMPLER.sample(model(tokens)[None], [state])
        assert isinstance(drawn, Sampled)
        tokens.append(drawn.token_id)
    return tokens[len(prompt) :]


def speculative(
    prompt: list[int], state: SamplerState, num_tokens: int, length: int
) -> tuple[list[int], int]:
    """Tokens, and how many forwards they took."""
    index, tokens, num_forwards = NgramIndex(min_ngram=1), list(prompt), 0
    index.extend(prompt)
    while len(tokens) - len(prompt) < num_tokens and not state.is_done:
        draft = index.propose(length)
        logits = torch.stack([model([*tokens, *draft[:i]]) for i in range(len(draft) + 1)])
        (taken,) = verify(SAMPLER, logits, [0], [state], [draft])
        new = [one.token_id for one in taken if isinstance(one, Sampled)]
        assert len(new) == len(taken)
        assert tuple(new[:-1]) == draft[: len(new) - 1]
        tokens += new
        index.extend(new)
        num_forwards += 1
    return tokens[len(prompt) :][:num_tokens], num_forwards


@pytest.mark.parametrize(
    "rules",
    [
        {"temperature": 0.0},
        {"temperature": 0.5, "top_k": 20},
        {"temperature": 0.3, "repetition_penalty": 1.1, "frequency_penalty": 0.2},
        {"temperature": 0.0, "min_tokens": 30, "presence_penalty": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("length", [1, 3, 8])
def test_tokens_equal_those_of_plain_decoding(rules: dict[str, float], length: int) -> None:
    prompt = [1, 2, 3, 1, 2]
    sampling = Sampling(seed=5, max_tokens=80, **rules)  # type: ignore[arg-type]
    want = plain(prompt, SamplerState(sampling, prompt_ids=prompt), 80)
    got, num_forwards = speculative(prompt, SamplerState(sampling, prompt_ids=prompt), 80, length)
    assert got == want
    if rules == {"temperature": 0.0}:
        assert num_forwards < 80 * 0.75  # it does fall into a loop, which is copied


def test_tokens_equal_under_a_grammar() -> None:
    compiler = GrammarCompiler([*(bytes([i]) for i in range(256)), b"<eos>"], (256,))
    compiled = compiler.compile(Grammar(kind=GrammarKind.REGEX, text="(ab|ba|cab){10,12}x"))
    prompt = [*b"abababab"]
    for seed in range(4):
        sampling = Sampling(seed=seed, temperature=0.8)
        states = [
            SamplerState(sampling, prompt_ids=prompt, grammar=compiled.matcher()) for _ in "ab"
        ]
        want = plain(prompt, states[0], 60)
        assert speculative(prompt, states[1], 60, 4)[0] == want
        assert want[-1] == ord("x")


def test_a_row_that_fails_ends_the_check() -> None:
    logits = torch.zeros(4, VOCAB)
    logits[:, 7] = 1.0
    logits[2, 0] = torch.nan
    state = SamplerState(Sampling(temperature=0.0), prompt_ids=())
    other = SamplerState(Sampling(temperature=0.0), prompt_ids=())
    (first, second, third), rest = verify(
        SAMPLER, torch.cat([logits, logits]), [0, 4], [state, other], [(7, 7, 7), (8, 7, 7)]
    )
    assert [one.token_id for one in rest if isinstance(one, Sampled)] == [7]
    assert isinstance(first, Sampled)
    assert isinstance(second, Sampled)
    assert isinstance(third, InternalError)


def latest_continuation(tokens: list[int], low: int, high: int, wanted: int) -> tuple[int, ...]:
    for length in range(high, low - 1, -1):
        for end in range(len(tokens) - 1, length - 1, -1):
            if length < len(tokens) and tokens[end - length : end] == tokens[-length:]:
                copied = list(tokens)
                while len(copied) < len(tokens) + wanted:
                    copied.append(copied[end + len(copied) - len(tokens)])
                return tuple(copied[len(tokens) :])
    return ()


@settings(max_examples=200, deadline=None)
@given(
    tokens=st.lists(st.integers(0, 3), max_size=40),
    cuts=st.lists(st.integers(0, 40), max_size=3),
    low=st.integers(1, 3),
    more=st.integers(0, 2),
    wanted=st.integers(0, 9),
)
def test_lookup_equals_a_search(
    tokens: list[int], cuts: list[int], low: int, more: int, wanted: int
) -> None:
    index = NgramIndex(min_ngram=low, max_ngram=low + more)
    edges = [0, *sorted(min(cut, len(tokens)) for cut in cuts), len(tokens)]
    for start, end in itertools.pairwise(edges):
        index.extend(tokens[start:end])
    assert index.propose(wanted) == latest_continuation(tokens, low, low + more, wanted)


rows = st.lists(st.tuples(st.floats(0.0, 1.0), st.integers(0, 3)), min_size=1, max_size=3)


@settings(max_examples=200, deadline=None)
@given(rows=rows, token_us=st.floats(0.01, 2.0), bend=st.integers(0, 6))
def test_no_other_sharing_makes_more_tokens_per_time(
    rows: list[tuple[float, int]], token_us: float, bend: int
) -> None:
    shares, limits = [min(share, MAX_SHARE) for share, _ in rows], [limit for _, limit in rows]

    def cost_us(num_drafted: int) -> float:
        return 1.0 + token_us * max(0, num_drafted - bend)

    def rate(lengths: Sequence[int]) -> float:
        num_tokens = sum(
            sum(share**i for i in range(length + 1))
            for share, length in zip(shares, lengths, strict=True)
        )
        return num_tokens / cost_us(sum(lengths))

    best = max(rate(lengths) for lengths in itertools.product(*[range(n + 1) for n in limits]))
    assert rate(share_out(shares, limits, cost_us)) == pytest.approx(best)


def test_costs_are_linear_between_what_was_measured() -> None:
    costs = StepCosts()
    assert costs.plain_us(2) is None
    for us in (50.0, 10.0, 10.0):  # the first warmed something up
        costs.observe(2, 0, us)
    assert costs.plain_us(2) == 10.0
    assert costs.estimate_us(2, 2) == pytest.approx(11.0)  # nothing known of drafts: a tenth
    for _ in range(3):
        costs.observe(2, 4, 18.0)
    assert costs.estimate_us(2, 2) == pytest.approx(14.0)
    assert costs.estimate_us(2, 8) == pytest.approx(20.0)  # past what is known as before
    for _ in range(20):
        costs.observe(2, 4, 1e6)  # a disturbance counts as three times
    assert costs.plain_us(2) == 10.0


def decode(
    pace: Pace,
    acceptance: Acceptance,
    held: Callable[[], bool],
    cost_us: Sequence[float],
    steps: int,
) -> float:
    """Tokens per time of one row whose drafted tokens hold as `held` says, in units of plain decoding."""
    num_tokens, spent_us = 0, 0.0
    for _ in range(steps):
        (num_drafted,) = pace.choose([acceptance.share], [8])
        num_held = 0
        while num_held < num_drafted and held():
            num_held += 1
        acceptance.observe(num_drafted=num_drafted, num_held=num_held)
        pace.observe(
            num_rows=1,
            num_drafted=num_drafted,
            num_taken=num_held + 1,
            spent_us=cost_us[num_drafted],
        )
        num_tokens, spent_us = num_tokens + num_held + 1, spent_us + cost_us[num_drafted]
    return num_tokens * cost_us[0] / spent_us


@pytest.mark.parametrize("acceptance", [0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0])
@pytest.mark.parametrize("per_token", [0.02, 0.2, 0.6])
@pytest.mark.parametrize("jump", [0.0, 0.8])
def test_drafting_pays_or_stops(acceptance: float, per_token: float, jump: float) -> None:
    """A step over k + 1 tokens costs 1 + k * per_token, and a jump where it is not plain: never 3% below plain."""
    rng = random.Random(1)
    cost_us = [1000.0 * (1.0 + k * per_token + (jump if k else 0.0)) for k in range(9)]
    rate = decode(Pace(), Acceptance(), lambda: rng.random() < acceptance, cost_us, 4000)
    best = max(sum(acceptance**i for i in range(k + 1)) * cost_us[0] / cost_us[k] for k in range(9))
    assert rate >= 0.97
    assert rate >= 0.9 * best or best < 1.35


def test_the_loss_is_small_from_the_first_token_on() -> None:
    cost_us = [1000.0] + [2000.0 + 300.0 * k for k in range(8)]
    for num_steps in (100, 200, 400, 800):
        rate = decode(Pace(), Acceptance(), lambda: False, cost_us, num_steps)
        assert rate >= 1 - 0.015 - 4 / num_steps, num_steps


def test_drafting_notices_a_part_that_can_be_copied() -> None:
    pace, acceptance = Pace(), Acceptance()
    cost_us = [1000.0 + 100.0 * k for k in range(9)]
    decode(pace, acceptance, lambda: False, cost_us, 300)
    assert pace.choose([acceptance.share], [8]) == (0,)
    assert decode(pace, acceptance, lambda: True, cost_us, 600) > 1.5
    assert acceptance.share > 0.95


def test_nothing_is_drafted_before_a_plain_step_was_measured() -> None:
    pace = Pace()
    assert pace.choose([0.9], [8]) == (0,)
    assert pace.choose([0.9], [0]) == (0,)
