"""World: what a simulated (or real) robot offers to a control loop.

Implemented by `robots.metaworld` and `robots.pusht`; used by `robots.loop`, the fleet and the recipe in `train`. Knows
no server and no policy. Views are rendered only when asked for, because on a CPU they cost far more than physics.
"""

from typing import Protocol, runtime_checkable

from ganglion.types import Float32Array, UInt8Array

Views = dict[str, UInt8Array | Float32Array]


@runtime_checkable
class World(Protocol):
    """One robot in its scene. Not thread-safe: one owner, one thread (the GL context belongs to it)."""

    @property
    def prompt(self) -> str:
        """The canonical instruction of the task."""
        ...

    @property
    def rate_hz(self) -> float:
        """Control ticks per second of the world's own time."""
        ...

    @property
    def success(self) -> bool:
        """Whether the task has been solved at any tick since the last reset."""
        ...

    @property
    def num_ticks(self) -> int:
        """Actions applied since the last reset."""
        ...

    def reset(self, seed: int) -> None:
        """Start a new episode; the same seed gives the same scene."""
        ...

    def observe(self) -> Views:
        """What the policy sees, under the keys of its checkpoint: uint8 [height, width, 3] views and the float32 state."""
        ...

    def apply(self, action: Float32Array) -> None:
        """Advance one control tick under `action`; values outside the bounds are clipped."""
        ...

    def close(self) -> None:
        """Free the renderer. The world cannot be used afterwards."""
        ...


@runtime_checkable
class Viewable(Protocol):
    """A world that people can watch."""

    def browser_view(self, view_px: int = 224) -> UInt8Array:
        """The scene upright, uint8 [view_px, view_px, 3]."""
        ...
