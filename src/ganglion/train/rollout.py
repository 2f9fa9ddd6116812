"""Rollout: several arms in lockstep, each chunk as late as it would be behind a server, in all execution modes.

Owns what an arm does between two chunks and when each flow step of a chunk is made. Called by `evaluate` and, through it,
by benches. Knows no server and no process. Time is control ticks: a chunk of the observation of tick t that takes d ticks
can be executed from tick t + d on.

| execution | rows of the chunk | meanwhile |
|---|---|---|
| SYNC | row 0 at tick t + d | the arm holds |
| NAIVE | row i at tick t + i | the last chunk goes on |
| BLEND | row i at tick t + i, 0.3 of what was planned before + 0.7 of it (LeRobot's weights) | as above |
| RTC, RTC_IDENTITY | row i at tick t + i, guided to what runs anyway | as above |
| PREFIX | row i at tick t + i, the first d given | as above |
| ROLLED | row 0 at tick t + d, for a state rolled forward to that tick | as above |

With a public context the chunks under way overlap as in the server: perception takes `PERCEIVE_SHARE` of d, the flow
steps the rest, one after the other; each reads the newest picture that is perceived by then and what runs anyway by then.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from torch import Tensor

from ganglion.robots.catalog import Arm
from ganglion.robots.execution import OLD_SHARE, roll
from ganglion.robots.metaworld import MAX_TICKS, STATE_KEY, VIEW_KEYS
from ganglion.train.actor import Actor, Draft, Glance
from ganglion.types import Execution, Float32Array, Plan

PERCEIVE_SHARE = (
    0.3  # of the time from picture to chunk: bench control's perceive / (perceive + generate)
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutConfig:
    """How chunks are made and used. `ticks_per_chunk`: from one observation to the next (SYNC: executed rows)."""

    execution: Execution = Execution.NAIVE
    ticks_per_chunk: int = 3
    delay_ticks: int = 1
    is_context_public: bool = False
    max_ticks: int = MAX_TICKS


@dataclass(slots=True, kw_only=True)
class _Flight:
    """A chunk under way: row 0 belongs to the tick of the observation that it read last."""

    launch_tick: int
    seen_tick: int
    draft: Draft


@dataclass(slots=True)
class Episode:
    """One arm's episode. `current`: the tick of its row 0 and the rows."""

    arm: Arm
    seed: int
    prompt: str
    config: RolloutConfig
    executed: list[Float32Array] = field(default_factory=list)
    switch_ticks: list[int] = field(default_factory=list)
    num_chunks: int = 0
    _flights: list[_Flight] = field(default_factory=list)
    _contexts: list[tuple[int, Tensor]] = field(default_factory=list)  # tick of the picture
    _current: tuple[int, Float32Array] | None = None
    _next_launch_tick: int = 0

    @property
    def is_solved(self) -> bool:
        return self.arm.world.success

    @property
    def solved_tick(self) -> int | None:
        """Ticks that it took; None when it was not solved."""
        return self.arm.world.num_ticks if self.is_solved else None

    # --- smoothness ------------------------------------------------------------------------------------------------

    def switch_jumps(self) -> list[float]:
        """Squared change of the motion (without the gripper) at each tick at which a new chunk took over."""
        motion = self._motion()
        return [
            float(np.sum((motion[tick] - motion[tick - 1]) ** 2))
            for tick in self.switch_ticks
            if 0 < tick < len(motion)
        ]

    def jerks(self) -> list[float]:
        """Squared second difference of the motion at each tick: an action is a velocity."""
        jerk = np.diff(self._motion(), n=2, axis=0)
        return [float(value) for value in np.sum(jerk**2, axis=1)]

    def _motion(self) -> Float32Array:
        body = self.arm.embodiment
        kept = [at for at in range(len(body.action_low)) if at not in body.kept_dims]
        return np.stack(self.executed)[:, kept]

    # --- one tick --------------------------------------------------------------------------------------------------

    def glance(self, tick: int) -> Glance | None:
        """The observation of this tick, if one is due."""
        if tick < self._next_launch_tick:
            return None
        config = self.config
        is_sync = config.execution is Execution.SYNC
        self._next_launch_tick = tick + config.ticks_per_chunk + config.delay_ticks * is_sync
        if is_sync and config.delay_ticks:
            self._current = None
        views = self.arm.world.observe()
        state = np.asarray(views[STATE_KEY], np.float32)
        plan = self._plan(seen_tick=tick, tick=tick, launch_tick=tick)
        if config.execution is Execution.ROLLED and plan is not None:
            state = roll(state, plan.actions[: plan.num_committed], self.arm.embodiment)
        return Glance(
            images=np.stack([views[key] for key in VIEW_KEYS]).astype(np.uint8),
            state=state,
            prompt=self.prompt,
            noise_seed=self.seed * MAX_TICKS + tick,
            execution=config.execution,
            plan=plan,
        )

    def launch(self, tick: int, draft: Draft) -> None:
        """`draft` was begun with the glance of this tick."""
        self._flights.append(_Flight(launch_tick=tick, seen_tick=tick, draft=draft))
        self._contexts.append((tick, draft.context))
        del self._contexts[: -2 - self.config.delay_ticks]

    def due(self, tick: int) -> list[Draft]:
        """Drafts whose next flow step is due by this tick, brought up to date."""
        drafts = []
        for flight in self._flights:
            time = self._step_time(flight)
            if not flight.draft.is_done and time <= tick:
                if self.config.is_context_public:
                    self._look_again(flight, tick, time)
                drafts.append(flight.draft)
        return drafts

    def arrived(self, tick: int) -> list[Draft]:
        """Drafts whose chunk arrives at this tick, finished."""
        return [flight.draft for flight in self._arriving(tick)]

    def take(self, tick: int, chunks: Sequence[Float32Array]) -> None:
        """Chunks of `arrived`, in its order."""
        for flight, chunk in zip(self._arriving(tick), chunks, strict=True):
            self._flights.remove(flight)
            first_tick = flight.seen_tick
            if self.config.execution in (Execution.SYNC, Execution.ROLLED):
                first_tick += self.config.delay_ticks
            if self.config.execution is Execution.BLEND:
                first_tick, chunk = self._blended(tick, first_tick, chunk)
            self._current = (first_tick, chunk)
            self.switch_ticks.append(tick)
            self.num_chunks += 1

    def advance(self, tick: int) -> None:
        """Execute what is planned for this tick; hold when nothing is."""
        body = self.arm.embodiment
        action = np.zeros(len(body.action_low), np.float32)
        if self.executed:
            kept = list(body.kept_dims)
            action[kept] = self.executed[-1][kept]
        rows = self._rows(tick)
        if len(rows):
            action = rows[0]
        self.executed.append(action)
        self.arm.world.apply(action)

    # --- what is known ---------------------------------------------------------------------------------------------

    def _rows(self, tick: int) -> Float32Array:
        """Planned rows from this tick on."""
        if self._current is None:
            return np.empty((0, len(self.arm.embodiment.action_low)), np.float32)
        first_tick, chunk = self._current
        return chunk[max(0, tick - first_tick) :]

    def _plan(self, *, seen_tick: int, tick: int, launch_tick: int) -> Plan | None:
        """What runs from `seen_tick` on, as known at `tick`, until the chunk launched at `launch_tick` arrives."""
        if self._current is None:
            return None
        actions = np.concatenate(
            [*(action[None] for action in self.executed[seen_tick:tick]), self._rows(tick)]
        )
        num_committed = launch_tick + self.config.delay_ticks - seen_tick
        return Plan(actions=actions, num_committed=max(0, min(num_committed, len(actions))))

    def _look_again(self, flight: _Flight, tick: int, time: float) -> None:
        """What a flow step at `time` reads: the newest picture perceived by then, what runs anyway by then."""
        perceive_ticks = PERCEIVE_SHARE * self.config.delay_ticks
        for seen_tick, context in self._contexts:
            if flight.seen_tick < seen_tick <= time - perceive_ticks:
                if flight.draft.num_steps_done:
                    flight.draft.move_up(seen_tick - flight.seen_tick)
                flight.seen_tick, flight.draft.context = seen_tick, context
        flight.draft.plan = self._plan(
            seen_tick=flight.seen_tick, tick=tick, launch_tick=flight.launch_tick
        )

    def _step_time(self, flight: _Flight) -> float:
        """When its next flow step begins."""
        if not self.config.is_context_public:
            return flight.launch_tick  # nothing that comes later can change the chunk
        draft = flight.draft
        share = PERCEIVE_SHARE + (1.0 - PERCEIVE_SHARE) * draft.num_steps_done / draft.num_steps
        return flight.launch_tick + share * self.config.delay_ticks

    def _arriving(self, tick: int) -> list[_Flight]:
        late = self.config.delay_ticks
        return [f for f in self._flights if f.launch_tick + late <= tick and f.draft.is_done]

    def _blended(self, tick: int, first_tick: int, chunk: Float32Array) -> tuple[int, Float32Array]:
        new, old = chunk[tick - first_tick :].copy(), self._rows(tick)
        num_both = min(len(new), len(old))
        new[:num_both] = OLD_SHARE * old[:num_both] + (1 - OLD_SHARE) * new[:num_both]
        return tick, new


