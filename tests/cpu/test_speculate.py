"""Speculation: drafts change no token (equality) and no probability (rejection), and stop where they do not pay."""

import itertools
import random
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor

from ganglion.engine.grammar import GrammarCompiler
from ganglion.engine.sampler import Sampled, Sampler, SamplerState
from ganglion.engine.verify import verify
from ganglion.errors import InternalError
from ganglion.generation import Grammar, GrammarKind, LanguageSpec, Sampling
from ganglion.models.speculate import DraftLength, NgramIndex, accept_by_rejection, num_equal

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
        new = [
            one.token_id
            for one in verify(SAMPLER, logits, state, draft)
            if isinstance(one, Sampled)
        ]
        assert num_equal(draft, new) in (len(new) - 1, len(new))
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
    first, second, third = verify(SAMPLER, logits, state, (7, 7, 7))
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


def test_equality_counts_the_prefix() -> None:
    assert num_equal((1, 2, 3), (1, 2, 3, 4)) == 3
    assert num_equal((1, 2, 3), (1, 5)) == 1
    assert num_equal((), (9,)) == 0


@pytest.mark.parametrize("overlap", [0.0, 0.5, 1.0])
def test_rejection_leaves_the_targets_distribution(overlap: float) -> None:
    """Joint distribution of the first two tokens, against the target's, from 6,000 drafts of two."""
    rng, num_runs, size = random.Random(3), 6_000, 5
    generator = torch.Generator().manual_seed(1)
    target = torch.rand(3, size, generator=generator, dtype=torch.float64)
    target[0, 2] = 0.0  # the target never says what the draft may
    other = torch.rand(2, size, generator=generator, dtype=torch.float64) + 0.01
    target /= target.sum(-1, keepdim=True)
    proposal = overlap * target[:2] + (1 - overlap) * other / other.sum(-1, keepdim=True)
    pairs: Counter[tuple[int, ...]] = Counter()
    num_accepted = 0
    for _ in range(num_runs):
        draft = [rng.choices(range(size), row)[0] for row in proposal.tolist()]
        taken = accept_by_rejection(
            target, proposal, draft, (rng.random(), rng.random()), rng.random()
        )
        num_accepted += len(taken) - 1
        if len(taken) == 1:  # plain decoding goes on by itself
            taken = (*taken, rng.choices(range(size), target[1].tolist())[0])
        pairs[taken[:2]] += 1
    joint = (target[0][:, None] * target[1][None]).tolist()
    kept = [(i, j) for i in range(size) for j in range(size) if joint[i][j] > 0]
    assert set(pairs) <= set(kept)
    want = [joint[i][j] * num_runs for i, j in kept]
    assert chisquare([pairs[place] for place in kept], want).pvalue > 1e-3
    if overlap == 1.0:
        assert num_accepted == 2 * num_runs
    else:  # the most that any rule can accept: the overlap of the two
        first, second = torch.minimum(target[:2], proposal).sum(-1).tolist()
        assert num_accepted / num_runs == pytest.approx(first + first * second, abs=0.04)


@pytest.mark.parametrize("acceptance", [0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0])
@pytest.mark.parametrize("per_token", [0.02, 0.2, 0.6])
def test_drafting_pays_or_stops(acceptance: float, per_token: float) -> None:
    """Tokens per time, in a world where a forward over k + 1 tokens costs 1 + k * per_token: never 3% below plain."""
    rng, length = random.Random(1), DraftLength()
    verify_us = [1.0 + k * per_token for k in range(9)]
    num_tokens, spent_us = 0, 0.0
    for _ in range(4000):
        num_drafted = length.choose(verify_us)
        num_held = 0
        while num_held < num_drafted and rng.random() < acceptance:
            num_held += 1
        length.observe(num_drafted=num_drafted, num_held=num_held)
        num_tokens, spent_us = num_tokens + num_held + 1, spent_us + verify_us[num_drafted]
    best = max(
        sum(acceptance**i for i in range(k + 1)) / verify_us[k] for k in range(len(verify_us))
    )
    assert num_tokens / spent_us >= 0.97
    assert num_tokens / spent_us >= 0.9 * best


def test_drafting_notices_a_part_that_can_be_copied() -> None:
    length, verify_us = DraftLength(), [1.0 + 0.1 * k for k in range(9)]
    for _ in range(50):
        length.observe(num_drafted=4, num_held=0)
    assert length.choose(verify_us) == 0
    for _ in range(400):
        num_drafted = length.choose(verify_us)
        length.observe(num_drafted=num_drafted, num_held=num_drafted)
    assert length.choose(verify_us) == 8
    assert length.acceptance > 0.95
    assert DraftLength().choose([1.0]) == 0
