"""The scheduler's promises: budget, dependencies, urgency, batching across cursors."""

from hypothesis import given
from hypothesis import strategies as st

from ganglion.engine.scheduler import DeadlineScheduler
from ganglion.engine.work import PieceOrder, WorkView
from ganglion.plan.cost import MeasuredCost
from ganglion.spec import Stage
from ganglion.types import RequestId, SpanKind


def stage(name: str, kind: SpanKind, num_units: int, *reads: str, divisible: bool = False) -> Stage:
    return Stage(
        name=name,
        kind=kind,
        num_units=num_units,
        reads=reads,
        layout="kv",
        num_pages=1,
        num_slots=1,
        is_shared=False,
        is_divisible=divisible,
    )


STAGES = (
    stage("view", SpanKind.ENCODE, 1),
    stage("text", SpanKind.PREFILL, 1),
    stage("observation", SpanKind.PREFILL, 1, "view", "text"),
    stage("denoise", SpanKind.DENOISE, 5, "observation", divisible=True),
)


class FlatCost:
    """100 us a unit for one row, 50 us for each further one."""

    def estimate_us(self, model: str, stage: str, *, num_rows: int, num_units: int) -> int:
        return (50 + 50 * num_rows) * num_units

    def observe(
        self, model: str, stage: str, *, num_rows: int, num_units: int, run_us: float
    ) -> None:
        raise AssertionError("the scheduler only asks")


def scheduler(*, max_rows: int = 64, num_lanes: int = 1) -> DeadlineScheduler:
    return DeadlineScheduler({"m": STAGES}, FlatCost(), max_rows=max_rows, num_lanes=num_lanes)


def work(
    request_id: int, deadline_us: int = 0, cursors: tuple[int, ...] = (0, 0, 0, 0)
) -> WorkView:
    return WorkView(
        request_id=RequestId(request_id), model="m", deadline_us=deadline_us, cursors=cursors
    )


def test_idle_server_answers_in_one_step() -> None:
    orders = scheduler().plan([work(1)], 10_000)
    assert [(o.stage.name, o.wave, o.num_units) for o in orders] == [
        ("view", 0, 1),
        ("text", 0, 1),
        ("observation", 1, 1),
        ("denoise", 2, 5),
    ]


def test_budget_cuts_flow_steps_not_rows() -> None:
    orders = scheduler().plan([work(1, cursors=(1, 1, 1, 0))], 350)
    assert [(o.stage.name, o.num_units) for o in orders] == [("denoise", 3)]


def test_rows_at_different_flow_steps_share_a_piece() -> None:
    rows = [work(1, 5, (1, 1, 1, 3)), work(2, 6, (1, 1, 1, 0))]
    orders = scheduler().plan(rows, 10_000)
    assert orders[0].rows == (1, 2)
    assert orders[0].first_units == (3, 0)
    assert orders[0].num_units == 2
    assert [(o.rows, o.num_units) for o in orders[1:]] == [((2,), 3)]


def test_something_always_advances() -> None:
    orders = scheduler().plan([work(1), work(2)], 1)
    assert [(o.stage.name, o.rows) for o in orders] == [("view", (1, 2))]


def test_an_overloaded_server_cuts_units_and_keeps_its_batch() -> None:
    rows = [work(at, at, (1, 1, 1, 0)) for at in range(8)]
    orders = scheduler().plan(rows, 1)
    assert [(len(o.rows), o.num_units) for o in orders] == [(8, 1)]


def test_most_urgent_row_goes_first_when_the_budget_is_short() -> None:
    rows = [work(1, 900, (1, 1, 1, 4)), work(2, 100, (1, 1, 1, 4))]
    orders = scheduler(max_rows=1).plan(rows, 120)
    assert [o.rows for o in orders] == [(2,)]


def test_lanes_share_the_rows() -> None:
    rows = [work(at, at, (1, 1, 1, 0)) for at in range(8)]
    orders = scheduler(num_lanes=2).plan(rows, 10_000)
    assert {o.lane for o in orders} == {0, 1}
    assert sorted(len(o.rows) for o in orders) == [4, 4]


@given(
    st.lists(
        st.tuples(st.integers(0, 1000), st.integers(0, 1), st.integers(0, 1), st.integers(0, 5)),
        min_size=1,
        max_size=20,
    ),
    st.integers(1, 5000),
    st.integers(1, 8),
    st.integers(1, 3),
)
def test_plans_are_sound(
    raw: list[tuple[int, int, int, int]], budget_us: int, max_rows: int, num_lanes: int
) -> None:
    """Dependencies hold, nothing is advanced twice or beyond its end, the budget holds but for one forced piece."""
    rows = []
    for at, (deadline_us, view, text, flow) in enumerate(raw):
        is_seen = bool(view and text)
        cursors = (view, text, int(is_seen), flow if is_seen else 0)
        if cursors != (1, 1, 1, 5):
            rows.append(work(at, deadline_us, cursors))
    orders = scheduler(max_rows=max_rows, num_lanes=num_lanes).plan(rows, budget_us)
    assert bool(orders) == bool(rows)
    cursors_now = {row.request_id: list(row.cursors) for row in rows}
    names = [s.name for s in STAGES]
    for _, wave in _waves(orders):
        before = {key: list(value) for key, value in cursors_now.items()}
        touched = set()
        for order in wave:
            at = names.index(order.stage.name)
            assert 0 < len(order.rows) <= max_rows
            for request_id, first in zip(order.rows, order.first_units, strict=True):
                assert (request_id, at) not in touched
                touched.add((request_id, at))
                assert before[request_id][at] == first
                for read in order.stage.reads:
                    index = names.index(read)
                    assert before[request_id][index] == STAGES[index].num_units
                cursors_now[request_id][at] += order.num_units
                assert cursors_now[request_id][at] <= order.stage.num_units
    perceiving = {order.wave for order in orders if order.stage.name != "denoise"}
    bound = tuple(o for o in orders if o.stage.name != "denoise" or o.wave not in perceiving)
    spent_us = sum(_wave_us(wave) for _, wave in _waves(bound))
    assert spent_us <= budget_us or {(o.wave, o.stage.name) for o in bound} == {
        (0, orders[0].stage.name)
    }, "only the most urgent stage may be forced, and a flow step beside perception"


