"""LanguageWatch: what operators learn of requests for tokens: metrics, a picture for the dashboard, a trace for each.

Told by `pipeline.language` and `pipeline.local` on the engine's thread; a refusal comes from any. Decides nothing.

One line of JSON a request, when it ends, from the logger `ganglion.trace` at INFO. Times are wall clock: what robots and
other requests took in between is in them. No text of prompts or answers stands in it.
"""

import json
import logging
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Protocol

from ganglion.clock import Clock
from ganglion.engine.drafter import DraftCounts
from ganglion.engine.language_record import Progress, WorkTrace
from ganglion.errors import ErrorCode, GanglionError
from ganglion.generation import FinishReason, GenerateRequest, Usage
from ganglion.metrics import Metrics
from ganglion.pipeline.turns import TurnKind
from ganglion.types import (
    LanguageRequestStats,
    LanguageStats,
    LanguageStepRecord,
    PromptPhase,
    RequestId,
)

trace_logger = logging.getLogger("ganglion.trace")

MAX_LISTED = 64  # requests of a picture
NUM_RECENT = 64  # first tokens whose median is shown
NOT_IN = Progress(  # of a request whose model is being loaded
    phase=PromptPhase.WAITING,
    num_computed_tokens=0,
    num_cached_tokens=0,
    num_preemptions=0,
    num_rows=1,
    num_pages=0,
)
UNKNOWN = "unknown"  # model of a request that named none that is served


class WatchedCore(Protocol):
    """What this reads of the language engine."""

    @property
    def records(self) -> Sequence[LanguageStepRecord]:
        """The last steps, newest last."""
        ...

    @property
    def num_preemptions(self) -> int:
        """Times that a request gave its pages back before its end."""
        ...

    @property
    def draft_counts(self) -> DraftCounts:
        """Tokens drafted ahead since the start."""
        ...

    def progress(self) -> Mapping[RequestId, Progress]:
        """How far each request is, oldest first."""
        ...


@dataclass(slots=True, kw_only=True)
class _Watched:
    """One request under way."""

    request: GenerateRequest
    submitted_s: float
    num_new_tokens: int = 0
    first_token_s: float | None = None
    last_token_s: float = 0.0
    is_long: bool = False  # a choice ended because it was long enough