def run_episodes(episodes: Sequence[Episode], actor: Actor) -> None:
    """Run all episodes from their reset to success or to `max_ticks`, every forward batched over the arms."""
    for episode in episodes:
        episode.arm.world.reset(episode.seed)
    for tick in range(max(episode.config.max_ticks for episode in episodes)):
        active = [e for e in episodes if not e.is_solved and tick < e.config.max_ticks]
        if not active:
            return
        _deliver(active, actor, tick)
        glances = {at: glance for at, e in enumerate(active) if (glance := e.glance(tick))}
        if glances:
            drafts = actor.begin(list(glances.values()))
            for at, draft in zip(glances, drafts, strict=True):
                active[at].launch(tick, draft)
        while drafts := [draft for e in active for draft in e.due(tick)]:
            is_whole = all(_is_private(e) for e in active)
            actor.refine(drafts, actor.num_flow_steps if is_whole else 1)
        _deliver(active, actor, tick)  # what takes no time
        for episode in active:
            episode.advance(tick)


def mean_square(values: Iterable[float]) -> float:
    """Mean of squares that are computed already; 0 when there are none."""
    listed = list(values)
    return float(np.mean(listed)) if listed else 0.0


def _is_private(episode: Episode) -> bool:
    return not episode.config.is_context_public


def _deliver(active: Sequence[Episode], actor: Actor, tick: int) -> None:
    drafts = [episode.arrived(tick) for episode in active]
    if not any(drafts):
        return
    chunks = actor.emit([draft for group in drafts for draft in group])
    ends = np.cumsum([0, *(len(group) for group in drafts)])
    for episode, (start, end) in zip(active, pairwise(ends), strict=True):
        episode.take(tick, list(chunks[start:end]))
