"""Meta-World: ten language-conditioned tasks of one simulated Sawyer arm, rendered fast enough for a CPU.

Owns the task table, the start states and the two policy views. Used by the fleet, the control loop and the recipe in
`train`. Knows no policy. Meta-World runs natively at 80 control ticks a second: 20 Hz is quarter speed.
"""

import ctypes
import ctypes.util
import os
import zlib
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from ganglion.errors import FieldError, MissingDependencyError
from ganglion.robots.frustum import drop_unseen
from ganglion.robots.world import Views
from ganglion.types import Float32Array, UInt8Array

RATE_HZ = 80.0
MAX_TICKS = 500  # Meta-World's own episode limit
CORNER_KEY = "observation.images.corner"
GRIPPER_KEY = "observation.images.gripper"
STATE_KEY = "observation.state"
VIEW_KEYS = (CORNER_KEY, GRIPPER_KEY)
VIEW_PX = 80
STATE_DIM = 4  # hand x, y, z in metres; gripper opening 0..1
ACTION_DIM = 4  # hand dx, dy, dz; gripper effort; all in [-1, 1]

# Seeds of episodes. Nothing is fitted on the UNSEEN ones: the published figures rest on them (the card says how often
# they were looked at).
TRAINING_SEEDS = range(10_000)
UNSEEN_SEEDS = range(10_000, 10_020)
VALIDATION_SEEDS = range(20_000, 20_010)  # for looking while developing
DEMO_SEEDS = range(30_000, 40_000)

# "corner4" is stock corner2 at the position where LeRobot's Meta-World environment moves it; upside down, so flipped.
_CORNER_CAMERA = "corner4"
_GRIPPER_CAMERA = "gripperPOV"
_GOAL_RGBA = (0.0, 0.8, 0.0, 1.0)


class Start(StrEnum):
    """Where a drawer or window starts. The other tasks know UNDONE only."""

    UNDONE = "undone"  # Meta-World's own start
    HALF_OPEN = (
        "half_open"  # solved for neither the task nor its opposite: only the words say what to do
    )
    DONE = "done"  # already solved: the opposite task's own start (for demonstrations)


