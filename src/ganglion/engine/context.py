"""Public context: what a session has perceived, by version, and what its robot executes. Pure; owned by the engine.

Perception publishes, generations in flight read the newest (Auras, arXiv 2509.09560). Knows pages by id and actions as
rows of control ticks; neither requests nor tensors.
"""

from dataclasses import dataclass

import numpy as np

from ganglion.memory.ledger import Ledger
from ganglion.memory.table import Lease, PageTable, VersionedTable
from ganglion.types import Float32Array, Observation, PageId, Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Percept:
    """One reader's right to one version of what was perceived, until `PublicContext.release`."""

    lease: Lease
    stages: tuple[str, ...]
    observation: Observation

    @property
    def version(self) -> int:
        """Versions of one session count up from 1."""
        return self.lease.version

    def pages(self, stage: str) -> tuple[PageId, ...]:
        """What that stage wrote."""
        return self.lease.tables[self.stages.index(stage)].pages


class PublicContext:
    """One session's versions and its robot's newest chunk."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger, self._table = ledger, VersionedTable(ledger)
        self._newest: tuple[Observation, tuple[str, ...]] | None = None
        self._chunk: tuple[int, Float32Array] | None = None  # tick of row 0, actions

    @property
    def version(self) -> int:
        """The newest; 0 before the first."""
        return self._table.version

    def num_pages(self) -> dict[str, int]:
        """Pages held, by layout."""
        return self._table.num_pages()

    def publish(self, observation: Observation, tables: dict[str, PageTable]) -> None:
        """What `observation` shows, by stage. Takes the caller's page references over."""
        self._table.publish(*tables.values())
        self._newest = (observation, tuple(tables))

    def is_newer(self, seq: int) -> bool:
        """Does the newest version rest on a later observation than number `seq`?"""
        return self._newest is not None and self._newest[0].seq > seq

    def acquire(self) -> Percept:
        """The newest version, for one reader. There must be one."""
        lease = self._table.acquire()
        assert lease is not None, "nothing was perceived yet"
        assert self._newest is not None, "a version without an observation"
        observation, stages = self._newest
        return Percept(lease=lease, stages=stages, observation=observation)

    def repeated(self, stage: str, layout: str, observation: Observation) -> tuple[PageId, ...]:
        """The newest version's pages of `stage`, with a reference each for the caller, if it rests on the same.

        The same: the very images, an equal state and instruction. None otherwise.
        """
        if self._newest is None:
            return ()
        seen, stages = self._newest
        is_same = (
            stage in stages
            and observation.prompt == seen.prompt
            and all(observation.images.get(key) is image for key, image in seen.images.items())
            and np.array_equal(observation.state, seen.state)
        )
        if not is_same:
            return ()
        percept = self.acquire()
        pages = percept.pages(stage)
        self._ledger.retain(layout, pages, owner=observation.session_id)
        self.release(percept)
        return pages

    def release(self, percept: Percept) -> None:
        """The reader is done."""
        self._table.release(percept.lease)

    def close(self) -> None:
        """Nothing newer will come."""
        self._table.close()

    # --- what the robot executes -------------------------------------------------------------------------------

    def execute(self, observation: Observation, actions: Float32Array) -> None:
        """This chunk went to the robot. Chunks of older observations change nothing: it would not take them either."""
        tick = observation.executed_until
        if tick is not None and (self._chunk is None or tick >= self._chunk[0]):
            self._chunk = (tick, actions)

    def plan(self, seen: Observation, *, own: Observation, max_prefix: int) -> Plan | None:
        """What is executed from the tick of `seen` on, for a request that came with the observation `own`.

        The robot's own word (`action_prefix`) goes before what was sent to it. None when nothing is known.
        """
        prefix = seen.action_prefix
        rest = self._rest(seen, 0 if prefix is None else len(prefix))
        known = [part for part in (prefix, rest) if part is not None and len(part)]
        if not known:
            return None
        actions = known[0] if len(known) == 1 else np.concatenate(known)
        num_committed = min(_num_ticks_left(own, seen), len(actions), max_prefix)
        return Plan(actions=actions, num_committed=num_committed)

    def _rest(self, seen: Observation, num_known: int) -> Float32Array | None:
        if self._chunk is None or seen.executed_until is None:
            return None
        first_tick, actions = self._chunk
        return actions[max(0, seen.executed_until + num_known - first_tick) :]


def ticks_between(earlier: Observation, later: Observation) -> int:
    """Control ticks from one observation to the next; 0 when the robot does not count them."""
    if earlier.executed_until is None or later.executed_until is None:
        return 0
    return later.executed_until - earlier.executed_until


def _num_ticks_left(own: Observation, seen: Observation) -> int:
    """Ticks from `seen` to the first one that the chunk of `own` is expected for."""
    delay = own.inference_delay_hint
    if delay is None:
        delay = 0 if own.action_prefix is None else len(own.action_prefix)
    return max(0, delay - ticks_between(own, seen))
