"""Gate worlds: what `bench gate` shows to the gate. Scenes as recorded frames, closed-loop episodes, and jumps.

Called by `bench.gate`, episodes in processes of their own. All frames are rendered by Meta-World; every camera has noise
of NOISE_STD levels, drawn anew for every frame.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import torch
from torch import Tensor

from ganglion.bench.eyes import Eyes, EyesConfig
from ganglion.models.policies.flow_checkpoint import FlowCheckpoint
from ganglion.pipeline.gate import GateConfig, Perceive, Reason, ViewGate
from ganglion.robots.metaworld import ACTION_DIM, MAX_TICKS, STATE_KEY, VIEW_KEYS, MetaWorld
from ganglion.robots.moving import Motion, MovingMetaWorld
from ganglion.robots.world import World
from ganglion.types import Float32Array, UInt8Array

NOISE_STD = 2.0
TICK_S = 1 / 20  # of the robot's control loop, as in bench control
SETTLE_TICKS = 130  # a resting arm of Meta-World sways that long
SLOW_SPEED = 0.1  # of the fastest: 2 cm a second at 20 Hz
TICKS_PER_CHUNK = 3
DELAY_TICKS = 1
REST = np.zeros(ACTION_DIM, np.float32)


class Scene(StrEnum):
    """What goes on in front of the cameras."""

    STATIC = "static"  # nothing but noise
    SLOW = "slow"  # the arm moves slowly
    BUSY = "busy"  # the policy solves a task whose objects drift


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """What one robot sends at one tick: views with noise, state."""

    images: Mapping[str, UInt8Array]
    state: Float32Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """One closed-loop episode. `solved_tick`: None when it was not solved."""

    solved_tick: int | None
    num_looks: int
    encode_ms: Mapping[str, float]  # by view, summed over looks, the gate's own time counted
    prefill_ms: float


class NoisyCamera:
    """A world seen through noise. One seed, one sequence of noise."""

    def __init__(self, world: World, seed: int) -> None:
        self._world = world
        self._rng = np.random.default_rng([seed, 977])

    def frame(self) -> Frame:
        views = self._world.observe()
        images = {}
        for key in VIEW_KEYS:
            noise = self._rng.normal(0.0, NOISE_STD, views[key].shape)
            images[key] = np.clip(np.rint(views[key] + noise), 0, 255).astype(np.uint8)
        return Frame(images=images, state=np.asarray(views[STATE_KEY], np.float32))


class Pilot:
    """The policy in closed loop: a chunk every TICKS_PER_CHUNK ticks, used DELAY_TICKS later."""

    def __init__(self, checkpoint: FlowCheckpoint, eyes: Eyes, prompt: str, seed: int) -> None:
        self._checkpoint, self._eyes, self._prompt, self._seed = checkpoint, eyes, prompt, seed
        self._current: tuple[int, Float32Array] | None = None
        self._arriving: tuple[int, Float32Array] | None = None
        self.num_looks, self.prefill_ms = 0, 0.0
        self.encode_ms = dict.fromkeys(VIEW_KEYS, 0.0)

    def action(self, tick: int, camera: NoisyCamera) -> Float32Array:
        """For this tick; looks through the camera when a chunk is due."""
        if tick % TICKS_PER_CHUNK == 0:
            self._arriving = (tick, self._chunk(tick, camera.frame()))
        if self._arriving is not None and self._arriving[0] + DELAY_TICKS <= tick:
            self._current, self._arriving = self._arriving, None
        if self._current is None:
            return REST
        action: Float32Array = self._current[1][tick - self._current[0]]
        return action

    def _chunk(self, tick: int, frame: Frame) -> Float32Array:
        now_s = tick * TICK_S
        look = self._eyes.look(frame.images, frame.state, self._prompt, now_s=now_s)
        self.num_looks += 1
        self.prefill_ms += look.prefill_ms
        for key in VIEW_KEYS:
            self.encode_ms[key] += look.encode_ms[key]
        latents = denoised(self._checkpoint, look.context_kv, self._seed * MAX_TICKS + tick)
        if self._eyes.is_heed_due(now_s):
            heed_ms = self._eyes.heed(look, latents, last_tau(self._checkpoint), now_s=now_s)
            for key in VIEW_KEYS:
                self.encode_ms[key] += heed_ms / len(VIEW_KEYS)
        chunk: Float32Array = self._checkpoint.processor.actions(latents)[0]
        return chunk


def denoised(checkpoint: FlowCheckpoint, context_kv: Tensor, seed: int) -> Tensor:
    """Latents [1, horizon, action] of a whole chunk."""
    config, num_steps = checkpoint.policy.config, checkpoint.spec.num_flow_steps
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(1, config.horizon, config.action_dim, generator=generator)
    tau, dtau = torch.zeros(1, config.horizon), torch.full((1,), 1 / num_steps)
    return checkpoint.policy.denoise(noise, tau, dtau, context_kv, num_steps)


def last_tau(checkpoint: FlowCheckpoint) -> float:
    """Where the last flow step starts."""
    return 1.0 - 1.0 / checkpoint.spec.num_flow_steps


def fly(
    checkpoint: FlowCheckpoint, world: World, seed: int, config: EyesConfig, max_ticks: int
) -> Episode:
    """One episode, until it is solved or `max_ticks` are over."""
    world.reset(seed)
    camera = NoisyCamera(world, seed)
    pilot = Pilot(checkpoint, Eyes(checkpoint, config), world.prompt, seed)
    tick = 0
    while tick < max_ticks and not world.success:
        world.apply(pilot.action(tick, camera))
        tick += 1
    return Episode(
        solved_tick=tick if world.success else None,
        num_looks=pilot.num_looks,
        encode_ms=pilot.encode_ms,
        prefill_ms=pilot.prefill_ms,
    )


def record(
    checkpoint: FlowCheckpoint, scene: Scene, task: str, seed: int, num_frames: int
) -> list[Frame]:
    """A scene's frames, one a control tick. A busy scene may end earlier: its task is solved."""
    if scene is Scene.BUSY:
        world: World = MovingMetaWorld(task=task, motion=Motion.DRIFT)
        pilot = Pilot(checkpoint, Eyes(checkpoint, EyesConfig()), world.prompt, seed)
    else:
        world, pilot = MetaWorld(task=task), None
    frames: list[Frame] = []
    try:
        world.reset(seed)
        camera = NoisyCamera(world, seed)
        if pilot is None:
            _rest(world)
        for tick in range(num_frames):
            if world.success:
                break
            frames.append(camera.frame())
            if pilot is not None:
                action = pilot.action(tick, camera)
            else:
                action = _slow_action(tick) if scene is Scene.SLOW else REST
            world.apply(action)
    finally:
        world.close()
    return frames


