"""The flow policy through pages and engine gives what it gives alone: paged = dense, cached = cold, cut = whole."""

import threading

import numpy as np
import pytest
import torch

from ganglion.config import EngineConfig, MemoryConfig
from ganglion.models.policies.flow_checkpoint import FlowCheckpoint
from ganglion.models.policies.flow_model import FlowModel
from ganglion.models.tiny import TINY_PROMPTS, tiny_flow
from ganglion.pipeline.local import LocalService
from ganglion.service import Outcome
from ganglion.types import ActionChunk, Float32Array, Observation, RobotId, ServiceStats, SessionId

MEMORY = MemoryConfig(arena_bytes=1 << 22, large_page_bytes=1 << 16)
TIMEOUT_S = 20.0


def observations(count: int, *, num_prompts: int = 3) -> list[Observation]:
    rng = np.random.default_rng(7)
    spec = tiny_flow().spec
    return [
        Observation(
            session_id=SessionId(f"arm-{at}"),
            robot_id=RobotId(f"arm-{at}"),
            seq=0,
            images={
                view.key: rng.integers(0, 256, (view.height, view.width, 3), dtype=np.uint8)
                for view in spec.views
            },
            state=rng.standard_normal(spec.state_dim).astype(np.float32),
            prompt=TINY_PROMPTS[at % num_prompts],
            seed=at,
        )
        for at in range(count)
    ]


def dense(checkpoint: FlowCheckpoint, seen: Observation) -> Float32Array:
    """The same request without pages, engine or batch: the truth."""
    policy, processor, config = checkpoint.policy, checkpoint.processor, checkpoint.policy.config
    with torch.inference_mode():
        images = np.stack([seen.images[key] for key in config.view_keys])[None]
        features = policy.encode_views(torch.from_numpy(images))
        text = policy.prefill_text(processor.tokens([seen.prompt]))
        state = processor.state(seen.state[None])
        kv = policy.prefill_observation(features, state, text)
        noise = torch.randn(
            config.horizon,
            config.action_dim,
            generator=torch.Generator().manual_seed(seen.seed or 0),
        )
        latents = policy.denoise(
            noise[None],
            torch.zeros(1, config.horizon),
            torch.full((1,), 1.0 / config.num_flow_steps),
            torch.cat([text, kv], dim=3),
            config.num_flow_steps,
        )
        return processor.actions(latents)[0]


def served(service: LocalService, seen: list[Observation]) -> list[ActionChunk]:
    outcomes: dict[str, Outcome] = {}
    done = threading.Semaphore(0)

    def keep(name: str, outcome: Outcome) -> None:
        outcomes[name] = outcome
        done.release()

    for item in seen:
        service.submit(item, lambda outcome, name=item.session_id: keep(name, outcome))  # type: ignore[misc]
    for _ in seen:
        assert done.acquire(timeout=TIMEOUT_S)
    chunks = []
    for item in seen:
        outcome = outcomes[item.session_id]
        assert isinstance(outcome, ActionChunk), outcome
        chunks.append(outcome)
    return chunks


@pytest.fixture(scope="module")
def checkpoint() -> FlowCheckpoint:
    torch.set_num_threads(1)
    return tiny_flow()


@pytest.mark.parametrize("budget_us", [1, 2000, 10_000_000])
@pytest.mark.parametrize("lanes", [((),), ((), ())])
def test_served_equals_dense(
    checkpoint: FlowCheckpoint, budget_us: int, lanes: tuple[tuple[int, ...], ...]
) -> None:
    model = FlowModel(checkpoint.policy, checkpoint.processor, checkpoint.spec)
    engine = EngineConfig(lanes=lanes, step_budget_us=budget_us)
    seen = observations(9)
    with LocalService(model, engine=engine, memory=MEMORY) as service:
        for chunk, item in zip(served(service, seen), seen, strict=True):
            np.testing.assert_allclose(chunk.actions, dense(checkpoint, item), atol=1e-5)


def test_cached_views_and_instructions_give_the_same_chunk(checkpoint: FlowCheckpoint) -> None:
    model = FlowModel(checkpoint.policy, checkpoint.processor, checkpoint.spec)
    (seen,) = observations(1)
    with LocalService(model, engine=EngineConfig(), memory=MEMORY) as service:
        (cold,) = served(service, [seen])
        twin = Observation(
            session_id=SessionId("twin"),
            robot_id=RobotId("twin"),
            seq=0,
            images=seen.images,
            state=seen.state,
            prompt=seen.prompt,
            seed=seen.seed,
        )
        (warm,) = served(service, [twin])
        np.testing.assert_array_equal(cold.actions, warm.actions)
        pool = _newer(service).pool
        assert pool is not None
        assert pool.num_hits >= 2 + 4, "two views and the instruction's four pages were known"


def _newer(service: LocalService) -> ServiceStats:
    """A picture made after this call: stats never waits, so ask until it is another one."""
    old, pause = service.stats(), threading.Event()
    while (new := service.stats()) is old:
        pause.wait(0.01)
    return new


def test_no_seed_is_repeatable_by_session_and_number(checkpoint: FlowCheckpoint) -> None:
    model = FlowModel(checkpoint.policy, checkpoint.processor, checkpoint.spec)
    (seen,) = observations(1)
    plain = Observation(
        session_id=seen.session_id,
        robot_id=seen.robot_id,
        seq=3,
        images=seen.images,
        state=seen.state,
        prompt=seen.prompt,
    )
    chunks = []
    for _ in range(2):
        with LocalService(model, engine=EngineConfig(), memory=MEMORY) as service:
            chunks += served(service, [plain])
    np.testing.assert_array_equal(chunks[0].actions, chunks[1].actions)
