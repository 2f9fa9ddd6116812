"""What browsers are told and what they may ask for."""

import json
from dataclasses import replace
from typing import Any

import pytest
from tests.side_messages import Ears, hello, telemetry

from ganglion.clock import SimulatedClock
from ganglion.errors import FieldError, GanglionError
from ganglion.serve.dashboard.orders import obey
from ganglion.serve.dashboard.picture import Painter, Picture
from ganglion.serve.fake import fake_spec
from ganglion.serve.hub import Hub, Robot
from ganglion.serve.side import Impair
from ganglion.service import OnDone
from ganglion.spec import PolicySpec
from ganglion.types import (
    Command,
    DegreeStats,
    Execution,
    LanguageRequestStats,
    LanguageStats,
    LanguageStepRecord,
    LivePage,
    Observation,
    OverridePrompt,
    PaceStats,
    PageId,
    PieceRecord,
    PoolStats,
    PromptPhase,
    RequestId,
    RobotId,
    RowRecord,
    ServiceStats,
    SessionId,
    SessionStats,
    SpanKind,
    StepRecord,
)

SPEC = fake_spec()


def session(name: str, **changes: Any) -> SessionStats:
    known = SessionStats(
        session_id=SessionId(name),
        robot_id=RobotId(f"arm-{name}"),
        prompt="open the drawer",
        is_prompt_overridden=False,
        num_chunks=3,
        num_superseded=0,
        num_deadline_misses=1,
        num_errors=0,
        chunk_hz=4.0,
        last_infer_ms=12.0,
        last_seq=9,
        context_version=2,
        num_pages={"kv": 4},
    )
    return replace(known, **changes)


def stats(*sessions: SessionStats, now_s: float = 10.0, **changes: Any) -> ServiceStats:
    known = ServiceStats(
        now_s=now_s,
        is_ready=True,
        stage="serving",
        sessions=sessions,
        pool=None,
        steps=(),
        num_requests=5,
        num_results=4,
        num_errors=1,
        num_cancelled=0,
    )
    return replace(known, **changes)


def row(name: str, request_id: int) -> RowRecord:
    return RowRecord(
        session_id=SessionId(name),
        request_id=RequestId(request_id),
        seq=40,
        first_unit=5,
        num_left=0,
        context_version=3,
        context_seq=41,
    )


def step(number: int) -> StepRecord:
    piece = PieceRecord(
        model="fake",
        stage="flow",
        kind=SpanKind.DENOISE,
        lane=1,
        num_rows=2,
        num_units=5,
        start_s=9.5,
        run_us=1500.0,
        rows=(row("a", 7), row("b", 8)),
    )
    return StepRecord(
        step=number,
        start_s=9.5,
        run_us=1700.0,
        budget_us=20_000,
        num_waiting=1,
        pieces=(piece,),
    )


def pool(*page_ids: int) -> PoolStats:
    return PoolStats(
        large_page_bytes=1024,
        num_large_pages=8,
        num_free_large_pages=6,
        pages_per_large={"kv": 4, "planner.feature": 2},
        num_used_pages={"kv": 2},
        num_cached_pages={"kv": 1},
        num_hits=3,
        num_misses=1,
        live_pages=tuple(
            LivePage(page_id=PageId(at), layout="kv", kind="kv", owner=f"s-{at}", num_refs=1)
            for at in page_ids
        ),
    )


def join(hub: Hub, session_id: str, robot_id: str, **changes: Any) -> Robot:
    ears = Ears()
    message = hello(robot_id=robot_id, session_id=session_id, **changes)
    return hub.join(message, tell=ears.tell, take_over=ears.take_over)


def paint(painter: Painter, picture_of: ServiceStats, now_s: float = 10.0) -> Picture:
    return painter.paint(picture_of, now_s=now_s, start_s=4.0)


def read(
    picture: Picture, *, last_step: int = -1, last_turn: int = -1, pool_version: int = -1
) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(
        picture.text(last_step=last_step, last_turn=last_turn, pool_version=pool_version)
    )
    return state


def turn(number: int) -> LanguageStepRecord:
    return LanguageStepRecord(
        step=number,
        model="tiny",
        start_s=9.0,
        run_us=800.0,
        budget_us=10_000,
        num_rows=2,
        num_prefill_tokens=16,
        num_decode_tokens=1,
        first_layer=0,
        num_layers=4,
        num_running=2,
        num_waiting=1,
    )


