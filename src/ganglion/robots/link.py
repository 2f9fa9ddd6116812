"""Link: the control loop's connection to the server. Never makes the loop wait; comes back by itself when it is lost.

Owned by `robots.loop`, used from its thread. While the connection is down a thread of the link's own reconnects, with a
growing and jittered pause, and nothing else touches the client. Knows neither worlds nor queues of actions.
"""

import logging
import random
import secrets
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ganglion.client import Client, ConnectionLostError, Reply, ReplyError
from ganglion.clock import Clock, RealClock
from ganglion.errors import GanglionError, UnauthorizedError

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 2.0
FIRST_PAUSE_S, MAX_PAUSE_S = 0.05, 2.0
MAX_IN_FLIGHT = (
    8  # more unanswered observations are not sent: a stalled server must not block a send
)
SILENCE_S = 5.0  # with unanswered observations: then the connection counts as lost


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """An observation under way: the tick it was taken at and when, by the loop's clock."""

    tick: int
    obs_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """A chunk and the observation that it answers."""

    sent: Sent
    reply: Reply


class Link:
    """One robot's connection, with one session for its whole life."""

    def __init__(self, url: str, *, robot_id: str, api_key: str | None = None) -> None:
        self.robot_id = robot_id
        self.session_id = f"{robot_id}-{secrets.token_hex(6)}"
        self._url, self._api_key = url, api_key
        self.clock: Clock = RealClock()  # sockets live in real time
        self._client: Client | None = None
        self._in_flight: dict[int, Sent] = {}
        self._heard_s = 0.0
        self._random = random.Random(self.session_id)
        self._is_up = threading.Event()  # the client is the loop's; else it is the thread's
        self._is_closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._failure: GanglionError | None = None
        self.num_reconnects = 0

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What the server said about its policy at the last connection."""
        return {} if self._client is None else self._client.metadata

    @property
    def is_connected(self) -> bool:
        """May be true for a moment after the server is gone."""
        return self._is_up.is_set()

    @property
    def num_in_flight(self) -> int:
        """Observations that are not answered yet."""
        return len(self._in_flight)

    def open(self, *, timeout_s: float) -> None:
        """Connect for the first time, trying again until `timeout_s` is over. Raises ConnectionLostError."""
        end_s = self.clock.now_s() + timeout_s
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                self._client = Client(
                    self._url,
                    robot_id=self.robot_id,
                    session_id=self.session_id,
                    api_key=self._api_key,
                    timeout_s=CONNECT_TIMEOUT_S,
                )
            except ConnectionLostError:
                if self.clock.now_s() + pause_s > end_s:
                    raise
                pause_s = self._pause(pause_s)
            else:
                self._is_up.set()
                return

    def send(
        self, observation: Mapping[str, Any], *, sent: Sent, prompt: str, **hints: Any
    ) -> bool:
        """Send an observation; False when the connection is down or too many are unanswered."""
        if not self._is_up.is_set() or len(self._in_flight) >= MAX_IN_FLIGHT:
            return False
        assert self._client is not None, "is up without a client"
        try:
            seq = self._client.request(observation, prompt=prompt, **hints)
        except (ConnectionLostError, TimeoutError) as error:
            self._lose(error)
            return False
        if not self._in_flight:
            self._heard_s = self.clock.now_s()
        self._in_flight[seq] = sent
        return True

    def poll(self, timeout_s: float) -> Answered | ReplyError | None:
        """The next answer within `timeout_s`; None when there is none. Raises what reconnecting cannot mend."""
        if self._failure is not None:
            raise self._failure
        if not self._is_up.is_set():
            self._is_up.wait(timeout_s)
            return None
        assert self._client is not None, "is up without a client"
        try:
            answer = self._client.poll(timeout_s=max(0.0, timeout_s))
        except ConnectionLostError as error:
            self._lose(error)
            return None
        if answer is None:
            if self._in_flight and self.clock.now_s() - self._heard_s > SILENCE_S:
                self._lose(ConnectionLostError(f"{self._url}: no answer for {SILENCE_S:g} s"))
            return None
        self._heard_s = self.clock.now_s()
        # which one an error without a number answers is unknown: the oldest, so that none is waited for without end
        seq = next(iter(self._in_flight), None) if answer.seq is None else answer.seq
        sent = None if seq is None else self._in_flight.pop(seq, None)
        if isinstance(answer, ReplyError):
            return answer
        return None if sent is None else Answered(sent=sent, reply=answer)

    def reset(self) -> None:
        """A new episode: the server forgets the session's context. Not while the arm moves: waits for the server."""
        if not self._is_up.is_set():
            return
        assert self._client is not None, "is up without a client"
        self._in_flight.clear()
        try:
            self._client.reset()
        except ConnectionLostError as error:
            self._lose(error)

    def close(self) -> None:
        """Leave. The link cannot be used afterwards."""
        self._is_closed.set()
        if self._thread is not None:
            self._thread.join()
        if self._client is not None:
            self._client.close()

    def _lose(self, error: Exception) -> None:
        logger.warning("robot %s: %s; reconnecting", self.robot_id, error)
        self._is_up.clear()
        self._in_flight.clear()
        self._thread = threading.Thread(
            target=self._reconnect, name=f"reconnect-{self.robot_id}", daemon=True
        )
        self._thread.start()

    def _reconnect(self) -> None:
        assert self._client is not None, "lost before it was open"
        pause_s = FIRST_PAUSE_S
        while not self._is_closed.is_set():
            try:
                self._client.reconnect()
            except UnauthorizedError as error:
                self._failure = error
                return
            except GanglionError:
                pause_s = self._pause(pause_s)
            else:
                self.num_reconnects += 1
                self._is_up.set()
                return

    def _pause(self, pause_s: float) -> float:
        """Wait half to all of `pause_s`; returns the next pause."""
        self._is_closed.wait(pause_s * self._random.uniform(0.5, 1.0))
        return min(2 * pause_s, MAX_PAUSE_S)
