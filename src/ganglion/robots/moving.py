"""Moving world: Meta-World whose goals and objects move while the arm works, so that old observations cost accuracy.

Owns what moves, how, and where to. Opened by `robots.catalog`; used by the control loop and the benches. Knows no
policy and no delay. All motion follows from task, seed and tick: the same on every machine, at every control rate.

| what moves | how | success |
|---|---|---|
| a fixed body (button, drawer, window, faucet, handle, door) | its place in the model | Meta-World's own; a target on the body moves with it |
| the goal of push and pick-place | its site and the target | Meta-World's own, against the goal where it is now |
| the puck | a belt under its box: displaced while it lies there and nothing of the arm touches it | as above |

Motion stays in the box that training drew its starts from. No motion solves a task: a body's target moves along, and
puck and goal keep in boxes that are further apart than success reaches.
"""

from copy import deepcopy
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from ganglion.errors import FieldError
from ganglion.robots.metaworld import RATE_HZ, VIEW_PX, MetaWorld, Snapshot, task_seed
from ganglion.robots.wrapped import WrappedMetaWorld
from ganglion.types import Float32Array

FIRST_JUMP_TICKS = (8, 30)
JUMP_TICKS = (40, 80)  # from one jump to the next
_ON_TABLE_Z_M = 0.03  # of a puck's centre: it lies at 0.02
_EDGE_M = 0.001  # a puck that the physics moved so far out of its box is still on the belt

Place = npt.NDArray[np.float64]


class Motion(StrEnum):
    """How things move."""

    DRIFT = "drift"  # a smooth path, all the time
    JUMP = "jump"  # at rest, and from one tick to the next somewhere else


class Kind(StrEnum):
    """What a mover displaces."""

    BODY = "body"  # a body that the model fixes to the world
    GOAL = "goal"
    PUCK = "puck"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mover:
    """One thing that moves between the corners `low` and `high` (x, y, maybe z, in metres; without z it keeps its height).

    `name`: of the body or the goal's site in the model. `speed_m_s`: the fastest drift, in the world's own time.
    """

    kind: Kind
    name: str
    low: tuple[float, ...]
    high: tuple[float, ...]
    speed_m_s: float


_DRAWER = Mover(kind=Kind.BODY, name="drawer", low=(-0.1, 0.9), high=(0.1, 0.9), speed_m_s=0.1)
_WINDOW = Mover(kind=Kind.BODY, name="window", low=(-0.1, 0.75), high=(0.1, 0.9), speed_m_s=0.15)
_BOX = Mover(kind=Kind.BODY, name="box", low=(-0.1, 0.8), high=(0.1, 0.9), speed_m_s=0.2)
_FAUCET = Mover(
    kind=Kind.BODY, name="faucetBase", low=(-0.05, 0.8), high=(0.05, 0.85), speed_m_s=0.1
)
_DOOR = Mover(kind=Kind.BODY, name="door", low=(0.0, 0.85), high=(0.1, 0.95), speed_m_s=0.2)
_PUCK = Mover(kind=Kind.PUCK, name="objjoint", low=(-0.1, 0.6), high=(0.1, 0.7), speed_m_s=0.04)
_GOAL = Mover(kind=Kind.GOAL, name="goal", low=(-0.1, 0.8), high=(0.1, 0.9), speed_m_s=0.2)
_HIGH_GOAL = replace(_GOAL, low=(-0.1, 0.8, 0.05), high=(0.1, 0.9, 0.3), speed_m_s=0.1)

MOVERS: dict[str, tuple[Mover, ...]] = {
    "button-press-topdown": (_BOX,),
    "drawer-open": (_DRAWER,),
    "drawer-close": (_DRAWER,),
    "window-open": (replace(_WINDOW, low=(-0.1, 0.7)),),
    "window-close": (_WINDOW,),
    "faucet-open": (_FAUCET,),
    "handle-press": (replace(_BOX, speed_m_s=0.15),),
    "door-close": (_DOOR,),
    "push": (_GOAL, _PUCK),
    "pick-place": (_HIGH_GOAL, replace(_PUCK, speed_m_s=0.02)),
}
# What benches run: solved when chunks are fresh, and worse the later they come. Drawers and window-close hardly notice
# motion (the hand is behind the handle for most of the time); pick-place is lost often even when chunks are fresh.
MOVING_TASKS = (
    "button-press-topdown",
    "push",
    "faucet-open",
    "handle-press",
    "door-close",
    "window-open",
)
MAX_MOVING_TICKS = 150  # an episode of a bench: fresh chunks need 20 to 120, luck needs more


