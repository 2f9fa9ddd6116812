"""Specs: what a served policy takes and gives, as plain data. Read by the edge to check observations. No torch."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewSpec:
    """One camera: `key` as it stands on the wire ("observation.images.corner"), uint8 [height, width, 3]."""

    key: str
    height: int
    width: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicySpec:
    """Inputs, outputs and limits of one policy.

    `control_hz` is the rate at which one action row is meant to be executed in the demonstrations' own time.
    `action_low/high` bound every action that may leave the server.
    """

    name: str
    family: str  # "ganglion_flow", "plain", ...
    version: str  # content hash of weights and config
    views: tuple[ViewSpec, ...]
    state_key: str
    state_dim: int
    action_dim: int
    horizon: int
    num_flow_steps: int
    control_hz: float
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]
    max_prompt_bytes: int = 2048

    def metadata(self) -> dict[str, Any]:
        """The part of openpi's first frame that describes this policy (msgpack-able)."""
        return {
            "policy": self.name,
            "family": self.family,
            "model_version": self.version,
            "views": {view.key: [view.height, view.width, 3] for view in self.views},
            "state": {self.state_key: [self.state_dim]},
            "action_dim": self.action_dim,
            "horizon": self.horizon,
            "num_flow_steps": self.num_flow_steps,
            "control_hz": self.control_hz,
            "action_low": list(self.action_low),
            "action_high": list(self.action_high),
            "max_prompt_bytes": self.max_prompt_bytes,
        }
