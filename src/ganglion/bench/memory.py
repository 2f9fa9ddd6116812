"""Bench memory: bytes per session of paged memory against contiguous buffers and against pages without sharing.

Called by `ganglion bench memory`. One fixed mix of sessions (`memory_mix`) runs three times with equal answers: in
buffers of each session's own (`baselines.contiguous`), on pages that nobody shares, and on pages as they are. Then
sessions come and go (`memory_churn`) with and without defragmentation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ganglion.bench.baselines.contiguous import ContiguousSession
from ganglion.bench.memory_churn import (
    LARGE_PAGE_BYTES as CHURN_LARGE_PAGE_BYTES,
)
from ganglion.bench.memory_churn import (
    NUM_LARGE_PAGES,
    NUM_SPARE,
    STALL_BUDGET_US,
    STEP_BUDGET_BYTES,
    Churn,
    ChurnedPool,
)
from ganglion.bench.memory_mix import (
    CELLS,
    HISTORIES,
    NUM_FLOW_STEPS,
    PERIOD_STEPS,
    QUICK_HISTORIES,
    Cameras,
    Member,
    members,
)
from ganglion.bench.memory_paged import (
    STEP_BUDGET_BYTES as MIX_STEP_BUDGET_BYTES,
)
from ganglion.bench.memory_paged import (
    Answer,
    InPool,
    Observations,
    PagedRun,
    PagedServer,
    Unshared,
    smallest_pool,
)
from ganglion.bench.result import BenchResult, Plot, percentiles
from ganglion.errors import GanglionError
from ganglion.models.base import Model
from ganglion.models.policies.flow_model import FlowModel
from ganglion.models.registry import load_policy, policy_folder
from ganglion.models.tiny import TINY_FLOW, tiny_flow
from ganglion.plan.hardware import read_hardware
from ganglion.types import Float32Array, SpanKind

SMALL, LARGE, TINY = "metaworld-ten", "metaworld-ten-large", "tiny"
SMALL_KV_PER_LARGE = (
    6  # KV pages of the smaller model in a large page, which is one of the larger model's
)
MAX_CHUNKS = 2  # of one session under way at once: NUM_FLOW_STEPS / PERIOD_STEPS, rounded up
NUM_CHURN_STEPS, NUM_QUICK_CHURN_STEPS = 3000, 150


@dataclass(frozen=True, slots=True, kw_only=True)
class _Paged:
    """One way to use pages: the arena that it needs, and what happened in it."""

    num_bytes: int
    run: PagedRun


def run(*, quick: bool, seed: int) -> BenchResult:
    """The mix three times, then the churn twice."""
    torch.set_num_threads(1)
    models = _models(quick=quick)
    mix = members(tuple(models), QUICK_HISTORIES if quick else HISTORIES)
    num_periods = max(member.history for member in mix) + 1  # every history full, and one to let go
    cameras = Cameras({name: model.spec for name, model in models.items()}, seed)
    seen = {
        (member.session_id, at): cameras.observation(member, at)
        for member in mix
        for at in range(num_periods)
    }
    max_history = max(member.history for member in mix)
    sessions = {
        member: ContiguousSession(
            models[member.model], max_history=max_history, max_chunks=MAX_CHUNKS
        )
        for member in mix
    }
    expected = _contiguous(sessions, seen, num_periods)
    pooled = {name: InPool(model, name) for name, model in models.items()}
    alone = {name: Unshared(model) for name, model in pooled.items()}
    large_page_bytes = SMALL_KV_PER_LARGE * models[SMALL].layouts[0].page_bytes
    unshared = _paged(alone, mix, seen, num_periods, large_page_bytes)
    shared = _paged(pooled, mix, seen, num_periods, large_page_bytes)
    for name, paged in (("unshared", unshared), ("shared", shared)):
        _check_equal(name, paged.run.actions, expected)
    burst = [replace(member, phase=0) for member in mix]
    burst_bytes = large_page_bytes * smallest_pool(
        pooled, burst, seen, num_periods, large_page_bytes=large_page_bytes
    )
    num_steps = NUM_QUICK_CHURN_STEPS if quick else NUM_CHURN_STEPS
    churns = {
        budget_bytes: ChurnedPool(budget_bytes=budget_bytes, seed=seed).run(num_steps)
        for budget_bytes in (0, STEP_BUDGET_BYTES)
    }
    contiguous_bytes = sum(session.num_bytes for session in sessions.values())
    spare_bytes = sum(session.spare_bytes for session in sessions.values())
    num_sessions = len(mix)
    metrics = {
        "bytes_saved_share": 1 - shared.num_bytes / contiguous_bytes,
        "paging_saved_share": 1 - unshared.num_bytes / contiguous_bytes,
        "sharing_saved_share": (unshared.num_bytes - shared.num_bytes) / contiguous_bytes,
        "single_context_bytes_saved_share": 1 - shared.num_bytes / (contiguous_bytes - spare_bytes),
        "burst_bytes_saved_share": 1 - burst_bytes / contiguous_bytes,
        "contiguous_bytes_per_session": contiguous_bytes / num_sessions,
        "unshared_bytes_per_session": unshared.num_bytes / num_sessions,
        "shared_bytes_per_session": shared.num_bytes / num_sessions,
        "encodes_saved_share": 1 - _num_encodes(models, shared) / _num_encodes(models, unshared),
        "waste_share": _waste_share(pooled, shared.run),
        "pool_waste_share": 1 - shared.run.used_bytes / shared.num_bytes,
        **_churn_metrics(churns[STEP_BUDGET_BYTES], churns[0]),
    }
    sides = ("contiguous", "pages, not shared", "pages, shared")
    return BenchResult(
        name="memory",
        metrics=metrics,
        detail=_detail(mix, models, num_steps)
        | {
            "used_pages_at_peak": shared.run.used_pages,
            "rows_run": {"shared": shared.run.work, "unshared": unshared.run.work},
            "large_page_bytes": large_page_bytes,
            "num_equal_chunks": len(expected),
        },
        n=len(expected),
        seed=seed,
        plots=(
            Plot(
                title="Memory of 16 sessions of two models",
                x_label="",
                y_label="MiB",
                names=sides,
                series={
                    "arena": tuple(
                        num_bytes / 2**20
                        for num_bytes in (contiguous_bytes, unshared.num_bytes, shared.num_bytes)
                    )
                },
            ),
        ),
    )


def _models(*, quick: bool) -> dict[str, Model]:
    """Two models of different sizes; a toy is the second one in a quick run."""
    dtype = "bfloat16" if "amx_bf16" in read_hardware().flags else "float32"
    small = load_policy(policy_folder(SMALL), dtype=dtype, num_flow_steps=NUM_FLOW_STEPS)
    if quick:
        toy = tiny_flow(config=replace(TINY_FLOW, num_flow_steps=NUM_FLOW_STEPS))
        return {SMALL: small, TINY: FlowModel(toy.policy, toy.processor, toy.spec)}
    large = load_policy(policy_folder(LARGE), dtype=dtype, num_flow_steps=NUM_FLOW_STEPS)
    return {SMALL: small, LARGE: large}


def _contiguous(
    sessions: Mapping[Member, ContiguousSession], seen: Observations, num_periods: int
) -> dict[Answer, Float32Array]:
    """Every chunk of every session, in buffers of its own."""
    actions: dict[Answer, Float32Array] = {}
    num_steps = num_periods * PERIOD_STEPS + NUM_FLOW_STEPS
    for at in range(num_steps):
        period, phase = divmod(at, PERIOD_STEPS)
        for member, session in sessions.items():
            is_due = phase == member.phase and period < num_periods
            observation = seen[member.session_id, period] if is_due else None
            for seq, chunk in session.step(observation).items():
                actions[member.session_id, seq] = chunk
    return actions


def _paged(
    models: Mapping[str, Model],
    mix: Sequence[Member],
    seen: Observations,
    num_periods: int,
    large_page_bytes: int,
) -> _Paged:
    """The smallest arena that will do, and the run in it."""
    num_large_pages = smallest_pool(
        models, mix, seen, num_periods, large_page_bytes=large_page_bytes
    )
    server = PagedServer(models, num_large_pages, large_page_bytes=large_page_bytes)
    paged = server.serve(mix, seen, num_periods)
    num_lost = server.close(mix)
    if num_lost:
        raise GanglionError(f"{num_lost} pages are still held after all sessions have left")
    return _Paged(num_bytes=num_large_pages * large_page_bytes, run=paged)


def _check_equal(
    name: str, actions: Mapping[Answer, Float32Array], expected: Mapping[Answer, Float32Array]
) -> None:
    wrong = [key for key in expected if not np.array_equal(actions[key], expected[key])]
    if wrong or len(actions) != len(expected):
        raise GanglionError(
            f"{name} pages: {len(wrong)} of {len(expected)} chunks differ from the contiguous "
            f"ones, the first is {wrong[:1]}; {len(actions)} were made"
        )


def _num_encodes(models: Mapping[str, Model], paged: _Paged) -> int:
    encodes = [
        f"{name}/{stage.name}"
        for name, model in models.items()
        for stage in model.stages
        if stage.kind is SpanKind.ENCODE
    ]
    return sum(paged.run.work[name] for name in encodes)


def _waste_share(models: Mapping[str, Model], paged: PagedRun) -> float:
    """Bytes of rows behind the last one in use, over all bytes of held pages, when most were in use."""
    wasted_bytes = 0.0
    for name, model in models.items():
        layouts = {layout.name: layout for layout in model.layouts}
        text = next(stage for stage in model.stages if stage.name == "text")
        observation = next(stage for stage in model.stages if stage.name == "observation")
        # every instruction is held from its first computation to the end; the rest of kv are observations
        num_text_pages = paged.work[f"{name}/text"] * text.num_pages
        num_tables = (paged.used_pages[text.layout] - num_text_pages) / observation.num_pages
        for stage, count in ((text, paged.work[f"{name}/text"]), (observation, num_tables)):
            layout = layouts[stage.layout]
            num_empty = stage.num_pages * layout.slots - stage.num_slots
            wasted_bytes += count * num_empty * layout.page_bytes / layout.slots
    return wasted_bytes / paged.used_bytes


def _churn_metrics(tidied: Churn, untidied: Churn) -> dict[str, float]:
    if not tidied.stalls_us:
        raise GanglionError("nothing moved in the churn", next_step="make its arena smaller")
    return {
        **percentiles(tidied.stalls_us, prefix="defrag_stall_{}_us"),
        "defrag_stall_budget_us": STALL_BUDGET_US,
        "defrag_over_budget_share": sum(us > STALL_BUDGET_US for us in tidied.stalls_us)
        / len(tidied.stalls_us),
        "defrag_steps": float(len(tidied.stalls_us)),
        "defrag_freed_large_pages": float(tidied.num_freed_large_pages),
        "defrag_moved_pages": float(tidied.num_moved_pages),
        "defrag_moved_bytes": float(tidied.num_moved_bytes),
        "defrag_refused_share": tidied.num_refused / tidied.num_asked,
        "no_defrag_refused_share": untidied.num_refused / untidied.num_asked,
    }


def _detail(mix: Sequence[Member], models: Mapping[str, Model], num_steps: int) -> dict[str, Any]:
    max_history = max(member.history for member in mix)
    return {
        "mix": [
            {
                "session": member.session_id,
                "cameras": member.cell.value,
                "instruction": member.prompt,
                "history": member.history,
                "phase": member.phase,
            }
            for member in mix
        ],
        "cells": f"of each of {', '.join(models)}: "
        + ", ".join(f"{count} sessions with {cell.value}" for cell, count in CELLS.items()),
        "schedule": f"an observation a session every {PERIOD_STEPS} engine steps, sessions of one model out of phase; "
        f"a chunk takes {NUM_FLOW_STEPS} steps, one flow step each, so the chunks of a session overlap; public context",
        "history": "a session keeps the feature pages of its last observations, the newest included, in a versioned "
        "table of their own; no shipped policy reads them yet, so they change no answer",
        "contiguous": f"per session, made when it opens: features of {max_history + 1} observations a view (the longest "
        "history and the one being encoded), KV of the longest instruction, KV of two observations (one read, one "
        f"written), {MAX_CHUNKS} latents; exact rows, no rounding. single_context: with one observation's KV instead of two",
        "not shared": "the same pages and engine, every key with the session in it: a session finds its own pages only",
        "bytes": "of the smallest arena in which the run waits for no page and computes nothing twice: rests of large "
        "pages, partly used large pages and row padding included; defragmented between steps, at most "
        f"{MIX_STEP_BUDGET_BYTES} bytes each",
        "waste_share": "rows of held pages that hold nothing; pool_waste_share: all bytes of the arena that are in no "
        "held page when most are held",
        "burst": "all sixteen observations arrive in the same step: no camera's picture is known yet when its second "
        "robot asks",
        "equal": "all chunks equal the contiguous ones bit by bit; pieces of one row, since a batch may round otherwise",
        "churn": f"{num_steps} steps on {NUM_LARGE_PAGES} large pages of {CHURN_LARGE_PAGE_BYTES} bytes; sessions "
        "of two models come and go at random, the load swings from one to the other; every page's contents checked",
        "defrag": f"at most {STEP_BUDGET_BYTES} bytes a step while fewer than {NUM_SPARE} large pages are free; the "
        "stall is planning, rewriting all tables and copying, in steps where something moved; refused: observations "
        "for which there was no page, with and without",
        "defrag_freed_large_pages": "large pages that became free by moving, over the whole run",
    }
