"""A service with a gate: what is perceived is near what came, chunks are those of what is perceived, pages come back."""

import threading
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from ganglion.clock import SimulatedClock
from ganglion.config import EngineConfig, MemoryConfig, PipelineConfig
from ganglion.engine.executor import Executor
from ganglion.engine.lane import Lanes
from ganglion.engine.scheduler import DeadlineScheduler
from ganglion.engine.step import Engine
from ganglion.errors import FieldError
from ganglion.layout import PoolLayout
from ganglion.memory.arena import Arena
from ganglion.memory.ledger import Ledger
from ganglion.metrics import Metrics
from ganglion.models.base import StageBatch
from ganglion.models.policies.flow_checkpoint import FlowCheckpoint
from ganglion.models.policies.flow_model import FlowModel
from ganglion.models.policies.patches import attended, view_attention
from ganglion.models.tiny import TINY_FLOW, TINY_PROMPTS, tiny_flow
from ganglion.pipeline.gate import Gate, GateConfig, Perceive, gate_config
from ganglion.pipeline.gating import Gating
from ganglion.pipeline.local import LocalService
from ganglion.pipeline.patch_grid import BoolArray
from ganglion.plan.cost import MeasuredCost
from ganglion.service import Outcome
from ganglion.spec import Stage
from ganglion.types import (
    ActionChunk,
    CloseSession,
    Float32Array,
    Observation,
    Renewal,
    RequestId,
    RobotId,
    SessionId,
    UInt8Array,
)
from tests.cpu.test_engine import engine, num_used
from tests.cpu.test_flow_serving import dense
from tests.cpu.toy import VIEW, Toy, expected, observation

MEMORY = MemoryConfig(arena_bytes=1 << 22, large_page_bytes=1 << 16)
GATED = PipelineConfig(gate_refresh_ms=60_000.0)
TIMEOUT_S = 20.0


@pytest.fixture
def tiny() -> FlowCheckpoint:
    """With views of 4 x 4 tokens, so that there are parts."""
    return tiny_flow(seed=2, config=replace(TINY_FLOW, view_height_px=64, view_width_px=64))


def core_of(checkpoint: FlowCheckpoint) -> Engine:
    """An engine alone, which serves it as "tiny"."""
    model = FlowModel(checkpoint.policy, checkpoint.processor, checkpoint.spec)
    layout = PoolLayout(large_page_bytes=1 << 16, layouts=model.layouts)
    clock, cost = SimulatedClock(), MeasuredCost()
    return Engine(
        {"tiny": model},
        Ledger(layout, 64),
        DeadlineScheduler({"tiny": model.stages}, cost, max_rows=4, num_lanes=1),
        Executor({"tiny": model}, Arena(layout, 64), Lanes(((),)), clock),
        cost,
        clock,
        step_budget_us=10_000_000,
        num_step_records=4,
    )


def ask(service: LocalService, seen: Observation) -> ActionChunk:
    chunk = outcome_of(service, seen)
    assert isinstance(chunk, ActionChunk), chunk
    return chunk


def outcome_of(service: LocalService, seen: Observation) -> Outcome:
    done = threading.Event()
    outcomes: list[Outcome] = []

    def keep(outcome: Outcome) -> None:
        outcomes.append(outcome)
        done.set()

    service.submit(seen, keep)
    assert done.wait(TIMEOUT_S)
    (outcome,) = outcomes
    return outcome


class Watched(FlowModel):
    """Notes what it ran."""

    runs: list[tuple[str, int, int]]  # stage, rows, rows with a base

    def run(self, stage: Stage, batch: StageBatch) -> Tensor:
        self.runs.append((stage.name, len(batch.rows), len(batch.bases)))
        return super().run(stage, batch)


