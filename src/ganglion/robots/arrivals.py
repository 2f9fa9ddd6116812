"""Arrivals: the network of a lockstep world, in ticks: when each chunk is there, and what a bad road loses.

Owned by `robots.loop`. The world waits for every answer, so what a real network and server would take is counted here.
"""

import math

from ganglion.robots.impairment import Road
from ganglion.robots.link import Answered


class Arrivals:
    """Chunks that the server has made and the arm has not got yet."""

    def __init__(self, road: Road, *, rate_hz: float, delay_ticks: int, give_up_ticks: int) -> None:
        """`delay_ticks`: from an observation to its chunk, on a clear road. `give_up_ticks`: what is lost counts so long."""
        self._road, self._rate_hz = road, rate_hz
        self._delay_ticks, self._give_up_ticks = delay_ticks, give_up_ticks
        # (tick at which it is there, chunk); None: lost, which the robot cannot know
        self._under_way: list[tuple[int, Answered | None]] = []
        self._there_s = 0.0

    def __len__(self) -> int:
        """Observations under way, as far as the robot knows."""
        return len(self._under_way)

    @property
    def next_tick(self) -> int | None:
        """At which the next chunk is there."""
        return min((tick for tick, _ in self._under_way), default=None)

    def depart(self, tick: int) -> bool:
        """Does the observation of `tick` get to the server?"""
        there_s = self._road.travel_s()
        if there_s is None:
            self._lose(tick)
            return False
        self._there_s = there_s
        return True

    def add(self, answer: Answered) -> None:
        """The server's answer to the observation that departed last."""
        tick, back_s = answer.sent.tick, self._road.travel_s()
        if back_s is None:
            self._lose(tick)
            return
        late_ticks = math.ceil((self._there_s + back_s) * self._rate_hz - 1e-9)
        self._under_way.append((tick + self._delay_ticks + late_ticks, answer))

    def due(self, tick: int) -> list[Answered]:
        """Take out what is there at `tick`, in order of arrival."""
        arrived = [item for item in self._under_way if item[0] <= tick]
        self._under_way = [item for item in self._under_way if item[0] > tick]
        arrived.sort(key=lambda item: item[0])
        return [answer for _, answer in arrived if answer is not None]

    def clear(self) -> None:
        """Nothing that is under way is wanted any more."""
        self._under_way.clear()

    def _lose(self, tick: int) -> None:
        self._under_way.append((tick + self._give_up_ticks, None))
