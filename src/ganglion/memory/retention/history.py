"""History: which earlier observations of one session stay, and in how many bytes. Decides in ints; pure.

A ladder of three rungs: whole, encoded, gone. Called by whoever owns the session's pages when an observation has been
committed, and obeyed: it says which items to encode and which to give back, in the order in which to do it.
"""

from dataclasses import dataclass

from ganglion.memory.retention.relevance import Relevance


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryConfig:
    """Places on the two upper rungs; `half_life` of attention in observations."""

    num_whole: int = 2
    num_encoded: int = 6
    half_life: float = 8.0
    first_score: float = 0.25

    def __post_init__(self) -> None:
        if self.num_whole < 0 or self.num_encoded < 0 or self.num_places < 1:
            raise ValueError(
                f"a history needs places: num_whole {self.num_whole}, num_encoded {self.num_encoded}"
            )

    @property
    def num_places(self) -> int:
        """Observations remembered at most."""
        return self.num_whole + self.num_encoded


@dataclass(frozen=True, slots=True, kw_only=True)
class Descent:
    """Items that go down a rung. An item that falls through the second rung at once is in `drop` only."""

    encode: tuple[int, ...] = ()
    drop: tuple[int, ...] = ()


class History:
    """Items of one session, the whole ones and the encoded ones, in the order of their observations."""

    def __init__(self, config: HistoryConfig) -> None:
        self._config = config
        self._value = Relevance(half_life=config.half_life, first_score=config.first_score)
        self._whole: dict[int, None] = {}  # an ordered set: oldest first
        self._encoded: dict[int, None] = {}

    @property
    def whole(self) -> tuple[int, ...]:
        """Items kept as they were written, oldest first."""
        return tuple(sorted(self._whole))

    @property
    def encoded(self) -> tuple[int, ...]:
        """Items kept encoded, oldest first."""
        return tuple(sorted(self._encoded))

    @property
    def items(self) -> tuple[int, ...]:
        """All that is remembered, oldest first."""
        return tuple(sorted((*self._whole, *self._encoded)))

    def note(self, item: int, mass: float, now: int) -> None:
        """`item` received `mass` of attention. An item that is not remembered is not remembered for it."""
        if item in self._whole or item in self._encoded:
            self._value.note(item, mass, now)

    def add(self, item: int, now: int) -> Descent:
        """Remember one more; items are numbers that rise with the observations. Returns what has to go for it."""
        assert not self._whole or item > max(self._whole), f"{item} is not newer than {self.whole}"
        self._whole[item] = None
        self._value.keep(item, now)
        encode, drop = [], []
        if len(self._whole) > self._config.num_whole:
            weak = min(self._whole, key=self._value.worth)
            del self._whole[weak]
            self._encoded[weak] = None
            encode.append(weak)
        if len(self._encoded) > self._config.num_encoded:
            weak = min(self._encoded, key=self._value.worth)
            del self._encoded[weak]
            self._value.forget(weak)
            drop.append(weak)
        return Descent(encode=tuple(i for i in encode if i not in drop), drop=tuple(drop))

    def clear(self) -> tuple[int, ...]:
        """Forget everything (reset, close); returns what has to be given back."""
        items = self.items
        for item in items:
            self._value.forget(item)
        self._whole.clear()
        self._encoded.clear()
        return items
