"""The control loop in simulated time: a scripted server, a world that counts, and what is measured."""

from dataclasses import replace

import numpy as np
import pytest

from ganglion.client import Reply, ReplyError, ReplyTimeoutError
from ganglion.clock import SimulatedClock
from ganglion.errors import ErrorCode, FieldError
from ganglion.robots.catalog import METAWORLD_ARM, PUSHT_ARM, Arm
from ganglion.robots.episode import EpisodePlan, EpisodeResult
from ganglion.robots.fleet import own_episodes, shared_episodes
from ganglion.robots.impairment import Impairment, Road
from ganglion.robots.link import Answered
from ganglion.robots.loop import (
    LoopConfig,
    OnSafeStop,
    Pace,
    RobotLoop,
    SafeStoppedError,
    check_policy_fits,
)
from ganglion.robots.queue import Embodiment, Mode, QueueConfig
from ganglion.types import Execution, Timing

PERIOD_S = 0.05
NO_TIME = Timing(queue_ms=0.0, perceive_ms=0.0, generate_ms=0.0, wait_ms=0.0, infer_ms=0.0)
METADATA = {"policy": "toy", "views": {"view": [8, 8, 3]}, "state": {"state": [4]}, "action_dim": 4}
PLAN = EpisodePlan(world="metaworld:push", seed=5)


class StageWorld:
    """Records what it is told and when. `apply_s[n]`: how long the n-th action takes."""

    prompt = "do it"
    rate_hz = 80.0

    def __init__(self, clock, *, solved_at: int = 10**9) -> None:
        self._clock, self._solved_at = clock, solved_at
        self.applied: list[tuple[float, list[float]]] = []
        self.apply_s: dict[int, float] = {}
        self.render_s = 0.0
        self.num_ticks = 0
        self.seeds: list[int] = []

    @property
    def success(self) -> bool:
        return self.num_ticks >= self._solved_at

    def reset(self, seed: int) -> None:
        self.seeds.append(seed)
        self.num_ticks = 0

    def observe(self):
        self._clock.advance(self.render_s)
        return {"view": np.zeros((8, 8, 3), np.uint8), "state": np.zeros(4, np.float32)}

    def apply(self, action) -> None:
        self.applied.append((self._clock.now_s(), action.tolist()))
        self.num_ticks += 1
        self._clock.advance(self.apply_s.get(len(self.applied), 0.0))

    def close(self) -> None:
        pass


class StageLink:
    """A server that answers after `latency_s`, in simulated time; silent between `silent_s[0]` and `silent_s[1]`."""

    robot_id = "arm"
    num_reconnects = 0
    is_connected = True

    def __init__(self, clock, *, latency_s: float = 0.03) -> None:
        self.clock, self.latency_s = clock, latency_s
        self.metadata: dict = METADATA
        self.road = Road("arm")
        self.newest_context = (
            False  # chunks rest on the newest observation there is when they leave
        )
        self.silent_s = (1e9, 1e9)
        self.broken_s = (1e9, 1e9)  # chunks of observations between them are NaN
        self.drops: set[int] = set()  # observations that are lost with their connection
        self.sent: list[dict] = []
        self.num_resets = 0
        self.bad_field: str | None = None
        self.fails: dict[int, ErrorCode] = {}
        self._on_air: list[tuple[float, object]] = []

    @property
    def oldest_tick(self):
        ticks = [answer.sent.tick for _, answer in self._on_air if isinstance(answer, Answered)]
        return min(ticks, default=None)

    @property
    def num_in_flight(self) -> int:
        return len(self._on_air)

    def reset(self) -> None:
        self.num_resets += 1
        self._on_air.clear()

    def send(self, observation, *, sent, prompt, **hints) -> bool:
        index = len(self.sent)
        self.sent.append({"sent": sent, "prompt": prompt, "state": observation["state"], **hints})
        now_s = self.clock.now_s()
        if self.silent_s[0] <= now_s < self.silent_s[1]:
            return True
        if index in self.drops:
            self.num_reconnects += 1
            return True
        if index in self.fails:
            answer = ReplyError("no", code=self.fails[index], seq=index, field=self.bad_field)
        else:
            reply = self._reply(index, hints.get("executed_until", sent.tick))
            if self.broken_s[0] <= now_s < self.broken_s[1]:
                reply.actions.fill(np.nan)
            answer = Answered(
                sent=sent, context=sent, reply=reply, round_trip_ms=self.latency_s * 1e3
            )
        self._on_air.append((now_s + self.latency_s, answer))
        return True

    def poll(self, timeout_s: float):
        end_s = self.clock.now_s() + timeout_s
        if self._on_air and self._on_air[0][0] <= end_s + 1e-12:
            arrival_s, answer = self._on_air.pop(0)
            self.clock.sleep_until(arrival_s)
            if self.newest_context and isinstance(answer, Answered):
                return self._on_newest(answer)
            return answer
        self.clock.sleep_until(end_s)
        return None

    def _on_newest(self, answer: Answered) -> Answered:
        context = self.sent[-1]["sent"]
        reply = replace(self._reply(answer.reply.seq, context.tick), context_seq=len(self.sent) - 1)
        return replace(answer, context=context, reply=reply)

    def _reply(self, seq: int, tick: int) -> Reply:
        actions = np.zeros((40, 4), np.float32)
        actions[:, 0] = (tick + np.arange(40)) / 1000  # says which tick it is for
        actions[:, 3] = 1.0
        return Reply(
            seq=seq, context_seq=seq, actions=actions, obs_time_ns=0, session_id="s", prompt="do it",
            is_prompt_overridden=False, is_deadline_met=True, model_version="v1", context_version=0,
            batch_size=1, timing=NO_TIME, server_ms=1.0, round_trip_ms=self.latency_s * 1e3,
        )  # fmt: skip


