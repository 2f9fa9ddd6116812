"""Display: what an arm's control loop tells people: telemetry, and its scene when a tick has time left. Never in its way.

Owned by `robots.loop`, which says what happened; knows the side channel, neither server nor link.
"""

from collections import deque

from ganglion.clock import Clock
from ganglion.robots.catalog import Arm
from ganglion.robots.episode import EpisodeResult
from ganglion.robots.link import Answered
from ganglion.robots.queue import ActionQueue, Command
from ganglion.robots.side import MAX_QUEUE_ROWS, VIEW_PX, SideChannel

VIEW_MARGIN_S = 0.004  # of a tick's slack that rendering for people leaves alone


class Display:
    """One robot's. Does nothing until a side channel is attached."""

    def __init__(self, clock: Clock, *, rate_hz: float) -> None:
        self._clock, self._period_s = clock, 1 / rate_hz
        self._side: SideChannel | None = None
        self._view_cost_s = 0.015
        self._tick_times: deque[float] = deque(maxlen=max(2, round(rate_hz)))
        self._last_command: Command | None = None
        self._last_answer: Answered | None = None
        self._num_episodes = self._num_successes = 0
        self._warm: dict[str, Arm] = {}  # their view for people has its renderer

    def attach(self, side: SideChannel) -> None:
        """Tell people about it from now on."""
        self._side = side

    def prepare(self, arm: Arm) -> None:
        """The first view of a world makes its renderer, which takes many ticks: not while the arm moves."""
        if self._side is None or self._warm.get(arm.name) is arm:
            return
        self._warm[arm.name] = arm
        if arm.view is not None:
            arm.view(VIEW_PX)
            start_s = self._clock.now_s()
            arm.view(VIEW_PX)
            self._view_cost_s = min(self._clock.now_s() - start_s, self._period_s)

    def note_tick(self, command: Command) -> None:
        """A command was applied now."""
        self._last_command = command
        self._tick_times.append(self._clock.now_s())

    def note_answer(self, answer: Answered) -> None:
        """A chunk came."""
        self._last_answer = answer

    def note_episode(self, *, is_success: bool) -> None:
        """An episode ended."""
        self._num_episodes += 1
        self._num_successes += is_success

    def report(self, arm: Arm, result: EpisodeResult, queue: ActionQueue, tick: int) -> None:
        """Send telemetry, when it is time for it."""
        if self._side is None or not self._side.wants_telemetry():
            return
        command, answer, counts = self._last_command, self._last_answer, queue.counts
        age_s = None if command is None else command.age_s
        self._side.offer_telemetry(
            {
                "tick": tick,
                "queue": queue.slots()[:MAX_QUEUE_ROWS].tolist(),
                "rate_hz": self._rate_hz(),
                "obs_age_ms": None if age_s is None else age_s * 1e3,
                "num_misses": counts.misses,
                "num_holds": counts.holds,
                "episode": self._num_episodes,
                "num_episodes": self._num_episodes,
                "num_successes": self._num_successes,
                "is_success": result.is_success,
                "task": arm.task,
                "prompt": result.prompt,
                "reply_prompt": None if answer is None else answer.reply.prompt,
                "latency_ms": None if answer is None else answer.round_trip_ms,
            }
        )

    def show(self, arm: Arm, deadline_s: float) -> None:
        """Render for people, only when it fits into what is left of this tick."""
        if self._side is None or arm.view is None or not self._side.wants_view():
            return
        start_s = self._clock.now_s()
        if deadline_s - start_s < self._view_cost_s + VIEW_MARGIN_S:
            self._view_cost_s *= 0.99  # one slow view must not end them all
            return
        self._side.offer_view(arm.view(VIEW_PX))
        cost_s = min(self._clock.now_s() - start_s, self._period_s)  # a stall is no forecast
        self._view_cost_s += 0.2 * (cost_s - self._view_cost_s)

    def _rate_hz(self) -> float:
        times = self._tick_times
        if len(times) < 2 or times[-1] == times[0]:
            return 0.0
        return (len(times) - 1) / (times[-1] - times[0])
