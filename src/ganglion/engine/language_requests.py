"""Requests of the language engine: what is under way, and what there is to tell of it.

Owns the requests, the seeded draws of their choices, the vectors that they gather, and the events that nobody has drained
yet. Called by `engine.language` and `engine.language_commit` on the loop's thread. Knows no batch and no page.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ganglion.engine.language_host import LanguageHost
from ganglion.engine.language_record import WorkTrace, trace
from ganglion.engine.language_work import LanguageRow, LanguageWork
from ganglion.engine.pooling import Pool
from ganglion.engine.sampler import Sampled, SamplerState
from ganglion.errors import GanglionError
from ganglion.generation import Embedded, FinishReason, PromptScored, TokenDelta, Usage
from ganglion.types import RequestId


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """The last event of a request: what it took, or the error that ended it."""

    request_id: RequestId
    outcome: Usage | GanglionError
    trace: WorkTrace | None = field(default=None, compare=False)  # None: it was refused


Event = TokenDelta | PromptScored | Embedded | Ended


class LanguageRequests:
    """Exactly one `Ended` for each request that is opened here. `on_finish` hears of each choice that ends."""

    def __init__(
        self, hosts: Mapping[str, LanguageHost], on_finish: Callable[[LanguageRow], None]
    ) -> None:
        self._hosts, self._on_finish = hosts, on_finish
        self.works: dict[RequestId, LanguageWork] = {}
        self._draws: dict[RequestId, list[SamplerState]] = {}
        self._pools: dict[RequestId, Pool] = {}  # of requests for a vector
        self._events: list[Event] = []

    def open(self, work: LanguageWork, draws: list[SamplerState], pool: Pool | None) -> None:
        """`draws`: of each choice. `pool`: where a vector is asked for."""
        self.works[work.request_id] = work
        self._draws[work.request_id] = draws
        if pool is not None:
            self._pools[work.request_id] = pool

    def refuse(self, request_id: RequestId, error: GanglionError) -> None:
        """It ends before it began."""
        self._events.append(Ended(request_id=request_id, outcome=error))

    def is_open(self, work: LanguageWork) -> bool:
        """Has it not ended?"""
        return work.request_id in self.works

    def draws(self, row: LanguageRow) -> SamplerState:
        """The seeded draws of a choice."""
        return self._draws[row.work.request_id][row.choice]

    def pool(self, work: LanguageWork) -> Pool | None:
        """Where its vector is gathered, if one is asked for."""
        return self._pools.get(work.request_id)

    def say(self, event: Event) -> None:
        """One more event."""
        self._events.append(event)

    def drain(self) -> list[Event]:
        """What happened since the last call, in order."""
        events, self._events = self._events, []
        return events

    def emit(
        self,
        row: LanguageRow,
        drawn: Sequence[Sampled],
        *,
        finish: FinishReason | None,
        stop_token_id: int | None = None,
    ) -> None:
        """Tokens of one choice, and its end where `finish` is given."""
        self._events.append(
            TokenDelta(
                request_id=row.work.request_id,
                choice=row.choice,
                token_ids=tuple(one.token_id for one in drawn),
                logprobs=tuple(one.logprob for one in drawn if one.logprob is not None),
                finish=finish,
                stop_token_id=stop_token_id,
            )
        )
        if finish is not None:
            self.finish_row(row, finish)

    def finish_row(self, row: LanguageRow, finish: FinishReason) -> None:
        """One choice ends: its pages are back."""
        row.finish = finish
        host = self._hosts[row.work.request.model]
        self._on_finish(row)
        host.release(row)
        host.rows.remove(row)

    def end_if_done(self, work: LanguageWork) -> None:
        """With its last choice a request ends."""
        if work.is_done and work.request_id in self.works:
            self.end(work, work.usage)

    def end(self, work: LanguageWork, outcome: Usage | GanglionError) -> None:
        """With a usage or an error; what of it still runs ends, too."""
        del self.works[work.request_id], self._draws[work.request_id]
        self._pools.pop(work.request_id, None)
        for row in work.rows:
            if row.finish is None:
                self.finish_row(row, FinishReason.STOP)
        self._events.append(Ended(request_id=work.request_id, outcome=outcome, trace=trace(work)))
