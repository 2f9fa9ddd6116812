"""Fleet: one process a robot, their episodes handed out one by one, their results collected as lines of JSON.

Called by the CLI (`demo`, `run`), the benches and tests. Knows processes and plans; a robot's inside is `robots.runner`.
A robot that dies is reported, the others live on; when the fleet dies, its robots end by themselves.

    with Fleet(FleetConfig(url=url, robots=("arm-1", "arm-2")), own_episodes(...)) as fleet:
        fleet.wait()
        fleet.results()
"""

import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self

from ganglion.clock import Clock, RealClock
from ganglion.errors import FieldError
from ganglion.robots.catalog import check_world
from ganglion.robots.episode import EpisodePlan, EpisodeResult
from ganglion.robots.impairment import Impairment
from ganglion.robots.loop import LoopConfig
from ganglion.robots.runner import END, START, RunnerConfig
from ganglion.types import Execution

logger = logging.getLogger(__name__)

STOP_S = 8.0  # more than a runner's grace
COMMON_START_S = 120.0  # at most so long robots wait for each other
MAX_STDERR_LINES = 20
SINGLE_THREADED = dict.fromkeys(
    (
        "OMP_NUM_THREADS",
        "OPENBLAS_NUM_THREADS",
        "MKL_NUM_THREADS",
        "NUMEXPR_NUM_THREADS",
        "LP_NUM_THREADS",
    ),
    "1",
)

