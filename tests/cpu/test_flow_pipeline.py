"""The flow policy's chunks that overlap, through the real service: newest context, committed rows, warm starts."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from ganglion.config import EngineConfig, PipelineConfig
from ganglion.models.base import StageBatch
from ganglion.models.policies.flow_model import FlowModel
from ganglion.models.tiny import tiny_flow
from ganglion.pipeline.local import LocalService
from ganglion.service import Outcome
from ganglion.types import ActionChunk, Execution, Observation, Plan, Row, SessionId
from tests.cpu.test_flow_serving import MEMORY, TIMEOUT_S, observations

NUM_OBSERVATIONS = 60


def stream(num: int, **more: object) -> list[Observation]:
    """What one robot sends, a control tick apart."""
    return [
        replace(seen, session_id=SessionId("arm"), robot_id=observations(1)[0].robot_id, seq=at,
                executed_until=at, **more)  # type: ignore[arg-type]
        for at, seen in enumerate(observations(num))
    ]  # fmt: skip


def serve(pipeline: PipelineConfig, sent: list[Observation]) -> list[ActionChunk]:
    """All observations, each offered as soon as the one before it is under way or displaced."""
    checkpoint = tiny_flow()
    model = FlowModel(checkpoint.policy, checkpoint.processor, checkpoint.spec)
    outcomes: list[Outcome] = []
    done = threading.Semaphore(0)

    def keep(outcome: Outcome) -> None:
        outcomes.append(outcome)
        done.release()

    engine = EngineConfig(step_budget_us=1)
    with LocalService(model, engine=engine, memory=MEMORY, pipeline=pipeline) as service:
        for seen in sent:
            service.submit(seen, keep)
            threading.Event().wait(0.002)
        for _ in sent:
            assert done.acquire(timeout=TIMEOUT_S)
    return [outcome for outcome in outcomes if isinstance(outcome, ActionChunk)]


def test_chunks_rest_on_ever_newer_observations() -> None:
    chunks = serve(PipelineConfig(degree=4), stream(NUM_OBSERVATIONS))
    assert len(chunks) > 5
    assert all(chunk.context_seq >= chunk.obs_seq for chunk in chunks)
    assert any(chunk.context_seq > chunk.obs_seq for chunk in chunks), "none saw a newer one"
    assert [c.context_seq for c in chunks] == sorted(c.context_seq for c in chunks)


def test_private_chunks_rest_on_their_own() -> None:
    chunks = serve(PipelineConfig(degree=4, context="private"), stream(NUM_OBSERVATIONS))
    assert len(chunks) > 5
    assert all(chunk.context_seq == chunk.obs_seq for chunk in chunks)


@pytest.mark.parametrize("warm_start", [0.0, 0.5])
def test_committed_rows_come_back_as_they_were(warm_start: float) -> None:
    prefix = np.full((2, tiny_flow().spec.action_dim), 0.125, np.float32)
    sent = stream(NUM_OBSERVATIONS, execution=Execution.PREFIX, action_prefix=prefix)
    chunks = serve(PipelineConfig(degree=2, warm_start=warm_start), sent)
    assert len(chunks) > 5
    for chunk in chunks:
        num_left = max(0, 2 - (chunk.context_seq - chunk.obs_seq))
        np.testing.assert_allclose(chunk.actions[:num_left], 0.125, atol=1e-6)


def test_a_shifted_latent_keeps_its_rows_at_their_ticks() -> None:
    """A row that moved on by two ticks, with the last step's velocity taken out, is the old latent two rows up."""
    checkpoint = tiny_flow()
    with torch.no_grad():
        checkpoint.policy.action_out.weight.zero_()
        checkpoint.policy.action_out.bias.zero_()
    model = FlowModel(checkpoint.policy, checkpoint.processor, checkpoint.spec)
    denoise = model.stages[-1]
    (seen,) = observations(1)
    reads = {}
    with torch.inference_mode():
        for stage in model.stages[:-1]:
            batch = StageBatch(
                rows=(Row(observation=seen, first_unit=0),),
                reads={name: reads[name] for name in stage.reads},
                num_units=stage.num_units,
            )
            reads[stage.name] = model.run(stage, batch)
        horizon, dim = checkpoint.spec.horizon, checkpoint.spec.action_dim
        latent = torch.arange(horizon * dim, dtype=torch.float32).view(1, 1, horizon, dim)
        kept = {name: reads[name] for name in denoise.reads} | {denoise.name: latent.clone()}
        row = Row(observation=seen, first_unit=1, shift=2)
        moved = model.run(denoise, StageBatch(rows=(row,), reads=kept, num_units=1))[0, 0]
    torch.testing.assert_close(moved[:-2], latent[0, 0, 2:])
    torch.testing.assert_close(moved[-1], latent[0, 0, -1])


def test_a_warm_start_begins_between_noise_and_the_plan() -> None:
    checkpoint = tiny_flow()
    with torch.no_grad():
        checkpoint.policy.action_out.weight.zero_()
        checkpoint.policy.action_out.bias.zero_()
    model = FlowModel(checkpoint.policy, checkpoint.processor, checkpoint.spec)
    denoise, spec = model.stages[-1], checkpoint.spec
    (seen,) = observations(1)
    reads: dict[str, torch.Tensor] = {}
    plan = Plan(actions=np.full((spec.horizon, spec.action_dim), 0.3, np.float32), num_committed=0)
    with torch.inference_mode():
        for stage in model.stages[:-1]:
            batch = StageBatch(
                rows=(Row(observation=seen, first_unit=0),),
                reads={name: reads[name] for name in stage.reads},
                num_units=stage.num_units,
            )
            reads[stage.name] = model.run(stage, batch)
        own = torch.zeros(1, 1, spec.horizon, spec.action_dim)

        def begun(first_unit: int) -> torch.Tensor:
            row = Row(observation=seen, first_unit=first_unit, is_new=True, plan=plan)
            kept = {name: reads[name] for name in denoise.reads} | {denoise.name: own.clone()}
            return model.run(denoise, StageBatch(rows=(row,), reads=kept, num_units=1))[0, 0]

        noise, last = begun(0), begun(spec.num_flow_steps - 1)
        tau = (spec.num_flow_steps - 1) / spec.num_flow_steps
        known = checkpoint.processor.prefix(plan.actions)
        torch.testing.assert_close(last, (1 - tau) * noise + tau * known)