@dataclass(frozen=True, slots=True, kw_only=True)
class Joint:
    """The joint of a drawer or window, and the scenes that a task and its opposite share.

    `low/high` bound the body's position; a half-open joint starts in `half_low..half_high`, success for neither task.
    """

    name: str
    half_low: float
    half_high: float
    low: tuple[float, float, float]
    high: tuple[float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One task: `opposite` shares its scenes, so that only the instruction tells them apart."""

    env_name: str
    prompt: str
    paraphrases: tuple[str, ...]
    opposite: str | None = None
    joint: Joint | None = None
    joint_done: float = 0.0
    is_goal_visible: bool = True


_DRAWER = Joint(
    name="goal_slidey",
    half_low=-0.125,
    half_high=-0.065,
    low=(-0.1, 0.9, 0.0),
    high=(0.1, 0.9, 0.0),
)
_WINDOW = Joint(
    name="window_slide",
    half_low=0.075,
    half_high=0.14,
    low=(-0.1, 0.75, 0.16),
    high=(0.1, 0.9, 0.2),
)

TASKS: dict[str, Task] = {
    "button-press-topdown": Task(
        env_name="button-press-topdown-v3",
        prompt="press the button from above",
        paraphrases=("push the button down", "press down on the red button"),
    ),
    "drawer-open": Task(
        env_name="drawer-open-v3",
        prompt="open the drawer",
        paraphrases=("pull the drawer open", "slide the green drawer out"),
        opposite="drawer-close",
        joint=_DRAWER,
        joint_done=-0.16,
        is_goal_visible=False,
    ),
    "drawer-close": Task(
        env_name="drawer-close-v3",
        prompt="close the drawer",
        paraphrases=("push the drawer shut", "slide the green drawer in"),
        opposite="drawer-open",
        joint=_DRAWER,
        joint_done=0.0,
        is_goal_visible=False,
    ),
    "window-open": Task(
        env_name="window-open-v3",
        prompt="open the window",
        paraphrases=("slide the window open", "push the window to the open side"),
        opposite="window-close",
        joint=_WINDOW,
        joint_done=0.2,
        is_goal_visible=False,
    ),
    "window-close": Task(
        env_name="window-close-v3",
        prompt="close the window",
        paraphrases=("slide the window shut", "push the window to the closed side"),
        opposite="window-open",
        joint=_WINDOW,
        joint_done=0.0,
        is_goal_visible=False,
    ),
    "faucet-open": Task(
        env_name="faucet-open-v3",
        prompt="open the faucet",
        paraphrases=("turn the faucet on", "rotate the faucet handle"),
    ),
    "handle-press": Task(
        env_name="handle-press-v3",
        prompt="press the handle down",
        paraphrases=("push the handle down", "press down on the red handle"),
    ),
    "door-close": Task(
        env_name="door-close-v3",
        prompt="close the door",
        paraphrases=("push the door shut", "swing the door closed"),
    ),
    "push": Task(
        env_name="push-v3",
        prompt="push the puck along the table to the goal",
        paraphrases=("slide the puck over the table to the goal", "push the puck across the table"),
        opposite="pick-place",
    ),
    "pick-place": Task(
        env_name="pick-place-v3",
        prompt="pick up the puck and hold it in the air at the goal",
        paraphrases=("lift the puck up to the goal", "grasp the puck and lift it into the air"),
        opposite="push",
    ),
}


def task_named(name: str) -> Task:
    """The task's row of the table. Raises FieldError listing the tasks when there is none."""
    task = TASKS.get(name)
    if task is None:
        raise FieldError("task", expected=f"one of {', '.join(TASKS)}", got=repr(name))
    return task


def task_seed(name: str, seed: int) -> np.random.Generator:
    """The random generator of episode `seed` of task `name`: the same on every machine and in every process."""
    return np.random.default_rng([zlib.crc32(name.encode()), seed])


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """One moment of one episode."""

    physics: npt.NDArray[np.float64]
    full_obs: npt.NDArray[np.float64]
    previous_obs: npt.NDArray[np.float64]
    is_solved: bool
    num_ticks: int


class MetaWorld:
    """One Sawyer arm with one task. Half of the seeds (the odd ones) of drawers and windows start half open."""

    def __init__(self, *, task: str, view_px: int = VIEW_PX) -> None:
        self._task = task_named(task)
        self._task_name = task
        self._view_px = view_px
        self._mujoco = _load_mujoco()
        from metaworld.env_dict import (
            ALL_V3_ENVIRONMENTS,
        )  # late: imports mujoco, which reads MUJOCO_GL

        env: Any = ALL_V3_ENVIRONMENTS[self._task.env_name]()
        env._partially_observable = False  # the scripted expert needs the goal
        del env.sawyer_observation_space  # cached with a goal clipped to zero
        env._set_task_called = True
        env._freeze_rand_vec = True  # we draw the start ourselves: one seed, one scene
        env.max_path_length = np.iinfo(np.int64).max  # the caller counts ticks (MAX_TICKS)
        env.model.vis.quality.offsamples = 0
        env.model.vis.quality.shadowsize = 0
        for site_id in range(env.model.nsite):
            if env.model.site(site_id).name == "goal":
                env.model.site_rgba[site_id] = (
                    _GOAL_RGBA if self._task.is_goal_visible else (0, 0, 0, 0)
                )
        self._env = env
        self._renderers: dict[int, Any] = {}
        self._full_obs: npt.NDArray[np.float64] = np.zeros(39)
        self._is_solved = False
        self._num_ticks = 0

    @property
    def task_name(self) -> str:
        """Key of the task in TASKS."""
        return self._task_name

    @property
    def prompt(self) -> str:
        return self._task.prompt

    @property
    def rate_hz(self) -> float:
        return RATE_HZ

    @property
    def success(self) -> bool:
        return self._is_solved

    @property
    def num_ticks(self) -> int:
        return self._num_ticks

    @property
    def privileged_obs(self) -> npt.NDArray[np.float64]:
        """Meta-World's own 39 numbers (object and goal positions included): for scripted experts only."""
        return self._full_obs

    @property
    def env(self) -> Any:
        """The wrapped Meta-World environment: for the moving world, the demonstration recipe and tests only."""
        return self._env

    @property
    def mujoco(self) -> Any:
        """The simulator's module, imported with an OpenGL that this machine has."""
        return self._mujoco

    def reset(self, seed: int) -> None:
        has_half_open = self._task.joint is not None and seed % 2 == 1
        self.reset_to(seed, Start.HALF_OPEN if has_half_open else Start.UNDONE)

    def reset_to(self, seed: int, start: Start) -> None:
        """Start episode `seed` from a chosen start. Raises FieldError when the task has no such start."""
        joint = self._task.joint
        if joint is None and start is not Start.UNDONE:
            raise FieldError("start", expected=f"undone for {self._task_name}", got=start.value)
        rng = task_seed(self._task_name, seed)
        low, high = self._env._random_reset_space.low, self._env._random_reset_space.high
        if joint is not None and start is not Start.UNDONE:
            low, high = np.array(joint.low), np.array(joint.high)
        position = rng.uniform(low, high)
        while (
            len(position) == 6 and np.linalg.norm(position[:2] - position[3:5]) < 0.15
        ):  # puck too near its goal
            position = rng.uniform(low, high)
        self._env._last_rand_vec = position
        self._env.reset()
        if joint is not None and start is not Start.UNDONE:
            is_half = start is Start.HALF_OPEN
            slide = (
                rng.uniform(joint.half_low, joint.half_high) if is_half else self._task.joint_done
            )
            self._env.data.joint(joint.name).qpos = slide
            self._env.data.joint(joint.name).qvel = 0.0
        self._mujoco.mj_forward(
            self._env.model, self._env.data
        )  # reset leaves poses and picture stale
        for site in self._env._target_site_config:
            self._env._set_pos_site(*site)
        self._env._get_obs()  # the next one stacks this observation, not the one of before the reset
        self._full_obs = np.asarray(self._env._get_obs(), np.float64)
        self._is_solved = False
        self._num_ticks = 0

    def observe(self) -> Views:
        return {
            CORNER_KEY: self._rendered(_CORNER_CAMERA, self._view_px)[::-1].copy(),
            GRIPPER_KEY: self._rendered(_GRIPPER_CAMERA, self._view_px).copy(),
            STATE_KEY: self._full_obs[:STATE_DIM].astype(np.float32),
        }

    def apply(self, action: Float32Array) -> None:
        clipped = np.clip(np.asarray(action, np.float32), -1.0, 1.0)
        obs, _, _, _, info = self._env.step(clipped)
        self._full_obs = obs
        self._num_ticks += 1
        self._is_solved = self._is_solved or bool(info["success"])

    def advance(self, action: Float32Array) -> None:
        """`apply` without judging success, three times as fast: for looking ahead with a scripted expert."""
        clipped = np.clip(np.asarray(action, np.float32), -1.0, 1.0)
        env = self._env
        env.set_xyz_action(clipped[:3])
        env.do_simulation([clipped[3], -clipped[3]], n_frames=env.frame_skip)
        for site in env._target_site_config:
            env._set_pos_site(*site)
        self._mujoco.mj_forward(env.model, env.data)
        space = env.sawyer_observation_space
        self._full_obs = np.clip(env._get_obs(), space.low, space.high)
        self._num_ticks += 1

    def snapshot(self) -> Snapshot:
        """Everything that `restore` needs to continue from here."""
        state_kind = self._mujoco.mjtState.mjSTATE_INTEGRATION
        physics = np.empty(self._mujoco.mj_stateSize(self._env.model, state_kind))
        self._mujoco.mj_getState(self._env.model, self._env.data, physics, state_kind)
        return Snapshot(
            physics=physics,
            full_obs=self._full_obs.copy(),
            previous_obs=np.array(self._env._prev_obs),
            is_solved=self._is_solved,
            num_ticks=self._num_ticks,
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot of this episode."""
        state_kind = self._mujoco.mjtState.mjSTATE_INTEGRATION
        self._mujoco.mj_setState(self._env.model, self._env.data, snapshot.physics, state_kind)
        self._mujoco.mj_forward(self._env.model, self._env.data)
        for site in self._env._target_site_config:
            self._env._set_pos_site(*site)
        self._env._prev_obs = snapshot.previous_obs.copy()
        self._full_obs = snapshot.full_obs.copy()
        self._is_solved = snapshot.is_solved
        self._num_ticks = snapshot.num_ticks

    def browser_view(self, view_px: int = 224) -> UInt8Array:
        """The policy's corner camera, larger."""
        return self._rendered(_CORNER_CAMERA, view_px)[::-1].copy()

    def close(self) -> None:
        for renderer in self._renderers.values():
            renderer.close()
        self._renderers.clear()
        self._env.close()

    def _rendered(self, camera: str, view_px: int) -> UInt8Array:
        renderer = self._renderers.get(view_px)
        if renderer is None:
            renderer = self._renderers[view_px] = self._new_renderer(view_px)
        renderer.update_scene(self._env.data, camera=camera)
        if camera == _GRIPPER_CAMERA:  # the corner camera sees it all
            drop_unseen(self._mujoco, renderer._scene, self._env.model, self._env.data)
        pixels: UInt8Array = renderer.render()
        return pixels

    def _new_renderer(self, view_px: int) -> Any:
        try:
            renderer = self._mujoco.Renderer(self._env.model, view_px, view_px)
        except Exception as error:  # the GL libraries raise whatever they like
            raise _no_opengl(f"{os.environ.get('MUJOCO_GL')}: {error}") from error
        flags = self._mujoco.mjtRndFlag
        for flag in (
            flags.mjRND_SHADOW,
            flags.mjRND_REFLECTION,
            flags.mjRND_SKYBOX,
            flags.mjRND_HAZE,
        ):
            renderer._scene.flags[flag] = 0
        return renderer


def _load_mujoco() -> Any:
    """Import mujoco with a headless OpenGL that this machine has. MUJOCO_GL wins when it is set."""
    if "MUJOCO_GL" not in os.environ:
        os.environ["MUJOCO_GL"] = _headless_backend()
    os.environ.setdefault(
        "LP_NUM_THREADS", "1"
    )  # Mesa's software rasteriser: one thread per world, not one per core
    import mujoco  # late: reads MUJOCO_GL when it is imported

    return mujoco


def _headless_backend() -> str:
    for backend, library in (("egl", "EGL"), ("osmesa", "OSMesa")):
        path = ctypes.util.find_library(library)
        if path is None:
            continue
        try:
            ctypes.CDLL(path)
        except OSError:
            continue
        return backend
    raise _no_opengl("neither libEGL nor libOSMesa can be loaded")


def _no_opengl(why: str) -> MissingDependencyError:
    return MissingDependencyError(
        f"no headless OpenGL for rendering ({why})",
        next_step="apt-get install -y libegl1 libegl-mesa0 libgl1-mesa-dri (or libosmesa6)",
    )