class StageSide:
    """Somebody looks at the arm all the time."""

    def __init__(self, clock) -> None:
        self._clock = clock
        self.shown_s: list[float] = []

    def wants_telemetry(self) -> bool:
        return False

    def wants_view(self) -> bool:
        return True

    def offer_view(self, pixels) -> None:
        self.shown_s.append(self._clock.now_s())


class Stage:
    def __init__(self, *, solved_at: int = 10**9, latency_s: float = 0.03, **config) -> None:
        self.clock = SimulatedClock(start_s=100.0)
        self.world = StageWorld(self.clock, solved_at=solved_at)
        is_lockstep = config.get("pace") is Pace.LOCKSTEP  # sockets keep their own time then
        link_clock = SimulatedClock() if is_lockstep else self.clock
        self.link = StageLink(link_clock, latency_s=latency_s)
        self.is_over = False
        self.arm = Arm(
            name="metaworld:push", world_name="metaworld", task="push", world=self.world,
            embodiment=METAWORLD_ARM, measure=None, view=None,
        )  # fmt: skip
        self.loop = RobotLoop(
            self.link,
            embodiment=METAWORLD_ARM,
            clock=self.clock,
            config=LoopConfig(**{"max_ticks": 60, **config}),
            should_stop=lambda: self.is_over,
        )

    def run(self, plan: EpisodePlan = PLAN) -> EpisodeResult:
        result = self.loop.run_episode(self.arm, plan)
        assert result is not None
        return result


def test_ticks_stand_on_absolute_deadlines_and_run_each_slot_at_its_tick():
    stage = Stage()
    stage.world.render_s = 0.013
    result = stage.run()
    times = np.array([at for at, _ in stage.world.applied])
    start_s = times[0]
    late_s = times - start_s - PERIOD_S * np.arange(60)
    assert late_s.max() <= 0.013 + 1e-9  # rendering delays its own tick and no other
    assert [action[0] for _, action in stage.world.applied] == pytest.approx(
        (np.arange(60) / 1000).tolist(), abs=1e-6
    )
    assert (result.num_ticks, result.num_misses, result.num_holds) == (60, 0, 0)
    assert max(result.ages_ms) < 250
    assert result.wait_ms == pytest.approx(43.0)
    assert len(stage.link.sent) == 1 + 20  # every third tick
    assert result.stages_ms["round_trip"] == [30.0] * result.num_chunks


def test_a_slow_server_never_delays_a_tick():
    stage = Stage(latency_s=0.4)
    result = stage.run()
    times = [at for at, _ in stage.world.applied]
    assert np.diff(times) == pytest.approx(PERIOD_S)
    assert result.num_holds == 0
    assert result.num_misses > 40  # all of them too old, and counted


