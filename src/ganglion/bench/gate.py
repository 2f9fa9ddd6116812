"""Bench gate: milliseconds of perception that the gate avoids, on static, slow and busy scenes, at equal success.

Called by the CLI. Frames are rendered by Meta-World and have sensor noise; a gated view is timed on the very frames that
the ungated one is timed on, alternately, and pays for the gate. Time is CPU time of the one thread that perceives: on an
idle machine it is the time that passes, on a busy one it is still what perception costs.
"""

import multiprocessing
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ganglion.bench.eyes import Eyes, EyesConfig, Look
from ganglion.bench.gate_worlds import (
    NOISE_STD,
    Episode,
    Frame,
    Jumped,
    Scene,
    denoised,
    fly,
    last_tau,
    record,
    watch_jumps,
)
from ganglion.bench.result import BenchResult, Plot, percentiles
from ganglion.models.packing import pack
from ganglion.models.policies.flow_checkpoint import FlowCheckpoint, load_flow_checkpoint
from ganglion.models.registry import DTYPES, policy_folder
from ganglion.pipeline.gate import GateConfig
from ganglion.plan.hardware import read_hardware
from ganglion.robots.metaworld import TASKS, UNSEEN_SEEDS, MetaWorld
from ganglion.robots.moving import Motion, MovingMetaWorld

FIXED, WRIST = "observation.images.corner", "observation.images.gripper"
VIEW_NAMES = {FIXED: "fixed", WRIST: "wrist"}
GATE = GateConfig(noise_std=NOISE_STD)
STATE_CHANGE = 0.002  # 2 mm of the hand, 0.2 % of the gripper's opening
MOVING = GateConfig(noise_std=NOISE_STD, motion_rms=30.0)
CONFIGS = {
    "full": EyesConfig(),
    "gated": EyesConfig(gate=GATE),
    "gated, attended patches in every frame": EyesConfig(
        gate=GateConfig(noise_std=NOISE_STD, attended_refresh_ms=0.0), heeds_instruction=True
    ),
    "gated, motion may pass where not attended to": EyesConfig(gate=MOVING, heeds_instruction=True),
    "gated, motion may pass": EyesConfig(gate=MOVING),
    "gated, keys and values reused": EyesConfig(gate=GATE, reuses_trunk=True),
    "gated, a still state is not perceived": EyesConfig(
        gate=GateConfig(noise_std=NOISE_STD, state_change=STATE_CHANGE)
    ),
}
FLOWN = (
    "full",
    "gated",
    "gated, motion may pass where not attended to",
    "gated, keys and values reused",
)
SCENE_TASKS = ("drawer-open", "push", "window-close")
PERIOD_S = 1 / 20
DRIFT_EVERY = 4  # frames: a chunk to compare
NUM_WORKERS = 2


def run(*, quick: bool, seed: int) -> BenchResult:
    """Scenes, then episodes with and without the gate, then jumps in front of a resting arm."""
    torch.set_num_threads(1)
    checkpoint = _checkpoint()
    timings = {
        scene: _time_scene(checkpoint, scene, seed, num_frames=20 if quick else 120, quick=quick)
        for scene in Scene
    }
    flown = _fly_all(seed, quick=quick)
    jumped = _watch_all(seed, quick=quick)
    num_jumps = sum(j.num_jumps for j in jumped)
    metrics = {
        **{
            f"{scene.value}_{name}encode_ratio": timing.encode_ratio("gated", key)
            for scene, timing in timings.items()
            for key, name in ((FIXED, ""), (WRIST, "wrist_"))
        },
        **{
            f"{scene.value}_perceive_ratio": timing.perceive_ratio("gated")
            for scene, timing in timings.items()
        },
        "static_perceive_reused_ratio": timings[Scene.STATIC].perceive_ratio(
            "gated, keys and values reused"
        ),
        "static_perceive_still_ratio": timings[Scene.STATIC].perceive_ratio(
            "gated, a still state is not perceived"
        ),
        **percentiles(
            [ms for t in timings.values() for by_view in t.gate_ms.values() for ms in by_view],
            prefix="gate_view_{}_ms",
        ),
        "full_success_rate": _success_rate(flown["full"]),
        "gated_success_rate": _success_rate(flown["gated"]),
        "gate_success_ratio": _success_rate(flown["gated"])
        / max(_success_rate(flown["full"]), 1e-9),
        "jumps_seen_share": sum(j.num_seen_by_gate for j in jumped) / max(num_jumps, 1),
        "jumps_seen_by_similarity_share": sum(j.num_seen_by_similarity for j in jumped)
        / max(num_jumps, 1),
    }
    return BenchResult(
        name="gate",
        metrics=metrics,
        detail={
            "note": "An encode ratio is the mean milliseconds of encoding a view whole over those of gate and encoding "
            "together; fixed view unless it says wrist. The perceive ratio takes in both views and the prefill, which is done "
            "whole unless keys and values are reused, or nothing differs and no number of the state by more than 0.002. Frames come 20 times a second, with noise of 2 levels of 255; "
            "episodes are flown in worlds that stand still and in drifting ones. similarity: LeRobot's filter, which "
            "passes an observation on when the hand has moved by 1 cm. Attended: what the action expert attends to "
            "(VLA-Cache's rule). Where motion may pass, cells of 4x4 pixels may change by 30 levels beyond noise.",
            "policy": checkpoint.spec.name,
            "dtype": str(checkpoint.policy.dtype).removeprefix("torch."),
            "noise_std_levels": NOISE_STD,
            "refresh_ms": GATE.refresh_ms,
            "change_rms_levels": GATE.change_rms,
            "scenes": {scene.value: timing.table() for scene, timing in timings.items()},
            "episodes": {name: _episode_facts(found) for name, found in flown.items()},
            "num_jumps": num_jumps,
        },
        n=sum(timing.num_frames for timing in timings.values()),
        seed=seed,
        plots=(_plot(timings),),
    )


