"""A policy of your own. Serve it:  ganglion serve policy=examples/my_policy.py:MyPolicy"""

from collections.abc import Sequence

import numpy as np

from ganglion.spec import PolicySpec, ViewSpec
from ganglion.types import Float32Array, Observation


class MyPolicy:
    """Moves towards the brightest part of the picture; closes the gripper when told to "grab"."""

    spec = PolicySpec(
        name="my-policy", family="plain", version="1",
        views=(ViewSpec(key="observation.images.corner", height=80, width=80),),
        state_key="observation.state", state_dim=4,
        action_dim=4, horizon=10, num_flow_steps=1, control_hz=20.0,
        action_low=(-1.0,) * 4, action_high=(1.0,) * 4,
    )  # fmt: skip

    def __call__(self, observations: Sequence[Observation]) -> Float32Array:
        """Actions [robot, horizon, action_dim]: the observations come from different robots."""
        chunks = []
        for observation in observations:
            light = observation.images["observation.images.corner"].mean(axis=2)
            row, column = np.unravel_index(light.argmax(), light.shape)
            grip = 1.0 if "grab" in observation.prompt else -1.0
            action = np.array([column / 40 - 1, 1 - row / 40, 0.0, grip], np.float32)
            chunks.append(np.tile(action, (self.spec.horizon, 1)))
        return np.stack(chunks)
