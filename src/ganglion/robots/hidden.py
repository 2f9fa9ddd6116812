"""Hidden goals: Meta-World whose goal marker is seen for the first ticks of an episode only. Who forgets, fails.

Owns when the marker goes out. Used by the temporal recipe in `train`, by the catalog and by tests. Knows no policy.
The goal itself stays where it is, and Meta-World's own rule says what success is; only the cameras lose it.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from ganglion.errors import FieldError
from ganglion.robots.metaworld import VIEW_PX, MetaWorld, task_named, task_seed
from ganglion.robots.world import Views
from ganglion.robots.wrapped import WrappedMetaWorld
from ganglion.types import UInt8Array

# Elsewhere the goal is part of the scene (a button, a handle, a door's lock) and cannot be hidden.
HIDDEN_TASKS = ("push", "pick-place")
VISIBLE_TICKS = (6, 15)  # first and last length of the look: 2 to 5 observations, one every 3 ticks


def check_hideable(task: str) -> None:
    """Raises FieldError for a task that there is not, or whose goal is part of the scene."""
    task_named(task)
    if task not in HIDDEN_TASKS:
        raise FieldError("task", expected=f"one of {', '.join(HIDDEN_TASKS)}", got=repr(task))


class HiddenGoal(WrappedMetaWorld):
    """One Sawyer arm that is shown its goal, and then must remember it."""

    def __init__(self, *, task: str, view_px: int = VIEW_PX) -> None:
        """Raises FieldError for a task whose goal is part of the scene."""
        check_hideable(task)
        super().__init__(MetaWorld(task=task, view_px=view_px))
        model: Any = self._inner.env.model
        names = [model.site(site_id).name for site_id in range(model.nsite)]
        self._site_id = names.index("goal")
        self._rgba: npt.NDArray[np.float32] = model.site_rgba[self._site_id].copy()
        self._num_visible_ticks = VISIBLE_TICKS[0]

    @property
    def num_visible_ticks(self) -> int:
        """From this tick of the episode on the marker is gone."""
        return self._num_visible_ticks

    @property
    def is_goal_visible(self) -> bool:
        """Whether a picture taken now shows the marker."""
        return self._inner.num_ticks < self._num_visible_ticks

    def reset(self, seed: int) -> None:
        rng = task_seed(f"look at {self.task_name}", seed)
        self._num_visible_ticks = int(rng.integers(VISIBLE_TICKS[0], VISIBLE_TICKS[1] + 1))
        super().reset(seed)

    def observe(self) -> Views:
        self._mark()
        return super().observe()

    def browser_view(self, view_px: int = 224) -> UInt8Array:
        """The policy's corner camera, larger: people are not shown more than the robot."""
        self._mark()
        return super().browser_view(view_px)

    def _mark(self) -> None:
        # when a picture is taken, not when a tick passes: a restored snapshot may go back in time
        shown = self._rgba if self.is_goal_visible else np.zeros(4, np.float32)
        self._inner.env.model.site_rgba[self._site_id] = shown
