"""Random sequences of submit, step, cancel, stop, preempt and move: no page leaks, every request ends once, and right."""

from hypothesis import given, settings
from hypothesis import strategies as st

from ganglion.engine.language_policy import POLICIES
from ganglion.errors import CancelledError, InternalError, OutOfPagesError
from ganglion.generation import Usage
from ganglion.types import RequestId
from tests.cpu.language_toy import Stand, ToyDecoder, dense_greedy
from tests.cpu.test_language_engine import LONG, Fragile

MODEL = ToyDecoder()
Action = tuple[str, int, int]

actions = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(1, 40), st.integers(1, 3)),
        st.tuples(st.just("fragile"), st.integers(2, 9), st.integers(1, 2)),
        st.tuples(st.just("step"), st.sampled_from([0, 60, 10**9]), st.integers(1, 12)),
        st.tuples(st.just("cancel"), st.integers(0, 9), st.just(0)),
        st.tuples(st.just("stop"), st.integers(0, 9), st.integers(0, 2)),
        st.tuples(st.just("preempt"), st.just(0), st.just(0)),
        st.tuples(st.just("move"), st.integers(1, 40), st.just(0)),
    ),
    max_size=40,
)


@given(
    actions=actions,
    policy=st.sampled_from(list(POLICIES)),
    num_large_pages=st.integers(2, 40),
    max_rows=st.integers(1, 9),
    max_batch_tokens=st.sampled_from([1, 8, 500]),
)
@settings(max_examples=50, deadline=None)
def test_no_page_leaks_and_every_request_ends_once(
    actions: list[Action], policy: str, num_large_pages: int, max_rows: int, max_batch_tokens: int
) -> None:
    stand = Stand(
        Fragile(),
        policy=POLICIES[policy],
        num_large_pages=num_large_pages,
        max_rows=max_rows,
        max_batch_tokens=max_batch_tokens,
    )
    prompts: list[tuple[list[int], int]] = []
    for name, first, second in actions:
        match name:
            case "submit" | "fragile":
                prompt = LONG[:first] if name == "submit" else [38] * first
                stand.submit(
                    len(prompts),
                    prompt,
                    max_tokens=6,
                    num_choices=second,
                    num_prompt_logprobs=1 if first % 7 == 0 else None,
                )
                prompts.append((prompt, second))
            case "step":
                for _ in range(second):
                    stand.step(first)
            case "cancel":
                stand.engine.cancel(RequestId(first))
            case "stop":
                stand.engine.stop(RequestId(first), second)
            case "preempt":
                stand.engine.preempt_latest()
            case "move":
                moves = stand.ledger.plan_moves(1 << 20, num_spare=first)
                if moves is not None:
                    stand.arena.copy(moves.copies)
        stand.ledger.check_integrity()
    stand.run()
    stand.check_empty()
    assert stand.outcomes.keys() == set(range(len(prompts)))
    for at, (prompt, num_choices) in enumerate(prompts):
        outcome = stand.outcomes[at]
        assert isinstance(outcome, Usage | CancelledError | OutOfPagesError | InternalError)
        continuation = dense_greedy(MODEL, prompt, 6)
        assert isinstance(outcome, InternalError) <= (38 in prompt + continuation)
        want = [] if 38 in prompt else continuation
        for choice in range(num_choices):
            tokens = stand.tokens.get((at, choice), [])
            assert tokens == want[: len(tokens)], (at, choice)
            if isinstance(outcome, Usage) and "stop" not in {action[0] for action in actions}:
                assert len(tokens) == 6
