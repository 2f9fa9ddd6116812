"""Control loop: one arm, closed loop over the server, at a fixed rate on absolute deadlines.

Owns ticks, episodes and what is measured about them. Called by `robots.runner` and tests. Knows a world only by its
protocol and the server only by its `Link`. One thread: the world's renderer belongs to it.

    tick t:  wait for its deadline, taking chunks as they come
             every `replan_ticks`: render the views, send them as the observation of tick t, go on (`sync`: when nothing is
             left to run and nothing is under way)
             take the queue's command for t, apply it
             in what is left of the tick: render a view for people, if one is asked for

A simulated world stands still between ticks, so an episode's clock starts when its first chunk is there: only from then on
is the arm under control. The world's own rate is another matter: Meta-World's is 80 Hz, so 20 Hz is quarter speed.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any

from ganglion.client import ReplyError, ReplyTimeoutError
from ganglion.clock import Clock
from ganglion.errors import FieldError, GanglionError
from ganglion.robots.arrivals import Arrivals
from ganglion.robots.catalog import Arm
from ganglion.robots.display import Display
from ganglion.robots.episode import EpisodePlan, EpisodeResult
from ganglion.robots.execution import OLD_SHARE, ChunkExecution, DelayForecast, Outlook
from ganglion.robots.link import MAX_IN_FLIGHT, Answered, Link, Sent
from ganglion.robots.queue import (
    ActionQueue,
    Chunk,
    Command,
    Embodiment,
    Mode,
    QueueConfig,
    QueueCounts,
    Verdict,
)
from ganglion.robots.side import SideChannel
from ganglion.types import Execution

logger = logging.getLogger(__name__)

RESEND_S = 1.0  # the first observation of an episode, while nothing answers it
RETRY_S = 0.1
MIN_WAIT_S = 1e-6  # a clock of whole nanoseconds may never reach a deadline exactly
SEEDS_PER_EPISODE = 1_000


class Pace(StrEnum):
    """How ticks follow each other."""

    REAL_TIME = "real_time"
    LOCKSTEP = "lockstep"  # the world waits for every chunk; runs as fast as the machine can


class OnSafeStop(StrEnum):
    """Who leaves SAFE_STOP."""

    STAY = "stay"  # nobody here: the run ends
    RESUME = "resume"  # the loop, once the server answers again; for simulated arms, where nobody can be hurt


class SafeStoppedError(GanglionError):
    """The arm is in SAFE_STOP, and nobody here may leave it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopConfig:
    """How an arm is controlled."""

    rate_hz: float = 20.0
    replan_ticks: int = 3
    execution: Execution = Execution.NAIVE
    max_in_flight: int = MAX_IN_FLIGHT  # observations under way; 1 = one at a time
    max_ticks: int = 500
    settle_ticks: int = 5  # run on after success
    pace: Pace = Pace.REAL_TIME
    delay_ticks: int = 1  # LOCKSTEP: from observation to the first tick that its chunk is there for
    first_chunk_s: float = 30.0  # an episode without a chunk for so long is an error
    on_safe_stop: OnSafeStop = OnSafeStop.RESUME
    queue: QueueConfig = field(default_factory=QueueConfig)

    def __post_init__(self) -> None:
        for name in ("rate_hz", "replan_ticks", "max_ticks"):
            if getattr(self, name) <= 0:
                raise FieldError(name, expected="more than 0", got=str(getattr(self, name)))
        if self.delay_ticks < 0:
            raise FieldError("delay_ticks", expected="0 or more", got=str(self.delay_ticks))
        if not 1 <= self.max_in_flight <= MAX_IN_FLIGHT:
            expected = f"1 to {MAX_IN_FLIGHT}"
            raise FieldError("max_in_flight", expected=expected, got=str(self.max_in_flight))


