"""Execution: what a robot tells the server of its plan, and at which ticks a chunk's rows run, in each of the seven modes.

Called by `robots.loop`. Pure: knows neither sockets nor worlds nor the queue; it is told the plan and the tick.

| mode | with the observation of tick t goes | row 0 of its chunk is for |
|---|---|---|
| sync | nothing: its rows are for no tick in particular | that at which it arrives; `replan_ticks` rows run, then the arm holds |
| naive | the tick | t |
| blend | the tick | t; the queue averages overlapping rows |
| rtc, rtc-identity, prefix | the tick, the rows that run before any other chunk can, the expected delay | t |
| rolled | the tick at which the chunk is expected, and the state that the arm will have then | that tick |

So row i of every chunk but sync's is for the tick `executed_until + i` of the observation that it rests on.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ganglion.errors import FieldError
from ganglion.robots.queue import ActionKind, Chunk, Embodiment
from ganglion.robots.world import Views
from ganglion.types import Execution, Float32Array

NUM_DELAYS = 10  # of the last ones the longest is the forecast (arXiv 2506.07339)
OLD_SHARE = 0.3  # LeRobot's weighted average: 0.3 old + 0.7 new
CONTINUING = frozenset({Execution.RTC, Execution.RTC_IDENTITY, Execution.PREFIX})


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """What a robot knows of the near future when it observes.

    `plan`: float32 [n, action_dim], the rows that would run from `tick` on if nothing new came. `delay_ticks`: expected
    from this observation to the first tick that its chunk is there for. `num_certain`: ticks before any chunk that
    is under way can change the plan.
    """

    tick: int
    plan: Float32Array
    delay_ticks: int
    num_certain: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """An observation as it goes out: `hints` are the client's, `first_tick` that of row 0 of its chunk."""

    views: Views
    hints: dict[str, Any]
    first_tick: int


class DelayForecast:
    """Ticks from an observation to the first one that its chunk is there for, from the last few that were measured."""

    def __init__(self, first_ticks: int) -> None:
        self._recent = deque([first_ticks], maxlen=NUM_DELAYS)

    @property
    def ticks(self) -> int:
        """The longest: what to be prepared for."""
        return max(self._recent)

    @property
    def least_ticks(self) -> int:
        """The shortest: until then nothing comes."""
        return min(self._recent)

    def add(self, num_ticks: int) -> None:
        """One more was measured."""
        self._recent.append(num_ticks)


class ChunkExecution:
    """One mode for one arm and one served policy. Lives as long as an episode."""

    def __init__(
        self,
        execution: Execution,
        *,
        metadata: Mapping[str, Any],
        embodiment: Embodiment,
        replan_ticks: int,
    ) -> None:
        """Raises FieldError for what the served policy or the arm cannot do."""
        self._max_prefix = int(metadata.get("max_prefix", 0))
        self.execution = execution
        self._body, self._replan_ticks = embodiment, replan_ticks
        self._horizon = int(metadata.get("horizon", 0))
        self._state_key = next(iter(metadata.get("state", {})), "")
        self._last_first_tick = 0
        self._check(metadata)

    def _check(self, metadata: Mapping[str, Any]) -> None:
        execution, known = self.execution, metadata.get("executions")
        if known is not None and execution not in known:
            raise FieldError(
                "execution",
                expected=f"one of {', '.join(known)} for policy {metadata.get('policy')!r}",
                got=execution.value,
                next_step="choose another execution or serve a policy that can do this one",
            )
        body = self._body
        if execution is Execution.ROLLED and (
            body.kind is not ActionKind.POSITION and body.motion is None
        ):
            raise FieldError(
                "execution",
                expected="an arm whose state is known to follow its actions",
                got=f"rolled for an arm of {body.kind.value} actions without a `motion`",
                next_step="choose another execution or give its Embodiment a StateMotion",
            )

    def told(self, views: Views, outlook: Outlook) -> Told:
        """The observation of `outlook.tick` and what goes out with it."""
        first_tick = outlook.tick
        hints: dict[str, Any] = {"execution": self.execution.value}
        num_ahead = outlook.delay_ticks if len(outlook.plan) else 0  # a dry queue commits nothing
        if self.execution is Execution.ROLLED:
            # never back: the server takes no observation of an older tick than the last
            first_tick = max(outlook.tick + num_ahead, self._last_first_tick)
            committed = outlook.plan[: first_tick - outlook.tick]
            state = roll(np.asarray(views[self._state_key], np.float32), committed, self._body)
            views = {**views, self._state_key: state}
        elif self.execution in CONTINUING:
            num_rows = min(outlook.num_certain, num_ahead, self._max_prefix)
            if num_rows and len(outlook.plan):
                hints["action_prefix"] = outlook.plan[:num_rows]
            hints["inference_delay_hint"] = min(num_ahead, self._horizon)
        if self.execution is not Execution.SYNC:
            hints["executed_until"] = self._last_first_tick = first_tick
        return Told(views=views, hints=hints, first_tick=first_tick)

    def placed(self, chunk: Chunk, *, next_tick: int) -> Chunk:
        """The chunk as the queue shall run it, when the next tick is `next_tick`."""
        if self.execution is not Execution.SYNC:
            return chunk
        return Chunk(
            actions=chunk.actions[: self._replan_ticks],
            obs_tick=chunk.obs_tick,
            obs_s=chunk.obs_s,
            version=chunk.version,
            request=chunk.request,
            first_tick=next_tick,
        )


def roll(state: Float32Array, actions: Float32Array, embodiment: Embodiment) -> Float32Array:
    """The state [state_dim] after `actions` [n, action_dim], as far as the arm's motion tells (VLASH, arXiv 2512.01031).

    The arm's bounds stop a motion; a state that is outside already stays.
    """
    if not len(actions):
        return state
    if embodiment.kind is ActionKind.POSITION:
        return np.array(actions[-1], np.float32)
    motion = embodiment.motion
    assert motion is not None, "checked when the mode was chosen"
    rolled, num = np.array(state, np.float32), len(motion.per_action)
    low = np.minimum(state[:num], np.asarray(motion.low, np.float32))
    high = np.maximum(state[:num], np.asarray(motion.high, np.float32))
    for action in actions[:, :num] * np.asarray(motion.per_action, np.float32):
        rolled[:num] = np.clip(rolled[:num] + action, low, high)
    return rolled
