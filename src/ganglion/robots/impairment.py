"""Impairment: a robot's link made worse on purpose, so that people and benches see what delay, jitter and loss do.

Set by an operator's slider (through `robots.side`) or by a fleet's config; drawn from by `robots.link` in real time and by
`robots.loop` in lockstep. Knows no messages. Seeded: the same robot meets the same luck.
"""

import math
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ganglion.errors import FieldError

MAX_MS = 2_000.0  # of delay, and of jitter: less than the silence after which a link counts as lost
LIMITS = {"delay_ms": MAX_MS, "jitter_ms": MAX_MS, "loss": 1.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Impairment:
    """What is added to the link: milliseconds of round trip, half of them on each way, and loss on either way.

    `jitter_ms`: up to so much more, drawn anew for each message, so that messages overtake each other. `loss`: the share
    of messages that never arrive. Raises FieldError for a value that is none or absurd.
    """

    delay_ms: float = 0.0
    jitter_ms: float = 0.0
    loss: float = 0.0

    def __post_init__(self) -> None:
        for name, limit in LIMITS.items():
            value = getattr(self, name)
            is_number = type(value) in (int, float) and math.isfinite(value)
            if not is_number or not 0 <= value <= limit:
                raise FieldError(
                    f"impair.{name}", expected=f"a number in 0..{limit:g}", got=repr(value)[:40]
                )

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> "Impairment":
        """From a message that may say more; what it does not say is 0."""
        return cls(**{name: body[name] for name in LIMITS if body.get(name) is not None})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


CLEAR = Impairment()


class Road:
    """One robot's way to its server and back. `impairment` may be set from any thread."""

    def __init__(self, name: str) -> None:
        self._random = random.Random(name)
        self.impairment = CLEAR

    def travel_s(self) -> float | None:
        """How much longer one message takes on one way; None when it is lost."""
        bad = self.impairment
        if bad == CLEAR:
            return 0.0
        if self._random.random() < bad.loss:
            return None
        return (bad.delay_ms + self._random.random() * bad.jitter_ms) * 0.5e-3
