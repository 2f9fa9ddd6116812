"""Hub: what robots tell about themselves on the side channel, one entry a session. Never actions.

Called by `serve.dashboard` on the event loop's thread only. Knows neither sockets, nor the Service,
nor the page that draws it. A robot's own end is `robots.side`.

The side channel is the websocket `/v1/robots/side`. It is optional: a robot is controlled the same
without it. Every message is one binary websocket message: a msgpack map. A robot's has exactly ONE
key, which names its kind, and at most `side.MAX_MESSAGE_BYTES` (288 KiB). Unknown keys are ignored,
counted and logged once; missing ones are refused. "?" marks what may be absent or nil.

Robot -> server
    first   {"hello": {
        "robot_id": str, "session_id": str,  1..128 bytes each; the ones its observations carry
        "world": str, "task": str,           0..64 bytes each: "metaworld", "drawer-open"
        "prompt": str,                       the robot's own instruction, 0..4096 bytes
        "control_hz": float,                 the rate that it wants to hold, 0 < hz <= 1000
        "impair": {"delay_ms": float, "jitter_ms": float, "loss": float}?
                                             how bad it makes its own link just now; its presence
                                             says that it obeys `impair` below
    }}
    then    {"telemetry": {                  10 a second while watched, else 1; the newest wins
        "tick": int,                         control ticks run since the robot started
        "queue": [[float, ...], ...],        actions left, next one first: row i is for tick
                                             `tick + i`; 0..64 rows of 1..32 numbers, one length
        "rate_hz": float,                    control rate measured over the last second or so
        "obs_age_ms": float?,                age of the observation behind the action of the last
                                             tick, when it was applied; nil while holding
        "num_misses": int,                   ticks without a valid action whose observation is at
                                             most 250 ms old
        "num_holds": int,                    ticks at which the queue was dry and the robot held
        "episode": int,                      index of the running episode, from 0
        "num_episodes": int,                 finished episodes
        "num_successes": int,                those of them that were solved
        "is_success": bool,                  the running episode is solved
        "task": str?, "prompt": str?,        when they changed since the hello
        "reply_prompt": str?,                the prompt that the newest reply says it followed
        "latency_ms": float?,                newest chunk: observation sent -> chunk received
    }}
    and     {"jpeg": bytes}                  only while watched, at most `max_view_hz`, at most
                                             256 KiB, a whole JPEG, upright, any size (224 x 224
                                             is plenty); the newest wins
Server -> robot
    {"watch": bool, "max_view_hz": float}    right after the hello (its acknowledgement) and at
                                             every change: whether somebody looks, and how many
                                             views a second at most (10 for a few robots, fewer
                                             when many share a machine). Until then: nobody does
    {"type": "impair", "delay_ms": float, "jitter_ms": float, "loss": float}
                                             only to a robot that can: make your own link to the
                                             server this bad until the next one, and say so in later
                                             hellos. delay_ms are added to the round trip, half on
                                             each way, and up to jitter_ms more on top
                                             (0..2000 both); on either way a share `loss` (0..1) of
                                             the messages is lost. All zero: as it is
    {"error": {"code": str, "message": str, "next_step": str}}
                                             the message before was refused; the connection
                                             lives on, except after a refused hello

Counters are cumulative since the robot's start. All numbers are finite and none is negative, except
the actions' values. Close codes: 1003 text message, 1002 not one msgpack map, 1008 refused hello or
another connection of the same robot took over, 1009 too large. A robot that is closed with anything
else reconnects with a growing pause. The hub forgets a robot when its connection ends.
"""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ganglion.clock import Clock
from ganglion.errors import FieldError, OverloadedError, SessionConflictError
from ganglion.serve.side import (
    MAX_VIEW_HZ,
    Hello,
    Impair,
    Telemetry,
    Watch,
    kind_of,
    parse_hello,
    parse_jpeg,
    parse_telemetry,
    unknown_keys,
)
from ganglion.types import SessionId

logger = logging.getLogger(__name__)

TOTAL_VIEW_HZ = 60.0  # of all robots together: rendering and decoding share the robots' cores
MAX_LOGGED_KEYS = 64


@dataclass(slots=True, kw_only=True)
class Robot:
    """One connected robot: the newest of everything. Written by the hub only."""

    hello: Hello
    tell: Callable[[Watch | Impair], None]
    take_over: Callable[[], None]
    impair: Impair | None  # what it does to its link; None: it cannot
    watch: Watch | None = None  # what it was told last
    telemetry: Telemetry | None = None
    telemetry_s: float = -math.inf
    jpeg: bytes | None = None
    jpeg_version: int = 0
    jpeg_s: float = -math.inf


