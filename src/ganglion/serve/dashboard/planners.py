"""Planners: language models' statistics as the JSON that the page draws. Called by `dashboard.picture`.

Knows neither sockets nor time: it is handed statistics that carry theirs. Also how numbers are written for eyes.
"""

import json
import math
from collections import deque
from collections.abc import Mapping
from typing import Any

from ganglion.service import Residence
from ganglion.types import LanguageRequestStats, LanguageStats, LanguageStepRecord

RATE_WINDOW_S = 2.0


class PlannerPainter:
    """Remembers what it needs for rates and unchanged parts."""

    def __init__(self) -> None:
        self._turns: dict[int, str] = {}
        self._counts: deque[tuple[float, int]] = deque()  # (time, tokens generated since the start)

    @property
    def turns(self) -> tuple[tuple[int, str], ...]:
        """(number, JSON object) of the last steps, oldest first."""
        return tuple(self._turns.items())

    def paint(
        self, language: LanguageStats, residences: Mapping[str, Residence], *, now_s: float
    ) -> dict[str, Any]:
        """Everything but the steps, which are in `turns` from here on. `residences`: by model."""
        self._turns = {
            record.step: self._turns.get(record.step) or dump(_turn(record))
            for record in language.steps
        }
        return {
            "num_under_way": language.num_under_way,
            "num_running": language.num_running,
            "num_waiting": language.num_waiting,
            "num_results": language.num_results,
            "num_errors": language.num_errors,
            "num_cancelled": language.num_cancelled,
            "num_prompt_tokens": language.num_prompt_tokens,
            "num_cached_tokens": language.num_cached_tokens,
            "num_new_tokens": language.num_new_tokens,
            "num_preemptions": language.num_preemptions,
            "num_drafted_tokens": language.num_drafted_tokens,
            "num_held_tokens": language.num_held_tokens,
            "tokens_per_s": rounded(self._tokens_per_s(language.num_new_tokens, now_s)),
            "first_token_p50_ms": rounded(language.first_token_p50_ms),
            "models": [
                {
                    "name": name,
                    "state": residence.state,
                    "stay": residence.stay,
                    "weight_bytes": residence.weight_bytes,
                }
                for name, residence in residences.items()
            ],
            "requests": [_request(request) for request in language.requests],
        }

    def _tokens_per_s(self, num_tokens: int, now_s: float) -> float:
        counts = self._counts
        if counts and num_tokens < counts[-1][1]:
            counts.clear()
        counts.append((now_s, num_tokens))
        while len(counts) > 2 and now_s - counts[1][0] >= RATE_WINDOW_S:
            counts.popleft()
        first_s, num_first = counts[0]
        return (num_tokens - num_first) / (now_s - first_s) if now_s > first_s else 0.0


def _request(request: LanguageRequestStats) -> dict[str, Any]:
    return {
        "request_id": request.request_id,
        "model": request.model,
        "phase": request.phase,
        "age_s": rounded(request.age_s),
        "num_choices": request.num_choices,
        "num_prompt_tokens": request.num_prompt_tokens,
        "num_computed_tokens": request.num_computed_tokens,
        "num_cached_tokens": request.num_cached_tokens,
        "num_new_tokens": request.num_new_tokens,
        "max_new_tokens": request.max_new_tokens,
        "tokens_per_s": rounded(request.tokens_per_s),
        "num_pages": request.num_pages,
        "num_preemptions": request.num_preemptions,
    }


def _turn(record: LanguageStepRecord) -> dict[str, Any]:
    return {
        "turn": record.step,
        "model": record.model,
        "start_s": fine(record.start_s),
        "run_us": rounded(record.run_us),
        "budget_us": record.budget_us,
        "num_rows": record.num_rows,
        "num_prefill": record.num_prefill_tokens,
        "num_decode": record.num_decode_tokens,
        "first_layer": record.first_layer,
        "num_layers": record.num_layers,
        "num_waiting": record.num_waiting,
    }


def rounded(number: float | None) -> float | None:
    """Three digits are plenty for eyes; what JSON cannot say becomes null."""
    return round(number, 3) if number is not None and math.isfinite(number) else None


def fine(time_s: float) -> float:
    """A time to the microsecond."""
    return round(time_s, 6)


def dump(value: object) -> str:
    """Compact JSON."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