def test_silent_server_safe_stops_the_arm_and_it_goes_on_when_the_server_is_back():
    stage = Stage()
    stage.link.silent_s = (101.0, 102.0)
    result = stage.run()
    still = [at for at, action in stage.world.applied if action[0] == 0.0 and at > 100.1]
    last_fresh_s = 101.0 + 0.03  # at the latest
    assert still[0] <= last_fresh_s + 0.5 + PERIOD_S
    assert still[-1] >= 102.0
    assert still[-1] <= 102.0 + 8 * PERIOD_S
    assert {action[3] for at, action in stage.world.applied if at in still} == {1.0}  # gripper
    assert result.num_safe_stops == 1
    assert result.num_holds == len(still)
    assert stage.loop.mode is Mode.RUN


def test_where_nobody_may_resume_the_arm_stays_and_the_next_episode_says_why():
    stage = Stage(on_safe_stop=OnSafeStop.STAY)
    stage.link.silent_s = (101.0, 101.5)
    stage.run()
    assert stage.loop.mode is Mode.SAFE_STOP
    with pytest.raises(SafeStoppedError, match="500 ms"):
        stage.loop.run_episode(stage.arm, PLAN)
    stage.loop.resume()
    assert stage.run().num_safe_stops == 0


def test_only_a_good_chunk_leaves_safe_stop():
    stage = Stage(max_ticks=70)
    stage.link.silent_s, stage.link.broken_s = (101.0, 102.0), (102.0, 1e9)
    result = stage.run()
    assert stage.loop.mode is Mode.SAFE_STOP
    assert result.num_safe_stops == 1
    last_s, _ = stage.world.applied[-1]
    assert last_s > 103.0, "broken chunks came for a second"
    stage.link.broken_s = (1e9, 1e9)
    assert stage.run().num_safe_stops == 0


def test_an_episode_ends_some_ticks_after_success():
    result = Stage(solved_at=10).run()
    assert (result.is_success, result.success_tick, result.num_ticks) == (True, 10, 15)


def test_errors_are_counted_and_the_arm_goes_on():
    stage = Stage()
    stage.link.fails = {0: ErrorCode.OVERLOADED, 5: ErrorCode.SUPERSEDED}
    result = stage.run()
    assert result.errors == {"overloaded": 1, "superseded": 1}
    assert result.num_holds == 0


def test_a_session_that_still_counts_the_last_episode_is_reset_once_more():
    stage = Stage()
    stage.link.fails, stage.link.bad_field = {0: ErrorCode.INVALID_FIELD}, "executed_until"
    result = stage.run()
    assert stage.link.num_resets == 2
    assert result.errors == {"invalid_field": 1}
    assert result.num_holds == 0


def test_held_up_process_counts_the_ticks_it_slept_through():
    stage = Stage()
    stage.world.apply_s[10] = 0.17  # three deadlines and a bit
    result = stage.run()
    assert result.num_overruns == 2
    assert result.num_ticks == 62
    assert result.num_misses >= 2
    times = [at for at, _ in stage.world.applied]
    assert min(np.diff(times)) > 0.02, "no burst of ticks"


def test_lockstep_waits_for_every_chunk_and_uses_it_a_tick_later():
    stage = Stage(pace=Pace.LOCKSTEP, latency_s=0.7)
    result = stage.run()
    assert (result.num_ticks, result.num_holds) == (60, 0)
    assert [action[0] for _, action in stage.world.applied] == pytest.approx(
        (np.arange(60) / 1000).tolist(), abs=1e-6
    )


def test_lockstep_uses_no_chunk_of_before_a_reconnect():
    patient = QueueConfig(safe_stop_s=2.0)
    stage = Stage(pace=Pace.LOCKSTEP, latency_s=0.02, delay_ticks=4, queue=patient)
    stage.link.drops = {2}  # sent at tick 4, while the chunk of tick 1 is still to be used
    result = stage.run()
    assert result.num_reconnects == 1
    assert stage.loop.counts.outdated == 1
    assert (result.num_ticks, result.num_holds) == (60, 0)


FLOW = METADATA | {
    "horizon": 40,
    "max_prefix": 4,
    "executions": [execution.value for execution in Execution],
}