class RobotLoop:
    """One robot's control loop over all its episodes."""

    def __init__(
        self,
        link: Link,
        *,
        embodiment: Embodiment,
        clock: Clock,
        config: LoopConfig,
        should_stop: Callable[[], bool],
    ) -> None:
        self._link, self._clock, self._config = link, clock, config
        self._embodiment, self._should_stop = embodiment, should_stop
        is_blending = config.execution is Execution.BLEND
        self._queue = ActionQueue(
            embodiment, replace(config.queue, old_share=OLD_SHARE) if is_blending else config.queue
        )
        self._period_s = 1 / config.rate_hz
        is_lockstep = config.pace is Pace.LOCKSTEP
        # a world that waits is in no hurry, however busy the machine
        self._deadline_ms = None if is_lockstep else config.queue.miss_age_s * 1e3
        self._tick = 0
        self._num_reconnects = 0
        self._arrivals = Arrivals(
            link.road,
            rate_hz=config.rate_hz,
            delay_ticks=config.delay_ticks,
            give_up_ticks=round(config.queue.max_age_s * config.rate_hz),
        )
        self._forecast = DelayForecast(config.delay_ticks if is_lockstep else 1)
        self._execution = self._new_execution()
        self._is_waiting = False  # for an episode's first chunk; the world stands still
        self._next_send = 0
        self._display = Display(clock, rate_hz=config.rate_hz)
        self._fitting: dict[str, Arm] = {}  # the served policy is made for them

    @property
    def counts(self) -> QueueCounts:
        """Of all episodes."""
        return self._queue.counts

    @property
    def mode(self) -> Mode:
        """What the arm does now."""
        return self._queue.mode

    @property
    def execution(self) -> Execution:
        """How chunks are executed."""
        return self._execution.execution

    def attach(self, side: SideChannel) -> None:
        """Tell people about it from now on."""
        self._display.attach(side)

    def resume(self) -> None:
        """Leave SAFE_STOP."""
        self._queue.resume()

    def prepare(self, arm: Arm, plan: EpisodePlan) -> None:
        """Set the episode's scene; a world's first time, make its renderers too. Raises FieldError.

        For robots that shall start together; `run_episode` does it by itself.
        """
        arm.world.reset(plan.seed)
        self._execution = self._new_execution()
        if self._fitting.get(arm.name) is not arm:
            check_policy_fits(self._link.metadata, arm)
            self._check_delay()
            self._fitting[arm.name] = arm
        self._display.prepare(arm)

    def run_episode(self, arm: Arm, plan: EpisodePlan) -> EpisodeResult | None:
        """Run one episode to its end; None when told to stop. Raises what no waiting mends."""
        if arm.embodiment != self._embodiment:
            raise FieldError("world", expected="worlds of one kind of arm a robot", got=arm.name)
        prompt = plan.prompt if plan.prompt is not None else arm.world.prompt
        result = EpisodeResult(
            robot_id=self._link.robot_id,
            world=arm.name,
            task=arm.task,
            seed=plan.seed,
            prompt=prompt,
            execution=self._new_execution().execution.value,
        )
        before, num_reconnects = asdict(self._queue.counts), self._num_reconnects
        self.prepare(arm, plan)
        self._restart()
        wait_start_s = self._clock.now_s()
        if not self._await_first_chunk(arm, result):
            return None
        start_s = self._clock.now_s()
        result.wait_ms = round((start_s - wait_start_s) * 1e3, 3)
        if not self._run_ticks(arm, result, start_s):
            return None
        result.run_s = round(self._clock.now_s() - start_s, 6)
        self._finish(result, before, num_reconnects)
        return result

    def _restart(self) -> None:
        if self._queue.mode is Mode.SAFE_STOP:
            if self._config.on_safe_stop is OnSafeStop.STAY:
                raise SafeStoppedError(
                    f"arm {self._link.robot_id} is in SAFE_STOP: no fresh chunk for "
                    f"{self._config.queue.safe_stop_s * 1e3:.0f} ms",
                    next_step="find out why the server was silent, then resume()",
                )
            self._queue.resume()
        self._queue.restart()
        self._arrivals.clear()
        self._reset_session()

    def _reset_session(self) -> None:
        try:
            self._link.reset()
        except GanglionError as error:  # an old context costs nothing but pages
            logger.info("robot %s: reset: %s", self._link.robot_id, error)

    def _new_execution(self) -> ChunkExecution:
        return ChunkExecution(
            self._config.execution,
            metadata=self._link.metadata,
            embodiment=self._embodiment,
            replan_ticks=self._config.replan_ticks,
        )

    def _check_delay(self) -> None:
        horizon = self._link.metadata.get("horizon")
        is_lockstep = self._config.pace is Pace.LOCKSTEP
        if is_lockstep and horizon is not None and self._config.delay_ticks >= horizon:
            raise FieldError(
                "delay_ticks",
                expected=f"less than the policy's horizon of {horizon}",
                got=str(self._config.delay_ticks),
                next_step="a chunk that is later has no row left to run",
            )

    def _await_first_chunk(self, arm: Arm, result: EpisodeResult) -> bool:
        """Ask until the first chunk is in the queue; false when told to stop."""
        self._is_waiting = True
        try:
            return self._ask_until_running(arm, result)
        finally:
            self._is_waiting = False

    def _ask_until_running(self, arm: Arm, result: EpisodeResult) -> bool:
        real_s = self._link.clock.now_s
        end_s = real_s() + self._config.first_chunk_s
        send_s = 0.0
        while self._queue.mode is not Mode.RUN:
            now_s = real_s()
            if self._should_stop():
                return False
            if now_s > end_s:
                raise ReplyTimeoutError(
                    f"no usable chunk for {arm.name} within {self._config.first_chunk_s:g} s: "
                    f"{len(result.errors)} kinds of errors {result.errors}, "
                    f"{result.num_chunks} chunks that came late or were refused",
                    next_step="see the server's log; `ganglion doctor` checks this machine",
                )
            if now_s >= send_s:
                is_sent = self._send_observation(arm, result)
                send_s = now_s + (RESEND_S if is_sent else RETRY_S)
            answer = self._link.poll(min(RETRY_S, max(0.0, send_s - now_s)))
            if isinstance(answer, ReplyError):
                send_s = real_s() + RETRY_S
                if answer.field == "executed_until":  # the reset did not get through
                    self._reset_session()
            self._take(answer, result)
            self._display.report(arm, result, self._queue, self._tick)
        return True

    def _run_ticks(self, arm: Arm, result: EpisodeResult, start_s: float) -> bool:
        config, world = self._config, arm.world
        self._next_send = 1
        for index in range(config.max_ticks):
            deadline_s = start_s + index * self._period_s
            self._wait_until(deadline_s, result)
            late_s = self._clock.now_s() - deadline_s
            result.add_sample("lateness", late_s * 1e3)
            num_overruns = int(late_s / self._period_s)
            if num_overruns:  # this process was held up: the world stood still meanwhile
                start_s += num_overruns * self._period_s
                self._queue.count_overrun(num_overruns)
                result.num_overruns += num_overruns
            if self._should_stop():
                return False
            self._take_arrived(result)
            if self._is_time_to_send(index):
                self._next_send = index + config.replan_ticks
                self._send_observation(arm, result)
                self._take_arrived(result)
            measured = None if arm.measure is None else arm.measure()
            command = self._queue.step(self._tick, now_s=self._clock.now_s(), measured=measured)
            world.apply(command.action)
            self._tick += 1
            self._note(command, result)
            if world.success and result.success_tick is None:
                result.success_tick, result.is_success = index + 1, True
            self._display.report(arm, result, self._queue, self._tick)
            self._display.show(arm, start_s + (index + 1) * self._period_s)
            if result.success_tick is not None and index + 1 >= (
                result.success_tick + config.settle_ticks
            ):
                break
        return True

    # --- observations out, chunks in ---------------------------------------------------------------------------

    def _is_time_to_send(self, index: int) -> bool:
        if self.execution is Execution.SYNC:
            return not len(self._queue.slots()) and not self._num_under_way()
        return index >= self._next_send and self._num_under_way() < self._config.max_in_flight

    def _num_under_way(self) -> int:
        is_lockstep = self._config.pace is Pace.LOCKSTEP
        return len(self._arrivals) if is_lockstep else self._link.num_in_flight

    def _outlook(self) -> Outlook:
        """What will run, and when the chunk of an observation of now is to be expected."""
        delay_ticks = 0 if self._is_waiting else self._forecast.ticks
        if self._config.pace is Pace.LOCKSTEP:
            next_tick = self._arrivals.next_tick
        else:
            oldest_tick = self._link.oldest_tick
            next_tick = None if oldest_tick is None else oldest_tick + self._forecast.least_ticks
        return Outlook(
            tick=self._tick,
            plan=self._queue.slots(),
            delay_ticks=delay_ticks,
            num_certain=delay_ticks if next_tick is None else max(0, next_tick - self._tick),
        )

    def _send_observation(self, arm: Arm, result: EpisodeResult) -> bool:
        is_lockstep = self._config.pace is Pace.LOCKSTEP and not self._is_waiting
        if is_lockstep and not self._arrivals.depart(self._tick):
            return True  # a robot cannot know
        obs_s, obs_ns = self._clock.now_s(), self._clock.now_ns()
        views = arm.world.observe()
        result.add_sample("render", (self._clock.now_s() - obs_s) * 1e3)
        told = self._execution.told(views, self._outlook())
        is_sent = self._link.send(
            told.views,
            sent=Sent(tick=self._tick, obs_s=obs_s, first_tick=told.first_tick),
            prompt=result.prompt,
            obs_time_ns=obs_ns,
            control_hz=self._config.rate_hz,
            deadline_ms=self._deadline_ms,
            seed=result.seed * SEEDS_PER_EPISODE + result.num_ticks % SEEDS_PER_EPISODE,
            **told.hints,
        )
        if is_lockstep:
            self._await_answer(result)
        return is_sent

    def _wait_until(self, deadline_s: float, result: EpisodeResult) -> None:
        if self._config.pace is Pace.LOCKSTEP:
            self._clock.sleep_until(deadline_s)
            return
        while (left_s := deadline_s - self._clock.now_s()) > MIN_WAIT_S:
            self._take(self._link.poll(left_s), result)

    def _take_arrived(self, result: EpisodeResult) -> None:
        if self._config.pace is Pace.LOCKSTEP:
            for chunk in self._arrivals.due(self._tick):
                self._offer(chunk, result)
            return
        while (answer := self._link.poll(0.0)) is not None:
            self._take(answer, result)

    def _await_answer(self, result: EpisodeResult) -> None:
        """LOCKSTEP: the world waits here for the answer to what was just sent, or for the connection to come back."""
        end_s = self._link.clock.now_s() + self._config.first_chunk_s
        while not self._should_stop():
            answer = self._link.poll(RETRY_S)
            self._note_reconnect()
            if isinstance(answer, ReplyError):
                self._take(answer, result)
                return
            if answer is not None:
                self._arrivals.add(answer)
                return
            if self._link.clock.now_s() > end_s:
                raise ReplyTimeoutError(
                    f"no chunk within {self._config.first_chunk_s:g} s",
                    next_step="see the server's log",
                )
            if self._link.num_in_flight == 0 and self._link.is_connected:
                return  # lost with its connection: the next observation asks again

    def _take(self, answer: Answered | ReplyError | None, result: EpisodeResult) -> None:
        self._note_reconnect()
        if isinstance(answer, ReplyError):
            result.add_error(answer.code.value)
            logger.info("robot %s: %s", self._link.robot_id, answer)
        elif answer is not None:
            self._offer(answer, result)

    def _note_reconnect(self) -> None:
        if self._link.num_reconnects != self._num_reconnects:
            self._num_reconnects = self._link.num_reconnects
            self._queue.fence()  # the first chunk from here on rests on a new observation

    def _offer(self, answer: Answered, result: EpisodeResult) -> None:
        reply, context = answer.reply, answer.context
        result.num_chunks += 1
        self._display.note_answer(answer)
        result.add_sample("round_trip", answer.round_trip_ms)
        result.add_sample("server", reply.server_ms)
        for stage in ("queue", "perceive", "generate", "wait", "infer"):
            result.add_sample(stage, getattr(reply.timing, f"{stage}_ms"))
        if not self._is_waiting:
            self._forecast.add(self._tick - answer.sent.tick)
        chunk = self._execution.placed(
            Chunk(
                actions=reply.actions,
                obs_tick=context.tick,
                obs_s=context.obs_s,
                version=reply.model_version,
                request=reply.seq,
                first_tick=context.first_tick,
            ),
            next_tick=self._queue.next_tick,
        )
        now_s = self._clock.now_s()
        may_resume = self._config.on_safe_stop is OnSafeStop.RESUME
        if (
            may_resume
            and self._queue.mode is Mode.SAFE_STOP
            and self._queue.is_good(chunk, now_s=now_s)
        ):
            self._queue.resume()  # the server is back; the next observation's chunk moves the arm
        verdict = self._queue.offer(chunk, now_s=now_s)
        if verdict is Verdict.REFUSED:
            logger.warning("robot %s: refused chunk %d", self._link.robot_id, reply.seq)

    # --- what people and results see ---------------------------------------------------------------------------

    def _note(self, command: Command, result: EpisodeResult) -> None:
        self._display.note_tick(command)
        result.num_ticks += 1
        if command.age_s is not None:
            result.ages_ms.append(round(command.age_s * 1e3, 3))

    def _finish(self, result: EpisodeResult, before: dict[str, int], num_reconnects: int) -> None:
        after = self._queue.counts
        result.num_ticks = after.ticks - before["ticks"]
        result.num_misses = after.misses - before["misses"]
        result.num_holds = after.holds - before["holds"]
        result.num_refused = after.refused - before["refused"]
        result.num_late = after.late - before["late"]
        result.num_safe_stops = after.safe_stops - before["safe_stops"]
        result.num_reconnects = self._num_reconnects - num_reconnects
        self._display.note_episode(is_success=result.is_success)


def check_policy_fits(metadata: Mapping[str, Any], arm: Arm) -> None:
    """Raises FieldError when the served policy takes other views or gives other actions than this arm's."""
    seen = {key: list(value.shape) for key, value in arm.world.observe().items()}
    wanted = {**metadata.get("views", {}), **metadata.get("state", {})}
    for key, shape in wanted.items():
        if seen.get(key) != list(shape):
            raise FieldError(
                key,
                expected=f"{list(shape)} by policy {metadata.get('policy')!r}",
                got=f"{seen.get(key, 'nothing')} from {arm.name}",
                next_step="serve a policy that was made for this world",
            )
    dim = len(arm.embodiment.action_low)
    if metadata.get("action_dim") != dim:
        raise FieldError(
            "action_dim", expected=f"{dim} for {arm.name}", got=str(metadata.get("action_dim"))
        )
