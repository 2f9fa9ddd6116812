"""Picture: the service's statistics and the hub's robots as the JSON that the page draws.

Called by `dashboard.feed`, ten times a second while a browser looks. Knows neither sockets nor time:
it is handed statistics that carry theirs. The page's side of the contract is docs/dashboard.md.
"""

import itertools
import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from ganglion.serve.dashboard.planners import PlannerPainter, dump, fine, rounded
from ganglion.serve.hub import Hub, Robot
from ganglion.serve.side import Impair
from ganglion.service import Residence
from ganglion.types import (
    LanguageStats,
    PaceStats,
    PoolStats,
    ServiceStats,
    SessionId,
    SessionStats,
    StepRecord,
)

STALE_S = 3.0  # telemetry older than this is drawn as old
LATENCY_WINDOW_S = 10.0
MAX_LATENCIES = 1024
POOL_PERIOD_S = 0.5
MAX_DRAWN_PAGES = 16_384
MAX_PIECE_ROWS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """One state of everything, encoded once for all browsers.

    `steps`, `turns` (steps of language models) and `pool` are apart because each browser gets only what it has not seen
    yet.
    """

    head: str  # JSON members without braces
    steps: tuple[tuple[int, str], ...]  # (step number, JSON object), oldest first
    turns: tuple[tuple[int, str], ...]
    pool: str
    pool_version: int
    views: Mapping[SessionId, int]  # sessions whose own robot is connected -> card

    def text(self, *, last_step: int, last_turn: int, pool_version: int) -> str:
        """The message for a browser that has seen these."""
        steps = ",".join(text for number, text in self.steps if number > last_step)
        turns = ",".join(text for number, text in self.turns if number > last_turn)
        pool = f',"pool":{self.pool}' if pool_version != self.pool_version else ""
        return f'{{"kind":"state",{self.head},"steps":[{steps}],"turns":[{turns}]{pool}}}'

    @property
    def last_step(self) -> int:
        """Number of the newest step; -1 before the first."""
        return self.steps[-1][0] if self.steps else -1

    @property
    def last_turn(self) -> int:
        """Number of the newest step of a language model; -1 before the first."""
        return self.turns[-1][0] if self.turns else -1