def language(*numbers: int, num_new_tokens: int = 0, **changes: Any) -> LanguageStats:
    request = LanguageRequestStats(
        request_id=RequestId(12),
        model="tiny",
        phase=PromptPhase.PREFILL,
        age_s=0.5,
        num_choices=1,
        num_prompt_tokens=2000,
        num_computed_tokens=640,
        num_cached_tokens=512,
        num_new_tokens=0,
        max_new_tokens=64,
        tokens_per_s=0.0,
        num_pages=10,
        num_preemptions=1,
    )
    known = LanguageStats(
        requests=(request,),
        num_under_way=1,
        num_running=1,
        num_waiting=0,
        num_results=3,
        num_errors=1,
        num_cancelled=2,
        num_prompt_tokens=100,
        num_cached_tokens=40,
        num_new_tokens=num_new_tokens,
        num_preemptions=1,
        num_drafted_tokens=8,
        num_held_tokens=6,
        first_token_p50_ms=None,
        steps=tuple(turn(number) for number in numbers),
        layouts={"planner.feature": "tiny"},
    )
    return replace(known, **changes)


def test_sessions_and_robots_become_arms() -> None:
    hub = Hub(SimulatedClock(10.0))
    robot = join(hub, "a", "arm-a")
    hub.receive(robot, telemetry(reply_prompt="open the drawer"))
    join(hub, "later", "arm-later")
    state = read(paint(Painter(hub), stats(session("a"), session("b"))))
    assert [arm["session_id"] for arm in state["arms"]] == ["a", "b", "later"]
    first, second, third = state["arms"]
    assert first["robot"]["telemetry"]["tick"] == 7
    assert first["robot"]["telemetry"]["is_stale"] is False
    assert first["session"]["prompt"] == "open the drawer"
    assert second["robot"] is None
    assert third["session"] is None
    assert len({arm["card"] for arm in state["arms"]}) == 3
    assert state["uptime_s"] == 6.0
    assert state["totals"]["num_arms"] == 3
    assert state["totals"]["chunk_hz"] == 8.0
    assert state["totals"]["num_misses"] == 1
    assert state["totals"]["num_late_chunks"] == 2


def test_a_robot_that_does_not_own_the_session_is_not_shown_for_it() -> None:
    hub = Hub(SimulatedClock())
    join(hub, "a", "impostor")
    picture = paint(Painter(hub), stats(session("a")))
    assert read(picture)["arms"][0]["robot"] is None
    assert picture.views == {}


def test_cards_keep_their_numbers_and_are_never_given_twice() -> None:
    painter = Painter(Hub(SimulatedClock()))
    first = read(paint(painter, stats(session("a"), session("b"))))
    second = read(paint(painter, stats(session("b"), session("c"))))
    assert [arm["card"] for arm in first["arms"]] == [1, 2]
    assert [arm["card"] for arm in second["arms"]] == [2, 3]
    assert [arm["card"] for arm in read(paint(painter, stats(session("a"))))["arms"]] == [4]


def test_old_telemetry_is_marked() -> None:
    hub = Hub(SimulatedClock(10.0))
    hub.receive(join(hub, "a", "arm-a"), telemetry())
    state = read(paint(Painter(hub), stats(session("a")), now_s=13.5))
    assert state["arms"][0]["robot"]["telemetry"]["is_stale"] is True


def test_each_browser_gets_each_step_once() -> None:
    painter = Painter(Hub(SimulatedClock()))
    picture = paint(painter, stats(session("a"), steps=(step(4), step(5), step(6))))
    assert [each["step"] for each in read(picture)["steps"]] == [4, 5, 6]
    assert [each["step"] for each in read(picture, last_step=5)["steps"]] == [6]
    assert picture.last_step == 6
    piece = read(picture)["steps"][0]["pieces"][0]
    assert (piece["kind"], piece["lane"]) == ("denoise", 1)
    # card, request, its observation, first unit, units left, version read, observation read; "b" is gone: card 0
    assert piece["rows"] == [[1, 7, 40, 5, 0, 3, 41], [0, 8, 40, 5, 0, 3, 41]]
    assert len(paint(painter, stats(steps=(step(6),))).steps) == 1  # old ones are forgotten


