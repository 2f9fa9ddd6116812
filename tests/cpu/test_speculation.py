"""Speculation in the language engine: tokens, ends, usage and pages equal those of plain decoding, whoever drafts."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ganglion.engine.drafter import Speculation
from ganglion.engine.language_policy import POLICIES
from ganglion.errors import FieldError
from ganglion.types import RequestId
from tests.cpu.language_toy import Stand, ToyDecoder, dense_greedy

PROMPTS = [[(7 * i + 3 * j) % 38 + 1 for j in range(2 + 3 * i)] for i in range(8)]
LONG = [(5 * j * j + 3 * j) % 38 + 1 for j in range(60)]
NO_BUDGET_US = 0


class Mistaken(ToyDecoder):
    """Drafts as the target would, but is wrong at some places."""

    def __init__(self, every: int = 3, name: str = "draft") -> None:
        super().__init__(name=name)
        self.every = every

    def logits(self, hidden: Tensor) -> Tensor:
        logits = super().logits(hidden)
        is_wrong = (hidden[:, 0] * 1000).long() % self.every == 0
        logits[is_wrong] = logits[is_wrong].roll(1, -1)
        return logits


def stand(source: str, *models: ToyDecoder, **options: object) -> Stand:
    settings = {
        name: options.pop(name)
        for name in ("max_tokens", "is_ahead", "is_paced")
        if name in options
    }
    speculation = Speculation(source=source, **({"is_paced": False} | settings))  # type: ignore[arg-type]
    return Stand(ToyDecoder(), *models, speculation=speculation, **options)


SOURCES = {
    "ngram": ("ngram", ()),
    "same": ("draft", (lambda: ToyDecoder(name="draft"),)),
    "other": ("draft", (lambda: ToyDecoder(name="draft", seed=1),)),
    "mistaken": ("draft", (Mistaken,)),
}


def make(kind: str, **options: object) -> Stand:
    source, makers = SOURCES[kind]
    return stand(source, *[make_() for make_ in makers], **options)


@pytest.mark.parametrize("when", ["before", "ahead"])
@pytest.mark.parametrize("num_rows", [1, 8])
@pytest.mark.parametrize("kind", SOURCES)
def test_tokens_equal_plain_greedy(kind: str, num_rows: int, when: str) -> None:
    made = make(kind, max_rows=num_rows, is_ahead=when == "ahead", max_tokens=5)
    prompts = PROMPTS[:num_rows]
    for at, prompt in enumerate(prompts):
        made.submit(at, prompt, max_tokens=64)
    made.run()
    for at, prompt in enumerate(prompts):
        assert made.tokens[at, 0] == dense_greedy(ToyDecoder(), prompt, 64), at
        assert made.usage(at).num_completion_tokens == 64
    made.check_empty()
    counts = made.engine.draft_counts
    assert counts.num_drafted > 0
    if kind == "same":
        assert counts.num_held > 0.9 * counts.num_drafted
    if kind == "mistaken":
        assert 0.1 < counts.num_held / counts.num_drafted < 0.95


@pytest.mark.parametrize("when", ["before", "ahead"])
@pytest.mark.parametrize("how", ["batched", "singly"])
def test_sliced_between_layers(when: str, how: str) -> None:
    """Drafts and their check stop after every layer; scores are bit-equal where every token is computed alone."""
    runs = []
    for kind in ("mistaken", "ngram", None):
        options: dict[str, object] = {"is_deterministic": how == "singly"}
        made = Stand(**options) if kind is None else make(kind, is_ahead=when == "ahead", **options)
        for at in range(2):
            made.submit(at, PROMPTS[at + 3], max_tokens=12, num_logprobs=2)
        made.run(NO_BUDGET_US, most=5000)
        made.check_empty()
        runs.append(
            (made.tokens, [scores(made, at) for at in range(2)] if how == "singly" else None)
        )
    assert runs[0] == runs[1] == runs[2]


def scores(made: Stand, request_id: int) -> list[object]:
    return [
        one for delta in made.deltas if delta.request_id == request_id for one in delta.logprobs
    ]


RULES = [
    {"temperature": 0.9, "seed": 3},
    {"temperature": 0.5, "seed": 4, "top_k": 5, "repetition_penalty": 1.2},
    {"temperature": 0.0, "frequency_penalty": 0.7, "min_tokens": 9, "stop_token_ids": (5, 7)},
]


@pytest.mark.parametrize("kind", ["ngram", "same", "mistaken"])
@pytest.mark.parametrize("rules", RULES, ids=str)
def test_sampled_tokens_and_ends_equal_plain_ones(rules: dict[str, object], kind: str) -> None:
    plain, made = Stand(), make(kind)
    for each in (plain, made):
        each.submit(0, PROMPTS[4], max_tokens=40, num_choices=3, is_eos_ignored=False, **rules)
        each.run()
        each.check_empty()
    assert made.tokens == plain.tokens
    assert made.outcomes == plain.outcomes
    ends = [
        {(one.choice, one.finish, one.stop_token_id) for one in each.deltas if one.finish}
        for each in (plain, made)
    ]
    assert ends[0] == ends[1]
    if kind == "same":  # drawn with the same random numbers, so that most hold
        assert made.engine.draft_counts.num_held > 0.7 * made.engine.draft_counts.num_drafted


def test_pages_are_those_of_plain_decoding_after_every_step() -> None:
    made, plain = make("mistaken"), Stand()
    for each in (made, plain):
        each.submit(0, PROMPTS[2], max_tokens=30)
    while made.engine.has_work:
        made.step()
        num_tokens = len(made.tokens.get((0, 0), []))
        while len(plain.tokens.get((0, 0), [])) < num_tokens:
            plain.step()
        of_both = [each.ledger.stats().num_used_pages for each in (made, plain)]
        assert {name: of_both[0][name] for name in of_both[1]} == of_both[1]
    made.check_empty()


def test_rows_of_a_batch_draft_each_their_own_way() -> None:
    made = make("mistaken", policy=POLICIES["chunked"])
    for at, speculate in enumerate(["off", "ngram", "draft", None, "off"]):
        made.submit(at, PROMPTS[at], max_tokens=20, speculate=speculate)
    for _ in range(4):
        made.step()
    made.submit(5, LONG, max_tokens=12)
    made.run()
    for at in range(5):
        assert made.tokens[at, 0] == dense_greedy(ToyDecoder(), PROMPTS[at], 20)
    assert made.tokens[5, 0] == dense_greedy(ToyDecoder(), LONG, 12)
    made.check_empty()


@pytest.mark.parametrize("when", ["before", "ahead"])
def test_preempted_in_between(when: str) -> None:
    made = make("mistaken", is_ahead=when == "ahead")
    for at in range(3):
        made.submit(at, PROMPTS[at], max_tokens=20)
    for at in range(200):
        made.step(NO_BUDGET_US)
        if at % 40 == 39:
            assert made.engine.preempt_latest()  # the drafts' pages first
            assert made.engine.preempt_latest() or not made.engine.num_running
    made.run()
    for at in range(3):
        assert made.tokens[at, 0] == dense_greedy(ToyDecoder(), PROMPTS[at], 20)
    assert made.engine.num_preemptions > 0
    made.check_empty()


def test_drafts_give_way_where_pages_are_few() -> None:
    made = make("same", num_large_pages=14)
    for at in range(4):
        made.submit(at, PROMPTS[at], max_tokens=30)
    made.run()
    for at in range(4):
        assert made.tokens[at, 0] == dense_greedy(ToyDecoder(), PROMPTS[at], 30)
    made.check_empty()


def test_a_drafting_model_that_fails_is_left_out() -> None:
    class Broken(ToyDecoder):
        def logits(self, hidden: Tensor) -> Tensor:
            raise RuntimeError("broken")

    for is_ahead in (False, True):
        made = stand("draft", Broken(name="draft"), is_ahead=is_ahead)
        made.submit(0, PROMPTS[3], max_tokens=10)
        made.run()
        assert made.tokens[0, 0] == dense_greedy(ToyDecoder(), PROMPTS[3], 10)
        made.check_empty()


def test_what_was_drafted_ahead_and_is_wrong_is_not_computed_on() -> None:
    made = make("mistaken", is_ahead=True, max_tokens=8)
    made.submit(0, PROMPTS[3], max_tokens=60)
    made.run()
    work = made.engine.draft_counts.layers
    assert work.num_saved > 0
    assert work.num_run > work.num_stale


def test_who_may_draft_is_checked() -> None:
    class Larger(ToyDecoder):
        def __init__(self) -> None:
            super().__init__(name="larger")
            self.spec = replace(self.spec, vocab_size=41)

    made = stand("off", ToyDecoder(name="draft"), Larger())
    for at, name in enumerate(["larger", "toy", "nobody"]):
        made.submit(at, PROMPTS[0], speculate=name)
        made.step()
        error = made.outcomes[at]
        assert isinstance(error, FieldError)
        assert "off, ngram, draft" in str(error)


def test_stopped_in_the_middle_and_models_that_go() -> None:
    made = make("same", is_ahead=True)
    made.submit(0, PROMPTS[3], max_tokens=60, num_choices=2)
    for _ in range(6):
        made.step(60)
    made.engine.stop(RequestId(0), 1)
    made.engine.close_model("draft")
    made.run()
    assert made.tokens[0, 0] == dense_greedy(ToyDecoder(), PROMPTS[3], 60)
    made.check_empty()
    made.engine.close()


def test_paced_drafts_are_no_slower() -> None:
    """On the toy's clock a step costs 5 microseconds a layer and one for each token: bad drafts stop, good ones pay."""

    def took_s(made: Stand) -> float:
        for at in range(3):
            made.submit(at, PROMPTS[at], max_tokens=100)
        made.run()
        return made.clock.now_s()

    plain = took_s(Stand(max_rows=1))
    good = stand("ngram", max_rows=1, is_paced=True)
    assert took_s(good) < 0.95 * plain
    bad = make("other", max_rows=1, is_paced=True)
    assert took_s(bad) < 1.04 * plain
    assert bad.engine.draft_counts.num_drafted > 0


