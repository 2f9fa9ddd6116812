"""The last check before an action leaves the server. Called by `pipeline.local` on the loop's thread. Pure numpy."""

import numpy as np

from ganglion.errors import UnsafeActionError
from ganglion.spec import PolicySpec
from ganglion.types import Float32Array


class ActionGuard:
    """Refuses a whole chunk that is not finite or leaves the action bounds; never repairs one.

    A clamp is no check: NaN passes through it, and a clamped target still moves the robot where nobody asked.
    """

    def __init__(self, spec: PolicySpec) -> None:
        self._shape = (spec.horizon, spec.action_dim)
        self._low = np.asarray(spec.action_low, dtype=np.float32)
        self._high = np.asarray(spec.action_high, dtype=np.float32)

    def check(self, actions: Float32Array) -> Float32Array:
        """The same actions, read-only. Raises UnsafeActionError naming the first bad row and dimension."""
        assert actions.shape == self._shape, f"chunk {actions.shape}, spec {self._shape}"
        is_good = np.isfinite(actions) & (actions >= self._low) & (actions <= self._high)
        if not is_good.all():
            row, dim = (int(at) for at in np.argwhere(~is_good)[0])
            raise UnsafeActionError(
                f"action[{row}, {dim}] = {actions[row, dim]} is outside "
                f"[{self._low[dim]}, {self._high[dim]}]; the chunk was withheld",
                next_step="hold the robot; check the observation and the checkpoint's statistics",
            )
        actions.setflags(write=False)
        return actions