def test_planners_are_told_and_each_browser_gets_each_of_their_steps_once() -> None:
    painter = Painter(Hub(SimulatedClock()))
    assert read(paint(painter, stats()))["language"] is None
    picture = paint(painter, stats(language=language(7, 8, num_new_tokens=10)))
    state = read(picture)
    assert [each["turn"] for each in state["turns"]] == [7, 8]
    assert [each["turn"] for each in read(picture, last_turn=7)["turns"]] == [8]
    assert picture.last_turn == 8
    assert (state["turns"][0]["num_prefill"], state["turns"][0]["num_decode"]) == (16, 1)
    (request,) = state["language"]["requests"]
    assert (request["phase"], request["num_computed_tokens"]) == ("prefill", 640)
    assert state["language"]["first_token_p50_ms"] is None
    later = stats(now_s=11.0, language=language(9, num_new_tokens=40))
    assert read(paint(painter, later))["language"]["tokens_per_s"] == 30.0


def test_pages_of_planners_are_told_from_those_of_robots() -> None:
    picture = paint(Painter(Hub(SimulatedClock())), stats(pool=pool(0), language=language()))
    layouts = read(picture)["pool"]["layouts"]
    assert [(each["kind"], each["who"]) for each in layouts] == [
        ("kv", "robots"),
        ("feature", "planners"),
    ]


def test_a_server_without_robots_takes_no_order() -> None:
    order = '{"id": 3, "clear_prompt": {"session_id": "a"}}'
    answer = json.loads(obey(order, Obedient(), hub(), None))
    assert answer["id"] == 3
    assert "has no robots" in answer["error"]["message"]


def test_the_pace_and_the_rung_are_told() -> None:
    pace = PaceStats(
        degree=2,
        reason="degree 2: more",
        max_age_ms=250.0,
        forecasts=(
            DegreeStats(degree=1, rate_hz=10.0, latency_ms=100.0),
            DegreeStats(degree=2, rate_hz=17.5, latency_ms=114.2857),
        ),
    )
    arm = session(
        "a", in_flight=(RequestId(7), RequestId(8)), execution=Execution.PREFIX, wait_ratio=0.25
    )
    state = read(paint(Painter(hub()), stats(arm, pace=pace, rung="5 flow steps")))
    assert state["pace"]["degree"] == 2
    assert state["pace"]["reason"] == "degree 2: more"
    assert state["pace"]["forecasts"] == [[1, 10.0, 100.0], [2, 17.5, 114.286]]
    assert state["rung"] == "5 flow steps"
    assert state["arms"][0]["session"]["in_flight"] == [7, 8]
    assert state["arms"][0]["session"]["execution"] == "prefix"
    assert state["arms"][0]["session"]["wait_ratio"] == 0.25
    plain = read(paint(Painter(hub()), stats()))
    assert (plain["pace"], plain["rung"]) == (None, None)


def test_the_pool_is_sent_when_it_changed_and_at_most_twice_a_second() -> None:
    painter = Painter(Hub(SimulatedClock()))
    first = paint(painter, stats(now_s=10.0, pool=pool(0, 5)))
    drawn = read(first)["pool"]
    assert drawn["pages"] == [[0, 0, 0, 0, 1], [1, 1, 0, 1, 1]]  # large page, place in it, ...
    assert drawn["owners"] == ["s-0", "s-5"]
    assert [layout["kind"] for layout in drawn["layouts"]] == ["kv", "feature"]
    assert "pool" not in read(first, pool_version=first.pool_version)
    soon = paint(painter, stats(now_s=10.1, pool=pool(0)))
    assert soon.pool_version == first.pool_version
    later = paint(painter, stats(now_s=10.6, pool=pool(0)))
    assert later.pool_version == first.pool_version + 1
    same = paint(painter, stats(now_s=11.6, pool=pool(0)))
    assert same.pool_version == later.pool_version


def test_latency_is_the_median_of_the_last_ten_seconds() -> None:
    painter = Painter(Hub(SimulatedClock()))
    for at, infer_ms in enumerate([10.0, 90.0, 20.0]):
        picture = paint(
            painter, stats(session("a", num_chunks=at + 1, last_infer_ms=infer_ms), now_s=10.0 + at)
        )
    assert read(picture)["totals"]["latency_p50_ms"] == 20.0
    quiet = paint(painter, stats(session("a", num_chunks=3, last_infer_ms=20.0), now_s=30.0))
    assert read(quiet)["totals"]["latency_p50_ms"] is None


def test_numbers_that_json_cannot_say_become_null() -> None:
    painter = Painter(Hub(SimulatedClock()))
    state = read(paint(painter, stats(session("a", last_infer_ms=float("nan"), num_chunks=0))))
    assert state["arms"][0]["session"]["infer_ms"] is None


