"""Bench memory: what it promises is measured, its baseline gives the same chunks, its pools are as small as they may be."""

import math
from dataclasses import replace

import numpy as np

from ganglion.bench.baselines.contiguous import ContiguousSession
from ganglion.bench.memory import run
from ganglion.bench.memory_churn import STEP_BUDGET_BYTES, ChurnedPool
from ganglion.bench.memory_mix import NUM_FLOW_STEPS, PERIOD_STEPS, Cameras, Cell, Member, members
from ganglion.bench.memory_paged import InPool, PagedServer, Unshared, smallest_pool
from ganglion.models.base import Model
from ganglion.models.policies.flow_model import FlowModel
from ganglion.models.tiny import TINY_FLOW, tiny_flow
from ganglion.types import Observation, SessionId

LARGE_PAGE_BYTES = 6144
NUM_PERIODS = 3


def toy(seed: int) -> FlowModel:
    made = tiny_flow(seed=seed, config=replace(TINY_FLOW, num_flow_steps=NUM_FLOW_STEPS))
    return FlowModel(made.policy, made.processor, made.spec)


def observed(
    mix: tuple[Member, ...], models: dict[str, Model]
) -> dict[tuple[SessionId, int], Observation]:
    cameras = Cameras({name: model.spec for name, model in models.items()}, seed=0)
    return {
        (m.session_id, at): cameras.observation(m, at) for m in mix for at in range(NUM_PERIODS)
    }


def test_the_mix_has_sessions_of_every_kind() -> None:
    mix = members(("a", "b"), (1, 2))
    assert len(mix) == 16
    assert len({member.session_id for member in mix}) == 16
    assert {(member.model, member.cell) for member in mix} == {
        (model, cell) for model in "ab" for cell in Cell
    }
    models: dict[str, Model] = {name: toy(seed=0) for name in "ab"}
    seen = observed(mix, models)
    pictures: dict[str, set[bytes]] = {}
    for member in mix:
        for camera, (key, image) in zip(
            member.cameras, seen[member.session_id, 0].images.items(), strict=True
        ):
            pictures.setdefault(camera, set()).add(image.tobytes())
            assert not np.array_equal(image, seen[member.session_id, 1].images[key])
    assert all(len(found) == 1 for found in pictures.values()), "one camera, one picture"
    assert len(pictures) == 2 * (2 + 4 + 4)
    assert len(set.union(*pictures.values())) == len(pictures)


def test_pages_shared_or_not_and_buffers_give_the_same_chunks() -> None:
    models: dict[str, Model] = {"a": toy(seed=1), "b": toy(seed=2)}
    mix = members(tuple(models), (1, 2, 3))
    seen = observed(mix, models)
    pooled = {name: InPool(model, name) for name, model in models.items()}
    alone = {name: Unshared(model) for name, model in pooled.items()}
    expected = {}
    for member in mix:
        session = ContiguousSession(models[member.model], max_history=3, max_chunks=2)
        assert session.num_bytes > session.spare_bytes > 0
        for at in range(NUM_PERIODS * PERIOD_STEPS + NUM_FLOW_STEPS):
            period, phase = divmod(at, PERIOD_STEPS)
            is_due = phase == member.phase and period < NUM_PERIODS
            chunks = session.step(seen[member.session_id, period] if is_due else None)
            expected |= {(member.session_id, seq): chunk for seq, chunk in chunks.items()}
    assert len(expected) == 16 * NUM_PERIODS
    num_large_pages = []
    for side in (alone, pooled):
        least = smallest_pool(side, mix, seen, NUM_PERIODS, large_page_bytes=LARGE_PAGE_BYTES)
        server = PagedServer(side, least, large_page_bytes=LARGE_PAGE_BYTES)
        paged = server.serve(mix, seen, NUM_PERIODS)
        assert paged.actions.keys() == expected.keys()
        for key, chunk in expected.items():
            assert np.array_equal(paged.actions[key], chunk), key
        assert server.close(mix) == 0
        num_large_pages.append(least)
    assert num_large_pages[1] < num_large_pages[0], "sharing saves"


def test_churn_without_defragmentation_refuses_more() -> None:
    """Contents are checked in the run itself."""
    tidied = ChurnedPool(budget_bytes=STEP_BUDGET_BYTES, seed=0).run(80)
    untidied = ChurnedPool(budget_bytes=0, seed=0).run(80)
    assert not untidied.stalls_us
    assert tidied.num_refused <= untidied.num_refused
    assert tidied.num_moved_bytes <= STEP_BUDGET_BYTES * len(tidied.stalls_us)


def test_every_promised_figure_is_measured() -> None:
    result = run(quick=True, seed=1)
    assert {
        "bytes_saved_share",
        "paging_saved_share",
        "sharing_saved_share",
        "waste_share",
        "defrag_stall_p99_us",
        "defrag_freed_large_pages",
    } <= result.metrics.keys()
    assert all(math.isfinite(value) for value in result.metrics.values())
    metrics = result.metrics
    parts = metrics["paging_saved_share"] + metrics["sharing_saved_share"]
    assert math.isclose(metrics["bytes_saved_share"], parts)
    assert metrics["waste_share"] < 0.05
    assert metrics["defrag_refused_share"] < metrics["no_defrag_refused_share"]