class LanguageWatch:
    """One of a LanguageFront."""

    def __init__(self, metrics: Metrics, clock: Clock, *, num_lanes: int) -> None:
        self._metrics, self._clock, self._num_lanes = metrics, clock, num_lanes
        self._open: dict[RequestId, _Watched] = {}
        self._first_token_s: deque[float] = deque(maxlen=NUM_RECENT)
        self._last_step = 0
        self._counts = (0, 0, 0)  # preemptions, drafted and held tokens that metrics know of
        self._num_results = self._num_errors = self._num_cancelled = 0
        self._num_prompt_tokens = self._num_cached_tokens = self._num_new_tokens = 0

    # --- requests ------------------------------------------------------------------------------------------------

    def refuse(self, model: str, error: GanglionError) -> None:
        """A request that was not let in. From any thread."""
        self._metrics.language_requests.inc(model=model, outcome=error.code)

    def open(self, request_id: RequestId, request: GenerateRequest, submitted_s: float) -> None:
        """A request came in."""
        self._open[request_id] = _Watched(request=request, submitted_s=submitted_s)

    def show(self, request_id: RequestId, num_tokens: int, finish: FinishReason | None) -> None:
        """Tokens of one choice came out of the engine; `finish`: they are its last."""
        watched = self._open[request_id]
        watched.is_long |= finish is FinishReason.LENGTH
        if not num_tokens:
            return
        now_s, model = self._clock.now_s(), watched.request.model
        if watched.first_token_s is None:
            watched.first_token_s = now_s
            first_token_s = now_s - watched.submitted_s
            self._first_token_s.append(first_token_s)
            self._metrics.language_first_token_seconds.observe(first_token_s, model=model)
        elif watched.request.num_choices == 1:
            # tokens that come together share the time since the last ones
            between_s = (now_s - watched.last_token_s) / num_tokens
            for _ in range(num_tokens):
                self._metrics.language_between_tokens_seconds.observe(between_s, model=model)
        watched.last_token_s = now_s
        watched.num_new_tokens += num_tokens
        self._num_new_tokens += num_tokens
        self._metrics.language_new_tokens.inc(num_tokens, model=model)

    def end(
        self, request_id: RequestId, outcome: Usage | GanglionError, trace: WorkTrace | None
    ) -> None:
        """A request ended. `trace`: what the engine says of it; None: it never took it in."""
        watched = self._open.pop(request_id)
        model, now_s = watched.request.model, self._clock.now_s()
        if not isinstance(outcome, GanglionError):
            self._num_results += 1
            name = str(FinishReason.LENGTH if watched.is_long else FinishReason.STOP)
        else:
            name = str(outcome.code)
            self._num_cancelled += outcome.code is ErrorCode.CANCELLED
            self._num_errors += outcome.code is not ErrorCode.CANCELLED
        self._metrics.language_requests.inc(model=model, outcome=name)
        self._metrics.language_request_seconds.observe(now_s - watched.submitted_s, model=model)
        if trace is not None and trace.started_s is not None:
            num_prompt = len(watched.request.prompt)
            self._num_prompt_tokens += num_prompt
            self._num_cached_tokens += trace.num_cached_tokens
            self._metrics.language_prompt_tokens.inc(num_prompt, model=model)
            self._metrics.language_cached_tokens.inc(trace.num_cached_tokens, model=model)
            queue_s = trace.started_s - watched.submitted_s
            self._metrics.language_queue_seconds.observe(queue_s, model=model)
        if trace_logger.isEnabledFor(logging.INFO):
            line = _trace_line(request_id, watched, outcome, name, trace, now_s)
            trace_logger.info("%s", json.dumps(line, separators=(",", ":")))

    # --- turns ---------------------------------------------------------------------------------------------------

    def observe_turn(self, kind: TurnKind, run_us: float, slack_us: int | None) -> None:
        """Language models had a turn, and with it all lanes; drafts are in it.

        `slack_us`: how long robots' work could stand still; None: there was none.
        """
        for lane in range(self._num_lanes):
            self._metrics.lane_seconds.inc(run_us * 1e-6, lane=str(lane), who="planners")
        self._metrics.language_turn_seconds.observe(run_us * 1e-6, kind=kind)
        if kind is TurnKind.SLACK and slack_us:
            self._metrics.language_slack_ratio.observe(run_us / slack_us)

    def hold_back(self) -> None:
        """Language models had work, and robots needed the time."""
        self._metrics.language_held_back.inc()

    def observe_steps(self, records: Sequence[LanguageStepRecord]) -> None:
        """Count steps that are new among `records`."""
        for record in reversed(records):
            if record.step <= self._last_step:
                break
            run_s = record.run_us * 1e-6
            self._metrics.language_step_seconds.observe(run_s, model=record.model)
            num_tokens = record.num_prefill_tokens + record.num_decode_tokens
            if num_tokens:  # none: a picture
                self._metrics.language_batch_tokens.observe(num_tokens, model=record.model)
        self.skip_steps(records)

    def skip_steps(self, records: Sequence[LanguageStepRecord]) -> None:
        """Nobody asked for what was run so far."""
        self._last_step = records[-1].step if records else 0

    def _observe_counts(self, core: WatchedCore) -> None:
        drafts = core.draft_counts
        counts = (core.num_preemptions, drafts.num_drafted, drafts.num_held)
        counters = (
            self._metrics.language_preemptions,
            self._metrics.language_drafted_tokens,
            self._metrics.language_held_tokens,
        )
        for counter, count, before in zip(counters, counts, self._counts, strict=True):
            counter.inc(count - before)
        self._counts = counts

    # --- picture -------------------------------------------------------------------------------------------------

    def stats(self, core: WatchedCore, layouts: Mapping[str, str]) -> LanguageStats:
        """Everything that an operator sees of language models, as of now. `layouts`: of their pages -> the model."""
        self._observe_counts(core)
        now_s, progress = self._clock.now_s(), core.progress()
        known = [(request_id, progress.get(request_id, NOT_IN)) for request_id in self._open]
        waiting = [each for _, each in known if each.phase is PromptPhase.WAITING]
        num_rows = sum(each.num_rows for _, each in known)
        num_waiting = sum(each.num_rows for each in waiting)
        first_tokens = self._first_token_s
        return LanguageStats(
            requests=tuple(
                self._request_stats(request_id, each, now_s)
                for request_id, each in known[:MAX_LISTED]
            ),
            num_under_way=len(known),
            num_running=num_rows - num_waiting,
            num_waiting=num_waiting,
            num_results=self._num_results,
            num_errors=self._num_errors,
            num_cancelled=self._num_cancelled,
            num_prompt_tokens=self._num_prompt_tokens,
            num_cached_tokens=self._num_cached_tokens,
            num_new_tokens=self._num_new_tokens,
            num_preemptions=core.num_preemptions,
            num_drafted_tokens=core.draft_counts.num_drafted,
            num_held_tokens=core.draft_counts.num_held,
            first_token_p50_ms=median(first_tokens) * 1e3 if first_tokens else None,
            steps=tuple(core.records),
            layouts=layouts,
        )

    def _request_stats(
        self, request_id: RequestId, progress: Progress, now_s: float
    ) -> LanguageRequestStats:
        watched = self._open[request_id]
        request, first_s = watched.request, watched.first_token_s
        decode_s = 0.0 if first_s is None else now_s - first_s
        return LanguageRequestStats(
            request_id=request_id,
            model=request.model,
            phase=progress.phase,
            age_s=now_s - watched.submitted_s,
            num_choices=request.num_choices,
            num_prompt_tokens=len(request.prompt),
            num_computed_tokens=progress.num_computed_tokens,
            num_cached_tokens=progress.num_cached_tokens,
            num_new_tokens=watched.num_new_tokens,
            max_new_tokens=request.sampling.max_tokens * request.num_choices,
            tokens_per_s=watched.num_new_tokens / decode_s if decode_s > 0 else 0.0,
            num_pages=progress.num_pages,
            num_preemptions=progress.num_preemptions,
        )


