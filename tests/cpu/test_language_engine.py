"""The language engine over pages: equal to the dense model however it is cut, batched, cached or preempted."""

from collections.abc import Sequence

import pytest
import torch

from ganglion.engine.language_policy import MAX_LAYER_TOKENS, POLICIES, BatchOrder, Policy
from ganglion.errors import (
    CancelledError,
    ErrorCode,
    FieldError,
    GanglionError,
    InternalError,
    OutOfPagesError,
)
from ganglion.generation import FinishReason, PromptScored
from ganglion.types import RequestId
from tests.cpu.language_toy import WINDOW, Stand, ToyDecoder, dense_greedy, dense_logits

PROMPTS = [[(7 * i + 3 * j) % 38 + 1 for j in range(2 + 3 * i)] for i in range(16)]
LONG = [(5 * j * j + 3 * j) % 38 + 1 for j in range(60)]
NO_BUDGET_US, SMALL_BUDGET_US, ALL_US = 0, 60, 10**9


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    return [dense_greedy(ToyDecoder(), prompt, 10) for prompt in PROMPTS]


@pytest.mark.parametrize("budget_us", [NO_BUDGET_US, SMALL_BUDGET_US, ALL_US])
@pytest.mark.parametrize("num_rows", [1, 3, 16])
@pytest.mark.parametrize("policy", POLICIES)
def test_greedy_tokens_equal_dense(
    policy: str, num_rows: int, budget_us: int, expected: list[list[int]]
) -> None:
    stand = Stand(max_rows=num_rows, policy=POLICIES[policy])
    for at, prompt in enumerate(PROMPTS):
        stand.submit(at, prompt, max_tokens=10)
    stand.run(budget_us)
    assert [stand.tokens[at, 0] for at in range(len(PROMPTS))] == expected
    assert all(stand.usage(at).num_completion_tokens == 10 for at in range(len(PROMPTS)))
    stand.check_empty()


def _logprobs(stand: Stand) -> dict[int, list[object]]:
    """Everything that was scored, exactly."""
    scores: dict[int, list[object]] = {}
    for delta in stand.deltas:
        scores.setdefault(delta.request_id, []).extend(delta.logprobs)
    return scores


def test_deterministic_scores_are_bit_equal_in_every_way_of_running() -> None:
    """Alone, in batches, chunked, layered, sliced, preempted and from cached prefixes."""
    prompts = [LONG[:19], LONG[:30], LONG[3:20], *PROMPTS[:6]]

    def scores(**options: object) -> tuple[dict[int, list[object]], Stand]:
        budget_us = options.pop("budget_us", ALL_US)
        stand = Stand(is_deterministic=True, **options)  # type: ignore[arg-type]
        for at, prompt in enumerate(prompts):
            stand.submit(at, prompt, max_tokens=9, num_logprobs=3)
        stand.run(budget_us)  # type: ignore[arg-type]
        return _logprobs(stand), stand

    alone, _ = scores(max_rows=1)
    assert all(len(of_request) == 9 for of_request in alone.values())
    for policy in POLICIES.values():
        for budget_us in (NO_BUDGET_US, ALL_US):
            assert scores(max_rows=16, policy=policy, budget_us=budget_us)[0] == alone
    tight, stand = scores(max_rows=16, num_large_pages=11)
    assert tight == alone
    assert stand.engine.num_preemptions > 0
    warm = Stand(is_deterministic=True)
    for first in (0, 100):
        for at, prompt in enumerate(prompts):
            warm.submit(first + at, prompt, max_tokens=9, num_logprobs=3)
        warm.run()
    assert warm.usage(101).num_cached_tokens == 28
    assert all(_logprobs(warm)[100 + at] == alone[at] for at in range(len(prompts)))


@pytest.mark.parametrize("policy", POLICIES)
def test_slicing_between_layers_changes_no_bit(policy: str) -> None:
    """The same batches, stopped after every layer or not at all."""
    runs = []
    for budget_us in (NO_BUDGET_US, ALL_US):
        stand = Stand(policy=_unhurried(POLICIES[policy]), max_batch_tokens=1)
        for at, prompt in enumerate(PROMPTS[:6]):
            stand.submit(at, prompt, max_tokens=6, num_logprobs=2)
        stand.run(budget_us)
        runs.append(_logprobs(stand))
    assert runs[0] == runs[1]


