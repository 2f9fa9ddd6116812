"""Wrapped worlds: a MetaWorld whose scene does more, with the same task, views, state, actions and rate.

The part that `robots.moving` and `robots.hidden` share. Knows neither what moves nor what is hidden.
"""

import numpy as np
import numpy.typing as npt

from ganglion.robots.metaworld import MetaWorld
from ganglion.robots.world import Views
from ganglion.types import Float32Array, UInt8Array


class WrappedMetaWorld:
    """Hands everything on to `inner`; a subclass says at which points the scene changes."""

    def __init__(self, inner: MetaWorld) -> None:
        self._inner = inner

    @property
    def inner(self) -> MetaWorld:
        """The world behind, for scripted experts: they know the goal, and its own views do not change."""
        return self._inner

    @property
    def task_name(self) -> str:
        """Key of the task in TASKS."""
        return self._inner.task_name

    @property
    def prompt(self) -> str:
        return self._inner.prompt

    @property
    def rate_hz(self) -> float:
        return self._inner.rate_hz

    @property
    def success(self) -> bool:
        return self._inner.success

    @property
    def num_ticks(self) -> int:
        return self._inner.num_ticks

    @property
    def privileged_obs(self) -> npt.NDArray[np.float64]:
        """Meta-World's own 39 numbers: for scripted experts only."""
        return self._inner.privileged_obs

    def reset(self, seed: int) -> None:
        self._inner.reset(seed)

    def observe(self) -> Views:
        return self._inner.observe()

    def apply(self, action: Float32Array) -> None:
        self._inner.apply(action)

    def browser_view(self, view_px: int = 224) -> UInt8Array:
        """The policy's corner camera, larger."""
        return self._inner.browser_view(view_px)

    def close(self) -> None:
        self._inner.close()