def _rest(world: World) -> None:
    for _ in range(SETTLE_TICKS):
        world.apply(REST)


def _slow_action(tick: int) -> Float32Array:
    """A slow circle over the table."""
    angle = tick / 30
    return np.array([np.cos(angle), np.sin(angle), 0.0, 0.0], np.float32) * np.float32(SLOW_SPEED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Jumped:
    """Jumps of objects in front of a resting arm: who saw them in the first frame that shows them."""

    num_jumps: int
    num_seen_by_gate: int
    num_seen_by_similarity: int


def watch_jumps(task: str, seed: int, num_ticks: int, config: GateConfig) -> Jumped:
    """Rest the arm, let objects jump, and ask the gate and LeRobot's filter (joints moved by more than 1 cm)."""
    world = MovingMetaWorld(task=task, motion=Motion.JUMP)
    num_jumps = num_seen = num_similar = 0
    try:
        world.reset(seed)
        _rest(world)
        camera = NoisyCamera(world, seed)
        gates = {key: ViewGate(config, height_px=80, width_px=80, patch_px=16) for key in VIEW_KEYS}
        last_state = camera.frame().state
        for tick in range(num_ticks):
            frame = camera.frame()
            decisions = [
                gates[key].decide(frame.images[key], now_s=tick * TICK_S) for key in VIEW_KEYS
            ]
            if tick and world.last_jump_tick == world.num_ticks:
                num_jumps += 1
                num_seen += any(
                    d.action is not Perceive.SKIP and d.reason is not Reason.REFRESH_DUE
                    for d in decisions
                )
                num_similar += is_dissimilar(frame.state, last_state)
            if is_dissimilar(frame.state, last_state):
                last_state = frame.state
            world.apply(REST)
    finally:
        world.close()
    return Jumped(
        num_jumps=num_jumps, num_seen_by_gate=num_seen, num_seen_by_similarity=num_similar
    )


def is_dissimilar(state: Float32Array, last: Float32Array, limit: float = 0.01) -> bool:
    """LeRobot's `observations_similar`, negated: the joint-space distance alone decides. `limit`: 1 cm of the hand."""
    return bool(np.linalg.norm(state - last) >= limit)
