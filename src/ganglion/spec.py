"""Specs: what a served policy takes and gives, and the stages it is computed in, as plain data. No torch.

Read by the edge (to check observations), by the scheduler (to plan) and by the memory (to size pages).
"""

from dataclasses import dataclass
from typing import Any

from ganglion.types import Execution, SpanKind


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewSpec:
    """One camera: `key` as it stands on the wire ("observation.images.corner"), uint8 [height, width, 3].

    `patch_px`: from one of its tokens to the next; a token sees less than that to every side. 0: it is perceived whole.
    """

    key: str
    height: int
    width: int
    patch_px: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicySpec:
    """Inputs, outputs and limits of one policy.

    `control_hz` is the rate at which one action row is meant to be executed in the demonstrations' own time.
    `action_low/high` bound every action that may leave the server. `max_prefix`: the longest `action_prefix` that the
    policy continues. `late_context_steps`: how many flow steps, from the first, may read an observation that is newer
    than the request's own.
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
    max_prefix: int = 0
    late_context_steps: int = 0

    @property
    def executions(self) -> tuple[Execution, ...]:
        """What a robot may ask for: guidance needs flow steps, a prefix a policy that can continue one."""
        known = [Execution.SYNC, Execution.NAIVE, Execution.BLEND]
        if self.num_flow_steps:
            known += [Execution.RTC, Execution.RTC_IDENTITY]
        if self.max_prefix:
            known.append(Execution.PREFIX)
        return (*known, Execution.ROLLED)

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
            "max_prefix": self.max_prefix,
            "executions": [execution.value for execution in self.executions],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Carry:
    """`reader` also reads the page that `stage` wrote for each of `depth` earlier observations of its session.

    They arrive under `name`: [row, depth, *page shape], oldest first, pages of zeros in front of those there are. A
    depth of 1 is a recurrent state: the newest. Otherwise what the reader attends to is kept longest.
    """

    reader: str
    stage: str
    depth: int

    @property
    def name(self) -> str:
        """In `StageBatch.reads`."""
        return f"{self.stage}@earlier"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One kind of span of this model: reads the pages of earlier stages, writes its own.

    A stage with `is_shared` is content-addressed: `Model.key` names what its pages hold, and robots with the same
    content share them. The last stage's pages are what `Model.emit` turns into actions.
    """

    name: str
    kind: SpanKind
    num_units: int  # encode: images; prefill: tokens; denoise: flow steps
    reads: tuple[str, ...]  # names of earlier stages; a denoise stage also reads its own pages
    layout: str
    num_pages: int
    num_slots: int  # rows of those pages that are in use
    is_shared: bool
    is_divisible: bool  # may a piece advance only some of its units?
    is_repeatable: bool = False  # not shared, but the same observation gives the same pages again