class Robot:
    """Sends noisy views of a scene in which a part may change."""

    def __init__(self, checkpoint: FlowCheckpoint, name: str, seed: int) -> None:
        self._views, self._name = checkpoint.spec.views, name
        self._rng = np.random.default_rng(seed)
        self._scene = {view.key: self._rng.normal(120, 40, (64, 64, 3)) for view in self._views}
        self._seq = 0

    def touch(self, key: str) -> None:
        top, left = self._rng.integers(0, 56, 2)
        self._scene[key][top : top + 8, left : left + 8] += 60.0

    def observe(self) -> Observation:
        self._seq += 1
        return Observation(
            session_id=SessionId(self._name),
            robot_id=RobotId(self._name),
            seq=self._seq,
            images={key: self._photo(scene) for key, scene in self._scene.items()},
            state=self._rng.standard_normal(4).astype(np.float32),
            prompt=TINY_PROMPTS[0],
            seed=self._seq,
        )

    def _photo(self, scene: np.ndarray) -> UInt8Array:
        noise = self._rng.normal(0.0, 2.0, scene.shape)
        return np.clip(np.rint(scene + noise), 0, 255).astype(np.uint8)


def test_chunks_are_those_of_the_reference_images(tiny: FlowCheckpoint) -> None:
    """Skipped, in parts or whole: equal to a dense forward of what the gate says the pages hold."""
    model = FlowModel(tiny.policy, tiny.processor, tiny.spec)
    metrics = Metrics()
    actions = set()
    with LocalService(
        model, engine=EngineConfig(), memory=MEMORY, pipeline=GATED, metrics=metrics
    ) as service:
        robots = [Robot(tiny, f"arm-{at}", at) for at in range(2)]
        config = gate_config(GATED)
        assert config is not None
        twins = [Gate(config, tiny.spec.views) for _ in robots]
        for step in range(12):
            for robot, twin in zip(robots, twins, strict=True):
                if step % 3 == 1:
                    robot.touch(tiny.spec.views[step % 2].key)
                seen = robot.observe()
                gated, decisions = twin.admit(seen, now_s=0.0)
                actions |= {decision.action for decision in decisions.values()}
                chunk = ask(service, seen)
                assert chunk.obs_seq == seen.seq
                np.testing.assert_allclose(chunk.actions, dense(tiny, gated), atol=1e-5)
    assert {Perceive.SKIP, Perceive.PATCHES, Perceive.FULL} == actions
    text = metrics.render().decode()
    for action in actions:
        assert f'ganglion_gated_views_total{{action="{action}"}}' in text


def test_a_skipped_view_is_not_computed_and_a_part_reads_the_old_page(
    tiny: FlowCheckpoint,
) -> None:
    model = Watched(tiny.policy, tiny.processor, tiny.spec)
    model.runs = []
    with LocalService(model, engine=EngineConfig(), memory=MEMORY, pipeline=GATED) as service:
        robot = Robot(tiny, "arm", 3)

        def encoded() -> list[tuple[str, int, int]]:
            model.runs.clear()
            ask(service, robot.observe())
            return sorted(run for run in model.runs if run[0].startswith("view"))

        assert encoded() == [("view.0", 1, 0), ("view.1", 1, 0)]
        assert encoded() == []
        robot.touch(tiny.spec.views[1].key)
        assert encoded() == [("view.1", 1, 1)]
        assert encoded() == []
        service.control(CloseSession(session_id=SessionId("arm"), robot_id=RobotId("arm")))
        again = Robot(tiny, "arm", 4)
        model.runs.clear()
        ask(service, again.observe())
        assert len([run for run in model.runs if run[0].startswith("view")]) == 2, "forgotten"


