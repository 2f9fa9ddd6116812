"""Chunks of one robot that overlap: what they read, how they move with the ticks, where they start."""

from dataclasses import replace

import numpy as np
import torch

from ganglion.engine.step import Engine
from ganglion.models.base import StageBatch
from ganglion.spec import Stage
from ganglion.types import Execution, RequestId
from tests.cpu.test_engine import engine
from tests.cpu.toy import NUM_STEPS, Toy, observation

FLOW = "flow"


class LateToy(Toy):
    """A toy that takes newer contexts as long as `late_steps` allow, and notes what its rows were told."""

    def __init__(self, *, late_steps: int = NUM_STEPS, max_prefix: int = 2) -> None:
        super().__init__()
        self.spec = replace(self.spec, late_context_steps=late_steps, max_prefix=max_prefix)
        self.told: list[tuple[int, int, bool, int]] = []  # seq read, first unit, is new, shift
        self.plans: list[tuple[int, int] | None] = []  # rows known, rows committed

    def run(self, stage: Stage, batch: StageBatch) -> torch.Tensor:
        if stage.name == FLOW:
            for row in batch.rows:
                self.told.append((row.observation.seq, row.first_unit, row.is_new, row.shift))
                plan = row.plan
                self.plans.append(plan and (len(plan.actions), plan.num_committed))
        return super().run(stage, batch)


def step_until(core: Engine, num_steps: int) -> None:
    for _ in range(num_steps):
        core.step()
        core.ledger.check_integrity()


def test_each_flow_step_reads_the_newest_context() -> None:
    toy = LateToy()
    core = engine(toy, budget_us=1)
    core.submit(RequestId(1), "toy", observation("a", 1, pixel=1, executed_until=10), deadline_s=1)
    step_until(core, 4)  # view, context, two flow steps
    assert toy.told == [(1, 0, True, 0), (1, 1, False, 0)]
    core.submit(RequestId(2), "toy", observation("a", 2, pixel=5, executed_until=13), deadline_s=0)
    step_until(core, 3)  # view and context of the newer one, its first flow step with both rows
    assert toy.told[-2:] == [(2, 0, True, 0), (2, 2, False, 3)]
    while core.has_work:
        core.step()
    finished = {done.work.request_id: done for done in core.drain_finished()}
    np.testing.assert_array_equal(finished[RequestId(1)].outcome, np.full((3, 2), 2 * 1 + 2 * 5.0))
    assert finished[RequestId(1)].work.seen.seq == 2
    np.testing.assert_array_equal(finished[RequestId(2)].outcome, np.full((3, 2), 4 * 5.0))
    core.close_session(observation("a", 0).session_id)
    core.ledger.check_integrity()


def test_a_late_context_is_taken_up_to_a_step() -> None:
    toy = LateToy(late_steps=1)
    core = engine(toy, budget_us=1)
    core.submit(RequestId(1), "toy", observation("a", 1, pixel=1), deadline_s=1)
    step_until(core, 3)
    core.submit(RequestId(2), "toy", observation("a", 2, pixel=5), deadline_s=0)
    while core.has_work:
        core.step()
    finished = {done.work.request_id: done for done in core.drain_finished()}
    assert finished[RequestId(1)].work.seen.seq == 1, "its first flow step was done already"


def test_the_private_context_is_the_requests_own() -> None:
    toy = LateToy()
    core = engine(toy, budget_us=1, is_context_public=False)
    core.submit(RequestId(1), "toy", observation("a", 1, pixel=1), deadline_s=1)
    step_until(core, 3)
    core.submit(RequestId(2), "toy", observation("a", 2, pixel=5), deadline_s=0)
    while core.has_work:
        core.step()
    finished = {done.work.request_id: done for done in core.drain_finished()}
    assert {key: done.work.seen.seq for key, done in finished.items()} == {1: 1, 2: 2}


def test_what_is_executed_becomes_the_plan_of_the_next_chunk() -> None:
    toy = LateToy()
    core = engine(toy)
    core.submit(RequestId(1), "toy", observation("a", 1, executed_until=0), deadline_s=1)
    core.step()
    (done,) = core.drain_finished()
    assert toy.plans == [None]
    core.execute(done.work, np.zeros((3, 2), np.float32))
    newer = observation("a", 2, executed_until=1, inference_delay_hint=1)
    core.submit(RequestId(2), "toy", newer, deadline_s=1)
    core.step()
    assert toy.plans[-1] == (2, 1), "two rows of the last chunk are left, one runs meanwhile"
    told = observation(
        "a",
        3,
        executed_until=2,
        action_prefix=np.ones((2, 2), np.float32),
        execution=Execution.PREFIX,
    )
    core.submit(RequestId(3), "toy", told, deadline_s=1)
    core.step()
    assert toy.plans[-1] == (2, 2), "the robot's own word"


def test_a_warm_start_needs_a_plan() -> None:
    toy = LateToy()
    core = engine(toy, warm_start_share=0.5)
    core.submit(RequestId(1), "toy", observation("a", 1, executed_until=0), deadline_s=1)
    core.step()
    (done,) = core.drain_finished()
    assert done.work.num_flow_steps == NUM_STEPS
    core.execute(done.work, np.zeros((3, 2), np.float32))
    core.submit(RequestId(2), "toy", observation("a", 2, executed_until=1), deadline_s=1)
    core.step()
    (done,) = core.drain_finished()
    assert done.work.num_flow_steps == NUM_STEPS // 2
    assert toy.told[-1] == (2, NUM_STEPS // 2, True, 0)


def test_a_percept_that_is_overtaken_gives_its_pages_back() -> None:
    toy = LateToy()
    core = engine(toy, budget_us=1, max_rows=1)
    core.submit(RequestId(1), "toy", observation("a", 1, pixel=1), deadline_s=9)
    core.submit(RequestId(2), "toy", observation("a", 2, pixel=5), deadline_s=1)
    while core.has_work:
        core.step()
        core.ledger.check_integrity()
    finished = {done.work.request_id: done for done in core.drain_finished()}
    assert finished[RequestId(1)].work.seen.seq == 2
    core.close_session(observation("a", 0).session_id)
    core.ledger.check_integrity()
    assert sum(core.ledger.stats().num_used_pages.values()) == 0
