"""Catalog: worlds by name ("metaworld:push", "metaworld-moving:push", "pusht"), each with what the control loop must know of its arm.

Called by `robots.runner` and by whoever checks a name. Simulators are imported only when a world is opened.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ganglion.errors import FieldError
from ganglion.robots.queue import ActionKind, Embodiment, StateMotion
from ganglion.robots.world import World
from ganglion.types import Float32Array, UInt8Array

if TYPE_CHECKING:
    from ganglion.robots.metaworld import MetaWorld
    from ganglion.robots.wrapped import WrappedMetaWorld

METAWORLD_ARM = Embodiment(
    kind=ActionKind.DELTA,
    action_low=(-1.0,) * 4,
    action_high=(1.0,) * 4,
    kept_dims=(3,),  # the gripper
    # metres a tick, within the box that Meta-World keeps the hand in; an opening of 0..1 that closes under effort
    motion=StateMotion(
        per_action=(0.01, 0.01, 0.01, -0.06),
        low=(-0.5, 0.4, 0.05, 0.0),
        high=(0.5, 1.0, 0.5, 1.0),
    ),
)
MAX_VIEW_PX = 480  # MuJoCo's own off-screen buffer is 640 x 480
MOVING_WORLDS = {
    "metaworld-moving": "drift",
    "metaworld-jumping": "jump",
}  # -> robots.moving.Motion
PUSHT_ARM = Embodiment(kind=ActionKind.POSITION, action_low=(0.0, 0.0), action_high=(512.0, 512.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """An open world and its arm. `measure`: where a POSITION arm is; `view`: the scene for people, if any."""

    name: str  # as in the catalog
    world_name: str
    task: str
    world: World
    embodiment: Embodiment
    measure: Callable[[], Float32Array] | None
    view: Callable[[int], UInt8Array] | None


def check_world(name: str) -> None:
    """Raises FieldError when there is no such world or task."""
    world_name, _, task = name.partition(":")
    if world_name not in WORLDS:
        raise FieldError("world", expected=f"one of {', '.join(WORLDS)}", got=repr(name))
    if world_name == "metaworld":
        from ganglion.robots.metaworld import task_named

        task_named(task)
    elif world_name in MOVING_WORLDS:
        from ganglion.robots.moving import movers_of

        movers_of(task)
    elif world_name == "metaworld-hidden":
        from ganglion.robots.hidden import check_hideable

        check_hideable(task)
    elif task:
        raise FieldError("world", expected=f"{world_name} without a task", got=repr(name))


def open_arm(name: str, *, views: Mapping[str, Sequence[int]] | None = None) -> Arm:
    """Open the world called `name`. Raises FieldError, MissingDependencyError.

    `views`: what the policy wants to see, key -> [height, width, 3]. A world that cannot render that keeps its own size:
    `robots.loop` says then what does not fit.
    """
    check_world(name)
    world_name, _, task = name.partition(":")
    return WORLDS[world_name](name, task, views or {})


def _wanted_px(views: Mapping[str, Sequence[int]], keys: Sequence[str], own_px: int) -> int:
    """The side of the square that all of `keys` are wanted in; `own_px` when that cannot be."""
    shapes = {tuple(views.get(key, ())) for key in keys}
    match shapes.pop() if len(shapes) == 1 else ():
        case (int(height), int(width), 3) if height == width and 0 < height <= MAX_VIEW_PX:
            return height
        case _:
            return own_px


def _open_metaworld(name: str, task: str, views: Mapping[str, Sequence[int]]) -> Arm:
    from ganglion.robots.metaworld import MetaWorld

    return _sawyer(name, task, MetaWorld(task=task, view_px=_metaworld_px(views)))


def _open_moving(name: str, task: str, views: Mapping[str, Sequence[int]]) -> Arm:
    from ganglion.robots.moving import Motion, MovingMetaWorld

    motion = Motion(MOVING_WORLDS[name.partition(":")[0]])
    return _sawyer(
        name, task, MovingMetaWorld(task=task, motion=motion, view_px=_metaworld_px(views))
    )


def _open_hidden(name: str, task: str, views: Mapping[str, Sequence[int]]) -> Arm:
    from ganglion.robots.hidden import HiddenGoal

    return _sawyer(name, task, HiddenGoal(task=task, view_px=_metaworld_px(views)))


def _metaworld_px(views: Mapping[str, Sequence[int]]) -> int:
    from ganglion.robots.metaworld import VIEW_KEYS, VIEW_PX

    return _wanted_px(views, VIEW_KEYS, VIEW_PX)


def _sawyer(name: str, task: str, world: "MetaWorld | WrappedMetaWorld") -> Arm:
    """Meta-World's arm, whatever the world around it does."""
    return Arm(
        name=name,
        world_name=name.partition(":")[0],
        task=task,
        world=world,
        embodiment=METAWORLD_ARM,
        measure=None,
        view=world.browser_view,
    )


def _open_pusht(name: str, task: str, views: Mapping[str, Sequence[int]]) -> Arm:
    from ganglion.robots.pusht import VIEW_KEY, VIEW_PX, PushT

    world = PushT(view_px=_wanted_px(views, (VIEW_KEY,), VIEW_PX))
    return Arm(
        name=name,
        world_name="pusht",
        task=task or "pusht",
        world=world,
        embodiment=PUSHT_ARM,
        measure=lambda: world.position,
        view=world.browser_view,
    )


WORLDS: dict[str, Callable[[str, str, Mapping[str, Sequence[int]]], Arm]] = {
    "metaworld": _open_metaworld,
    "metaworld-moving": _open_moving,
    "metaworld-jumping": _open_moving,
    "metaworld-hidden": _open_hidden,
    "pusht": _open_pusht,
}