# --- scenes ------------------------------------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class SceneTiming:
    """All of a scene's frames, perceived by every one of CONFIGS."""

    num_frames: int = 0
    encode_ms: dict[str, dict[str, float]] = field(default_factory=dict)  # config -> view -> sum
    prefill_ms: dict[str, float] = field(default_factory=dict)
    gate_ms: dict[str, list[float]] = field(default_factory=dict)  # view -> of "gated"
    actions: dict[str, dict[str, Counter[str]]] = field(default_factory=dict)
    square_drift: dict[str, list[float]] = field(default_factory=dict)  # of chunks, normalised
    num_similar: int = 0

    def encode_ratio(self, name: str, key: str) -> float:
        """Whole over gated."""
        return self.encode_ms["full"][key] / self.encode_ms[name][key]

    def perceive_ratio(self, name: str) -> float:
        """The same with both views and the prefill."""
        return self._perceive_ms("full") / self._perceive_ms(name)

    def _perceive_ms(self, name: str) -> float:
        return sum(self.encode_ms[name].values()) + self.prefill_ms[name]

    def add(self, name: str, look: Look) -> None:
        """One frame, seen by one of CONFIGS."""
        sums = self.encode_ms.setdefault(name, dict.fromkeys(VIEW_NAMES, 0.0))
        for key in VIEW_NAMES:
            sums[key] += look.encode_ms[key]
            if look.decisions:
                by_view = self.actions.setdefault(name, {key: Counter() for key in VIEW_NAMES})
                by_view[key][look.decisions[key].action.value] += 1
        self.prefill_ms[name] = self.prefill_ms.get(name, 0.0) + look.prefill_ms
        if name == "gated":
            for key in VIEW_NAMES:
                self.gate_ms.setdefault(key, []).append(look.gate_ms[key])

    def add_heed(self, name: str, ms: float) -> None:
        """Asking what the instruction attends to is paid by the views."""
        for key in VIEW_NAMES:
            self.encode_ms[name][key] += ms / len(VIEW_NAMES)

    def table(self) -> dict[str, Any]:
        """For the result file."""
        rows = {
            name: {
                "perceive_ms": self._perceive_ms(name) / self.num_frames,
                "perceive_ratio": self.perceive_ratio(name),
                "chunk_drift_rms": float(np.mean(self.square_drift[name])) ** 0.5,
                **{
                    view: {
                        "encode_ms": self.encode_ms[name][key] / self.num_frames,
                        "encode_ratio": self.encode_ratio(name, key),
                        "shares": _shares(self.actions.get(name, {}).get(key, Counter())),
                    }
                    for key, view in VIEW_NAMES.items()
                },
            }
            for name in self.encode_ms
        }
        rows["full"]["chunk_drift_rms_of_another_noise_seed"] = rows["full"].pop("chunk_drift_rms")
        return {
            "num_frames": self.num_frames,
            "configs": rows,
            "dropped_by_similarity_share": self.num_similar / self.num_frames,
        }


def _shares(counts: Counter[str]) -> dict[str, float]:
    return {name: count / counts.total() for name, count in counts.items()}


def _time_scene(
    checkpoint: FlowCheckpoint, scene: Scene, seed: int, *, num_frames: int, quick: bool
) -> SceneTiming:
    timing = SceneTiming()
    for task in SCENE_TASKS[:1] if quick else SCENE_TASKS:
        frames = record(checkpoint, scene, task, UNSEEN_SEEDS[0] + seed, num_frames)
        for config in CONFIGS.values():  # whatever a first call allocates
            Eyes(checkpoint, config).look(
                frames[0].images, frames[0].state, TASKS[task].prompt, now_s=0.0
            )
        eyes = {name: Eyes(checkpoint, config) for name, config in CONFIGS.items()}
        last_state = frames[0].state
        for at, frame in enumerate(frames):
            looks = _look_all(eyes, frame, TASKS[task].prompt, at, timing)
            if at % DRIFT_EVERY == 0:
                _compare_chunks(checkpoint, eyes, looks, at, timing)
            is_passed_on = float(np.linalg.norm(frame.state - last_state)) >= 0.01
            timing.num_similar += not is_passed_on
            last_state = frame.state if is_passed_on else last_state
        timing.num_frames += len(frames)
    return timing