def delayed(execution: Execution, delay_ticks: int, **config) -> Stage:
    """Lockstep with a chunk that comes so late, a server that can do everything, and a patient arm."""
    config = {"queue": QueueConfig(safe_stop_s=10.0, max_age_s=10.0), **config}
    stage = Stage(pace=Pace.LOCKSTEP, execution=execution, delay_ticks=delay_ticks, **config)
    stage.link.metadata = FLOW
    return stage


def rows_run(stage: Stage) -> list[int]:
    """Which tick each applied action was made for; 0 while holding."""
    return [round(action[0] * 1000) for _, action in stage.world.applied]


@pytest.mark.parametrize("delay_ticks", [0, 1, 5, 12, 20])
@pytest.mark.parametrize("execution", [e for e in Execution if e is not Execution.SYNC])
def test_every_row_runs_at_its_own_tick_whatever_the_delay(execution, delay_ticks):
    stage = delayed(execution, delay_ticks)
    result = stage.run()
    assert rows_run(stage) == list(range(60))
    assert (result.num_holds, result.execution) == (0, execution.value)
    first, *rest = stage.link.sent
    assert {sent["execution"] for sent in stage.link.sent} == {execution.value}
    assert first["executed_until"] == 0
    assert "action_prefix" not in first, (
        "the world waits for the first chunk: nothing runs meanwhile"
    )
    assert len(rest) == 20, "an observation every third tick, however many are under way"


def test_prefix_says_what_runs_before_any_chunk_can_change_it():
    stage = delayed(Execution.PREFIX, 8)
    stage.run()
    second, third = stage.link.sent[1:3]
    assert (second["executed_until"], second["inference_delay_hint"]) == (1, 8)
    assert second["action_prefix"][:, 0] == pytest.approx(
        [0.001, 0.002, 0.003, 0.004]
    )  # max_prefix
    steady = stage.link.sent[10]
    tick = steady["executed_until"]
    # observations of every third tick are under way; the oldest's chunk is there two ticks from now
    assert steady["action_prefix"][:, 0] == pytest.approx([tick / 1000, (tick + 1) / 1000])
    assert third["sent"].tick == 4


def test_in_real_time_the_prefix_ends_where_the_oldest_chunk_under_way_may_come():
    stage = Stage(
        latency_s=0.33,
        max_ticks=90,
        queue=QueueConfig(safe_stop_s=2.0),
        execution=Execution.PREFIX,
    )
    stage.link.metadata = FLOW
    stage.run()
    for hints in stage.link.sent[15:]:
        tick = hints["executed_until"]
        assert hints["inference_delay_hint"] == 7, "330 ms is there for the seventh tick"
        assert len(hints["action_prefix"]) in (1, 2), (
            "others of three and six ticks ago are under way"
        )
        assert hints["action_prefix"][0, 0] == pytest.approx(tick / 1000)


def test_rtc_without_a_trained_prefix_tells_where_it_is_and_the_delay():
    stage = delayed(Execution.RTC, 5)
    stage.link.metadata = FLOW | {"max_prefix": 0}
    stage.run()
    hints = stage.link.sent[4]
    assert "action_prefix" not in hints
    assert (hints["executed_until"], hints["inference_delay_hint"]) == (10, 5)


@pytest.mark.parametrize("delay_ticks", [0, 1, 4])
def test_sync_stands_still_until_the_chunk_of_its_newest_observation(delay_ticks):
    stage = delayed(Execution.SYNC, delay_ticks)
    stage.run()
    runs = rows_run(stage)
    # three rows from the first on, then as many held ticks as the chunk takes
    at, expected = 0, []
    while len(expected) < 60:
        expected += [at, at + 1, at + 2]
        at = len(expected)
        expected += [0] * delay_ticks
    assert runs == expected[:60]
    assert not any("executed_until" in hints for hints in stage.link.sent)


def test_one_at_a_time_observes_again_when_the_chunk_is_there():
    stage = delayed(Execution.NAIVE, 8, max_in_flight=1)
    stage.run()
    ticks = [hints["sent"].tick for hints in stage.link.sent]
    assert np.diff(ticks[1:]).tolist() == [8] * (len(ticks) - 2)


