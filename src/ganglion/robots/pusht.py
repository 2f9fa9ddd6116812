"""PushT: a disc pushes a T onto its outline. Two dimensions, no OpenGL: the world that runs anywhere.

Used by the fleet and by tests. Wraps gym-pusht; keys and sizes follow LeRobot. Actions are positions: where the disc
should go, in pixels of a 512 x 512 table. Natively 10 control ticks a second.
"""

import os
from typing import Any

import numpy as np

from ganglion.errors import MissingDependencyError
from ganglion.robots.world import Views
from ganglion.types import Float32Array, UInt8Array

RATE_HZ = 10.0
TABLE_PX = 512.0
VIEW_KEY = "observation.image"
VIEW_PX = 96
STATE_KEY = "observation.state"
STATE_DIM = ACTION_DIM = 2
PROMPT = "push the T onto the green outline"


class PushT:
    """One disc, one T. Solved when 95% of the outline is covered."""

    def __init__(self, *, view_px: int = VIEW_PX) -> None:
        self._env = _new_env(view_px)
        self._is_solved = False
        self._num_ticks = 0

    @property
    def prompt(self) -> str:
        return PROMPT

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
    def position(self) -> Float32Array:
        """Where the disc is: what an arm of position actions holds."""
        return np.asarray(self._env.agent.position, np.float32)

    def reset(self, seed: int) -> None:
        self._env.reset(seed=seed)
        self._is_solved = False
        self._num_ticks = 0

    def observe(self) -> Views:
        return {VIEW_KEY: np.ascontiguousarray(self._env._render()), STATE_KEY: self.position}

    def apply(self, action: Float32Array) -> None:
        clipped = np.clip(np.asarray(action, np.float64), 0.0, TABLE_PX)
        info = self._env.step(clipped)[-1]
        self._num_ticks += 1
        self._is_solved = self._is_solved or bool(info["is_success"])

    def browser_view(self, view_px: int = 224) -> UInt8Array:
        """The table, with a cross where the disc should go."""
        self._env.visualization_width = self._env.visualization_height = view_px
        pixels: UInt8Array = np.ascontiguousarray(self._env.render())
        return pixels

    def close(self) -> None:
        self._env.close()


def _new_env(view_px: int) -> Any:
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    try:
        from gym_pusht.envs.pusht import PushTEnv  # late: imports pygame, which reads SDL_*
    except ImportError as error:
        raise MissingDependencyError(
            f"pusht needs gym-pusht: {error}", next_step="pip install 'ganglion[sim]'"
        ) from error
    # "state": a step does not render
    return PushTEnv(
        obs_type="state",
        render_mode="rgb_array",
        observation_width=view_px,
        observation_height=view_px,
    )