class Painter:
    """Makes pictures; remembers what it needs for rates, stable card numbers and unchanged parts."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._cards: dict[SessionId, int] = {}
        self._next_card = itertools.count(1)
        self._steps: dict[int, str] = {}
        self._planners = PlannerPainter()
        self._latencies: deque[tuple[float, float]] = deque(maxlen=MAX_LATENCIES)
        self._num_chunks: dict[SessionId, int] = {}
        self._pool: PoolStats | None = None
        self._pool_text = "null"
        self._pool_version = 0
        self._pool_s = -math.inf

    def paint(
        self,
        stats: ServiceStats,
        *,
        now_s: float,
        start_s: float,
        residences: Mapping[str, Residence] | None = None,
    ) -> Picture:
        """Everything as of `stats`; `now_s` and `start_s` are the edge's clock, for ages and uptime.

        `residences`: where each language model is.
        """
        pairs = self._pairs(stats)
        self._number_cards(session_id for session_id, _, _ in pairs)
        self._note_latencies(stats)
        self._encode_steps(stats.steps)
        self._encode_pool(stats)
        head = {
            "now_s": fine(stats.now_s),
            "uptime_s": rounded(now_s - start_s),
            "is_ready": stats.is_ready,
            "stage": stats.stage,
            "totals": self._totals(stats, pairs),
            "pace": None if stats.pace is None else _pace(stats.pace),
            "rung": stats.rung,
            "language": None
            if stats.language is None
            else self._planners.paint(stats.language, residences or {}, now_s=stats.now_s),
            "arms": [
                {
                    "card": self._cards[session_id],
                    "session_id": session_id,
                    "session": None if session is None else _session(session),
                    "robot": None if robot is None else _robot(robot, now_s),
                }
                for session_id, session, robot in pairs
            ],
        }
        return Picture(
            head=dump(head)[1:-1],
            steps=tuple(self._steps.items()),
            turns=self._planners.turns,
            pool=self._pool_text,
            pool_version=self._pool_version,
            views={
                session_id: self._cards[session_id]
                for session_id, _, robot in pairs
                if robot is not None
            },
        )

    def _pairs(
        self, stats: ServiceStats
    ) -> list[tuple[SessionId, SessionStats | None, Robot | None]]:
        """The service's sessions with their robots, then robots whose session is not open yet."""
        pairs: list[tuple[SessionId, SessionStats | None, Robot | None]] = []
        for session in stats.sessions:
            robot = self._hub.speaker(session.session_id)
            is_owner = robot is not None and robot.hello.robot_id == session.robot_id
            pairs.append((session.session_id, session, robot if is_owner else None))
        open_ids = {session.session_id for session in stats.sessions}
        pairs += [
            (robot.hello.session_id, None, robot)
            for robot in self._hub.robots
            if robot.hello.session_id not in open_ids
        ]
        return pairs

    def _number_cards(self, session_ids: Iterable[SessionId]) -> None:
        """Keep the numbers of known sessions, forget those that are gone."""
        self._cards = {
            session_id: self._cards.get(session_id) or next(self._next_card)
            for session_id in session_ids
        }

    def _note_latencies(self, stats: ServiceStats) -> None:
        for session in stats.sessions:
            if session.num_chunks > self._num_chunks.get(session.session_id, 0):
                self._latencies.append((stats.now_s, session.last_infer_ms))
        self._num_chunks = {s.session_id: s.num_chunks for s in stats.sessions}
        while self._latencies and stats.now_s - self._latencies[0][0] > LATENCY_WINDOW_S:
            self._latencies.popleft()

    def _totals(
        self,
        stats: ServiceStats,
        pairs: list[tuple[SessionId, SessionStats | None, Robot | None]],
    ) -> dict[str, Any]:
        heard = [
            robot.telemetry
            for _, _, robot in pairs
            if robot is not None and robot.telemetry is not None
        ]
        return {
            "num_arms": len(pairs),
            "chunk_hz": rounded(sum(session.chunk_hz for session in stats.sessions)),
            "latency_p50_ms": (
                rounded(median(ms for _, ms in self._latencies)) if self._latencies else None
            ),
            "num_requests": stats.num_requests,
            "num_results": stats.num_results,
            "num_errors": stats.num_errors,
            "num_cancelled": stats.num_cancelled,
            "num_late_chunks": sum(s.num_deadline_misses for s in stats.sessions),
            "num_ticks": sum(telemetry.tick for telemetry in heard),
            "num_misses": sum(telemetry.num_misses for telemetry in heard),
            "num_holds": sum(telemetry.num_holds for telemetry in heard),
            "num_episodes": sum(telemetry.num_episodes for telemetry in heard),
            "num_successes": sum(telemetry.num_successes for telemetry in heard),
        }

    def _encode_steps(self, records: tuple[StepRecord, ...]) -> None:
        self._steps = {
            record.step: self._steps.get(record.step) or dump(_step(record, self._cards))
            for record in records
        }

    def _encode_pool(self, stats: ServiceStats) -> None:
        """At most twice a second and only when it changed: a pool has thousands of pages."""
        if stats.now_s - self._pool_s < POOL_PERIOD_S or stats.pool == self._pool:
            return
        self._pool, self._pool_s = stats.pool, stats.now_s
        text = "null" if stats.pool is None else dump(_pool(stats.pool, stats.language))
        if text != self._pool_text:
            self._pool_text = text
            self._pool_version += 1


def _session(session: SessionStats) -> dict[str, Any]:
    return {
        "robot_id": session.robot_id,
        "prompt": session.prompt,
        "is_prompt_overridden": session.is_prompt_overridden,
        "num_chunks": session.num_chunks,
        "num_superseded": session.num_superseded,
        "num_late_chunks": session.num_deadline_misses,
        "num_errors": session.num_errors,
        "chunk_hz": rounded(session.chunk_hz),
        "infer_ms": rounded(session.last_infer_ms),
        "context_version": session.context_version,
        "in_flight": session.in_flight,
        "execution": session.execution,
        "wait_ratio": rounded(session.wait_ratio),
        "num_pages": dict(session.num_pages),
    }


