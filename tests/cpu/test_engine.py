"""The engine on a toy with known answers: batching, cutting, sharing, cancelling and failing change nobody else's."""

from collections.abc import Callable
from itertools import count

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ganglion.clock import SimulatedClock
from ganglion.engine.executor import Executor
from ganglion.engine.lane import Lanes
from ganglion.engine.scheduler import DeadlineScheduler
from ganglion.engine.step import Engine
from ganglion.errors import CancelledError, GanglionError, InternalError, OutOfPagesError
from ganglion.layout import PoolLayout
from ganglion.memory.arena import Arena
from ganglion.memory.ledger import Ledger
from ganglion.plan.cost import MeasuredCost
from ganglion.types import PageId, RequestId
from tests.cpu.toy import Toy, expected, observation


def engine(
    toy: Toy,
    *,
    budget_us: int = 10_000_000,
    num_large: int = 64,
    max_rows: int = 8,
    is_context_public: bool = True,
    warm_start_share: float = 0.0,
    make_room: Callable[[], bool] = lambda: False,
) -> Engine:
    layout = PoolLayout(large_page_bytes=64, layouts=toy.layouts)
    clock, cost = SimulatedClock(), MeasuredCost(smoothing=0.0)
    return Engine(
        {"toy": toy},
        Ledger(layout, num_large),
        DeadlineScheduler({"toy": toy.stages}, cost, max_rows=max_rows, num_lanes=1),
        Executor({"toy": toy}, Arena(layout, num_large), Lanes(((),)), clock),
        cost,
        clock,
        step_budget_us=budget_us,
        num_step_records=16,
        is_context_public=is_context_public,
        warm_start_share=warm_start_share,
        make_room=make_room,
    )


def num_used(core: Engine) -> int:
    return sum(core.ledger.stats().num_used_pages.values())


def test_one_request_takes_one_step() -> None:
    core = engine(Toy())
    seen = observation("a", 0, pixel=7, state=1.0, seed=3)
    core.submit(RequestId(1), "toy", seen, deadline_s=1.0)
    record = core.step()
    assert record is not None
    assert [(p.stage, p.num_units) for p in record.pieces] == [
        ("view", 1),
        ("context", 1),
        ("flow", 4),
    ]
    (finished,) = core.drain_finished()
    np.testing.assert_array_equal(finished.outcome, expected(seen))
    assert not core.has_work
    assert core.step() is None


def test_robots_batch_and_a_common_camera_is_encoded_once() -> None:
    toy = Toy()
    core = engine(toy)
    core.submit(RequestId(0), "toy", observation("z", 0, pixel=5), deadline_s=1.0)
    core.step()
    toy.num_rows_run.clear()
    for at in range(4):
        core.submit(RequestId(at + 1), "toy", observation(f"s{at}", 0, pixel=5), deadline_s=1.0)
    core.step()
    assert toy.num_rows_run == [("context", 4), ("flow", 4)], "the view's pages were known"
    assert len(core.drain_finished()) == 5


def test_a_failing_row_does_not_spoil_its_batch_mates() -> None:
    core = engine(Toy())
    seen = [
        observation(f"s{at}", 0, pixel=at + 1, state=13.0 if at == 1 else 0.0) for at in range(3)
    ]
    for at, item in enumerate(seen):
        core.submit(RequestId(at), "toy", item, deadline_s=1.0)
    while core.has_work:
        core.step()
    outcomes = {f.work.request_id: f.outcome for f in core.drain_finished()}
    assert isinstance(outcomes[RequestId(1)], InternalError)
    for at in (0, 2):
        np.testing.assert_array_equal(outcomes[RequestId(at)], expected(seen[at]))


def test_context_versions_rise_and_old_pages_come_back() -> None:
    core = engine(Toy())
    for seq in range(5):
        core.submit(RequestId(seq), "toy", observation("a", seq, pixel=seq), deadline_s=1.0)
        core.step()
        assert core.context_version(observation("a", 0).session_id) == seq + 1
        assert core.num_pages(observation("a", 0).session_id) == {"feature": 1, "kv": 2}
    core.close_session(observation("a", 0).session_id)
    core.ledger.check_integrity()
    assert num_used(core) == 0


def test_a_request_that_can_never_fit_says_so_and_the_others_live() -> None:
    core = engine(Toy(), num_large=1)
    core.submit(RequestId(1), "toy", observation("a", 0), deadline_s=1.0)
    core.submit(RequestId(2), "toy", observation("b", 0, pixel=9), deadline_s=2.0)
    for _ in range(20):
        core.step()
    assert not core.has_work
    outcomes = [f.outcome for f in core.drain_finished()]
    assert any(isinstance(outcome, OutOfPagesError) for outcome in outcomes)
    core.ledger.check_integrity()


def test_others_on_the_pool_make_room_until_the_robots_request_fits() -> None:
    held: list[tuple[PageId, ...]] = []

    def make_room() -> bool:
        if not held:
            return False
        core.ledger.release("kv", held.pop())
        return True

    core = engine(Toy(), num_large=8, make_room=make_room)
    while core.ledger.num_free("kv"):
        held.append(core.ledger.reserve("kv", 1, owner="planner"))
    num_held = len(held)
    seen = observation("a", 0, pixel=7, state=1.0, seed=3)
    core.submit(RequestId(1), "toy", seen, deadline_s=1.0)
    while core.has_work:
        core.step()
    (finished,) = core.drain_finished()
    np.testing.assert_array_equal(finished.outcome, expected(seen))
    assert 0 < len(held) < num_held, "some was given back, and no more than was needed"


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["submit", "submit", "submit", "step", "step", "cancel", "close"]),
            st.integers(0, 3),
            st.integers(1, 6),
            st.sampled_from([0.0, 0.0, 0.0, 2.0, 13.0]),
        ),
        max_size=50,
    ),
    st.sampled_from([1, 1500, 4000, 10_000_000]),
    st.sampled_from([4, 12, 64]),
)
def test_random_lives(
    events: list[tuple[str, int, int, float]], budget_us: int, num_large: int
) -> None:
    """Every request ends exactly once, right or with an error of its own; the pages balance after every event."""
    toy, ids = Toy(), count()
    core = engine(toy, budget_us=budget_us, num_large=num_large, max_rows=3)
    sent: dict[int, object] = {}
    ended: dict[int, object] = {}

    def collect() -> None:
        for finished in core.drain_finished():
            assert finished.work.request_id not in ended
            ended[finished.work.request_id] = finished.outcome

    for what, who, pixel, state in events:
        if what == "submit":
            request_id = RequestId(next(ids))
            seen = observation(f"s{who}", request_id, pixel=pixel, state=state, seed=who)
            sent[request_id] = seen
            core.submit(request_id, "toy", seen, deadline_s=float(pixel))
        elif what == "step":
            core.step()
        elif what == "cancel" and sent:
            core.cancel(RequestId(len(sent) - 1))
        elif what == "close":
            core.close_session(observation(f"s{who}", 0).session_id)
        collect()
        core.ledger.check_integrity()
    for _ in range(400):
        if not core.has_work:
            break
        core.step()
        collect()
    assert sorted(ended) == sorted(sent)
    for request_id, outcome in ended.items():
        seen = sent[request_id]
        if isinstance(outcome, GanglionError):
            is_own = seen.state[0] == 13 or isinstance(outcome, CancelledError | OutOfPagesError)
            assert is_own, outcome
        else:
            np.testing.assert_array_equal(outcome, expected(seen))
    for who in range(4):
        core.close_session(observation(f"s{who}", 0).session_id)
    core.ledger.check_integrity()
    assert num_used(core) == 0
