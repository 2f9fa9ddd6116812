"""Memories: what each session carries from observation to observation, for models that remember. Pure.

Owned by the engine. Knows which stages read what earlier observations wrote (`Carry`), not what it means.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ganglion.engine.work import Work
from ganglion.memory.carried import CarriedPages, CarryRule, EncodeOrder, Kept
from ganglion.memory.ledger import Ledger
from ganglion.memory.retention.history import HistoryConfig
from ganglion.spec import Carry, Stage
from ganglion.types import SessionId


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPolicy:
    """How histories are kept: `num_whole` places as they were written, the others encoded (None: all whole)."""

    num_whole: int | None = None
    half_life: float = 8.0  # of attention, in observations


class Memories:
    """Carried pages by session, opened with its first observation."""

    def __init__(self, ledger: Ledger, policy: MemoryPolicy) -> None:
        self._ledger, self._policy = ledger, policy
        self._sessions: dict[SessionId, CarriedPages] = {}

    def earlier(self, work: Work, carry: Carry) -> tuple[Kept, ...]:
        """What `carry.stage` wrote for earlier observations of the work's session; remembered in `work.recalled`."""
        carried = self._sessions.get(work.observation.session_id)
        kept = () if carried is None else carried.earlier(carry.stage)
        work.recalled[carry.stage] = kept
        return kept

    def keep(
        self,
        work: Work,
        carries: Sequence[Carry],
        stages: Mapping[str, Stage],
        masses: Mapping[str, Sequence[float]],
    ) -> list[EncodeOrder]:
        """The work's perception is committed: note what was attended to, carry its pages on."""
        session_id, now = work.observation.session_id, work.observation.seq
        carried = self._sessions.get(session_id)
        if carried is None:
            rules = [self._rule(carry, stages[carry.stage]) for carry in carries]
            carried = CarriedPages(self._ledger, rules, owner=session_id)
            self._sessions[session_id] = carried
        orders: list[EncodeOrder] = []
        for carry in carries:
            kept = work.recalled.get(carry.stage, ())
            of_kept = masses.get(carry.stage, ())[-len(kept) :] if kept else ()
            by_seq = {item.seq: mass for item, mass in zip(kept, of_kept, strict=False)}
            carried.note(carry.stage, by_seq, now=now)
            (page,) = work.spans[carry.stage].pages
            orders += carried.keep(carry.stage, page, seq=now)
        return orders

    def num_pages(self, session_id: SessionId) -> dict[str, int]:
        """Pages that the session carries, by layout."""
        carried = self._sessions.get(session_id)
        return {} if carried is None else carried.num_pages()

    def close(self, session_id: SessionId) -> None:
        """The session begins anew, or is gone."""
        carried = self._sessions.pop(session_id, None)
        if carried is not None:
            carried.close()

    def _rule(self, carry: Carry, stage: Stage) -> CarryRule:
        whole = self._policy.num_whole
        num_whole = carry.depth if whole is None else min(whole, carry.depth)
        num_encoded = carry.depth - num_whole
        return CarryRule(
            stage=carry.stage,
            layout=stage.layout,
            history=HistoryConfig(
                num_whole=num_whole, num_encoded=num_encoded, half_life=self._policy.half_life
            ),
            encoded_layout=f"{stage.layout}@int8" if num_encoded else None,
        )
