"""Drafter: who drafts for which row, how many tokens, and when. Owned by `engine.language`, asked before each batch.

Drafts come from what stood before (n-grams) or from another model. Whether they hold is decided by `engine.verify`: a
draft never changes a token. Nobody else ever waits for a draft's pages: they are given back first.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ganglion.clock import Clock
from ganglion.engine.draft_pace import Ahead, LayerTimer
from ganglion.engine.language_draft import DraftRun, LayerWork
from ganglion.engine.language_host import LanguageHost
from ganglion.engine.language_work import LanguageRow, Part
from ganglion.engine.sampler import SamplerState
from ganglion.errors import FieldError, OutOfPagesError, UnsupportedFieldError
from ganglion.generation import GenerateRequest
from ganglion.memory.arena import Arena
from ganglion.memory.orders import Moves
from ganglion.models.language import can_rewind
from ganglion.models.speculate import Acceptance, NgramIndex, Pace, Trials

logger = logging.getLogger(__name__)

OFF, NGRAM = "off", "ngram"
TYPICAL_LAG = 16  # tokens that a drafting model may have to catch up with in a step like any other
CATCH_UP_SHARE = 0.1  # of the time that a row's tokens are going to take, for catching up


@dataclass(frozen=True, slots=True, kw_only=True)
class Speculation:
    """`source`: who drafts where a request does not say: "off", "ngram" or the name of a model.

    `is_ahead`: a model drafts on, on a thread of its own with `num_threads` of torch's, while the target checks what it
    drafted before. `is_paced`: as many tokens as pay by what was measured, at most `max_tokens`; else always so many.
    """

    source: str = OFF
    max_tokens: int = 8
    is_ahead: bool = False
    num_threads: int = 1
    is_paced: bool = True


@dataclass(slots=True, kw_only=True, eq=False)
class _Choice:
    """What is kept of one row that may draft."""

    acceptance: Acceptance
    index: NgramIndex | None = None  # None: a model drafts
    is_failed: bool = False


@dataclass(slots=True, kw_only=True)
class _Cycle:
    """From the decision to draft until the batch is committed."""

    source: str = OFF
    run: DraftRun | None = None
    num_wanted: dict[LanguageRow, int] = field(
        default_factory=dict
    )  # of those that a model drafts for
    drafts: dict[LanguageRow, tuple[int, ...]] = field(default_factory=dict)
    spent_us: float = 0.0
    is_typical: bool = True
    is_committed: bool = False
    num_rows: int = 0
    num_taken: int = 0
    num_drafted: int = 0


@dataclass(slots=True, kw_only=True)
class DraftCounts:
    """Drafted tokens since the start, those of them that held, and the layers that drafting models ran."""

    num_drafted: int = 0
    num_held: int = 0
    layers: LayerWork = field(default_factory=LayerWork)


class Drafter:
    """Speculation of all models of one engine. `state_of`: the sampler state of a row."""

    def __init__(
        self,
        hosts: Mapping[str, LanguageHost],
        arena: Arena,
        clock: Clock,
        speculation: Speculation,
        state_of: Callable[[LanguageRow], SamplerState],
    ) -> None:
        self._hosts, self._arena, self._clock = hosts, arena, clock
        self._settings, self._state_of = speculation, state_of
        self._choices: dict[LanguageRow, _Choice] = {}
        self._cycles: dict[str, _Cycle] = {}  # by target
        self._runs: dict[tuple[str, str], DraftRun] = {}  # (target, drafting model)
        self._paces: dict[tuple[str, str], Pace] = {}
        self._trials: dict[tuple[str, str], Trials] = {}  # ahead, or when the target is done
        self._shares: dict[tuple[str, str], float] = {}  # acceptance that new choices start with
        self._catch_up_us: dict[str, float] = {}  # per token, by drafting model
        self._ahead = Ahead(speculation.num_threads)
        self._counts = DraftCounts()

    @property
    def counts(self) -> DraftCounts:
        """Up to the last commit."""
        layers = [self._counts.layers, *(run.work for run in self._runs.values())]
        return DraftCounts(
            num_drafted=self._counts.num_drafted,
            num_held=self._counts.num_held,
            layers=LayerWork(
                num_run=sum(work.num_run for work in layers),
                num_stale=sum(work.num_stale for work in layers),
                num_saved=sum(work.num_saved for work in layers),
            ),
        )

    def check(self, request: GenerateRequest) -> None:
        """Raise FieldError where the request names somebody who cannot draft for its model."""
        source = request.speculate
        if source is None or source == OFF:
            return
        if not can_rewind(self._hosts[request.model].model):
            raise UnsupportedFieldError(
                "speculate",
                why=f"{request.model} has recurrent layers, which cannot take tokens back",
            )
        if source != NGRAM and not self._can_draft(source, request):
            names = [name for name in self._hosts if self._can_draft(name, request)]
            raise FieldError(
                "speculate",
                expected=f"one of {', '.join([OFF, NGRAM, *names])}",
                got=repr(source)[:200],
            )

    def _can_draft(self, source: str, request: GenerateRequest) -> bool:
        host, target = self._hosts.get(source), self._hosts[request.model]
        return (
            host is not None
            and host is not target
            and host.model.spec.vocab_size == target.model.spec.vocab_size
            and can_rewind(host.model)
        )

    def _source(self, row: LanguageRow) -> str:
        request = row.work.request
        source = self._settings.source if request.speculate is None else request.speculate
        if source == OFF or not can_rewind(self._hosts[request.model].model):
            return OFF
        if source == NGRAM:
            return NGRAM
        has_pictures = bool(request.pictures or request.images)
        is_told = self._can_draft(source, request) and not has_pictures
        return source if is_told else OFF

    # --- one step ------------------------------------------------------------------------------------------------

    def open(self, host: LanguageHost) -> None:
        """Decide what the next batch tries, unless that is decided already."""
        if host.name in self._cycles:
            return
        rows = host.admitted
        is_decoding = not host.suspects and host.stage is None
        is_decoding &= all(row.num_left == 1 and row.work.is_forked for row in rows)
        sources = [self._source(row) for row in rows] if is_decoding else []
        used = sorted({source for source in sources if source != OFF}, reverse=True)
        if not used:
            return
        source = next((name for name in used if name != NGRAM), NGRAM)
        cycle = self._cycles[host.name] = _Cycle(source=source)
        drafting = [row for row, own in zip(rows, sources, strict=True) if own in (source, NGRAM)]
        self._choose(host, cycle, rows, drafting, dict(zip(rows, sources, strict=True)))

    def _choose(
        self,
        host: LanguageHost,
        cycle: _Cycle,
        rows: Sequence[LanguageRow],
        drafting: Sequence[LanguageRow],
        sources: Mapping[LanguageRow, str],
    ) -> None:
        run = self._runs.get((host.name, cycle.source))
        if run is not None:
            for row in set(rows) & run.lines.keys():
                run.sync(row)
        found: dict[LanguageRow, tuple[int, ...]] = {}
        limits: list[int] = []
        shares: list[float] = []
        pace = self._paces.setdefault((host.name, cycle.source), Pace())
        plain_us = pace.costs.plain_us(len(rows))
        for row in rows:
            if row not in drafting:
                limits.append(0)
                shares.append(0.0)
                continue
            choice = self._choice(host, row, sources[row])
            most = 0 if choice.is_failed else self._most(host, row)
            if choice.index is not None:
                choice.index.extend(row.tokens[len(choice.index) :])
                found[row] = choice.index.propose(most)
                most = len(found[row])
            elif most and self._settings.is_paced:
                most = most if self._is_worth_it(host, cycle, row, plain_us, len(rows)) else 0
            limits.append(most)
            shares.append(choice.acceptance.share)
        lengths = pace.choose(shares, limits) if self._settings.is_paced else tuple(limits)
        for row, length in zip(rows, lengths, strict=True):
            if length and row in found:
                cycle.drafts[row] = found[row][:length]
            elif length:
                self._want(host, cycle, row, length)

    def _choice(self, host: LanguageHost, row: LanguageRow, source: str) -> _Choice:
        choice = self._choices.get(row)
        if choice is None:
            prior = self._shares.get((host.name, source), 0.5)
            choice = self._choices[row] = _Choice(
                acceptance=Acceptance(prior=(prior + 0.5) / 2),
                index=NgramIndex() if source == NGRAM else None,
            )
        return choice

    def _most(self, host: LanguageHost, row: LanguageRow) -> int:
        """Tokens that the row could still take, less the one that the target draws anyway."""
        return max(0, min(self._settings.max_tokens, _num_left(host, row) - 1))

    def _is_worth_it(
        self,
        host: LanguageHost,
        cycle: _Cycle,
        row: LanguageRow,
        plain_us: float | None,
        num_rows: int,
    ) -> bool:
        """May the drafting model catch up with what it has not seen of the row?"""
        lag = len(row.tokens) - self._num_seen(host, cycle.source, row)
        token_us = self._catch_up_us.get(cycle.source)
        if lag <= TYPICAL_LAG or token_us is None or plain_us is None:
            return True
        num_left = row.work.request.sampling.max_tokens - row.num_drawn
        return lag * token_us <= CATCH_UP_SHARE * num_left * plain_us / num_rows

    def _num_seen(self, host: LanguageHost, source: str, row: LanguageRow) -> int:
        run = self._runs.get((host.name, source))
        line = None if run is None else run.lines.get(row)
        return 0 if line is None else line.cursor

    def _want(self, host: LanguageHost, cycle: _Cycle, row: LanguageRow, length: int) -> None:
        """Have the model draft `length` tokens for the row. Without pages for that it drafts none."""
        key = (host.name, cycle.source)
        run = self._runs.get(key)
        if run is None:
            run = self._runs[key] = DraftRun(self._hosts[cycle.source], self._arena)
        if row not in run.lines:
            run.open(row)
        cycle.is_typical &= len(row.tokens) - run.lines[row].cursor <= TYPICAL_LAG
        try:
            run.want(row, length, self._state_of(row))
        except OutOfPagesError:
            run.drop(row)
            return
        cycle.run = run
        cycle.num_wanted[row] = length

    def advance(self, host: LanguageHost, budget_us: float) -> bool:
        """Have the model draft for about `budget_us`, at least one layer; True when all drafts are there."""
        cycle = self._cycles.get(host.name)
        if cycle is None or cycle.run is None or cycle.run.is_done:
            return True
        run, start_s, num_tokens = cycle.run, self._clock.now_s(), cycle.run.work.num_run
        per_token = LayerTimer(self._clock, budget_us)
        run.advance(per_token.num_fitting)
        spent_us = (self._clock.now_s() - start_s) * 1e6
        num_layers = run.host.model.spec.num_layers
        num_tokens = (run.work.num_run - num_tokens) // num_layers
        if num_tokens > TYPICAL_LAG:
            self._catch_up_us[run.host.name] = spent_us / num_tokens
        return run.is_done

    def take(self, host: LanguageHost) -> dict[LanguageRow, tuple[int, ...]]:
        """The drafts of the batch that is made now."""
        cycle = self._cycles.get(host.name)
        if cycle is None:
            return {}
        if cycle.run is not None:
            for row, length in cycle.num_wanted.items():
                line = cycle.run.lines.get(row)
                if line is not None and line.base == len(row.tokens) and line.draft:
                    cycle.drafts[row] = line.draft[:length]
        return cycle.drafts

    def run_ahead(self, host: LanguageHost) -> None:
        """The batch is on its way: draft what comes after, as if all of it held. Goes on until `pause`."""
        cycle = self._cycles.get(host.name)
        if not self._settings.is_ahead or cycle is None or cycle.run is None or not cycle.drafts:
            return
        run = cycle.run
        if self._settings.is_paced and not self._trial(host, cycle).is_first:
            return
        for row, length in cycle.num_wanted.items():
            line = run.lines.get(row)
            if line is None or not line.is_done:
                continue
            most = min(2 * length + 1, _num_left(host, row) - 1)
            if len(line.draft) < most:
                try:
                    run.want(row, most, self._state_of(row))
                except OutOfPagesError:
                    continue
        if not run.is_done:
            self._ahead.start(run)

    def _trial(self, host: LanguageHost, cycle: _Cycle) -> Trials:
        return self._trials.setdefault((host.name, cycle.source), Trials())

    def pause(self) -> None:
        """Nothing is drafted until it is asked for again; pages and lines may be touched."""
        run, error = self._ahead.pause()
        if run is not None and error is not None:
            logger.error("drafting with %s failed", run.host.name, exc_info=error)
            self._fail(run)

    def commit(
        self, host: LanguageHost, parts: Sequence[Part], num_taken: Mapping[LanguageRow, int]
    ) -> None:
        """A batch was checked. `num_taken`: tokens that each row that drew has more, the end of its text included."""
        cycle = self._cycles.get(host.name)
        if cycle is None:
            return
        cycle.is_committed, cycle.num_rows = True, len(parts)
        cycle.is_typical &= len(num_taken) == len(parts)
        cycle.num_taken = sum(num_taken.values())
        for part in parts:
            cycle.is_typical &= part.num_tokens == 1 + len(part.draft)
            if not part.draft or part.row not in num_taken:
                continue
            num_held = min(num_taken[part.row] - 1, len(part.draft))
            cycle.num_drafted += len(part.draft)
            self._counts.num_drafted += len(part.draft)
            self._counts.num_held += num_held
            choice = self._choices.get(part.row)
            if choice is not None:
                choice.acceptance.observe(num_drafted=len(part.draft), num_held=num_held)
                key = (host.name, NGRAM if choice.index is not None else cycle.source)
                known = self._shares.get(key, 0.5)
                self._shares[key] = known + 0.05 * (choice.acceptance.share - known)

    def end_step(self, host: LanguageHost, spent_us: float) -> None:
        """The engine spent so long on this model just now."""
        cycle = self._cycles.get(host.name)
        if cycle is None:
            return
        cycle.spent_us += spent_us
        if not cycle.is_committed:
            return
        del self._cycles[host.name]
        if self._settings.is_ahead and cycle.num_drafted and cycle.run is not None:
            self._trial(host, cycle).observe(num_taken=cycle.num_taken, spent_us=cycle.spent_us)
        pace = self._paces.get((host.name, cycle.source))
        is_told = cycle.is_typical or cycle.num_drafted > 0
        if pace is not None and is_told and cycle.num_taken >= cycle.num_rows > 0:
            pace.observe(
                num_rows=cycle.num_rows,
                num_drafted=cycle.num_drafted,
                num_taken=cycle.num_taken,
                spent_us=cycle.spent_us,
                is_typical=cycle.is_typical,
            )

    # --- rows and pages ------------------------------------------------------------------------------------------

    def forget(self, row: LanguageRow) -> None:
        """The row has ended."""
        self._choices.pop(row, None)
        self.release(row)

    def release(self, row: LanguageRow) -> None:
        """The row waits: what was drafted for it holds no pages."""
        for run in self._runs.values():
            run.drop(row)
        cycle = self._cycles.get(row.work.request.model)
        if cycle is not None:
            cycle.drafts.pop(row, None)
            cycle.num_wanted.pop(row, None)

    def give_pages(self) -> bool:
        """All pages of drafting models' rows are back. False: there were none."""
        has_any = any(run.lines for run in self._runs.values())
        for run in self._runs.values():
            for row in list(run.lines):
                run.drop(row)
        return has_any

    def abandon(self, host: LanguageHost) -> None:
        """The batch of this model failed."""
        self._cycles.pop(host.name, None)

    def relocate(self, moves: Moves) -> None:
        """The ledger moved pages: lines follow."""
        for run in self._runs.values():
            for line in run.lines.values():
                run.host.pages.relocate(line.shadow, moves)
            run.forget_pages()

    def close_model(self, name: str) -> None:
        """It neither drafts nor is drafted for any more."""
        for key in [key for key in self._runs if name in key]:
            run = self._runs.pop(key)
            for row in list(run.lines):
                run.drop(row)
            cycle = self._cycles.get(key[0])
            if cycle is not None and cycle.run is run:
                cycle.run = None
        self._cycles.pop(name, None)
        for key in [key for key in self._paces if name in key]:
            del self._paces[key]
            self._trials.pop(key, None)

    def fail(self, host: LanguageHost) -> None:
        """The model that drafts for this one failed: its rows go on without."""
        cycle = self._cycles.get(host.name)
        assert cycle is not None
        assert cycle.run is not None
        self._fail(cycle.run)

    def close(self) -> None:
        """Stop the thread, give all pages back."""
        self.pause()
        self.give_pages()
        self._ahead.close()

    def _fail(self, run: DraftRun) -> None:
        for row in list(run.lines):
            run.drop(row)
            choice = self._choices.get(row)
            if choice is not None:
                choice.is_failed = True


def _num_left(host: LanguageHost, row: LanguageRow) -> int:
    """Tokens that the row may still have."""
    return min(
        row.work.request.sampling.max_tokens - row.num_drawn,
        host.model.spec.max_tokens - len(row.tokens),
    )
