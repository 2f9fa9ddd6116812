"""Link: the control loop's connection to the server. Never makes the loop wait; comes back by itself when it is lost.

Owned by `robots.loop`, used from its thread. While the connection is down a thread of the link's own reconnects, with a
growing and jittered pause, and nothing else touches the client. It remembers which tick an observation was taken at, since
a chunk may rest on a newer one than it answers. Knows neither worlds nor queues of actions.

An impaired link holds messages back on their way out and in, or loses them: a lost one counts as under way for `LOST_S`,
because a robot cannot know.
"""

import heapq
import logging
import random
import secrets
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ganglion.client import Answer, Client, ConnectionLostError, Outgoing, Reply, ReplyError
from ganglion.clock import Clock, RealClock
from ganglion.errors import ErrorCode, GanglionError, UnauthorizedError
from ganglion.robots.impairment import Impairment, Road

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 2.0
FIRST_PAUSE_S, MAX_PAUSE_S = 0.05, 2.0
MAX_IN_FLIGHT = (
    8  # more unanswered observations are not sent: a stalled server must not block a send
)
SILENCE_S = 5.0  # with unanswered observations: then the connection counts as lost
LOST_S = 1.0  # what a bad link lost is given up after
MAX_REMEMBERED = 256  # observations that a chunk may name as what it rests on


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """An observation under way: the tick it was taken at and when, by the loop's clock.

    `first_tick`: of row 0 of a chunk that rests on it, where that is another tick.
    """

    tick: int
    obs_s: float
    first_tick: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """A chunk, the observation that it answers, and the newest that it rests on (`context`)."""

    sent: Sent
    context: Sent
    reply: Reply
    round_trip_ms: float  # as the loop saw it, what was held back on purpose included


@dataclass(slots=True, kw_only=True)
class _Flight:
    """A request under way."""

    sent: Sent
    sent_s: float  # the link's clock
    is_lost: bool = False


