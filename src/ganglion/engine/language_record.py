"""Language record: what the language engine did in a step, and how far each request is, as operators see it.

Called by `engine.language`. Pure; decides nothing.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ganglion.engine.language_host import LanguageHost
from ganglion.engine.language_work import LanguageWork, Part
from ganglion.types import LanguageStepRecord, PromptPhase

MAX_RECORDS = 480  # kept for the timeline: several pictures' worth of short steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far one request is. `num_computed_tokens`: of its prompt, cached ones included."""

    phase: PromptPhase
    num_computed_tokens: int
    num_cached_tokens: int
    num_preemptions: int
    num_rows: int  # its choices that have not ended; before the prompt is computed there is one
    num_pages: int  # that its rows hold, shared ones counted for each


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkTrace:
    """What a request went through. `started_s`: when its first batch was made; None: it never came in."""

    started_s: float | None
    num_preemptions: int
    num_cached_tokens: int


def trace(work: LanguageWork) -> WorkTrace:
    """Of a request that ends."""
    return WorkTrace(
        started_s=work.started_s,
        num_preemptions=work.num_preemptions,
        num_cached_tokens=work.num_cached or 0,
    )


def progress(work: LanguageWork) -> Progress:
    """Of a request under way: it waits while none of its rows is admitted, and prefills until its prompt is computed."""
    rows = [row for row in work.rows if row.finish is None]
    num_prompt = len(work.request.prompt)
    num_computed = min((row.num_computed for row in rows), default=num_prompt)
    if not any(row.is_admitted for row in rows):
        phase = PromptPhase.WAITING
    elif num_computed < num_prompt:
        phase = PromptPhase.PREFILL
    else:
        phase = PromptPhase.DECODE
    return Progress(
        phase=phase,
        num_computed_tokens=min(num_computed, num_prompt),
        num_cached_tokens=work.num_cached or 0,
        num_preemptions=work.num_preemptions,
        num_rows=len(rows),
        num_pages=sum(len(table.pages) for row in rows for table in row.tables),
    )


def step_record(
    step: int,
    host: LanguageHost,
    parts: Sequence[Part],
    layers: range,
    *,
    hosts: Mapping[str, LanguageHost],
    start_s: float,
    end_s: float,
    budget_us: int,
) -> LanguageStepRecord:
    """A step that took `parts` through `layers`. Tokens of a prompt are prefilled, even for a second time."""
    num_prefill, num_decode = _num_tokens(parts)
    rows = [row for each in hosts.values() for row in each.rows]
    num_running = sum(row.is_admitted for row in rows)
    return LanguageStepRecord(
        step=step,
        model=host.name,
        start_s=start_s,
        run_us=(end_s - start_s) * 1e6,
        budget_us=budget_us,
        num_rows=len(parts),
        num_prefill_tokens=num_prefill,
        num_decode_tokens=num_decode,
        first_layer=layers.start,
        num_layers=len(layers),
        num_running=num_running,
        num_waiting=len(rows) - num_running,
    )


def _num_tokens(parts: Iterable[Part]) -> tuple[int, int]:
    num_prefill = num_decode = 0
    for part in parts:
        num_of_prompt = max(0, min(part.end, len(part.row.work.request.prompt)) - part.start)
        num_prefill += num_of_prompt
        num_decode += part.num_tokens - num_of_prompt
    return num_prefill, num_decode
