"""Turns: when language models may take a step beside robots, and how long it may be. Called by `pipeline.local`. Pure.

| robots | a step of the language models |
|---|---|
| none connected | whenever they have work, of the engine's own budget |
| connected, nothing to do | at once, but short: an observation that comes now waits for it |
| have work | short, if it ends before the first robot's slack is used up, and while the share of time is kept |
"""

SMOOTHING = 0.3
MAX_CREDIT_SLICES = 2


class Turns:
    """Robots first: their deadlines bound each turn of the language models, a share of the time bounds all of them.

    `slice_us` is the budget of a turn while robots are connected. What a turn really takes is measured, since one
    forward cannot be shorter than it is.
    """

    def __init__(self, *, step_us: int, slice_us: int, share: float) -> None:
        assert 0 <= share < 1, share
        self._step_us, self._slice_us = step_us, min(slice_us, step_us)
        self._credit_per_us = share / (1 - share)
        self._credit_us = 0.0
        self._turn_us = float(self._slice_us)  # what a short turn takes

    @property
    def turn_us(self) -> float:
        """What a turn beside robots takes, measured."""
        return self._turn_us

    def budget_us(self, *, has_robots: bool, slack_us: int | None) -> int | None:
        """The budget of a turn now, or None: not now.

        `slack_us`: how long all robots' work may stand still without a missed deadline; None: they have none.
        """
        if not has_robots:
            return self._step_us
        if slack_us is None:
            return self._slice_us
        is_in_time = self._turn_us <= slack_us
        return self._slice_us if is_in_time and self._credit_us >= self._turn_us else None

    def observe_robots(self, run_us: float) -> None:
        """Robots' work took this long."""
        most_us = MAX_CREDIT_SLICES * self._turn_us
        self._credit_us = min(most_us, self._credit_us + run_us * self._credit_per_us)

    def observe_turn(self, run_us: float, *, budget_us: int, has_robot_work: bool) -> None:
        """A turn with this budget took this long."""
        if budget_us <= self._slice_us:
            # rises at once, falls slowly: a deadline is missed by the long turns, not by the mean one
            gap_us = run_us - self._turn_us
            self._turn_us += gap_us if gap_us > 0 else SMOOTHING * gap_us
        if has_robot_work:
            self._credit_us -= run_us  # below 0 after a turn that took longer than expected