def _unhurried(policy: Policy) -> Policy:
    """The budget bounds no layer: the same batches whatever it is."""

    def cut(
        num_left: Sequence[int],
        max_tokens: int,
        *,
        is_stage_busy: bool,
        max_layer_tokens: int = MAX_LAYER_TOKENS,
    ) -> BatchOrder:
        return policy(num_left, max_tokens, is_stage_busy=is_stage_busy)

    return cut


def test_no_budget_runs_one_layer_a_step() -> None:
    stand = Stand()
    stand.submit(0, PROMPTS[3], max_tokens=1)
    (model,) = stand.models
    for num_layers in range(1, 4):
        stand.step(NO_BUDGET_US)
        assert [len(layers) for _, layers in model.num_run] == [1] * num_layers
        assert not stand.deltas


def test_layered_prefill_keeps_decoding_and_runs_a_prompt_once_through_each_layer() -> None:
    stand = Stand(policy=POLICIES["layered"])
    (model,) = stand.models
    stand.submit(0, PROMPTS[1], max_tokens=30)
    stand.step()
    stand.submit(1, [1 + at % 38 for at in range(150)], max_tokens=1)
    model.num_run.clear()
    stand.run()
    assert sum(len(layers) for num, layers in model.num_run if num >= 150) == model.num_layers


# --- prefixes ----------------------------------------------------------------------------------------------------


def test_a_known_prefix_is_not_computed_again() -> None:
    stand = Stand()
    (model,) = stand.models
    stand.submit(0, LONG, max_tokens=5)
    stand.run()
    model.num_run.clear()
    stand.submit(1, LONG, max_tokens=5)
    stand.run()
    assert stand.usage(0).num_cached_tokens == 0
    assert stand.usage(1).num_cached_tokens == 56  # 60 tokens in pages of 4, but never the last
    assert model.num_run[0][0] == 4
    assert stand.tokens[1, 0] == stand.tokens[0, 0] == dense_greedy(ToyDecoder(), LONG, 5)
    stand.check_empty()


def test_a_window_needs_only_its_own_pages_of_a_prefix() -> None:
    """What fell out of every window may be evicted: the prefix is still found, and the longer part wins."""
    stand = Stand()
    stand.submit(0, LONG, max_tokens=1)
    stand.run()
    longer = [*LONG, 5, 6, 7]
    stand.submit(1, longer, max_tokens=5)
    stand.run()
    assert stand.usage(1).num_cached_tokens == 60
    assert stand.tokens[1, 0] == dense_greedy(ToyDecoder(), longer, 5)
    shorter = [*LONG[:30], 9, 9, 9]
    stand.submit(2, shorter, max_tokens=5)
    stand.run()
    assert stand.usage(2).num_cached_tokens == 28
    assert stand.tokens[2, 0] == dense_greedy(ToyDecoder(), shorter, 5)


def test_continuations_are_prefixes_of_the_next_turn() -> None:
    stand = Stand()
    stand.submit(0, LONG[:20], max_tokens=20)
    stand.run()
    turn = [*LONG[:20], *stand.tokens[0, 0], 3, 4]
    stand.submit(1, turn, max_tokens=3)
    stand.run()
    assert stand.usage(1).num_cached_tokens == 36  # the last drawn token was never computed
    assert stand.tokens[1, 0] == dense_greedy(ToyDecoder(), turn, 3)


def test_prefixes_are_not_shared_between_tenants() -> None:
    stand = Stand()
    for at, tenant in enumerate(["a", "b", "a"]):
        stand.submit(at, LONG, max_tokens=2, tenant=tenant)
        stand.run()
    assert [stand.usage(at).num_cached_tokens for at in range(3)] == [0, 0, 56]