NextPlan = Callable[[int], EpisodePlan | None]  # robot's index -> its next episode, None = no more


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetConfig:
    """Which robots, which server, how they are controlled.

    `cores[i]` and `executions[i]`, if given, are where robot i runs and what it does while a chunk is computed.
    """

    url: str
    robots: tuple[str, ...]  # their ids
    api_key: str | None = None
    loop: LoopConfig = field(default_factory=LoopConfig)
    has_side_channel: bool = False
    executions: tuple[Execution, ...] = ()
    cores: tuple[tuple[int, ...], ...] = ()
    niceness: int = 0
    connect_s: float = 30.0  # how long robots try to reach the server at their start
    impairment: Impairment = field(default_factory=Impairment)  # of every robot's link
    has_common_start: bool = False  # first episodes begin when all scenes are ready

    def __post_init__(self) -> None:
        if not self.robots or len(set(self.robots)) != len(self.robots):
            raise FieldError("robots", expected="one or more different ids", got=str(self.robots))
        for field_name in ("cores", "executions"):
            given = getattr(self, field_name)
            if given and len(given) != len(self.robots):
                raise FieldError(
                    field_name,
                    expected=f"one for each of {len(self.robots)} robots",
                    got=str(given),
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class RobotStatus:
    """One robot of the fleet, now. `counts`: its queue's, over all its episodes."""

    robot_id: str
    pid: int
    is_alive: bool
    mode: str = ""
    task: str = ""
    counts: dict[str, int] = field(default_factory=dict)
    num_episodes: int = 0
    failure: str = ""  # why it ended, when it ended before its time


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetResult:
    """What came of a fleet."""

    episodes: tuple[EpisodeResult, ...]
    robots: tuple[RobotStatus, ...]

    @property
    def failures(self) -> tuple[RobotStatus, ...]:
        """Robots that ended before their time."""
        return tuple(robot for robot in self.robots if robot.failure)


def own_episodes(
    worlds: Sequence[Sequence[str]],
    *,
    first_seed: int,
    num_episodes: int | None,
    prompt: str | None = None,
) -> NextPlan:
    """Every robot i goes round `worlds[i]`, for `num_episodes` or without end, with seeds of its own rising by one."""
    for names in worlds:
        for name in names:
            check_world(name)
    given = [0] * len(worlds)

    def next_plan(robot: int) -> EpisodePlan | None:
        index = given[robot]
        if num_episodes is not None and index >= num_episodes:
            return None
        given[robot] += 1
        names = worlds[robot]
        seed = first_seed + robot + index * len(worlds)
        return EpisodePlan(world=names[index % len(names)], seed=seed, prompt=prompt)

    return next_plan


def shared_episodes(plans: Sequence[EpisodePlan]) -> NextPlan:
    """All robots work the same list off; a robot stays in its world while that has episodes left."""
    for plan in plans:
        check_world(plan.world)
    left: dict[str, deque[EpisodePlan]] = {}
    for plan in plans:
        left.setdefault(plan.world, deque()).append(plan)
    current: dict[int, str] = {}

    def next_plan(robot: int) -> EpisodePlan | None:
        name = current.get(robot)
        if name is None or not left[name]:
            if not any(left.values()):
                return None
            busy = [world for other, world in current.items() if other != robot]
            name = max(left, key=lambda world: len(left[world]) / (1 + busy.count(world)))
            current[robot] = name
        return left[name].popleft()

    return next_plan


class Fleet:
    """Running robots. `start` returns at once; every method may be called from any thread."""

    def __init__(
        self,
        config: FleetConfig,
        next_plan: NextPlan,
        *,
        on_result: Callable[[EpisodeResult], None] | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._config, self._next_plan, self._on_result = config, next_plan, on_result
        self._clock = clock or RealClock()
        self._lock = threading.Lock()
        self._plan_lock = threading.Lock()
        self._results: list[EpisodeResult] = []
        self._robots: list[_Robot] = []
        self._unprepared = set(range(len(config.robots)))  # for whose scenes the others wait
        self._prepared = threading.Condition()
        self._is_stopping = False

    def start(self) -> None:
        """Start every process. When one cannot be started, the others are stopped."""
        try:
            for index, robot_id in enumerate(self._config.robots):
                robot = _Robot(robot_id, index, self._runner_config(index), self)
                self._robots.append(robot)
        except BaseException:
            self.stop()
            raise

    def results(self) -> tuple[EpisodeResult, ...]:
        """Episodes that ended so far, in order of their end."""
        with self._lock:
            return tuple(self._results)

    def statuses(self) -> tuple[RobotStatus, ...]:
        """Every robot, now."""
        with self._lock:
            return tuple(robot.status for robot in self._robots)

    def result(self) -> FleetResult:
        """Results and robots, now."""
        return FleetResult(episodes=self.results(), robots=self.statuses())

    @property
    def is_running(self) -> bool:
        """Is a robot still alive?"""
        return any(robot.status.is_alive for robot in self._robots)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Until all robots have ended, or `timeout_s` is over; true when they have. Ctrl-C gets through."""
        end_s = None if timeout_s is None else self._clock.now_s() + timeout_s
        for robot in self._robots:
            while robot.thread.is_alive():
                left_s = 0.2 if end_s is None else min(0.2, end_s - self._clock.now_s())
                if left_s <= 0:
                    return False
                robot.thread.join(left_s)
        return True

    def kill(self, robot_id: str) -> None:
        """End one robot's process hard, as a crash would. Raises FieldError."""
        for robot in self._robots:
            if robot.robot_id == robot_id:
                robot.process.kill()
                return
        raise FieldError("robot_id", expected=f"one of {self._config.robots}", got=repr(robot_id))

    def stop(self) -> None:
        """End all robots: each within a tick, hard after some seconds. Returns when they are gone."""
        self._is_stopping = True
        with self._prepared:
            self._prepared.notify_all()
        for robot in self._robots:
            robot.hang_up()
        self.wait(STOP_S)
        for robot in self._robots:
            if robot.process.poll() is None:
                robot.process.kill()
        self.wait(STOP_S)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    # --- called by the robots' threads --------------------------------------------------------------------------

    def plan_for(self, index: int) -> EpisodePlan | None:
        """The next episode of a robot."""
        if self._is_stopping:
            return None
        with self._plan_lock:
            return self._next_plan(index)

    def note_prepared(self, index: int) -> None:
        """A robot's scene is ready, or it has ended: the others need not wait for it."""
        with self._prepared:
            self._unprepared.discard(index)
            self._prepared.notify_all()

    def await_start(self) -> None:
        """With a common start: until every robot is prepared, has ended, or the fleet stops."""
        if not self._config.has_common_start:
            return
        with self._prepared:
            is_complete = self._prepared.wait_for(
                lambda: not self._unprepared or self._is_stopping, COMMON_START_S
            )
        if not is_complete:
            logger.warning("started without %d robots that were not ready", len(self._unprepared))

    def take_result(self, robot: "_Robot", result: EpisodeResult) -> None:
        """An episode ended."""
        with self._lock:
            self._results.append(result)
            robot.status = replace(robot.status, num_episodes=robot.status.num_episodes + 1)
        if self._on_result is not None:
            self._on_result(result)

    def update(self, robot: "_Robot", **changes: Any) -> None:
        """A robot's status changed."""
        with self._lock:
            robot.status = replace(robot.status, **changes)

    @property
    def is_stopping(self) -> bool:
        """Has `stop` been called?"""
        return self._is_stopping

    def _runner_config(self, index: int) -> RunnerConfig:
        config, loop = self._config, self._config.loop
        if config.executions:
            loop = replace(loop, execution=config.executions[index])
        return RunnerConfig(
            robot_id=config.robots[index],
            url=config.url,
            api_key=config.api_key,
            loop=loop,
            has_side_channel=config.has_side_channel,
            cores=config.cores[index] if config.cores else (),
            niceness=config.niceness,
            connect_s=config.connect_s,
            impairment=config.impairment,
        )


class _Robot:
    """One process, the thread that answers it and the thread that keeps the end of what it complained about."""

    def __init__(self, robot_id: str, index: int, config: RunnerConfig, fleet: Fleet) -> None:
        self.robot_id, self._index, self._fleet = robot_id, index, fleet
        self._complaints: deque[str] = deque(maxlen=MAX_STDERR_LINES)
        self._is_finished = False
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ganglion.robots.runner"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | SINGLE_THREADED,
            start_new_session=True,  # Ctrl-C is for the fleet, which ends its robots in order
        )
        self.status = RobotStatus(robot_id=robot_id, pid=self.process.pid, is_alive=True)
        self._send(config.to_json())
        self._listener = threading.Thread(target=self._keep_complaints, daemon=True)
        self._listener.start()
        self.thread = threading.Thread(target=self._serve, name=f"robot-{robot_id}", daemon=True)
        self.thread.start()

    def hang_up(self) -> None:
        """The end of its stdin: the robot stops within a tick."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()

    def _serve(self) -> None:
        try:
            failure = self._answer()
        except Exception as error:  # of a caller's function, of a broken line: ends this robot only
            logger.exception("robot %s: defect while it was answered", self.robot_id)
            failure = f"ended by its fleet: {type(error).__name__}: {error}"
            self.process.kill()
        self._fleet.note_prepared(self._index)
        code = self.process.wait()
        self._listener.join()
        self.hang_up()
        assert self.process.stdout is not None
        self.process.stdout.close()
        is_wanted = self._is_finished or self._fleet.is_stopping
        if not failure and (code > 0 or not is_wanted):
            failure = f"robot process ended with {code}: {' | '.join(self._complaints)}"
        if failure:
            logger.warning("robot %s: %s", self.robot_id, failure)
        self._fleet.update(self, is_alive=False, failure=failure)

    def _answer(self) -> str:
        """Until the process says nothing any more; returns why it failed, if it said so."""
        assert self.process.stdout is not None
        failure = ""
        for line in self.process.stdout:
            kind, body = next(iter(json.loads(line).items()))
            match kind:
                case "ready":
                    plan = self._fleet.plan_for(self._index)
                    self._is_finished = plan is None
                    self._send(END if plan is None else plan.to_json())
                case "prepared":
                    self._fleet.note_prepared(self._index)
                    self._fleet.await_start()
                    self._send(START)
                case "status":
                    mode, task = body.pop("mode"), body.pop("task")
                    self._fleet.update(self, mode=mode, task=task, counts=body)
                case "result":
                    self._fleet.take_result(self, EpisodeResult.from_json(body))
                case "failed":
                    failure = body["error"]
                    if body["next_step"]:
                        failure += f"; next: {body['next_step']}"
        return failure

    def _send(self, body: Any) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(body) + "\n")
            self.process.stdin.flush()
        except (BrokenPipeError, ValueError):
            logger.info("robot %s does not listen any more", self.robot_id)

    def _keep_complaints(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as lines:
            self._complaints.extend(line.rstrip() for line in lines)


def run_fleet(
    config: FleetConfig,
    next_plan: NextPlan,
    *,
    on_result: Callable[[EpisodeResult], None] | None = None,
) -> FleetResult:
    """Run a fleet to its end. Ctrl-C ends its robots, then goes on as KeyboardInterrupt."""
    with Fleet(config, next_plan, on_result=on_result) as fleet:
        fleet.wait()
        return fleet.result()