def _robot(robot: Robot, now_s: float) -> dict[str, Any]:
    hello, telemetry = robot.hello, robot.telemetry
    picture: dict[str, Any] = {
        "robot_id": hello.robot_id,
        "world": hello.world,
        "task": hello.task,
        "prompt": hello.prompt,
        "control_hz": rounded(hello.control_hz),
        "impair": None if robot.impair is None else _impair(robot.impair),
        "telemetry": None,
    }
    if telemetry is None:
        return picture
    if telemetry.task is not None:
        picture["task"] = telemetry.task
    if telemetry.prompt is not None:
        picture["prompt"] = telemetry.prompt
    picture["telemetry"] = {
        "is_stale": now_s - robot.telemetry_s > STALE_S,
        "tick": telemetry.tick,
        "queue": [[rounded(value) for value in row] for row in telemetry.queue],
        "rate_hz": rounded(telemetry.rate_hz),
        "obs_age_ms": rounded(telemetry.obs_age_ms),
        "num_misses": telemetry.num_misses,
        "num_holds": telemetry.num_holds,
        "episode": telemetry.episode,
        "num_episodes": telemetry.num_episodes,
        "num_successes": telemetry.num_successes,
        "is_success": telemetry.is_success,
        "reply_prompt": telemetry.reply_prompt,
        "latency_ms": rounded(telemetry.latency_ms),
    }
    return picture


def _pace(pace: PaceStats) -> dict[str, Any]:
    return {
        "degree": pace.degree,
        "reason": pace.reason,
        "max_age_ms": rounded(pace.max_age_ms),
        "forecasts": [
            (each.degree, rounded(each.rate_hz), rounded(each.latency_ms))
            for each in pace.forecasts
        ],
    }


def _impair(impair: Impair) -> dict[str, Any]:
    return {"delay_ms": impair.delay_ms, "jitter_ms": impair.jitter_ms, "loss": impair.loss}


def _step(record: StepRecord, cards: Mapping[SessionId, int]) -> dict[str, Any]:
    return {
        "step": record.step,
        "start_s": fine(record.start_s),
        "run_us": rounded(record.run_us),
        "budget_us": record.budget_us,
        "num_waiting": record.num_waiting,
        "pieces": [
            {
                "model": piece.model,
                "stage": piece.stage,
                "kind": piece.kind,
                "lane": piece.lane,
                "num_rows": piece.num_rows,
                "num_units": piece.num_units,
                "start_s": fine(piece.start_s),
                "run_us": rounded(piece.run_us),
                "rows": [
                    (
                        cards.get(row.session_id, 0),
                        row.request_id,
                        row.seq,
                        row.first_unit,
                        row.num_left,
                        row.context_version,
                        row.context_seq,
                    )
                    for row in piece.rows[:MAX_PIECE_ROWS]
                ],
            }
            for piece in record.pieces
        ],
    }


def _pool(pool: PoolStats, language: LanguageStats | None) -> dict[str, Any]:
    planners = {} if language is None else language.layouts
    names = list(pool.pages_per_large)
    owners: dict[str, int] = {}
    pages = [
        (
            *divmod(page.page_id, pool.pages_per_large[page.layout]),
            names.index(page.layout),
            owners.setdefault(page.owner, len(owners)),
            page.num_refs,
        )
        for page in pool.live_pages[:MAX_DRAWN_PAGES]
    ]
    return {
        "large_page_bytes": pool.large_page_bytes,
        "num_large_pages": pool.num_large_pages,
        "num_free_large_pages": pool.num_free_large_pages,
        "num_hits": pool.num_hits,
        "num_misses": pool.num_misses,
        "layouts": [
            {
                "name": name,
                "kind": pool.kind(name),
                "who": "planners" if name in planners else "robots",
                "pages_per_large": pool.pages_per_large[name],
                "num_used": pool.num_used_pages.get(name, 0),
                "num_cached": pool.num_cached_pages.get(name, 0),
            }
            for name in names
        ],
        "owners": list(owners),
        "pages": pages,  # [large page, place in it, layout, owner, references]
        "num_hidden": sum((*pool.num_used_pages.values(), *pool.num_cached_pages.values()))
        - len(pages),
    }