def movers_of(task: str) -> tuple[Mover, ...]:
    """What moves in `task`. Raises FieldError listing the moving tasks."""
    movers = MOVERS.get(task)
    if movers is None:
        raise FieldError("task", expected=f"one of {', '.join(MOVERS)}", got=repr(task))
    return movers


class Drift:
    """A smooth path in a box: one sine an axis, through `start` at tick 0, never faster than `speed_m_s`."""

    def __init__(
        self, low: Place, high: Place, start: Place, speed_m_s: float, rng: np.random.Generator
    ) -> None:
        self._middle, self._half = (low + high) / 2, (high - low) / 2
        width = np.where(self._half > 0, self._half, 1.0)
        phase = np.arcsin(np.clip((start - self._middle) / width, -1.0, 1.0))
        shares = rng.uniform(0.5, 1.0, len(low)) * self._half
        self._phase = np.where(rng.random(len(low)) < 0.5, np.pi - phase, phase)
        peak_m_s = speed_m_s * shares / np.linalg.norm(shares)
        self._radians = peak_m_s / width / RATE_HZ  # a tick

    def at(self, tick: int) -> Place:
        """The place at `tick`."""
        place: Place = self._middle + self._half * np.sin(self._phase + self._radians * tick)
        return place


class Jumps:
    """Places that follow each other at seeded ticks; each at least half of the box's longest side from the last."""

    def __init__(self, low: Place, high: Place, start: Place, rng: np.random.Generator) -> None:
        self._low, self._high, self._rng = low, high, rng
        self._shortest_m = float(np.max(high - low)) / 2
        self.due_tick = int(rng.integers(*FIRST_JUMP_TICKS))
        self.place = self._away_from(start)

    def done(self, tick: int) -> None:
        """The jump to `place` was made at `tick`: draws the next one."""
        self.due_tick = tick + int(self._rng.integers(*JUMP_TICKS))
        self.place = self._away_from(self.place)

    def _away_from(self, place: Place) -> Place:
        while True:
            away: Place = self._rng.uniform(self._low, self._high)
            if np.linalg.norm(away - place) >= self._shortest_m:
                return away


@dataclass(frozen=True, slots=True, kw_only=True)
class MovingSnapshot:
    """One moment of one episode, with what moves and how it will move."""

    inner: Snapshot
    places: tuple[Place, ...]
    paths: tuple["Drift | Jumps", ...]
    last_jump_tick: int | None