def _trace_line(
    request_id: RequestId,
    watched: _Watched,
    outcome: Usage | GanglionError,
    name: str,
    trace: WorkTrace | None,
    now_s: float,
) -> dict[str, str | int | float | None]:
    """What became of one request. A time is null when the request never came that far."""
    request, first_s = watched.request, watched.first_token_s
    started_s = None if trace is None else trace.started_s
    return {
        "event": "language_request",
        "id": request.trace_id,
        "request": request_id,
        "model": request.model,
        "outcome": name,
        "error": str(outcome)[:200] if isinstance(outcome, GanglionError) else None,
        "num_choices": request.num_choices,
        "num_prompt_tokens": len(request.prompt),
        "num_cached_tokens": 0 if trace is None else trace.num_cached_tokens,
        "num_new_tokens": watched.num_new_tokens,
        "num_preemptions": 0 if trace is None else trace.num_preemptions,
        "queue_ms": _ms(watched.submitted_s, started_s),
        "prefill_ms": _ms(started_s, first_s),
        "decode_ms": _ms(first_s, watched.last_token_s),
        "total_ms": _ms(watched.submitted_s, now_s),
    }


def _ms(start_s: float | None, end_s: float | None) -> float | None:
    return None if start_s is None or end_s is None else round((end_s - start_s) * 1e3, 3)