Action = tuple[str, int, int]
actions = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(1, 30), st.integers(1, 3)),
        st.tuples(st.just("step"), st.sampled_from([0, 60, 10**9]), st.integers(1, 12)),
        st.tuples(st.just("cancel"), st.integers(0, 5), st.just(0)),
        st.tuples(st.just("preempt"), st.just(0), st.just(0)),
        st.tuples(st.just("move"), st.integers(1, 40), st.just(0)),
    ),
    max_size=25,
)


@given(
    actions=actions,
    kind=st.sampled_from(["ngram", "mistaken"]),
    when=st.sampled_from(["before", "ahead"]),
    num_large_pages=st.integers(3, 40),
    num_drafted=st.integers(1, 9),
)
@settings(max_examples=25, deadline=None)
def test_no_page_leaks(
    actions: list[Action], kind: str, when: str, num_large_pages: int, num_drafted: int
) -> None:
    made = make(
        kind, is_ahead=when == "ahead", num_large_pages=num_large_pages, max_tokens=num_drafted
    )
    prompts: list[list[int]] = []
    for name, first, second in actions:
        match name:
            case "submit":
                made.submit(len(prompts), LONG[:first], max_tokens=9, num_choices=second)
                prompts.append(LONG[:first])
            case "step":
                for _ in range(second):
                    made.step(first)
            case "cancel":
                made.engine.cancel(RequestId(first))
            case "preempt":
                made.engine.preempt_latest()
            case "move":
                moves = made.ledger.plan_moves(1 << 20, num_spare=first)
                if moves is not None:
                    made.arena.copy(moves.copies)
        made.ledger.check_integrity()
    made.run()
    made.check_empty()
    assert made.outcomes.keys() == set(range(len(prompts)))
    for (at, _), tokens in made.tokens.items():
        assert tokens == dense_greedy(ToyDecoder(), prompts[at], 9)[: len(tokens)]
    made.engine.close()