def test_requests_of_one_prefix_that_come_together_compute_it_once() -> None:
    stand = Stand(max_rows=8)
    prompts = [[*LONG[:40], at, at + 1] for at in range(1, 6)]
    for at, prompt in enumerate(prompts):
        stand.submit(at, prompt, max_tokens=3)
    stand.run()
    assert [stand.usage(at).num_cached_tokens for at in range(5)] == [0, 40, 40, 40, 40]
    for at, prompt in enumerate(prompts):
        assert stand.tokens[at, 0] == dense_greedy(ToyDecoder(), prompt, 3)


def test_pages_that_left_every_window_are_given_back() -> None:
    stand = Stand()
    stand.submit(0, LONG, max_tokens=100)
    for _ in range(60):
        stand.step()
    used = stand.ledger.stats().num_used_pages
    assert used["toy.kv-window"] <= WINDOW // 2 + 2
    assert used["toy.kv"] >= len(LONG) // 4


# --- choices -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tokens", [5, 8, 13])  # with and without a page that is half full
def test_choices_share_the_prompt_and_copy_its_tail_on_write(num_tokens: int) -> None:
    stand = Stand(max_rows=8)
    prompt = LONG[:num_tokens]
    stand.submit(0, prompt, max_tokens=6, num_choices=4)
    stand.step()
    used = stand.ledger.stats().num_used_pages["toy.kv"]
    assert used == -(-num_tokens // 4)  # shared by all four
    stand.run()
    want = dense_greedy(ToyDecoder(), prompt, 6)
    assert [stand.tokens[0, choice] for choice in range(4)] == [want] * 4
    assert stand.usage(0).num_completion_tokens == 24
    stand.check_empty()


def test_seeded_choices_differ_and_do_not_depend_on_their_batch() -> None:
    runs = []
    for num_others in (0, 5):
        stand = Stand(max_rows=16)
        for at in range(num_others):
            stand.submit(100 + at, PROMPTS[at], max_tokens=20)
        stand.submit(0, LONG[:9], max_tokens=12, num_choices=3, temperature=1.0, seed=7)
        stand.run()
        runs.append([stand.tokens[0, choice] for choice in range(3)])
    assert runs[0] == runs[1]
    assert len({tuple(tokens) for tokens in runs[0]}) == 3


def test_a_stopped_choice_leaves_the_others_running() -> None:
    stand = Stand()
    stand.submit(0, PROMPTS[2], max_tokens=6, num_choices=2)
    stand.step()
    stand.engine.stop(RequestId(0), 1)
    stand.engine.stop(RequestId(0), 1)  # once is enough
    stand.run()
    assert len(stand.tokens[0, 0]) == 6
    assert len(stand.tokens[0, 1]) == 1
    assert stand.usage(0).num_completion_tokens == 7
    stand.check_empty()


# --- ends --------------------------------------------------------------------------------------------------------


def test_a_choice_ends_with_eos_a_stop_token_or_its_length() -> None:
    want = dense_greedy(ToyDecoder(), LONG[:9], 10)
    stop = want[4]
    first = want.index(stop)
    stand = Stand()
    stand.submit(0, LONG[:9], max_tokens=10, stop_token_ids=(stop,))
    stand.submit(1, LONG[:9], max_tokens=3)
    stand.run()
    ends = {delta.request_id: delta for delta in stand.deltas if delta.finish is not None}
    assert stand.tokens[0, 0] == want[:first]
    assert (ends[0].finish, ends[0].stop_token_id) == (FinishReason.STOP, stop)
    assert stand.tokens[1, 0] == want[:3]
    assert ends[1].finish is FinishReason.LENGTH
    assert stand.usage(0).num_completion_tokens == first
    stand.check_empty()


def test_eos_ends_a_choice() -> None:
    stand = Stand()
    stand.submit(0, LONG[:9], max_tokens=10, is_eos_ignored=False, logit_bias={0: 100.0})
    stand.run()
    (delta,) = stand.deltas
    assert (delta.token_ids, delta.finish, delta.stop_token_id) == ((), FinishReason.STOP, 0)


def test_the_models_limit_ends_a_choice() -> None:
    stand = Stand()
    stand.submit(0, [1 + at % 38 for at in range(197)], max_tokens=50)
    stand.run()
    assert len(stand.tokens[0, 0]) == 3
    assert stand.deltas[-1].finish is FinishReason.LENGTH


@pytest.mark.parametrize("policy", POLICIES)
def test_prompt_tokens_are_scored(policy: str) -> None:
    stand = Stand(policy=POLICIES[policy])
    stand.submit(0, LONG[:30], max_tokens=1)
    stand.run()
    stand.submit(1, LONG[:30], max_tokens=1, num_prompt_logprobs=2)
    stand.run()
    (scored,) = stand.others
    assert isinstance(scored, PromptScored)
    want = dense_logits(ToyDecoder(), LONG[:30]).log_softmax(-1)
    assert len(scored.logprobs) == 30
    assert scored.logprobs[0] is None
    for at, score in enumerate(scored.logprobs[1:], 1):
        assert score is not None
        assert score.token_id == LONG[at]
        assert score.logprob == pytest.approx(float(want[at - 1, LONG[at]]), abs=1e-4)
        assert score.top[0][0] == int(want[at - 1].argmax())


def test_bad_requests_end_with_an_error_that_says_why() -> None:
    stand = Stand()
    stand.submit(0, [1], model="other")
    stand.submit(1, [])
    stand.submit(2, [1] * 201)
    stand.submit(3, [1, 40])
    stand.submit(4, [1], temperature=float("nan"))
    stand.submit(5, [1], num_choices=0)
    stand.step()
    assert len(stand.outcomes) == 6
    for outcome in stand.outcomes.values():
        assert isinstance(outcome, FieldError), outcome
    assert not stand.engine.has_work


def test_cancelling_gives_all_pages_back_at_once() -> None:
    for num_steps in range(12):
        stand = Stand(policy=POLICIES["layered"])
        for at in range(3):
            stand.submit(at, LONG[at : at + 20 + at], max_tokens=9, num_choices=1 + at)
        for _ in range(num_steps):
            stand.step(NO_BUDGET_US)
        for at in range(3):
            stand.engine.cancel(RequestId(at))
        stand.check_empty()
        stand.run()
        assert all(isinstance(outcome, CancelledError) for outcome in stand.outcomes.values())


def test_cancelling_in_the_middle_of_a_batch_leaves_the_others_as_they_are() -> None:
    want = [dense_greedy(ToyDecoder(), LONG[at : at + 20], 5) for at in range(3)]
    for policy in POLICIES.values():
        stand = Stand(policy=policy)
        for at in range(3):
            stand.submit(at, LONG[at : at + 20], max_tokens=5)
        stand.step(NO_BUDGET_US)
        stand.step(NO_BUDGET_US)
        stand.engine.cancel(RequestId(1))
        stand.submit(3, LONG[7:30], max_tokens=2)
        stand.run(NO_BUDGET_US)
        assert [stand.tokens[0, 0], stand.tokens[2, 0]] == [want[0], want[2]]


class Fragile(ToyDecoder):
    """Raises when token 38 is in the batch, at its third layer."""

    def embed(self, token_ids):  # type: ignore[no-untyped-def]
        hidden = super().embed(token_ids).clone()
        hidden[token_ids == 38] = torch.inf
        return hidden


@pytest.mark.parametrize("policy", POLICIES)
def test_a_row_that_fails_does_not_spoil_its_batch_mates(policy: str) -> None:
    stand = Stand(Fragile(), policy=POLICIES[policy])
    prompts = [[1, 2, 3, 4, 5], [1, 38, 3, 4], [9, 8, 7, 6, 5, 4]]
    for at, prompt in enumerate(prompts):
        stand.submit(at, prompt, max_tokens=4, logit_bias={38: -100.0})
    stand.run()
    assert isinstance(stand.outcomes[1], InternalError)
    for at in (0, 2):
        assert len(stand.tokens[at, 0]) == 4
    stand.check_empty()


# --- room --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_preempted_requests_say_the_same(policy: str) -> None:
    prompts = [LONG[at : at + 12 + at] for at in range(8)]
    stand = Stand(num_large_pages=10, max_rows=8, policy=POLICIES[policy])
    for at, prompt in enumerate(prompts):
        stand.submit(at, prompt, max_tokens=25, num_choices=1 + at % 2)
    stand.run()
    assert stand.engine.num_preemptions > 0
    for at, prompt in enumerate(prompts):
        want = dense_greedy(ToyDecoder(), prompt, 25)
        for choice in range(1 + at % 2):
            assert stand.tokens[at, choice] == want, (at, choice)
    stand.check_empty()


def test_the_first_request_is_never_preempted() -> None:
    stand = Stand(num_large_pages=6, max_rows=8)
    for at in range(6):
        stand.submit(at, PROMPTS[4 + at], max_tokens=20)
    while 0 not in stand.outcomes:
        stand.step()
    assert stand.engine.num_preemptions > 0
    assert len([delta for delta in stand.deltas if delta.request_id == 0]) == 20


def test_a_request_that_can_never_fit_gets_an_error_and_the_rest_goes_on() -> None:
    stand = Stand(num_large_pages=2)
    stand.submit(0, [1 + at % 38 for at in range(150)])  # its prompt is too long
    stand.submit(1, PROMPTS[2], max_tokens=100)  # grows too long
    stand.submit(2, PROMPTS[1], max_tokens=3)
    stand.run()
    for at in (0, 1):
        assert isinstance(stand.outcomes[at], OutOfPagesError)
    assert len(stand.tokens[2, 0]) == 3
    stand.check_empty()


def test_robots_may_take_the_pages_of_the_latest_request() -> None:
    stand = Stand(policy=POLICIES["layered"])
    for at in range(3):
        stand.submit(at, PROMPTS[5 + at], max_tokens=6)
    stand.step(NO_BUDGET_US)
    for _ in range(3):
        assert stand.engine.preempt_latest()
    assert not stand.engine.preempt_latest()
    stand.check_empty()
    stand.run()
    for at in range(3):
        assert stand.tokens[at, 0] == dense_greedy(ToyDecoder(), PROMPTS[5 + at], 6)


def test_pages_may_move_between_two_slices_of_a_batch() -> None:
    stand = Stand(num_large_pages=40, policy=POLICIES["layered"])
    for at in range(6):
        stand.submit(at, LONG[at : at + 15], max_tokens=12, num_choices=2)
    num_moved = 0
    for _ in range(400):
        stand.step(NO_BUDGET_US)
        if stand.engine.num_under_way == 6:
            stand.engine.cancel(RequestId(1))
        moves = stand.ledger.plan_moves(1 << 20, num_spare=40)
        if moves is not None:
            stand.arena.copy(moves.copies)
            num_moved += len(moves.copies)
    stand.run()
    assert num_moved > 0
    for at in (0, 2, 3, 4, 5):
        assert stand.tokens[at, 1] == dense_greedy(ToyDecoder(), LONG[at : at + 15], 12)


def test_two_models_share_the_pool() -> None:
    models = (ToyDecoder(), ToyDecoder(name="other", seed=1, slots=(2, 8)))
    stand = Stand(*models, num_large_pages=14)
    for at, prompt in enumerate(PROMPTS[3:9]):
        stand.submit(at, prompt, max_tokens=15, model=("toy", "other")[at % 2])
    stand.run(SMALL_BUDGET_US)
    for at, prompt in enumerate(PROMPTS[3:9]):
        assert stand.tokens[at, 0] == dense_greedy(models[at % 2], prompt, 15)
    stand.check_empty()


def test_errors_are_of_the_tree() -> None:
    stand = Stand()
    stand.submit(0, LONG, max_tokens=50)
    stand.step()
    stand.engine.close()
    stand.step()
    outcome = stand.outcomes[0]
    assert isinstance(outcome, GanglionError)
    assert outcome.code is ErrorCode.CANCELLED
    stand.check_empty()