def hub() -> Hub:
    """One robot, that of session "a"; it can disturb its link."""
    made = Hub(SimulatedClock())
    join(made, "a", "arm-a", impair={"delay_ms": 0.0, "jitter_ms": 0.0, "loss": 0.0})
    return made


class Obedient:
    """A Service that takes commands for the session "a" only."""

    def __init__(self) -> None:
        self.commands: list[Command] = []

    @property
    def spec(self) -> PolicySpec:
        return fake_spec()

    def submit(self, observation: Observation, on_done: OnDone) -> RequestId:
        raise AssertionError("no observation expected")

    def cancel(self, request_id: RequestId) -> None:
        raise AssertionError("no request expected")

    def control(self, command: Command) -> None:
        if command.session_id != "a":
            raise FieldError("session_id", expected="an open session", got=command.session_id)
        self.commands.append(command)

    def stats(self) -> ServiceStats:
        return stats()


def test_an_operator_sets_a_prompt_and_gives_it_back() -> None:
    service = Obedient()
    order = {"id": 1, "set_prompt": {"session_id": "a", "prompt": " close the drawer  "}}
    assert json.loads(obey(json.dumps(order), service, hub(), SPEC)) == {
        "kind": "answer",
        "id": 1,
        "error": None,
    }
    obey(json.dumps({"id": 2, "clear_prompt": {"session_id": "a"}}), service, hub(), SPEC)
    assert service.commands == [
        OverridePrompt(session_id=SessionId("a"), prompt="close the drawer"),
        OverridePrompt(session_id=SessionId("a"), prompt=None),
    ]


@pytest.mark.parametrize(
    ("order", "what"),
    [
        ("{", "order: expected JSON"),
        ("[" * 16_000, "order: expected JSON"),
        ("[]", "order.id"),
        ('{"id": true}', "order.id"),
        ('{"id": 1}', "set_prompt"),
        ('{"id": 1, "set_prompt": {"session_id": "a"}}', "set_prompt"),
        ('{"id": 1, "set_prompt": {"session_id": 4, "prompt": "x"}}', "set_prompt"),
        ('{"id": 1, "set_prompt": {"session_id": "a", "prompt": "  "}}', "an instruction"),
        ('{"id": 1, "set_prompt": {"session_id": "a", "prompt": "a\\u0007"}}', "control char"),
        ('{"id": 1, "clear_prompt": {"session_id": "gone"}}', "an open session"),
        (
            '{"id": 1, "impair": {"session_id": "gone", "delay_ms": 1, "jitter_ms": 0, "loss": 0}}',
            "can disturb",
        ),
        (
            '{"id": 1, "impair": {"session_id": "a", "delay_ms": 1, "jitter_ms": 0, "loss": 2}}',
            "impair.loss",
        ),
        ('{"id": 1, "impair": {"session_id": "a", "delay_ms": 1}}', "impair.jitter_ms"),
        (
            json.dumps({"id": 1, "set_prompt": {"session_id": "a", "prompt": "x" * 2049}}),
            "at most 2048 bytes",
        ),
    ],
)
def test_a_bad_order_is_answered_and_not_carried_out(order: str, what: str) -> None:
    service = Obedient()
    answer = json.loads(obey(order, service, hub(), SPEC))
    assert what in answer["error"]["message"]
    assert service.commands == []


def test_an_operator_disturbs_a_robots_link() -> None:
    service, robots = Obedient(), hub()
    order = {"session_id": "a", "delay_ms": 120, "jitter_ms": 30.5, "loss": 0.25}
    answer = json.loads(obey(json.dumps({"id": 4, "impair": order}), service, robots, SPEC))
    assert answer == {"kind": "answer", "id": 4, "error": None}
    assert robots.robots[0].impair == Impair(delay_ms=120.0, jitter_ms=30.5, loss=0.25)
    assert service.commands == []
    picture = paint(Painter(robots), stats(session("a")))
    shown = read(picture)["arms"][0]["robot"]["impair"]
    assert shown == {"delay_ms": 120.0, "jitter_ms": 30.5, "loss": 0.25}


def test_an_error_of_the_service_is_answered_with_its_next_step() -> None:
    class Refusing(Obedient):
        def control(self, command: Command) -> None:
            raise GanglionError("too busy", next_step="try later")

    answer = json.loads(
        obey('{"id": 9, "clear_prompt": {"session_id": "a"}}', Refusing(), hub(), SPEC)
    )
    assert answer["id"] == 9
    assert answer["error"] == {"code": "internal", "message": "too busy", "next_step": "try later"}