class Link:
    """One robot's connection, with one session for its whole life."""

    def __init__(
        self,
        url: str,
        *,
        robot_id: str,
        api_key: str | None = None,
        is_real_time: bool = True,
    ) -> None:
        """`is_real_time` False: messages are never held back here; who counts in ticks asks `road` itself."""
        self.robot_id = robot_id
        self.session_id = f"{robot_id}-{secrets.token_hex(6)}"
        self.road = Road(robot_id)
        self._is_real_time = is_real_time
        self._url, self._api_key = url, api_key
        self.clock: Clock = RealClock()  # sockets live in real time
        self._client: Client | None = None
        self._in_flight: dict[int, _Flight] = {}
        self._recent: OrderedDict[int, Sent] = OrderedDict()
        self._outbox: list[tuple[float, int, Outgoing]] = []  # heaps by due time
        self._inbox: list[tuple[float, int, Answer]] = []
        self._num_received = 0
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

    @property
    def oldest_tick(self) -> int | None:
        """Of the observations that are not answered yet."""
        return min((flight.sent.tick for flight in self._in_flight.values()), default=None)

    def impair(self, impairment: Impairment) -> None:
        """Make the link so bad from now on. Any thread."""
        self.road.impairment = impairment

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
        self._give_up_lost()
        if not self._is_up.is_set() or len(self._in_flight) >= MAX_IN_FLIGHT:
            return False
        assert self._client is not None, "is up without a client"
        now_s = self.clock.now_s()
        out = self._client.prepare(observation, prompt=prompt, **hints)
        flight = self._in_flight[out.seq] = _Flight(sent=sent, sent_s=now_s)
        self._recent[out.seq] = sent
        if len(self._recent) > MAX_REMEMBERED:
            self._recent.popitem(last=False)
        travel_s = self._travel_s()
        if travel_s is None:
            flight.is_lost = True
        else:
            heapq.heappush(self._outbox, (now_s + travel_s, out.seq, out))
            self._send_due()
        return self._is_up.is_set()

    def poll(self, timeout_s: float) -> Answered | ReplyError | None:
        """The next answer within `timeout_s`; None when there is none. Raises what reconnecting cannot mend."""
        if self._failure is not None:
            raise self._failure
        end_s = self.clock.now_s() + max(0.0, timeout_s)
        while True:
            self._give_up_lost()
            self._send_due()
            now_s = self.clock.now_s()
            if not self._is_up.is_set():
                self._is_up.wait(max(0.0, end_s - now_s))
                return None
            if self._inbox and self._inbox[0][0] <= now_s:
                return self._deliver(heapq.heappop(self._inbox)[2])
            due_s = min([end_s, *(held[0][0] for held in (self._outbox, self._inbox) if held)])
            has_heard = self._receive(max(0.0, due_s - now_s))
            if not has_heard and self.clock.now_s() >= end_s:
                return None

    def reset(self) -> None:
        """A new episode: the server forgets the session's context. Not while the arm moves: waits for the server."""
        if not self._is_up.is_set():
            return
        assert self._client is not None, "is up without a client"
        self._forget()
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

    def _receive(self, timeout_s: float) -> bool:
        """Put the next message into the inbox, unless the road loses it; was there one?"""
        assert self._client is not None, "is up without a client"
        try:
            answer = self._client.poll(timeout_s=timeout_s)
        except ConnectionLostError as error:
            self._lose(error)
            return False
        now_s = self.clock.now_s()
        if answer is None:
            unheard = [flight.sent_s for flight in self._in_flight.values() if not flight.is_lost]
            if unheard and now_s - max(self._heard_s, min(unheard)) > SILENCE_S:
                self._lose(ConnectionLostError(f"{self._url}: no answer for {SILENCE_S:g} s"))
            return False
        self._heard_s = now_s
        travel_s = self._travel_s()
        if travel_s is None:
            flight = None if answer.seq is None else self._in_flight.get(answer.seq)
            if flight is not None:
                flight.is_lost = True
        else:
            self._num_received += 1
            heapq.heappush(self._inbox, (now_s + travel_s, self._num_received, answer))
        return True

    def _deliver(self, answer: Answer) -> Answered | ReplyError | None:
        # which one an error without a number answers is unknown: the oldest, so that none is waited for without end
        seq = next(iter(self._in_flight), None) if answer.seq is None else answer.seq
        flight = None if seq is None else self._in_flight.pop(seq, None)
        if isinstance(answer, ReplyError):
            return answer
        if flight is None:
            return None
        context = self._recent.get(answer.context_seq)
        if context is None:
            return ReplyError(
                f"chunk {answer.seq} rests on observation {answer.context_seq}, which was never sent",
                code=ErrorCode.MALFORMED_FRAME,
                seq=answer.seq,
                next_step="use a server and a client of the same version",
            )
        round_trip_ms = (self.clock.now_s() - flight.sent_s) * 1e3
        return Answered(
            sent=flight.sent, context=context, reply=answer, round_trip_ms=round_trip_ms
        )

    def _travel_s(self) -> float | None:
        return self.road.travel_s() if self._is_real_time else 0.0

    def _send_due(self) -> None:
        now_s = self.clock.now_s()
        while self._outbox and self._outbox[0][0] <= now_s and self._is_up.is_set():
            assert self._client is not None, "is up without a client"
            out = heapq.heappop(self._outbox)[2]
            try:
                self._client.send(out)
            except (ConnectionLostError, TimeoutError) as error:
                self._lose(error)

    def _give_up_lost(self) -> None:
        limit_s = self.clock.now_s() - LOST_S
        for seq in [
            seq
            for seq, flight in self._in_flight.items()
            if flight.is_lost and flight.sent_s < limit_s
        ]:
            del self._in_flight[seq]

    def _forget(self) -> None:
        self._in_flight.clear()
        self._outbox.clear()
        self._inbox.clear()

    def _lose(self, error: Exception) -> None:
        logger.warning("robot %s: %s; reconnecting", self.robot_id, error)
        self._is_up.clear()
        self._forget()
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
