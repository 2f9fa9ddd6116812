"""Turns: when language models may take a step beside robots, and how long it may be. Called by `pipeline.local`. Pure.

| robots | a step of the language models |
|---|---|
| none connected | whenever they have work, of the engine's own budget |
| connected, nothing to do | at once, but short: an observation that comes now waits for it |
| have work | short, if it ends before the first robot's slack is used up, and while the share of time is kept |
| are late | short, and seldom: a floor of the time, so that what was asked ends some day |
"""

from enum import StrEnum

SMOOTHING = 0.3
MAX_CREDIT_TURNS = 2


class TurnKind(StrEnum):
    """Which line of the table above holds."""

    ALONE = "alone"
    IDLE = "idle"
    SLACK = "slack"
    LATE = "late"


class Turns:
    """Robots first: their deadlines bound each turn of the language models, a share of the time bounds all of them.

    `slice_us` is the budget of a turn while robots are connected. What a turn really takes is measured, since one
    forward cannot be shorter than it is. `floor` is the share that is taken even where robots are late.
    """

    def __init__(self, *, step_us: int, slice_us: int, share: float, floor: float) -> None:
        assert 0 <= share < 1, share
        assert 0 <= floor < 1, floor
        self._step_us, self._slice_us = step_us, min(slice_us, step_us)
        self._share, self._floor = _Credit(max(share, floor)), _Credit(floor)
        self._turn_us = float(self._slice_us)  # what a short turn takes

    @property
    def turn_us(self) -> float:
        """What a turn beside robots takes, measured."""
        return self._turn_us

    def budget_us(self, *, has_robots: bool, slack_us: int | None) -> int | None:
        """The budget of a turn now, or None: not now.

        `slack_us`: how long all robots' work may stand still without a missed deadline; None: they have none.
        """
        match self.kind(has_robots=has_robots, slack_us=slack_us):
            case TurnKind.ALONE:
                return self._step_us
            case TurnKind.IDLE:
                return self._slice_us
            case TurnKind.SLACK:
                credit = self._share
            case TurnKind.LATE:
                credit = self._floor
        return self._slice_us if credit.us >= self._turn_us else None

    def kind(self, *, has_robots: bool, slack_us: int | None) -> TurnKind:
        """What a turn now would be, arguments as of `budget_us`."""
        if not has_robots:
            return TurnKind.ALONE
        if slack_us is None:
            return TurnKind.IDLE
        return TurnKind.SLACK if self._turn_us <= slack_us else TurnKind.LATE

    def observe_robots(self, run_us: float) -> None:
        """Robots' work took this long."""
        for credit in (self._share, self._floor):
            credit.earn(run_us, most_us=MAX_CREDIT_TURNS * self._turn_us)

    def observe_turn(self, run_us: float, *, budget_us: int, has_robot_work: bool) -> None:
        """A turn with this budget took this long."""
        if budget_us <= self._slice_us:
            # rises at once, falls slowly: a deadline is missed by the long turns, not by the mean one
            gap_us = run_us - self._turn_us
            self._turn_us += gap_us if gap_us > 0 else SMOOTHING * gap_us
        if has_robot_work:
            self._share.us -= run_us  # below 0 after a turn that took longer than expected
            self._floor.us -= run_us


class _Credit:
    """Time that robots' work has earned for language models, so that they get `share` of both together."""

    def __init__(self, share: float) -> None:
        self._per_us = share / (1 - share)
        self.us = 0.0

    def earn(self, run_us: float, *, most_us: float) -> None:
        """Robots' work took `run_us`; no more than `most_us` is saved up."""
        self.us = min(most_us, self.us + run_us * self._per_us)