class Hub:
    """All connected robots, bounded by `max_robots`."""

    def __init__(self, clock: Clock, *, max_robots: int = 256) -> None:
        self._clock = clock
        self._max_robots = max_robots
        self._robots: dict[SessionId, Robot] = {}
        self._num_watchers = 0
        self._logged_keys: set[str] = set()
        self.num_unknown_keys = 0
        self.num_dropped_views = 0

    @property
    def robots(self) -> tuple[Robot, ...]:
        """Connected robots in order of arrival."""
        return tuple(self._robots.values())

    @property
    def num_watchers(self) -> int:
        """Browsers that look."""
        return self._num_watchers

    def speaker(self, session_id: SessionId) -> Robot | None:
        """The robot that speaks for this session."""
        return self._robots.get(session_id)

    def join(
        self,
        message: Mapping[Any, Any],
        *,
        tell: Callable[[Watch | Impair], None],
        take_over: Callable[[], None],
    ) -> Robot:
        """Admit the robot that sent `message`, its hello, and tell it whether it is watched.

        `tell` and `take_over` (a newer connection of the same robot replaced this one) are called
        on this thread and must return at once. Raises FieldError, SessionConflictError when another
        robot speaks for the session, OverloadedError.
        """
        hello = parse_hello(message)
        self._count_unknown(unknown_keys(message))
        old = self._robots.get(hello.session_id)
        if old is not None:
            if old.hello.robot_id != hello.robot_id:
                raise SessionConflictError(
                    hello.session_id, owner=old.hello.robot_id, asked_by=hello.robot_id
                )
            del self._robots[hello.session_id]
            old.take_over()
        if len(self._robots) >= self._max_robots:
            raise OverloadedError("the side channel", limit=self._max_robots, retry_after_s=5.0)
        robot = Robot(hello=hello, tell=tell, take_over=take_over, impair=hello.impair)
        self._robots[hello.session_id] = robot
        self._tell_all()
        return robot

    def receive(self, robot: Robot, message: Mapping[Any, Any]) -> None:
        """Take one message after the hello. Raises FieldError; the last good state stays."""
        if kind_of(message) == "jpeg":
            self._keep_view(robot, parse_jpeg(message))
        else:
            robot.telemetry = parse_telemetry(message)
            robot.telemetry_s = self._clock.now_s()
        self._count_unknown(unknown_keys(message))

    def impair(self, session_id: SessionId, impair: Impair) -> None:
        """Ask the robot that speaks for the session to make its link this bad. Raises FieldError when it cannot."""
        robot = self._robots.get(session_id)
        if robot is None or robot.impair is None:
            raise FieldError(
                "session_id",
                expected="a session whose robot can disturb its own link",
                got=repr(session_id),
                next_step="simulated arms can; a robot says so in its hello on the side channel",
            )
        robot.impair = impair
        robot.tell(impair)

    def leave(self, robot: Robot) -> None:
        """Forget a robot; does nothing when it was replaced already."""
        if self._robots.get(robot.hello.session_id) is robot:
            del self._robots[robot.hello.session_id]
            self._tell_all()

    def add_watcher(self) -> None:
        """Somebody looks: robots start to render."""
        self._num_watchers += 1
        self._tell_all()

    def remove_watcher(self) -> None:
        """Pair of `add_watcher`: when the last one leaves, robots stop and views are dropped."""
        assert self._num_watchers > 0, "remove_watcher without add_watcher"
        self._num_watchers -= 1
        if self._num_watchers == 0:
            for robot in self._robots.values():
                robot.jpeg = None
        self._tell_all()

    def _tell_all(self) -> None:
        share_hz = TOTAL_VIEW_HZ / max(1, len(self._robots))
        watch = Watch(
            is_watched=self._num_watchers > 0, max_view_hz=round(min(MAX_VIEW_HZ, share_hz), 2)
        )
        for robot in tuple(self._robots.values()):
            if robot.watch != watch:
                robot.watch = watch
                robot.tell(watch)

    def _keep_view(self, robot: Robot, jpeg: bytes) -> None:
        assert robot.watch is not None, "a robot is told at its hello"
        now_s = self._clock.now_s()
        # Half a period of grace, so that jitter costs a well-behaved robot nothing.
        is_too_soon = now_s - robot.jpeg_s < 0.5 / robot.watch.max_view_hz
        if self._num_watchers == 0 or is_too_soon:
            self.num_dropped_views += 1
            return
        robot.jpeg, robot.jpeg_s = jpeg, now_s
        robot.jpeg_version += 1

    def _count_unknown(self, names: tuple[str, ...]) -> None:
        self.num_unknown_keys += len(names)
        for name in names:
            if name not in self._logged_keys and len(self._logged_keys) < MAX_LOGGED_KEYS:
                self._logged_keys.add(name)
                logger.info("side channel: unknown key %s is ignored", name)
