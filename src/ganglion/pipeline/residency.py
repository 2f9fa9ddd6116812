"""Residency: which language models are in memory, on one byte budget with the pages. Pure: ints, names and times.

Asked by `pipeline.residents`. A model is worth the tokens that it made lately, per byte of its weights; where another needs
the bytes, the pages give way first (down to a floor), then the idle models that are worth least.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from math import exp2

from ganglion.errors import ConfigError
from ganglion.service import ModelState
from ganglion.units import format_bytes

HALF_LIFE_S = 300.0  # after which a token counts half


@dataclass(frozen=True, slots=True, kw_only=True)
class Stay:
    """How long a model stays: pinned for ever; else until its bytes are needed, or for `ttl_s` without a request."""

    is_pinned: bool = True
    ttl_s: float | None = None

    def __str__(self) -> str:
        if self.is_pinned:
            return "pinned"
        return "on demand" if self.ttl_s is None else f"for {self.ttl_s:g} s"


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What one model takes, and how long it stays."""

    weight_bytes: int
    stay: Stay


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What must go so that a model fits, and the bytes that are left for pages then."""

    evicted: tuple[str, ...]
    page_bytes: int


@dataclass(slots=True, kw_only=True)
class _Model:
    terms: Terms
    state: ModelState = ModelState.UNLOADED
    last_used_s: float = 0.0
    num_tokens: float = 0.0  # as of `counted_s`
    counted_s: float = 0.0

    def value(self, now_s: float) -> float:
        """Tokens lately, per byte."""
        return self.tokens(now_s) / max(1, self.terms.weight_bytes)

    def tokens(self, now_s: float) -> float:
        """All of them, old ones counting less."""
        return self.num_tokens * exp2((self.counted_s - now_s) / HALF_LIFE_S)


@dataclass(slots=True, kw_only=True)
class Residency:
    """The books. `budget_bytes` None: no bound. `other_bytes`: weights of the policy.

    Invariant: other_bytes + weights of all models that are not UNLOADED + page_bytes <= budget_bytes, and
    floor_bytes <= page_bytes <= arena_bytes.
    """

    models: Mapping[str, Terms]
    budget_bytes: int | None
    other_bytes: int
    arena_bytes: int
    floor_bytes: int
    _models: dict[str, _Model] = field(init=False)

    def __post_init__(self) -> None:
        """Pinned models are in memory. Raises ConfigError where they, or any one beside them, cannot fit."""
        self._models = {name: _Model(terms=terms) for name, terms in self.models.items()}
        for model in self._models.values():
            if model.terms.stay.is_pinned:
                model.state = ModelState.LOADED
        if self.budget_bytes is None:
            return
        least_bytes = self.other_bytes + self.floor_bytes + self.weight_bytes
        over = [("what is pinned", 0)] if self.weight_bytes else [("the pages' floor", 0)]
        over += [
            (f"{name} beside what is pinned", model.terms.weight_bytes)
            for name, model in self._models.items()
            if not model.terms.stay.is_pinned
        ]
        for what, more_bytes in over:
            if least_bytes + more_bytes > self.budget_bytes:
                raise ConfigError(
                    f"memory.budget_bytes: {what} needs {format_bytes(least_bytes + more_bytes)} "
                    f"({format_bytes(self.other_bytes + self.weight_bytes + more_bytes)} of weights, "
                    f"{format_bytes(self.floor_bytes)} of pages at least), "
                    f"the budget is {format_bytes(self.budget_bytes)}",
                    next_step="raise --memory, lower --arena-bytes, or serve fewer models as pinned: chat=NAME,on_demand",
                )

    @property
    def weight_bytes(self) -> int:
        """Of all language models that are in memory, or on their way into it."""
        return sum(
            model.terms.weight_bytes
            for model in self._models.values()
            if model.state is not ModelState.UNLOADED
        )

    @property
    def page_bytes(self) -> int:
        """What the pages may take now."""
        if self.budget_bytes is None:
            return self.arena_bytes
        return min(self.arena_bytes, self.budget_bytes - self.other_bytes - self.weight_bytes)

    def state(self, name: str) -> ModelState:
        """Of one model."""
        return self._models[name].state

    def room(self, name: str, now_s: float, *, busy: Collection[str]) -> Room | None:
        """What must go for `name`; None: it cannot be loaded while these are busy. Nothing is changed."""
        need_bytes = self._models[name].terms.weight_bytes
        if self.budget_bytes is None:
            return Room(evicted=(), page_bytes=self.arena_bytes)
        over_bytes = (
            self.other_bytes + self.weight_bytes + need_bytes + self.floor_bytes - self.budget_bytes
        )
        by_value = sorted(self._idle(busy), key=lambda other: self._models[other].value(now_s))
        evicted: list[str] = []
        freed_bytes = 0
        for other in by_value:
            if freed_bytes >= over_bytes:
                break
            evicted.append(other)
            freed_bytes += self._models[other].terms.weight_bytes
        if freed_bytes < over_bytes:
            return None
        for other in reversed(evicted):  # the last ones may be so large that others can stay
            other_bytes = self._models[other].terms.weight_bytes
            if freed_bytes - other_bytes >= over_bytes:
                evicted.remove(other)
                freed_bytes -= other_bytes
        left_bytes = self.budget_bytes - self.other_bytes - self.weight_bytes - need_bytes
        return Room(
            evicted=tuple(evicted), page_bytes=min(self.arena_bytes, left_bytes + freed_bytes)
        )

    def expired(self, now_s: float, *, busy: Collection[str]) -> tuple[str, ...]:
        """Models whose time is over."""
        return tuple(name for name in self._idle(busy) if self.left_s(name, now_s) == 0)

    def left_s(self, name: str, now_s: float) -> float | None:
        """How long a model stays if nobody asks for it; None: no time is set."""
        model = self._models[name]
        ttl_s = model.terms.stay.ttl_s
        return None if ttl_s is None else max(0.0, model.last_used_s + ttl_s - now_s)

    def count(self, name: str, num_tokens: int, now_s: float) -> None:
        """A request of this model ended, with so many tokens, prompt included."""
        model = self._models[name]
        model.num_tokens = model.tokens(now_s) + num_tokens
        model.counted_s = model.last_used_s = now_s

    def begin(self, name: str) -> None:
        """Its bytes are its own from here on."""
        assert self._models[name].state is ModelState.UNLOADED, name
        self._models[name].state = ModelState.LOADING

    def finish(self, name: str, now_s: float) -> None:
        """It can be run."""
        assert self._models[name].state is ModelState.LOADING, name
        self._models[name].state = ModelState.LOADED
        self._models[name].last_used_s = now_s

    def drop(self, name: str) -> None:
        """It is not in memory any more, or never got there."""
        assert not self._models[name].terms.stay.is_pinned, name
        self._models[name].state = ModelState.UNLOADED

    def _idle(self, busy: Collection[str]) -> list[str]:
        return [
            name
            for name, model in self._models.items()
            if model.state is ModelState.LOADED
            and not model.terms.stay.is_pinned
            and name not in busy
        ]
