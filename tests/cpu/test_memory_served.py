"""A policy with memory through the engine: what its sessions carry is what a session driven by hand carries."""

import threading

import numpy as np
import pytest
import torch

from ganglion.config import EngineConfig, MemoryConfig
from ganglion.errors import SupersededError
from ganglion.memory.retention.history import HistoryConfig
from ganglion.pipeline.local import LocalService
from ganglion.service import Outcome
from ganglion.types import ActionChunk, CloseSession, Observation, ResetSession, RobotId, SessionId
from tests.cpu.temporal_stage import Session, episode, model_of, tiny_temporal

MEMORY = {"arena_bytes": 1 << 22, "large_page_bytes": 1 << 16}


def answer(service: LocalService, seen: Observation) -> ActionChunk:
    outcomes: list[Outcome] = []
    done = threading.Event()

    def keep(outcome: Outcome) -> None:
        outcomes.append(outcome)
        done.set()

    service.submit(seen, keep)
    assert done.wait(20.0)
    (chunk,) = outcomes
    assert isinstance(chunk, ActionChunk), chunk
    return chunk


@pytest.mark.parametrize("history_whole", [0, 1])
def test_served_equals_driven_by_hand(history_whole: int) -> None:
    torch.set_num_threads(1)
    model = model_of(tiny_temporal())
    whole = history_whole or 3
    config = HistoryConfig(num_whole=whole, num_encoded=3 - whole)
    a, b = Session(model, config), Session(model, config)
    memory = MemoryConfig(**MEMORY, history_whole=history_whole)
    with LocalService(model, engine=EngineConfig(), memory=memory) as service:
        for mine, other in zip(episode("a", 7), episode("b", 7, seed=1), strict=True):
            np.testing.assert_allclose(answer(service, mine).actions, a.act(mine), atol=1e-5)
            np.testing.assert_allclose(answer(service, other).actions, b.act(other), atol=1e-5)
        first = episode("a", 9)[8]
        service.control(ResetSession(session_id=SessionId("a"), robot_id=RobotId("a")))
        fresh = Session(model, config)
        np.testing.assert_allclose(answer(service, first).actions, fresh.act(first), atol=1e-5)


def test_hurried_sessions_leave_no_carried_page_behind() -> None:
    """Observations faster than the engine: some are superseded, some overlap; memory goes forward and comes back."""
    torch.set_num_threads(1)
    model = model_of(tiny_temporal())
    memory = MemoryConfig(**MEMORY, history_whole=1)
    outcomes: list[Outcome] = []
    done = threading.Semaphore(0)

    def keep(outcome: Outcome) -> None:
        outcomes.append(outcome)
        done.release()

    with LocalService(model, engine=EngineConfig(), memory=memory) as service:
        arms = [episode(name, 30, seed=at) for at, name in enumerate("abc")]
        for seen in (item for of_tick in zip(*arms, strict=True) for item in of_tick):
            service.submit(seen, keep)
        for _ in range(90):
            assert done.acquire(timeout=20.0)
        num_chunks = sum(isinstance(outcome, ActionChunk) for outcome in outcomes)
        assert num_chunks >= 3
        others = [o for o in outcomes if not isinstance(o, ActionChunk | SupersededError)]
        assert not others
        for name in "abc":
            service.control(CloseSession(session_id=SessionId(name), robot_id=RobotId(name)))
        answer(service, episode("last", 1)[0])  # the engine's thread has seen the closings
    ledger = service._ledger
    ledger.check_integrity()
    used = ledger.stats().num_used_pages
    assert used["memory"] <= 1  # of the last session
    assert used["memory@int8"] == 0
