"""Runner: one robot as a process of its own: `python -m ganglion.robots.runner`. Started by `robots.fleet`, and only by it.

Lines of JSON: its config and then one plan after another come in on stdin, statuses and results go out on the pipe that
stdout was. Before its first episode it says that it is prepared and waits for the start, which the fleet gives. The end of
stdin ends it: no robot outlives its fleet. Single-threaded math, because robots share a machine.
"""

import json
import logging
import os
import sys
import threading
from dataclasses import asdict, dataclass, field
from typing import Any, TextIO

from ganglion.clock import Clock, RealClock, SimulatedClock
from ganglion.errors import GanglionError
from ganglion.robots.catalog import Arm, open_arm
from ganglion.robots.episode import EpisodePlan, EpisodeResult
from ganglion.robots.impairment import Impairment
from ganglion.robots.link import Link
from ganglion.robots.loop import LoopConfig, OnSafeStop, Pace, RobotLoop
from ganglion.robots.queue import QueueConfig
from ganglion.robots.side import SideChannel
from ganglion.types import Execution

logger = logging.getLogger(__name__)

STATUS_S = 0.5
MAX_OPEN_WORLDS = 4  # opening one takes a second or more, keeping it some 30 MB
GRACE_S = 5.0  # after the end of stdin; then a robot that hangs is ended hard
EXIT_DONE, EXIT_FAILED = 0, 1
START = "start"  # a line among the plans: the first episode may begin
END = None  # the same: there are no more plans


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerConfig:
    """One robot: who it is, which server, how it is controlled."""

    robot_id: str
    url: str
    api_key: str | None
    loop: LoopConfig
    has_side_channel: bool
    cores: tuple[int, ...]  # () = wherever the system puts it
    niceness: int
    connect_s: float  # how long to try to reach the server at the start
    impairment: Impairment = field(default_factory=Impairment)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, body: dict[str, Any]) -> "RunnerConfig":
        loop = dict(body["loop"])
        loop["pace"], loop["on_safe_stop"] = Pace(loop["pace"]), OnSafeStop(loop["on_safe_stop"])
        loop["queue"] = QueueConfig(**loop["queue"])
        loop["execution"] = Execution(loop["execution"])
        parts = {
            "cores": tuple(body["cores"]),
            "loop": LoopConfig(**loop),
            "impairment": Impairment.from_json(body["impairment"]),
        }
        return cls(**{**body, **parts})


class Runner:
    """One robot's life: connect, then an episode for every plan."""

    def __init__(self, config: RunnerConfig, *, plans: TextIO, out: TextIO) -> None:
        self._config, self._plans, self._out = config, plans, out
        self._out_lock = threading.Lock()
        self._next_plan: EpisodePlan | None = None
        self._changed = threading.Condition()
        self._may_start = False
        self._is_over = threading.Event()
        self._is_done = threading.Event()
        self._arm: Arm | None = None  # of the running episode
        self._open_arms: dict[str, Arm] = {}  # oldest use first
        self._loop: RobotLoop | None = None
        self._side: SideChannel | None = None

    def run(self) -> None:
        """Until there are no more plans."""
        threading.Thread(target=self._read_plans, name="plans", daemon=True).start()
        threading.Thread(target=self._send_statuses, name="status", daemon=True).start()
        config = self._config
        link = Link(
            config.url,
            robot_id=config.robot_id,
            api_key=config.api_key,
            is_real_time=config.loop.pace is Pace.REAL_TIME,
        )
        link.impair(config.impairment)
        try:
            link.open(timeout_s=config.connect_s)
            while (plan := self._ask()) is not None:
                result = self._run_plan(plan, link)
                if result is None:
                    break
                self._say_status()
                self._say("result", result.to_json())
        finally:
            self._is_done.set()
            if self._side is not None:
                self._side.close()
            link.close()
            for arm in self._open_arms.values():
                arm.world.close()

    def _run_plan(self, plan: EpisodePlan, link: Link) -> EpisodeResult | None:
        config = self._config
        arm = self._arm = self._arm_for(plan.world, link)
        if self._loop is None:
            clock: Clock = RealClock() if config.loop.pace is Pace.REAL_TIME else SimulatedClock()
            self._loop = RobotLoop(
                link,
                embodiment=arm.embodiment,
                clock=clock,
                config=config.loop,
                should_stop=self._is_over.is_set,
            )
            if config.has_side_channel:
                hello = {
                    "robot_id": link.robot_id,
                    "session_id": link.session_id,
                    "world": arm.world_name,
                    "task": arm.task,
                    "prompt": plan.prompt if plan.prompt is not None else arm.world.prompt,
                    "control_hz": config.loop.rate_hz,
                }
                self._side = SideChannel(
                    config.url,
                    hello=hello,
                    impairment=config.impairment,
                    on_impair=link.impair,
                    api_key=config.api_key,
                )
                self._loop.attach(self._side)
            self._loop.prepare(arm, plan)
            self._await_start()
        return self._loop.run_episode(arm, plan)

    def _await_start(self) -> None:
        self._say("prepared", {})
        with self._changed:
            while not self._may_start and not self._is_over.is_set():
                self._changed.wait()

    def _arm_for(self, world: str, link: Link) -> Arm:
        arm = self._open_arms.pop(world, None)
        if arm is None:
            while len(self._open_arms) >= MAX_OPEN_WORLDS:
                self._open_arms.pop(next(iter(self._open_arms))).world.close()
            arm = open_arm(world, views=link.metadata.get("views", {}))
        self._open_arms[world] = arm
        return arm

    def _ask(self) -> EpisodePlan | None:
        self._say("ready", {})
        with self._changed:
            while self._next_plan is None and not self._is_over.is_set():
                self._changed.wait()
            plan, self._next_plan = self._next_plan, None
            return None if self._is_over.is_set() else plan

    def _read_plans(self) -> None:
        for line in self._plans:
            body = json.loads(line)
            if body is END:
                break
            with self._changed:
                if body == START:
                    self._may_start = True
                else:
                    self._next_plan = EpisodePlan.from_json(body)
                self._changed.notify()
        with self._changed:
            self._is_over.set()
            self._changed.notify()
        if not self._is_done.wait(GRACE_S):
            os._exit(EXIT_FAILED)

    def _send_statuses(self) -> None:
        while not self._is_done.wait(STATUS_S):
            self._say_status()

    def _say_status(self) -> None:
        loop, arm = self._loop, self._arm
        if loop is not None and arm is not None:
            body = {"mode": loop.mode.value, "task": arm.task, **asdict(loop.counts)}
            self._say("status", body)

    def _say(self, kind: str, body: dict[str, Any]) -> None:
        with self._out_lock:
            try:
                self._out.write(json.dumps({kind: body}) + "\n")
                self._out.flush()
            except (BrokenPipeError, ValueError):
                self._is_over.set()  # nobody listens any more


def main() -> int:
    """The process. Returns its exit status."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to stderr: the pipe carries our lines only
    body = sys.stdin.readline()
    if not body:
        return EXIT_FAILED
    config = RunnerConfig.from_json(json.loads(body))
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    if config.cores:
        os.sched_setaffinity(0, config.cores)
    if config.niceness:
        os.nice(config.niceness)
    runner = Runner(config, plans=sys.stdin, out=out)
    try:
        runner.run()
    except GanglionError as error:
        failure = {"error": str(error), "next_step": error.advice, "code": error.code.value}
        out.write(json.dumps({"failed": failure}) + "\n")
        out.flush()
        return EXIT_FAILED
    return EXIT_DONE


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)  # renderers and daemon threads have nothing to say any more
