"""Recorded fleets against real servers: every scheme gets its chunks, the baselines serve, the quick benches run."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ganglion.bench.baselines.threads import ThreadsService
from ganglion.bench.replay import ReplayConfig, Scheme, Tape, replay, run_here
from ganglion.config import EngineConfig, MemoryConfig, ServeConfig
from ganglion.models.base import Model
from ganglion.models.policies.flow_model import FlowModel
from ganglion.models.tiny import TINY_PROMPTS, tiny_flow
from ganglion.pipeline.ladder import Ladder, Rung
from ganglion.pipeline.local import LocalService
from ganglion.serve.app import ServerThread


@pytest.fixture(scope="module")
def model() -> Model:
    torch.set_num_threads(1)
    checkpoint = tiny_flow()
    return FlowModel(checkpoint.policy, checkpoint.processor, checkpoint.spec)


@pytest.fixture(scope="module")
def tape(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    spec = model.spec
    path = tmp_path_factory.mktemp("tape") / "tape.npz"
    Tape(
        {
            view.key: rng.integers(0, 256, (2, 5, view.height, view.width, 3), dtype=np.uint8)
            for view in spec.views
        },
        rng.standard_normal((2, 5, spec.state_dim)).astype(np.float32),
        list(TINY_PROMPTS[:2]),
    ).save(path)
    return path


def config(url: str, tape: Path, scheme: Scheme) -> ReplayConfig:
    # a slow rate and an age to match: what is tested is who answers whom, on any machine
    return ReplayConfig(
        url=url,
        tape=tape,
        scheme=scheme,
        num_robots=3,
        interval_ticks=3,
        rate_hz=10.0,
        warm_s=0.3,
        run_s=1.5,
        max_age_s=2.0,
    )


@pytest.mark.parametrize("scheme", list(Scheme))
def test_every_scheme_is_supplied(model: Model, tape: Path, scheme: Scheme) -> None:
    ladder = Ladder(rungs=(Rung(num_flow_steps=5), Rung(num_flow_steps=2)))
    service = (
        LocalService(
            model,
            engine=EngineConfig(),
            memory=MemoryConfig(arena_bytes=1 << 22, large_page_bytes=1 << 16),
            ladder=ladder,
        )
        if scheme is Scheme.NEWEST
        else ThreadsService(model)
    )
    with service, ServerThread(service, config=ServeConfig(port=0)) as edge:
        report = run_here(config(edge.ws_url, tape, scheme))
        stats = service.stats()
    assert len(report.robots) == 3
    for robot in report.robots:
        assert robot.num_ticks >= 15
        assert robot.num_chunks >= 2
        assert not robot.errors
    assert report.miss_rate < 0.5
    if scheme is Scheme.NEWEST:
        assert stats.rung == "5 flow steps"
        assert all(session.wait_ratio >= 0 for session in stats.sessions)


def test_bare_threads_serve_a_process_of_robots_at_once(model: Model, tape: Path) -> None:
    with (
        ThreadsService(model, num_workers=3) as service,
        ServerThread(service, config=ServeConfig(port=0)) as edge,
    ):
        report = replay(config(edge.ws_url, tape, Scheme.NEWEST))
    assert sum(robot.num_chunks for robot in report.robots) >= 6


@pytest.mark.slow
def test_the_quick_bench_of_robots_runs() -> None:
    from ganglion.bench.robots import run

    result = run(quick=True, seed=0)
    assert set(result.metrics) >= {"max_robots", "fleet_ratio", "wait_ratio_p50", "wait_ratio_p99"}
    assert np.isfinite(list(result.metrics.values())).all()


@pytest.mark.slow
def test_the_quick_bench_of_the_ladder_runs() -> None:
    from ganglion.bench.ladder import run

    result = run(quick=True, seed=0)
    assert result.detail["rungs"]
    assert np.isfinite(list(result.metrics.values())).all()
