"""Carried pages: what one session takes along from observation to observation: recurrent states, histories. Pure.

Owned by the engine, one for each session; told when an observation's perception is committed. Holds one reference to
each page that it keeps, in ints: what is to be encoded it orders, and the executor does it (`memory.codec.carry`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ganglion.errors import OutOfPagesError
from ganglion.memory.ledger import Ledger
from ganglion.memory.orders import Moves
from ganglion.memory.retention.history import History, HistoryConfig
from ganglion.types import PageId


@dataclass(frozen=True, slots=True, kw_only=True)
class CarryRule:
    """The pages of `stage`, one of each observation, in `layout`; of at most `history.num_places` observations.

    `encoded_layout` is needed when the history has encoded places. A history of one whole place is a recurrent state:
    it keeps the newest.
    """

    stage: str
    layout: str
    history: HistoryConfig
    encoded_layout: str | None = None

    def __post_init__(self) -> None:
        if self.history.num_encoded and self.encoded_layout is None:
            raise ValueError(
                f"stage {self.stage!r}: {self.history.num_encoded} encoded places need an encoded_layout"
            )

    @property
    def is_recurrent(self) -> bool:
        """Does the newest page alone matter?"""
        return self.history.num_places == 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A page of observation `seq`, in the layout that it now has."""

    seq: int
    layout: str
    page: PageId


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeOrder:
    """Encode `source` into `target`. To be carried out at once: the source is given back already."""

    source_layout: str
    source: PageId
    target_layout: str
    target: PageId


class CarriedPages:
    """Pages of one session by stage, oldest first. Is a Holder: pages move while it keeps them."""

    def __init__(self, ledger: Ledger, rules: Sequence[CarryRule], *, owner: str) -> None:
        self._ledger, self._owner = ledger, owner
        self._rules = {rule.stage: rule for rule in rules}
        self._histories = {rule.stage: History(rule.history) for rule in rules}
        self._kept: dict[str, dict[int, Kept]] = {rule.stage: {} for rule in rules}
        ledger.attach(self)

    def earlier(self, stage: str) -> tuple[Kept, ...]:
        """What is kept of `stage`, oldest first: valid until the next `keep`, `reset` or move."""
        kept = self._kept[stage]
        return tuple(kept[seq] for seq in sorted(kept))

    def num_pages(self) -> dict[str, int]:
        """Pages held, by layout."""
        counts: dict[str, int] = {}
        for of_stage in self._kept.values():
            for kept in of_stage.values():
                counts[kept.layout] = counts.get(kept.layout, 0) + 1
        return counts

    def note(self, stage: str, masses: Mapping[int, float], *, now: int) -> None:
        """The reader of `stage` paid these shares of its attention, by observation number, at observation `now`."""
        for seq, mass in masses.items():
            self._histories[stage].note(seq, mass, now)

    def keep(self, stage: str, page: PageId, *, seq: int) -> tuple[EncodeOrder, ...]:
        """Observation `seq` wrote this committed page. Takes a reference of its own.

        Older observations than the newest kept change nothing: a session's memory goes forward only.
        """
        rule, kept = self._rules[stage], self._kept[stage]
        if kept and seq <= max(kept):
            return ()
        self._ledger.retain(rule.layout, (page,), owner=self._owner)
        if rule.is_recurrent:
            self.reset(stage)
            kept[seq] = Kept(seq=seq, layout=rule.layout, page=page)
            return ()
        kept[seq] = Kept(seq=seq, layout=rule.layout, page=page)
        descent = self._histories[stage].add(seq, seq)
        for gone in descent.drop:
            self._let_go(kept.pop(gone))
        orders = [self._encode(stage, rule, low) for low in descent.encode]
        return tuple(order for order in orders if order is not None)

    def reset(self, stage: str) -> None:
        """Forget what is kept of `stage`."""
        for kept in self._kept[stage].values():
            self._let_go(kept)
        self._kept[stage].clear()
        self._histories[stage].clear()

    def close(self) -> None:
        """The session is gone: all pages go back."""
        for stage in self._kept:
            self.reset(stage)
        self._ledger.detach(self)

    def relocate(self, moves: Moves) -> None:
        for of_stage in self._kept.values():
            for seq, kept in of_stage.items():
                (page,) = moves.now_at(kept.layout, (kept.page,))
                of_stage[seq] = replace(kept, page=page)

    def _encode(self, stage: str, rule: CarryRule, seq: int) -> EncodeOrder | None:
        """Without room for an encoded page, the whole one stays on its lower rung: memory is saved later, or never."""
        whole = self._kept[stage][seq]
        assert rule.encoded_layout is not None, f"checked by {rule}"
        try:
            (target,) = self._ledger.reserve(rule.encoded_layout, 1, owner=self._owner)
        except OutOfPagesError:
            return None
        self._ledger.commit(rule.encoded_layout, (target,), None)
        self._let_go(whole)
        self._kept[stage][seq] = Kept(seq=seq, layout=rule.encoded_layout, page=target)
        return EncodeOrder(
            source_layout=whole.layout,
            source=whole.page,
            target_layout=rule.encoded_layout,
            target=target,
        )

    def _let_go(self, kept: Kept) -> None:
        self._ledger.release(kept.layout, (kept.page,))