class MovingMetaWorld(WrappedMetaWorld):
    """A MetaWorld with `movers_of(task)` in motion; the same views, state, actions and rate."""

    def __init__(self, *, task: str, motion: Motion = Motion.DRIFT, view_px: int = VIEW_PX) -> None:
        self._movers = movers_of(task)
        self._motion = motion
        super().__init__(MetaWorld(task=task, view_px=view_px))
        self._scene = _Scene(self._inner.env, self._inner.mujoco)
        self._paths: list[Drift | Jumps] = []
        self._last_jump_tick: int | None = None

    @property
    def motion(self) -> Motion:
        return self._motion

    @property
    def last_jump_tick(self) -> int | None:
        """The first tick whose observation shows the newest jump; None before the first jump and under drift."""
        return self._last_jump_tick

    @property
    def places(self) -> tuple[Place, ...]:
        """Where every mover is, x, y and z in metres, in the order of `movers_of`."""
        return tuple(self._scene.place(mover) for mover in self._movers)

    def reset(self, seed: int) -> None:
        super().reset(seed)
        self._last_jump_tick = None
        self._paths = []
        for index, mover in enumerate(self._movers):
            rng = task_seed(f"{self._motion.value} {index} of {self.task_name}", seed)
            low, high = np.array(mover.low), np.array(mover.high)
            start = self._scene.place(mover)[: len(low)]
            self._paths.append(
                Drift(low, high, start, mover.speed_m_s, rng)
                if self._motion is Motion.DRIFT
                else Jumps(low, high, start, rng)
            )

    def apply(self, action: Float32Array) -> None:
        self._move()
        super().apply(action)

    def advance(self, action: Float32Array) -> None:
        """`apply` without judging success, for looking ahead with a scripted expert."""
        self._move()
        self._inner.advance(action)

    def snapshot(self) -> MovingSnapshot:
        """Everything that `restore` needs to continue from here."""
        return MovingSnapshot(
            inner=self._inner.snapshot(),
            places=self.places,
            paths=tuple(deepcopy(self._paths)),
            last_jump_tick=self._last_jump_tick,
        )

    def restore(self, snapshot: MovingSnapshot) -> None:
        """Go back to a snapshot of this episode."""
        for mover, place in zip(self._movers, snapshot.places, strict=True):
            if mover.kind is not Kind.PUCK:  # a puck is part of the physics
                self._scene.shift(mover, place - self._scene.place(mover))
        self._paths = deepcopy(list(snapshot.paths))
        self._last_jump_tick = snapshot.last_jump_tick
        self._inner.restore(snapshot.inner)

    def _move(self) -> None:
        tick = self._inner.num_ticks + 1  # of the observation that shows the motion
        for mover, path in zip(self._movers, self._paths, strict=True):
            if isinstance(path, Drift):
                self._drift(mover, path, tick)
            elif tick >= path.due_tick and self._scene.jump(mover, path.place):
                path.done(tick)
                self._last_jump_tick = tick

    def _drift(self, mover: Mover, path: Drift, tick: int) -> None:
        step = path.at(tick) - path.at(tick - 1)
        if mover.kind is Kind.PUCK:
            place = self._scene.place(mover)[: len(step)]
            low, high = np.array(mover.low), np.array(mover.high)
            is_on_belt = (place > low - _EDGE_M).all() and (place < high + _EDGE_M).all()
            if not is_on_belt or not self._scene.is_free(mover):
                return
            step = np.clip(place + step, low, high) - place  # the arm may have put it elsewhere
        self._scene.shift(mover, step)


class _Scene:
    """Places in Meta-World's model and data. A displaced thing shows with the next step of the physics."""

    def __init__(self, env: Any, mujoco: Any) -> None:
        self._env, self._mujoco = env, mujoco
        model = env.model
        self._root_of_geom = model.body_rootid[model.geom_bodyid]
        self._is_arm = self._root_of_geom == model.body_rootid[model.body("hand").id]

    def place(self, mover: Mover) -> Place:
        """x, y and z in metres."""
        match mover.kind:
            case Kind.BODY:
                place = self._env.model.body(mover.name).pos
            case Kind.GOAL:
                place = self._env._target_pos
            case Kind.PUCK:
                place = self._env.data.joint(mover.name).qpos[:3]
        return np.array(place, np.float64)

    def shift(self, mover: Mover, step: Place) -> None:
        """Displace by `step` (x, y, maybe z); a target on a body moves along."""
        env, size = self._env, len(step)
        if mover.kind is Kind.PUCK:
            env.data.joint(mover.name).qpos[:size] += step
            return
        if mover.kind is Kind.BODY:
            env.model.body(mover.name).pos[:size] += step
        target = np.array(env._target_pos, np.float64)  # a copy: other attributes may share it
        target[:size] += step
        env._target_pos = target
        for name, _ in env._target_site_config[:1]:
            env.model.site(name).pos = target

    def jump(self, mover: Mover, place: Place) -> bool:
        """Displace to `place` unless the arm touches the thing here or would there. True when it was done."""
        step = place - self.place(mover)[: len(place)]
        if mover.kind is Kind.GOAL:  # a mark: nothing can be in its way
            self.shift(mover, step)
            return True
        if not self.is_free(mover):
            return False
        self.shift(mover, step)
        self._mujoco.mj_forward(self._env.model, self._env.data)
        if self.is_free(mover):
            return True
        self.shift(mover, -step)
        self._mujoco.mj_forward(self._env.model, self._env.data)
        return False

    def is_free(self, mover: Mover) -> bool:
        """Whether the arm touches no part of it; a puck must lie on the table, too."""
        model, data = self._env.model, self._env.data
        if mover.kind is Kind.PUCK:
            if data.joint(mover.name).qpos[2] > _ON_TABLE_Z_M:
                return False
            root = model.joint(mover.name).bodyid[0]
        else:
            root = model.body(mover.name).id
        pairs = data.contact.geom
        is_part, is_arm = self._root_of_geom[pairs] == root, self._is_arm[pairs]
        return not bool((is_part & is_arm[:, ::-1]).any())