def _waves(orders: tuple[PieceOrder, ...]) -> list[tuple[int, list[PieceOrder]]]:
    waves: dict[int, list[PieceOrder]] = {}
    for order in orders:
        waves.setdefault(order.wave, []).append(order)
    return sorted(waves.items())


def _wave_us(wave: list[PieceOrder]) -> int:
    lanes: dict[int, int] = {}
    for order in wave:
        lanes[order.lane] = lanes.get(order.lane, 0) + order.cost_us
    return max(lanes.values())


def test_measured_cost_interpolates() -> None:
    cost = MeasuredCost(smoothing=1.0)
    assert cost.estimate_us("m", "s", num_rows=2, num_units=3) == 6000
    cost.observe("m", "s", num_rows=1, num_units=2, run_us=200)
    cost.observe("m", "s", num_rows=4, num_units=1, run_us=400)
    assert cost.estimate_us("m", "s", num_rows=1, num_units=1) == 100
    assert cost.estimate_us("m", "s", num_rows=2, num_units=1) == 200
    assert cost.estimate_us("m", "s", num_rows=8, num_units=1) == 800
    cost.observe("m", "s", num_rows=1, num_units=1, run_us=300)
    assert cost.estimate_us("m", "s", num_rows=1, num_units=1) == 300


def test_of_about_equal_deadlines_the_robot_that_waited_longer_goes_first() -> None:
    rows = [
        WorkView(request_id=RequestId(1), model="m", deadline_us=900, cursors=(1, 1, 1, 4)),
        WorkView(
            request_id=RequestId(2),
            model="m",
            deadline_us=4_000,
            cursors=(1, 1, 1, 4),
            wait_ratio=0.5,
        ),
        WorkView(
            request_id=RequestId(3),
            model="m",
            deadline_us=40_000,
            cursors=(1, 1, 1, 4),
            wait_ratio=9.0,
        ),
    ]
    orders = scheduler(max_rows=1).plan(rows, 350)
    assert [o.rows for o in orders] == [(2,), (1,), (3,)]


def test_a_request_of_fewer_flow_steps_shares_pieces_and_ends_early() -> None:
    short = WorkView(
        request_id=RequestId(2),
        model="m",
        deadline_us=6,
        cursors=(1, 1, 1, 0),
        num_units=(1, 1, 1, 2),
    )
    orders = scheduler().plan([work(1, 5, (1, 1, 1, 0)), short], 10_000)
    assert [(o.rows, o.num_units) for o in orders] == [((1, 2), 2), ((1,), 3)]


def test_a_robots_newer_observation_goes_before_its_older_chunks_but_not_before_others() -> None:
    """Perception that joins a pipeline is first; another robot's only where it is more urgent."""
    done = tuple(stage.num_units for stage in STAGES[:-1])
    older = WorkView(request_id=RequestId(1), model="m", deadline_us=10, cursors=(*done, 2))
    for is_joining, first in ((True, SpanKind.ENCODE), (False, SpanKind.DENOISE)):
        newer = WorkView(
            request_id=RequestId(2),
            model="m",
            deadline_us=20,
            cursors=(0,) * len(STAGES),
            is_joining=is_joining,
        )
        orders = scheduler().plan([older, newer], 1_000_000)
        assert orders[0].stage.kind is first


def test_an_idle_lane_generates_beside_perception_no_longer_than_that_takes() -> None:
    """The older chunks go on while the newer observation is perceived, spread so that both lanes end together."""
    older = [work(at, 10, (1, 1, 1, 0)) for at in range(4)]
    newer = WorkView(
        request_id=RequestId(9), model="m", deadline_us=20, cursors=(1, 1, 0, 0), is_joining=True
    )
    orders = scheduler(num_lanes=2).plan([*older, newer], 10_000)
    beside = [(o.stage.name, o.lane, o.rows, o.num_units) for o in orders if o.wave == 0]
    assert beside == [
        ("observation", 0, (9,), 1),
        ("denoise", 0, (0,), 1),
        ("denoise", 1, (1, 2, 3), 1),
    ]
    assert all(len(o.rows) < 4 for o in orders if o.wave == 1), "then all five on both lanes"
