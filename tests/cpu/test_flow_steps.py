"""Requests of different numbers of flow steps: each gets what it would get alone, also in one batch."""

import numpy as np
import pytest
import torch

from ganglion.clock import RealClock
from ganglion.config import EngineConfig, MemoryConfig
from ganglion.engine.executor import Executor
from ganglion.engine.lane import Lanes
from ganglion.engine.scheduler import DeadlineScheduler
from ganglion.engine.step import Engine
from ganglion.layout import PoolLayout
from ganglion.memory.arena import Arena
from ganglion.memory.ledger import Ledger
from ganglion.models.policies.flow_checkpoint import FlowCheckpoint
from ganglion.models.policies.flow_model import FlowModel
from ganglion.models.tiny import tiny_flow
from ganglion.pipeline.ladder import Ladder, Rung
from ganglion.pipeline.local import LocalService
from ganglion.plan.cost import MeasuredCost
from ganglion.types import Float32Array, Observation, RequestId
from tests.cpu.test_flow_serving import MEMORY, observations, served

TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def checkpoint() -> FlowCheckpoint:
    torch.set_num_threads(1)
    return tiny_flow()


def truth(checkpoint: FlowCheckpoint, seen: Observation, num_steps: int) -> Float32Array:
    policy, processor, config = checkpoint.policy, checkpoint.processor, checkpoint.policy.config
    with torch.inference_mode():
        images = np.stack([seen.images[key] for key in config.view_keys])[None]
        text = policy.prefill_text(processor.tokens([seen.prompt]))
        state = processor.state(seen.state[None])
        kv = policy.prefill_observation(policy.encode_views(torch.from_numpy(images)), state, text)
        generator = torch.Generator().manual_seed(seen.seed or 0)
        noise = torch.randn(config.horizon, config.action_dim, generator=generator)
        latents = policy.denoise(
            noise[None],
            torch.zeros(1, config.horizon),
            torch.full((1,), 1.0 / num_steps),
            torch.cat([text, kv], dim=3),
            num_steps,
        )
        return processor.actions(latents)[0]


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_a_rung_computes_that_many_steps(checkpoint: FlowCheckpoint, num_steps: int) -> None:
    model = FlowModel(checkpoint.policy, checkpoint.processor, checkpoint.spec)
    ladder = Ladder(rungs=(Rung(num_flow_steps=num_steps),))
    seen = observations(3)
    with LocalService(model, engine=EngineConfig(), memory=MEMORY, ladder=ladder) as service:
        chunks = served(service, seen)
    for item, chunk in zip(seen, chunks, strict=True):
        expected = truth(checkpoint, item, num_steps)
        np.testing.assert_allclose(chunk.actions, expected, atol=TOLERANCE)


def test_rows_of_different_numbers_of_steps_share_a_batch(checkpoint: FlowCheckpoint) -> None:
    model = FlowModel(checkpoint.policy, checkpoint.processor, checkpoint.spec)
    memory = MemoryConfig(arena_bytes=1 << 22, large_page_bytes=1 << 16)
    layout = PoolLayout(large_page_bytes=memory.large_page_bytes, layouts=model.layouts)
    num_large = memory.arena_bytes // memory.large_page_bytes
    name, clock, cost = model.spec.name, RealClock(), MeasuredCost()
    engine = Engine(
        {name: model},
        Ledger(layout, num_large),
        DeadlineScheduler({name: model.stages}, cost, max_rows=8, num_lanes=1),
        Executor({name: model}, Arena(layout, num_large), Lanes(((),)), clock),
        cost,
        clock,
        step_budget_us=60_000_000,
        num_step_records=4,
    )
    seen = observations(3)
    steps = (5, 2, 3)
    for at, (item, num_steps) in enumerate(zip(seen, steps, strict=True)):
        engine.submit(RequestId(at), name, item, deadline_s=1.0, num_flow_steps=num_steps)
    outlooks = {outlook.request_id: outlook for outlook in engine.outlooks()}
    assert outlooks[RequestId(1)].left_us < outlooks[RequestId(2)].left_us
    widest = 0
    while engine.has_work:
        record = engine.step()
        assert record is not None
        widest = max(widest, *(p.num_rows for p in record.pieces if p.stage == "denoise"))
    assert widest == 3
    for finished in engine.drain_finished():
        at = finished.work.request_id
        assert finished.work.num_flow_steps == steps[at]
        expected = truth(checkpoint, seen[at], steps[at])
        np.testing.assert_allclose(finished.outcome, expected, atol=TOLERANCE)