def test_a_still_observation_is_not_perceived_at_all(tiny: FlowCheckpoint) -> None:
    """Its chunk is that of the observation before, with its own noise; the context still counts versions."""
    model = Watched(tiny.policy, tiny.processor, tiny.spec)
    model.runs = []
    pipeline = replace(GATED, gate_state_change=0.1)
    with LocalService(model, engine=EngineConfig(), memory=MEMORY, pipeline=pipeline) as service:
        robot = Robot(tiny, "arm", 8)
        first = robot.observe()
        chunk = ask(service, first)
        for moved in (0.05, 0.0, -0.09):
            model.runs.clear()
            seen = replace(robot.observe(), state=first.state + np.float32(moved))
            again = ask(service, seen)
            assert {name for name, _, _ in model.runs} == {"denoise"}
            truth = dense(tiny, replace(first, seed=seen.seed))
            np.testing.assert_allclose(again.actions, truth, atol=1e-5)
            assert again.context_version == chunk.context_version + 1
            assert again.context_seq == seen.seq
            chunk = again
        model.runs.clear()
        moved_far = replace(robot.observe(), state=first.state + np.float32(0.2))
        truth = dense(tiny, replace(moved_far, images=first.images))
        np.testing.assert_allclose(ask(service, moved_far).actions, truth, atol=1e-5)
        assert {name for name, _, _ in model.runs} == {"observation", "denoise"}
        service.control(CloseSession(session_id=SessionId("arm"), robot_id=RobotId("arm")))


def test_a_repeat_gives_its_pages_back_however_it_ends(tiny: FlowCheckpoint) -> None:
    core, robot = core_of(tiny), Robot(tiny, "arm", 9)
    first = robot.observe()
    core.submit(RequestId(0), "tiny", first, deadline_s=1.0)
    core.step()
    num_held = num_used(core)
    renewal = Renewal(images={}, tokens={}, is_repeat=True)
    for number in (1, 2):
        repeat = replace(robot.observe(), images=first.images, state=first.state, renewal=renewal)
        work = core.submit(RequestId(number), "tiny", repeat, deadline_s=1.0)
        assert [name for name, span in work.spans.items() if not span.is_done] == ["denoise"]
        assert num_used(core) == num_held, "the pages are shared"
        if number == 1:
            core.cancel(RequestId(1))
        else:
            core.step()
        assert num_used(core) == num_held
    other = replace(robot.observe(), state=first.state, renewal=renewal)
    work = core.submit(RequestId(3), "tiny", other, deadline_s=1.0)
    assert not work.spans["observation"].is_done, "a gate's word alone is not enough"
    core.close_session(SessionId("arm"))
    assert num_used(core) == 0