def _look_all(
    eyes: Mapping[str, Eyes], frame: Frame, prompt: str, at: int, timing: SceneTiming
) -> dict[str, Look]:
    looks = {}
    names = list(eyes)
    for name in names[at % len(names) :] + names[: at % len(names)]:  # nobody is always first
        look = eyes[name].look(frame.images, frame.state, prompt, now_s=at * PERIOD_S)
        timing.add(name, look)
        looks[name] = look
    return looks


def _compare_chunks(
    checkpoint: FlowCheckpoint,
    eyes: Mapping[str, Eyes],
    looks: Mapping[str, Look],
    at: int,
    timing: SceneTiming,
) -> None:
    """What the gate changes in the chunk, in the network's units; for scale, what another noise seed changes."""
    whole = denoised(checkpoint, looks["full"].context_kv, at)
    for name, look in looks.items():
        is_full = name == "full"
        chunk = denoised(checkpoint, look.context_kv, at + 1_000_000 if is_full else at)
        square = float((chunk - whole).pow(2).mean())
        timing.square_drift.setdefault(name, []).append(square)
        now_s = at * PERIOD_S
        if eyes[name].is_heed_due(now_s):
            tau = last_tau(checkpoint)
            timing.add_heed(name, eyes[name].heed(look, chunk, tau, now_s=now_s))


# --- episodes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Order:
    """Episodes of one task for one process; `motion` None: a world that stands still."""

    task: str
    motion: Motion | None
    names: tuple[str, ...]
    seeds: tuple[int, ...]
    max_ticks: int


def _fly_all(seed: int, *, quick: bool) -> dict[str, list[Episode]]:
    """Every name of FLOWN on the same seeds, in worlds that stand still and that drift."""
    first = UNSEEN_SEEDS[0] + seed
    orders = [
        _Order(
            task=task,
            motion=motion,
            names=FLOWN[:2] if quick else FLOWN,
            seeds=tuple(range(first, first + (1 if quick else 5))),
            max_ticks=120 if quick else 300,
        )
        for task in (("window-close",) if quick else TASKS)
        for motion in (None, Motion.DRIFT)
    ]
    if quick:
        answers = [_fly_order(order) for order in orders]
    else:
        # spawn: a forked child would share the parent's GL context
        with multiprocessing.get_context("spawn").Pool(NUM_WORKERS) as pool:
            answers = pool.map(_fly_order, orders, chunksize=1)
    flown: dict[str, list[Episode]] = {}
    for answer in answers:
        for name, episodes in answer.items():
            flown.setdefault(name, []).extend(episodes)
    return flown


def _fly_order(order: _Order) -> dict[str, list[Episode]]:
    torch.set_num_threads(1)
    checkpoint = _checkpoint()
    world = (
        MetaWorld(task=order.task)
        if order.motion is None
        else MovingMetaWorld(task=order.task, motion=order.motion)
    )
    try:
        return {
            name: [fly(checkpoint, world, at, CONFIGS[name], order.max_ticks) for at in order.seeds]
            for name in order.names
        }
    finally:
        world.close()


def _success_rate(episodes: Sequence[Episode]) -> float:
    return sum(episode.solved_tick is not None for episode in episodes) / len(episodes)


def _episode_facts(episodes: Sequence[Episode]) -> dict[str, Any]:
    solved = [episode.solved_tick for episode in episodes if episode.solved_tick is not None]
    num_looks = sum(episode.num_looks for episode in episodes)
    return {
        "num_episodes": len(episodes),
        "success_rate": _success_rate(episodes),
        "median_ticks_to_success": float(np.median(solved)) if solved else None,
        "encode_ms": {
            name: sum(episode.encode_ms[key] for episode in episodes) / num_looks
            for key, name in VIEW_NAMES.items()
        },
        "prefill_ms": sum(episode.prefill_ms for episode in episodes) / num_looks,
    }


# --- jumps -------------------------------------------------------------------------------------------------------------


def _watch_all(seed: int, *, quick: bool) -> list[Jumped]:
    tasks = SCENE_TASKS[:1] if quick else SCENE_TASKS
    seeds = range(UNSEEN_SEEDS[0] + seed, UNSEEN_SEEDS[0] + seed + (1 if quick else 5))
    return [watch_jumps(task, at, 90 if quick else 200, GATE) for task in tasks for at in seeds]


def _checkpoint() -> FlowCheckpoint:
    """The shipped policy as it is served on this machine."""
    dtype = "bfloat16" if "amx_bf16" in read_hardware().flags else "float32"
    checkpoint = load_flow_checkpoint(policy_folder("metaworld-ten"), dtype=DTYPES[dtype])
    pack(checkpoint.policy)
    return checkpoint


def _plot(timings: Mapping[Scene, SceneTiming]) -> Plot:
    return Plot(
        title="Perception avoided: encoding a view whole over gate and encoding",
        x_label="scene",
        y_label="times less",
        names=tuple(scene.value for scene in timings),
        series={
            f"{view} view": tuple(t.encode_ratio("gated", key) for t in timings.values())
            for key, view in VIEW_NAMES.items()
        },
    )