def test_rolled_sends_the_state_of_the_tick_at_which_its_chunk_runs():
    stage = delayed(Execution.ROLLED, 6)
    stage.run()
    for hints in stage.link.sent[1:]:
        tick = hints["sent"].tick
        assert hints["executed_until"] == hints["sent"].first_tick == tick + 6
        assert "action_prefix" not in hints
        # the hand moves by a hundredth of each action, here tick / 1000
        moved = sum(range(tick, tick + 6)) * 1e-5
        assert hints["state"][0] == pytest.approx(moved, rel=1e-4)


def test_a_rolled_tick_never_goes_back():
    stage = delayed(Execution.ROLLED, 2)
    stage.link.road.impairment = Impairment(jitter_ms=600.0)
    stage.run()
    ticks = [hints["executed_until"] for hints in stage.link.sent]
    assert ticks == sorted(ticks)
    assert max(np.diff(ticks)) > 3, "the forecast follows what was measured"


def test_blend_averages_overlapping_rows():
    stage = delayed(Execution.BLEND, 1)
    reply = stage.link._reply
    # every chunk wants one value all along: its number
    stage.link._reply = lambda seq, tick: replace(
        reply(seq, tick), actions=np.full((40, 4), seq / 100, np.float32)
    )
    stage.run()
    value = 0.0
    for index, (_, action) in enumerate(stage.world.applied):
        if index >= 2 and (index - 2) % 3 == 0:
            value = 0.3 * value + 0.7 * ((index - 2) // 3 + 1) / 100
        assert action[0] == pytest.approx(value, abs=1e-6)


def test_rows_belong_to_the_observation_that_the_chunk_rests_on():
    stage = Stage(latency_s=0.4, execution=Execution.NAIVE)
    stage.link.newest_context = True
    result = stage.run()
    assert rows_run(stage) == list(range(60))
    assert max(result.ages_ms[20:]) < 250, "as young as the newest observation, not as the request"
    stage = Stage(latency_s=0.4, execution=Execution.NAIVE)
    assert max(stage.run().ages_ms[20:]) > 400


@pytest.mark.parametrize("execution", list(Execution))
def test_a_link_that_loses_and_delays_in_lockstep_repeats_exactly(execution):
    def fly():
        stage = delayed(execution, 2, max_ticks=200)
        stage.link.road.impairment = Impairment(delay_ms=100.0, jitter_ms=300.0, loss=0.3)
        result = stage.run()
        return rows_run(stage), result.num_chunks, len(stage.link.sent)

    rows, num_chunks, num_sent = fly()
    assert (rows, num_chunks, num_sent) == fly()
    assert num_chunks < num_sent < 67
    if execution is not Execution.SYNC:
        assert all(row in (0, tick) for tick, row in enumerate(rows))


@pytest.mark.parametrize(
    ("changes", "config", "field"),
    [
        ({"executions": ["naive"]}, {"execution": Execution.RTC}, "execution"),
        ({"horizon": 8}, {"delay_ticks": 8}, "delay_ticks"),
    ],
)
def test_what_the_policy_cannot_do_is_said_before_the_first_tick(changes, config, field):
    stage = delayed(**{"execution": Execution.NAIVE, "delay_ticks": 1, **config})
    stage.link.metadata = FLOW | changes
    with pytest.raises(FieldError) as error:
        stage.run()
    assert error.value.field == field
    assert stage.world.applied == []


def test_rolled_needs_an_arm_whose_state_follows_its_actions():
    body = replace(METAWORLD_ARM, motion=None)
    assert isinstance(body, Embodiment)
    stage = delayed(Execution.NAIVE, 1)
    with pytest.raises(FieldError, match="StateMotion"):
        RobotLoop(
            stage.link, embodiment=body, clock=stage.clock,
            config=LoopConfig(execution=Execution.ROLLED), should_stop=lambda: False,
        )  # fmt: skip


def watched(stage: Stage, cost_s: dict[int, float]) -> list[int]:
    """Let people watch; view n takes `cost_s[n]`, others 10 ms. Counts views in the list's item."""
    num_views = [0]

    def view(view_px: int):
        num_views[0] += 1
        stage.clock.advance(cost_s.get(num_views[0], 0.01))
        return np.zeros((view_px, view_px, 3), np.uint8)

    stage.arm = replace(stage.arm, view=view)
    return num_views


@pytest.mark.parametrize("is_late", [False, True])
def test_the_slow_first_view_of_a_world_stalls_no_tick(is_late):
    stage = Stage()
    side = StageSide(stage.clock)
    watched(stage, {1: 0.8})
    if is_late:
        stage.run()
        stage.world.applied.clear()
    stage.loop.attach(side)
    result = stage.run()
    times = [at for at, _ in stage.world.applied]
    assert np.diff(times) == pytest.approx(PERIOD_S)
    assert (result.num_overruns, result.num_misses) == (0, 0)
    assert len(side.shown_s) == 60


def test_one_slow_view_does_not_end_them_all():
    stage = Stage()
    side = StageSide(stage.clock)
    watched(stage, {10: 2.0})
    stage.loop.attach(side)
    stage.run()
    assert max(np.diff(side.shown_s)) < 2.2
    assert len(side.shown_s) > 50


def test_the_plan_names_seed_and_instruction():
    stage = Stage()
    result = stage.run(EpisodePlan(world="metaworld:push", seed=7, prompt="close the drawer"))
    assert stage.world.seeds == [7]
    assert {sent["prompt"] for sent in stage.link.sent} == {"close the drawer"}
    assert len({sent["seed"] for sent in stage.link.sent}) == len(stage.link.sent)
    assert (result.seed, result.prompt) == (7, "close the drawer")
    assert EpisodeResult.from_json(result.to_json()) == result


def test_stop_ends_the_episode_without_a_result():
    stage = Stage()
    stage.is_over = True
    assert stage.loop.run_episode(stage.arm, PLAN) is None


def test_a_server_that_never_answers_is_an_error_with_a_next_step():
    stage = Stage(first_chunk_s=2.0)
    stage.link.silent_s = (0.0, 1e9)
    with pytest.raises(ReplyTimeoutError, match="within 2 s"):
        stage.loop.run_episode(stage.arm, PLAN)
    assert len(stage.link.sent) == 3  # asked again every second


def test_a_policy_for_another_world_is_named_before_the_first_tick():
    stage = Stage()
    for change, field in (
        ({"views": {"view": [9, 9, 3]}}, "view"),
        ({"state": {"pose": [4]}}, "pose"),
        ({"action_dim": 7}, "action_dim"),
    ):
        with pytest.raises(FieldError) as caught:
            check_policy_fits(METADATA | change, stage.arm)
        assert caught.value.field == field


def test_one_robot_is_one_kind_of_arm():
    stage = Stage()
    loop = RobotLoop(
        stage.link, embodiment=PUSHT_ARM, clock=stage.clock, config=LoopConfig(),
        should_stop=lambda: False,
    )  # fmt: skip
    with pytest.raises(FieldError):
        loop.run_episode(stage.arm, PLAN)


def test_own_episodes_go_round_the_worlds_with_seeds_of_their_own():
    next_plan = own_episodes(
        [["pusht"], ["metaworld:push", "pusht"]], first_seed=100, num_episodes=3
    )
    plans = [[next_plan(robot) for _ in range(4)] for robot in range(2)]
    assert [plan.seed for plan in plans[0][:3]] == [100, 102, 104]
    assert [plan.world for plan in plans[1][:3]] == ["metaworld:push", "pusht", "metaworld:push"]
    assert plans[0][3] is plans[1][3] is None
    with pytest.raises(FieldError):
        own_episodes([["metaworld:fly"]], first_seed=0, num_episodes=1)


def test_shared_episodes_are_each_given_once_and_robots_rarely_change_worlds():
    plans = [
        EpisodePlan(world=f"metaworld:{task}", seed=seed)
        for task in ("push", "drawer-open", "door-close")
        for seed in range(8)
    ]
    next_plan = shared_episodes(plans)
    given: list[EpisodePlan] = []
    num_changes, world_of = 0, {}
    for turn in range(24):
        plan = next_plan(turn % 4)
        assert plan is not None
        given.append(plan)
        num_changes += world_of.get(turn % 4) not in (None, plan.world)
        world_of[turn % 4] = plan.world
    assert sorted(given, key=repr) == sorted(plans, key=repr)
    assert next_plan(0) is None
    assert num_changes <= 6


@pytest.mark.parametrize(
    "change", [{"rate_hz": 0.0}, {"max_ticks": 0}, {"delay_ticks": -1}, {"max_in_flight": 0}]
)
def test_impossible_configs_are_refused(change):
    with pytest.raises(FieldError):
        LoopConfig(**change)
