"""Rollout: which row of which chunk an arm executes at which tick, in every execution mode, with a policy that counts."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from ganglion.robots.catalog import METAWORLD_ARM, Arm
from ganglion.robots.metaworld import STATE_KEY, VIEW_KEYS
from ganglion.robots.world import Views
from ganglion.train.actor import Actor, Draft, Glance
from ganglion.train.rollout import Episode, RolloutConfig, run_episodes
from ganglion.types import Execution, Float32Array

HORIZON, NUM_TICKS = 48, 60
STEPS = 5


class CountingWorld:
    """Its pictures say the tick; it keeps what was applied."""

    prompt, rate_hz, success = "count", 80.0, False

    def __init__(self) -> None:
        self.applied: list[Float32Array] = []

    @property
    def num_ticks(self) -> int:
        return len(self.applied)

    def reset(self, seed: int) -> None:
        self.applied = []

    def observe(self) -> Views:
        picture = np.full((1, 1, 3), self.num_ticks, np.uint8)
        return {**dict.fromkeys(VIEW_KEYS, picture), STATE_KEY: np.zeros(4, np.float32)}

    def apply(self, action: Float32Array) -> None:
        self.applied.append(np.array(action))

    def close(self) -> None:
        pass


def seen_tick(glance: Glance) -> float:
    return float(glance.images[0, 0, 0, 0])


class CountingActor(Actor):
    """Row i of a chunk says [i, the tick it saw, ..., a gripper of the tick it saw]; keeps every glance and draft."""

    def __init__(self) -> None:
        self.num_flow_steps = STEPS
        self.glances: list[Glance] = []
        self.refined: list[tuple[int, float, int | None]] = []  # steps done, seen tick, committed

    def begin(self, glances: Sequence[Glance]) -> list[Draft]:
        self.glances += glances
        return [
            Draft(
                latent=torch.arange(HORIZON, dtype=torch.float32)[:, None].repeat(1, 4),
                context=torch.tensor(seen_tick(glance)),
                execution=glance.execution,
                plan=glance.plan,
                num_steps=STEPS,
            )
            for glance in glances
        ]

    def refine(self, drafts: Sequence[Draft], num_steps: int) -> None:
        for draft in drafts:
            committed = None if draft.plan is None else draft.plan.num_committed
            self.refined.append((draft.num_steps_done, float(draft.context), committed))
            draft.num_steps_done += num_steps

    def emit(self, drafts: Sequence[Draft]) -> Float32Array:
        rows = np.arange(HORIZON, dtype=np.float32)
        return np.stack(
            [
                np.stack([rows, np.full(HORIZON, float(d.context)), 0 * rows, rows + 1], 1)
                for d in drafts
            ]
        ).astype(np.float32)


def run(
    execution: Execution, *, delay: int, every: int, is_public: bool = False
) -> tuple[list[tuple[float, ...]], CountingActor, Episode]:
    """What was executed at each tick, (row, tick of its picture, 0, gripper)."""
    world, actor = CountingWorld(), CountingActor()
    arm = Arm(
        name="count",
        world_name="count",
        task="count",
        world=world,
        embodiment=METAWORLD_ARM,
        measure=None,
        view=None,
    )
    config = RolloutConfig(
        execution=execution,
        ticks_per_chunk=every,
        delay_ticks=delay,
        is_context_public=is_public,
        max_ticks=NUM_TICKS,
    )
    episode = Episode(arm, 0, "count", config)
    run_episodes([episode], actor)
    return [tuple(action.tolist()) for action in world.applied], actor, episode


@pytest.mark.parametrize("execution", [mode for mode in Execution if mode is not Execution.BLEND])
def test_without_delay_every_mode_runs_the_newest_rows(execution: Execution) -> None:
    for is_public in (False, True):
        executed, _, _ = run(execution, delay=0, every=3, is_public=is_public)
        assert [(row, seen) for row, seen, *_ in executed] == [
            (tick % 3, tick - tick % 3) for tick in range(NUM_TICKS)
        ]


@pytest.mark.parametrize(
    "execution", [Execution.NAIVE, Execution.RTC, Execution.RTC_IDENTITY, Execution.PREFIX]
)
@pytest.mark.parametrize(("delay", "every"), [(4, 4), (8, 3), (2, 7)])
def test_late_rows_run_at_their_own_ticks(execution: Execution, delay: int, every: int) -> None:
    executed, actor, episode = run(execution, delay=delay, every=every)
    for tick, (row, seen, _, _) in enumerate(executed):
        if tick < delay:
            assert (row, seen) == (0.0, 0.0), "holds until its first chunk"
        else:
            assert seen == (tick - delay) // every * every, "of the newest that arrived"
            assert row == tick - seen
    assert episode.switch_ticks[:2] == [delay, delay + every]
    plan = actor.glances[-1].plan
    assert plan is not None
    assert plan.num_committed == delay
    launch = int(seen_tick(actor.glances[-2]))
    plan = actor.glances[-2].plan
    assert plan is not None
    num_sure = min(delay, every)  # until a chunk that is under way arrives
    np.testing.assert_array_equal(
        plan.actions[: num_sure if every >= delay else 1],
        episode.executed[launch : launch + (num_sure if every >= delay else 1)],
    )


def test_sync_holds_until_its_chunk_is_there_and_keeps_the_gripper() -> None:
    executed, _, _ = run(Execution.SYNC, delay=4, every=3)
    for tick, (row, seen, _, gripper) in enumerate(executed):
        round_number, at = divmod(tick, 7)
        if at < 4:
            assert (row, seen) == (0.0, 0.0)
            assert gripper == (3.0 if round_number else 0.0), "of the last row that ran"
        else:
            assert (row, seen) == (at - 4, round_number * 7)


def test_blend_is_a_running_average_of_what_was_planned() -> None:
    executed, _, _ = run(Execution.BLEND, delay=4, every=4)
    planned: dict[int, float] = {}
    for tick in range(NUM_TICKS):
        if tick >= 4 and tick % 4 == 0:
            for row in range(4, HORIZON):
                at = tick - 4 + row
                planned[at] = 0.3 * planned[at] + 0.7 * row if at in planned else float(row)
        assert executed[tick][0] == pytest.approx(planned.get(tick, 0.0), abs=1e-4)


def test_rolled_tells_where_the_hand_will_be_and_starts_there() -> None:
    executed, actor, _ = run(Execution.ROLLED, delay=4, every=4)
    for tick in range(8, NUM_TICKS):
        assert executed[tick][:2] == (tick % 4, tick - tick % 4 - 4)
    glance = actor.glances[2]
    assert glance.plan is not None
    assert glance.state[0] == pytest.approx(0.01 * sum(glance.plan.actions[:4, 0]))
    assert glance.state[1] > 0.0


def test_with_a_public_context_late_steps_see_newer_pictures_and_what_runs_by_then() -> None:
    executed, actor, _ = run(Execution.PREFIX, delay=8, every=3, is_public=True)
    # launched at t: perceived at t + 2.4, steps at t + 2.4, 3.52, 4.64, 5.76, 6.88; pictures every 3 ticks
    last = [seen for done, seen, _ in actor.refined if done == STEPS - 1]
    assert last[:3] == [3.0, 6.0, 9.0], "of tick 3, perceived at 5.4, before step 4 at 6.88"
    committed = {(done, c) for done, seen, c in actor.refined if seen > 20 and c is not None}
    assert committed == {(0, 8), (1, 8), (2, 8), (3, 5), (4, 5)}
    for tick in range(20, NUM_TICKS):
        row, seen, *_ = executed[tick]
        assert row == tick - seen, "rows count from the picture that was read last"
        assert seen == (tick - 8) // 3 * 3 + 3


def test_a_context_of_its_own_makes_all_steps_at_once() -> None:
    _, actor, _ = run(Execution.PREFIX, delay=8, every=3)
    assert {done for done, _, _ in actor.refined} == {0}


def test_smoothness_is_of_the_motion_without_the_gripper() -> None:
    _, _, episode = run(Execution.NAIVE, delay=0, every=3)
    motion = np.stack(episode.executed)[:, :3]
    jumps = [float(np.sum((motion[t] - motion[t - 1]) ** 2)) for t in range(3, NUM_TICKS, 3)]
    assert episode.switch_jumps() == pytest.approx(jumps)
    assert len(episode.jerks()) == NUM_TICKS - 2