def test_the_engine_says_what_a_chunk_attended_to(
    tiny: FlowCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the network alone would; nothing for another instruction, an unknown session or a model that cannot say."""
    above_even = partial(attended, factor=1.0)  # an untrained network attends almost evenly
    monkeypatch.setattr("ganglion.models.policies.flow_model.attended", above_even)
    core = core_of(tiny)
    seen = Robot(tiny, "arm", 6).observe()
    core.submit(RequestId(0), "tiny", seen, deadline_s=1.0)
    core.step()
    ((actions),) = [finished.outcome for finished in core.drain_finished()]
    assert isinstance(actions, np.ndarray)
    num_before = num_used(core)

    def ask_for(session: str, prompt: str) -> dict[str, BoolArray]:
        answer = core.attended(SessionId(session), "tiny", prompt=prompt, actions=actions)
        return dict(answer)

    policy, config = tiny.policy, tiny.policy.config
    with torch.inference_mode():
        images = np.stack([seen.images[key] for key in config.view_keys])[None]
        text_kv = policy.prefill_text(tiny.processor.tokens([seen.prompt]))
        kv = policy.prefill_observation(
            policy.encode_views(torch.from_numpy(images)),
            tiny.processor.state(seen.state[None]),
            text_kv,
        )
        latents = tiny.processor.prefix(actions[None])
        tau = torch.full(latents.shape[:2], 0.8)
        shares = view_attention(policy, latents, tau, torch.cat([text_kv, kv], dim=3))
    masks = above_even(shares)[0].reshape(2, 4, 4)
    got = ask_for("arm", seen.prompt)
    assert masks.any()
    for key, mask in zip(config.view_keys, masks, strict=True):
        assert np.array_equal(got[key], mask)
    assert ask_for("arm", TINY_PROMPTS[1]) == {}
    assert ask_for("nobody", seen.prompt) == {}
    assert num_used(core) == num_before
    toy = engine(Toy())
    toy.submit(RequestId(0), "toy", observation("a", 0), deadline_s=1.0)
    toy.step()
    assert toy.attended(SessionId("a"), "toy", prompt="toy", actions=actions) == {}


def test_where_motion_may_pass_the_model_is_asked_once_a_refresh(tiny: FlowCheckpoint) -> None:
    class Asked:
        num_asked = 0

        def attended(
            self, session_id: SessionId, model: str, *, prompt: str, actions: Float32Array
        ) -> dict[str, BoolArray]:
            self.num_asked += 1
            tokens = np.zeros((4, 4), np.bool_)
            tokens[0, 1] = True
            return {view.key: tokens for view in tiny.spec.views}

    for motion_rms, expected_asked in ((20.0, 1), (0.0, 0)):
        config = GateConfig(motion_rms=motion_rms, attended_refresh_ms=0.0)
        asked, robot = Asked(), Robot(tiny, "arm", 7)
        gating = Gating(config, tiny.spec, asked, Metrics())
        for step in range(6):
            gated = gating.admit(robot.observe(), now_s=step * 0.01)
            gating.execute(SessionId("arm"), np.zeros((12, 4), np.float32))
        assert asked.num_asked == expected_asked
        assert (gated.renewal is not None) == bool(expected_asked), "attended tokens are renewed"
        gating.forget(SessionId("arm"))
        gated = gating.admit(robot.observe(), now_s=1.0)
        assert gated.renewal is None


def test_the_pages_that_an_observation_renews_come_back_however_it_ends() -> None:
    core = engine(Toy())
    old, new = observation("a", 0, pixel=5), observation("a", 1, pixel=6)
    renewal = Renewal(images=old.images, tokens={VIEW.key: np.ones((1, 1), np.bool_)})
    new = replace(new, renewal=renewal)
    core.submit(RequestId(0), "toy", old, deadline_s=1.0)
    core.step()
    core.close_session(SessionId("a"))
    assert num_used(core) == 0
    core.submit(RequestId(1), "toy", new, deadline_s=1.0)
    assert num_used(core) == 1, "the old page is held while the new one is made of it"
    core.cancel(RequestId(1))
    assert num_used(core) == 0
    core.submit(RequestId(2), "toy", new, deadline_s=1.0)
    core.step()
    *_, finished = core.drain_finished()
    np.testing.assert_array_equal(finished.outcome, expected(new))
    core.close_session(SessionId("a"))
    assert num_used(core) == 0


def test_a_wrong_image_ends_its_own_request_alone(tiny: FlowCheckpoint) -> None:
    model = FlowModel(tiny.policy, tiny.processor, tiny.spec)
    key = tiny.spec.views[0].key
    with LocalService(model, engine=EngineConfig(), memory=MEMORY, pipeline=GATED) as service:
        good, bad = Robot(tiny, "good", 1), Robot(tiny, "bad", 2)
        for images in ({}, {key: np.zeros((8, 8, 3), np.uint8)}):
            seen = bad.observe()
            rest = {name: image for name, image in seen.images.items() if name != key}
            error = outcome_of(service, replace(seen, images=rest | images))
            assert isinstance(error, FieldError), error
            ask(service, good.observe())
        ask(service, bad.observe())


def test_without_a_gate_everything_is_perceived(tiny: FlowCheckpoint) -> None:
    model = FlowModel(tiny.policy, tiny.processor, tiny.spec)
    with LocalService(model, engine=EngineConfig(), memory=MEMORY) as service:
        robot = Robot(tiny, "arm", 5)
        for _ in range(3):
            seen = robot.observe()
            np.testing.assert_allclose(ask(service, seen).actions, dense(tiny, seen), atol=1e-5)
