"""Metrics: every number that an operator can scrape, in one literal table, on a registry of its own.

Made once by `cli` (or a test) and passed down; written by serve and the engine, rendered by `/metrics`.
docs/metrics.md is generated from the table. Knows nothing of who writes which number.
"""

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from threading import Lock

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from ganglion.errors import ErrorCode, GanglionError
from ganglion.types import ActionChunk, PoolStats, ServiceStats, StepRecord

OTHER = "other"  # what a label becomes when its metric already has `max_series` series
CONTENT_TYPE = CONTENT_TYPE_LATEST

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 10.0)
_LONG_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0, 30.0, 120.0)
_TOKENS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0)
_RATIO = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 3.0)
_MODEL = {"model": "the language model"}
_ROWS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricSpec:
    """One row of the table. `labels`: label name -> what its values are, in words."""

    name: str
    doc: str
    labels: dict[str, str] = field(default_factory=dict)
    buckets: tuple[float, ...] = ()  # histograms only
    max_series: int = 64


# attribute of Metrics -> what it is. Names end in their unit; counters in _total (Prometheus' rule).
COUNTERS: dict[str, MetricSpec] = {
    "requests": MetricSpec(
        name="ganglion_requests_total", doc="Observations accepted by the service."
    ),
    "results": MetricSpec(name="ganglion_results_total", doc="Action chunks handed back."),
    "errors": MetricSpec(
        name="ganglion_errors_total",
        doc="Requests that ended in an error, superseded and cancelled ones included.",
        labels={"code": "the error's code, as on the wire"},
    ),
    "deadline_misses": MetricSpec(
        name="ganglion_deadline_misses_total",
        doc="Chunks that were ready only after their deadline, and requests dropped for it.",
    ),
    "steps": MetricSpec(
        name="ganglion_steps_total", doc="Engine steps that ran at least one piece."
    ),
    "page_hits": MetricSpec(
        name="ganglion_page_hits_total",
        doc="Pages of a shared stage found in the pool instead of computed.",
    ),
    "page_misses": MetricSpec(
        name="ganglion_page_misses_total",
        doc="Pages of a shared stage that had to be computed.",
    ),
    "frames": MetricSpec(
        name="ganglion_frames_total",
        doc="Websocket frames received from robots.",
        labels={"dialect": "openpi or ganglion"},
    ),
    "refused_frames": MetricSpec(
        name="ganglion_refused_frames_total",
        doc="Frames refused before they reached the service.",
        labels={"reason": "the error's code, or oversized, text, truncated"},
    ),
    "ignored_keys": MetricSpec(
        name="ganglion_ignored_keys_total",
        doc="Observation keys that the policy does not know and that were ignored.",
        labels={"key": "the key as sent, cut to 64 characters"},
        max_series=32,
    ),
    "clock_jumps": MetricSpec(
        name="ganglion_clock_jumps_total",
        doc="Observations whose robot's clock ran backwards since the one before; the clock was ignored.",
    ),
    "refused_requests": MetricSpec(
        name="ganglion_refused_http_requests_total",
        doc="HTTP requests and websocket handshakes refused by key, Host or Origin.",
        labels={"reason": "key, host, origin, limit"},
    ),
    "prompt_overrides": MetricSpec(
        name="ganglion_prompt_overrides_total",
        doc="Instructions that an operator put in place of a robot's own.",
    ),
    "gated_views": MetricSpec(
        name="ganglion_gated_views_total",
        doc="Views that the gate compared with what pages hold, where the service has a gate.",
        labels={"action": "skip, patches or full"},
    ),
    "lane_seconds": MetricSpec(
        name="ganglion_lane_seconds_total",
        doc="Time that a lane computed. A turn of language models has all lanes, whatever cores it runs on.",
        labels={"lane": "its number", "who": "robots or planners"},
        max_series=256,
    ),
    "language_requests": MetricSpec(
        name="ganglion_language_requests_total",
        doc="Requests to language models that ended, those that were not let in included.",
        labels=_MODEL | {"outcome": "stop, length, or the error's code"},
        max_series=256,
    ),
    "language_prompt_tokens": MetricSpec(
        name="ganglion_language_prompt_tokens_total",
        doc="Prompt tokens of requests that ended, cached ones included.",
        labels=_MODEL,
    ),
    "language_cached_tokens": MetricSpec(
        name="ganglion_language_cached_tokens_total",
        doc="Those of them that were found in pages.",
        labels=_MODEL,
    ),
    "language_new_tokens": MetricSpec(
        name="ganglion_language_new_tokens_total", doc="Tokens generated.", labels=_MODEL
    ),
    "language_preemptions": MetricSpec(
        name="ganglion_language_preemptions_total",
        doc="Times that a request gave its pages back before its end and waited again.",
    ),
    "language_drafted_tokens": MetricSpec(
        name="ganglion_language_drafted_tokens_total",
        doc="Tokens that were drafted ahead and checked.",
    ),
    "language_held_tokens": MetricSpec(
        name="ganglion_language_held_tokens_total",
        doc="Those of them that held: the model would have drawn them, too.",
    ),
    "language_held_back": MetricSpec(
        name="ganglion_language_held_back_total",
        doc="Engine rounds in which a language model had work and robots needed the time.",
    ),
    "model_loads": MetricSpec(
        name="ganglion_model_loads_total",
        doc="Language models loaded, or refused in loading.",
        labels=_MODEL | {"outcome": "loaded, or the error's code"},
    ),
    "model_unloads": MetricSpec(
        name="ganglion_model_unloads_total",
        doc="Language models put out of memory.",
        labels=_MODEL | {"reason": "idle: nobody asked for it; room: another needed its bytes"},
    ),
}

GAUGES: dict[str, MetricSpec] = {
    "connections": MetricSpec(
        name="ganglion_connections",
        doc="Open websockets.",
        labels={"channel": "robot; side channels and browsers are not counted"},
    ),
    "sessions": MetricSpec(name="ganglion_sessions", doc="Open sessions."),
    "waiting": MetricSpec(
        name="ganglion_waiting_requests", doc="Requests accepted and not yet answered."
    ),
    "pool_pages": MetricSpec(
        name="ganglion_pool_pages",
        doc="Small pages of the pool.",
        labels={"layout": "page layout", "state": "used or cached"},
    ),
    "pool_kind_bytes": MetricSpec(
        name="ganglion_pool_kind_bytes",
        doc="Bytes of the pool's small pages by what they hold and for whom.",
        labels={
            "kind": "kv, feature, state, ...",
            "who": "robots or planners",
            "state": "used or cached",
        },
    ),
    "pool_free_bytes": MetricSpec(
        name="ganglion_pool_free_bytes", doc="Bytes in large pages that no layout holds."
    ),
    "pool_bytes": MetricSpec(name="ganglion_pool_bytes", doc="Bytes of the whole pool."),
    "ready": MetricSpec(name="ganglion_ready", doc="1 when the service takes requests."),
    "language_running": MetricSpec(
        name="ganglion_language_running_rows",
        doc="Sequences of language models that hold pages.",
    ),
    "language_waiting": MetricSpec(
        name="ganglion_language_waiting_rows",
        doc="Sequences of language models that wait for pages.",
    ),
}

HISTOGRAMS: dict[str, MetricSpec] = {
    "infer_seconds": MetricSpec(
        name="ganglion_infer_seconds",
        doc="Observation submitted to chunk ready.",
        buckets=_SECONDS,
    ),
    "queue_seconds": MetricSpec(
        name="ganglion_queue_seconds",
        doc="Observation submitted to its first piece starting.",
        buckets=_SECONDS,
    ),
    "step_seconds": MetricSpec(
        name="ganglion_step_seconds", doc="One engine step, plan to emit.", buckets=_SECONDS
    ),
    "piece_seconds": MetricSpec(
        name="ganglion_piece_seconds",
        doc="Model time of one piece.",
        labels={"kind": "encode, prefill or denoise"},
        buckets=_SECONDS,
    ),
    "batch_rows": MetricSpec(
        name="ganglion_batch_rows",
        doc="Rows of one piece: how many robots' requests shared a forward pass.",
        labels={"kind": "encode, prefill or denoise"},
        buckets=_ROWS,
    ),
    "overhead_seconds": MetricSpec(
        name="ganglion_overhead_seconds",
        doc="Frame received to reply sent, minus the time inside the service.",
        buckets=_SECONDS,
    ),
    "language_queue_seconds": MetricSpec(
        name="ganglion_language_queue_seconds",
        doc="Prompt submitted to its first batch.",
        labels=_MODEL,
        buckets=_LONG_SECONDS,
    ),
    "language_first_token_seconds": MetricSpec(
        name="ganglion_language_first_token_seconds",
        doc="Prompt submitted to its first token.",
        labels=_MODEL,
        buckets=_LONG_SECONDS,
    ),
    "language_between_tokens_seconds": MetricSpec(
        name="ganglion_language_between_tokens_seconds",
        doc="One token to the next, of requests for one choice.",
        labels=_MODEL,
        buckets=_SECONDS,
    ),
    "language_request_seconds": MetricSpec(
        name="ganglion_language_request_seconds",
        doc="Prompt submitted to the end of its request.",
        labels=_MODEL,
        buckets=_LONG_SECONDS,
    ),
    "language_step_seconds": MetricSpec(
        name="ganglion_language_step_seconds",
        doc="One step of the language engine: a batch, or some layers of it.",
        labels=_MODEL,
        buckets=_SECONDS,
    ),
    "language_batch_tokens": MetricSpec(
        name="ganglion_language_batch_tokens",
        doc="Tokens of one step, prefilled and decoded.",
        labels=_MODEL,
        buckets=_TOKENS,
    ),
    "language_turn_seconds": MetricSpec(
        name="ganglion_language_turn_seconds",
        doc="A turn of language models between robots' steps.",
        labels={
            "kind": "alone: no robot is connected; idle: robots have no work; slack: before the first "
            "of them has to go on; late: robots are late, and this is the floor of the time"
        },
        buckets=_SECONDS,
    ),
    "language_slack_ratio": MetricSpec(
        name="ganglion_language_slack_used_ratio",
        doc="Part of the slack of robots' work that a turn took; above 1 it took more than there was.",
        buckets=_RATIO,
    ),
    "model_load_seconds": MetricSpec(
        name="ganglion_model_load_seconds",
        doc="A language model's files to its being ready.",
        labels=_MODEL,
        buckets=_LONG_SECONDS,
    ),
}


class _Series:
    """The label values that one metric has seen, bounded: past `max_series` they all count as OTHER."""

    def __init__(self, spec: MetricSpec) -> None:
        self._spec = spec
        self._names = tuple(spec.labels)
        self._seen: dict[tuple[str, ...], tuple[str, ...]] = {}
        self._lock = Lock()

    def key(self, labels: dict[str, str]) -> tuple[str, ...]:
        """Label values in the table's order, or OTHER for each when the metric is full."""
        try:
            values = tuple(labels[name] for name in self._names)
        except KeyError:
            values = ()
        if len(values) != len(labels) or len(values) != len(self._names):
            raise TypeError(
                f"{self._spec.name} takes the labels {self._names}, got {tuple(labels)}"
            )
        bounded = self._seen.get(values)
        if bounded is None:
            with self._lock:
                if len(self._seen) < self._spec.max_series:
                    bounded = tuple(value[:64] for value in values)
                    self._seen[values] = bounded
                else:
                    bounded = (OTHER,) * len(values)
        return bounded


class CounterMetric:
    """A number that only rises. Thread-safe."""

    def __init__(self, spec: MetricSpec, registry: CollectorRegistry) -> None:
        self._series = _Series(spec)
        self._metric = Counter(spec.name, spec.doc, tuple(spec.labels), registry=registry)

    def inc(self, amount: float = 1.0, **labels: str) -> None:
        """Add `amount`; labels by name, exactly those of the table."""
        key = self._series.key(labels)
        (self._metric.labels(*key) if key else self._metric).inc(amount)


class GaugeMetric:
    """A number that is what it is now. Thread-safe."""

    def __init__(self, spec: MetricSpec, registry: CollectorRegistry) -> None:
        self._series = _Series(spec)
        self._metric = Gauge(spec.name, spec.doc, tuple(spec.labels), registry=registry)

    def set(self, value: float, **labels: str) -> None:
        """Replace the value."""
        key = self._series.key(labels)
        (self._metric.labels(*key) if key else self._metric).set(value)

    def inc(self, amount: float = 1.0, **labels: str) -> None:
        """Add `amount`, which may be negative."""
        key = self._series.key(labels)
        (self._metric.labels(*key) if key else self._metric).inc(amount)


class HistogramMetric:
    """A distribution. Thread-safe."""

    def __init__(self, spec: MetricSpec, registry: CollectorRegistry) -> None:
        self._series = _Series(spec)
        self._metric = Histogram(
            spec.name, spec.doc, tuple(spec.labels), registry=registry, buckets=spec.buckets
        )

    def observe(self, value: float, **labels: str) -> None:
        """Count one value."""
        key = self._series.key(labels)
        (self._metric.labels(*key) if key else self._metric).observe(value)


class Metrics:
    """One attribute per row of the tables above, on a registry that nobody else writes."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        reg = self.registry
        self.requests = CounterMetric(COUNTERS["requests"], reg)
        self.results = CounterMetric(COUNTERS["results"], reg)
        self.errors = CounterMetric(COUNTERS["errors"], reg)
        self.deadline_misses = CounterMetric(COUNTERS["deadline_misses"], reg)
        self.steps = CounterMetric(COUNTERS["steps"], reg)
        self.page_hits = CounterMetric(COUNTERS["page_hits"], reg)
        self.page_misses = CounterMetric(COUNTERS["page_misses"], reg)
        self.frames = CounterMetric(COUNTERS["frames"], reg)
        self.refused_frames = CounterMetric(COUNTERS["refused_frames"], reg)
        self.ignored_keys = CounterMetric(COUNTERS["ignored_keys"], reg)
        self.clock_jumps = CounterMetric(COUNTERS["clock_jumps"], reg)
        self.refused_requests = CounterMetric(COUNTERS["refused_requests"], reg)
        self.prompt_overrides = CounterMetric(COUNTERS["prompt_overrides"], reg)
        self.gated_views = CounterMetric(COUNTERS["gated_views"], reg)
        self.lane_seconds = CounterMetric(COUNTERS["lane_seconds"], reg)
        self.language_requests = CounterMetric(COUNTERS["language_requests"], reg)
        self.language_prompt_tokens = CounterMetric(COUNTERS["language_prompt_tokens"], reg)
        self.language_cached_tokens = CounterMetric(COUNTERS["language_cached_tokens"], reg)
        self.language_new_tokens = CounterMetric(COUNTERS["language_new_tokens"], reg)
        self.language_preemptions = CounterMetric(COUNTERS["language_preemptions"], reg)
        self.language_drafted_tokens = CounterMetric(COUNTERS["language_drafted_tokens"], reg)
        self.language_held_tokens = CounterMetric(COUNTERS["language_held_tokens"], reg)
        self.language_held_back = CounterMetric(COUNTERS["language_held_back"], reg)
        self.model_loads = CounterMetric(COUNTERS["model_loads"], reg)
        self.model_unloads = CounterMetric(COUNTERS["model_unloads"], reg)
        self.connections = GaugeMetric(GAUGES["connections"], reg)
        self.sessions = GaugeMetric(GAUGES["sessions"], reg)
        self.waiting = GaugeMetric(GAUGES["waiting"], reg)
        self.pool_pages = GaugeMetric(GAUGES["pool_pages"], reg)
        self.pool_free_bytes = GaugeMetric(GAUGES["pool_free_bytes"], reg)
        self.pool_bytes = GaugeMetric(GAUGES["pool_bytes"], reg)
        self.pool_kind_bytes = GaugeMetric(GAUGES["pool_kind_bytes"], reg)
        self.ready = GaugeMetric(GAUGES["ready"], reg)
        self.language_running = GaugeMetric(GAUGES["language_running"], reg)
        self.language_waiting = GaugeMetric(GAUGES["language_waiting"], reg)
        self.infer_seconds = HistogramMetric(HISTOGRAMS["infer_seconds"], reg)
        self.queue_seconds = HistogramMetric(HISTOGRAMS["queue_seconds"], reg)
        self.step_seconds = HistogramMetric(HISTOGRAMS["step_seconds"], reg)
        self.piece_seconds = HistogramMetric(HISTOGRAMS["piece_seconds"], reg)
        self.batch_rows = HistogramMetric(HISTOGRAMS["batch_rows"], reg)
        self.overhead_seconds = HistogramMetric(HISTOGRAMS["overhead_seconds"], reg)
        self.language_queue_seconds = HistogramMetric(HISTOGRAMS["language_queue_seconds"], reg)
        self.language_first_token_seconds = HistogramMetric(
            HISTOGRAMS["language_first_token_seconds"], reg
        )
        self.language_between_tokens_seconds = HistogramMetric(
            HISTOGRAMS["language_between_tokens_seconds"], reg
        )
        self.language_request_seconds = HistogramMetric(HISTOGRAMS["language_request_seconds"], reg)
        self.language_step_seconds = HistogramMetric(HISTOGRAMS["language_step_seconds"], reg)
        self.language_batch_tokens = HistogramMetric(HISTOGRAMS["language_batch_tokens"], reg)
        self.language_turn_seconds = HistogramMetric(HISTOGRAMS["language_turn_seconds"], reg)
        self.language_slack_ratio = HistogramMetric(HISTOGRAMS["language_slack_ratio"], reg)
        self.model_load_seconds = HistogramMetric(HISTOGRAMS["model_load_seconds"], reg)

        self._num_hits = self._num_misses = 0  # of the pool, as of the last observe_pool

    def observe_outcome(self, outcome: ActionChunk | GanglionError) -> None:
        """Count one request's end. Called once per request."""
        if isinstance(outcome, ActionChunk):
            self.results.inc()
            self.infer_seconds.observe(outcome.timing.infer_ms * 1e-3)
            self.queue_seconds.observe(outcome.timing.queue_ms * 1e-3)
            if not outcome.is_deadline_met:
                self.deadline_misses.inc()
            return
        self.errors.inc(code=outcome.code)
        if outcome.code is ErrorCode.DEADLINE_MISSED:
            self.deadline_misses.inc()

    def observe_step(self, record: StepRecord) -> None:
        """Count one finished engine step and its pieces."""
        self.steps.inc()
        self.step_seconds.observe(record.run_us * 1e-6)
        self.waiting.set(record.num_waiting)
        for piece in record.pieces:
            self.piece_seconds.observe(piece.run_us * 1e-6, kind=piece.kind)
            self.batch_rows.observe(piece.num_rows, kind=piece.kind)
            self.lane_seconds.inc(piece.run_us * 1e-6, lane=str(piece.lane), who="robots")

    def observe_stats(self, stats: ServiceStats) -> None:
        """Bring the gauges up to `stats`. Called before each render, from one thread."""
        self.ready.set(stats.is_ready)
        self.sessions.set(len(stats.sessions))
        language, pool = stats.language, stats.pool
        if language is not None:
            self.language_running.set(language.num_running)
            self.language_waiting.set(language.num_waiting)
        if pool is None:
            return
        planners = frozenset[str]() if language is None else frozenset(language.layouts)
        self.pool_bytes.set(pool.large_page_bytes * pool.num_large_pages)
        self.pool_free_bytes.set(pool.large_page_bytes * pool.num_free_large_pages)
        for state, num_pages in (("used", pool.num_used_pages), ("cached", pool.num_cached_pages)):
            for layout, count in num_pages.items():
                self.pool_pages.set(count, layout=layout, state=state)
            self._observe_kinds(pool, num_pages, state, planners=planners)
        self.page_hits.inc(pool.num_hits - self._num_hits)
        self.page_misses.inc(pool.num_misses - self._num_misses)
        self._num_hits, self._num_misses = pool.num_hits, pool.num_misses

    def _observe_kinds(
        self, pool: PoolStats, num_pages: Mapping[str, int], state: str, *, planners: Set[str]
    ) -> None:
        num_bytes: dict[tuple[str, str], float] = {}
        for layout, count in num_pages.items():
            of = (pool.kind(layout), "planners" if layout in planners else "robots")
            page_bytes = pool.large_page_bytes / pool.pages_per_large[layout]
            num_bytes[of] = num_bytes.get(of, 0.0) + count * page_bytes
        for (kind, who), value in num_bytes.items():
            self.pool_kind_bytes.set(value, kind=kind, who=who, state=state)

    def render(self) -> bytes:
        """The text that `/metrics` answers with; its content type is `CONTENT_TYPE`."""
        return generate_latest(self.registry)


def metrics_page() -> str:
    """docs/metrics.md: the tables above as markdown."""
    lines = [
        "# Metrics",
        "",
        "Generated from `src/ganglion/metrics.py` by `make docs`; do not edit.",
        "",
        "`GET /metrics` answers in Prometheus' text format. A metric keeps a bounded number of label values; further",
        f"ones count as `{OTHER}`.",
    ]
    for title, table in (("Counters", COUNTERS), ("Gauges", GAUGES), ("Histograms", HISTOGRAMS)):
        lines += ["", f"## {title}", "", "| name | labels | what |", "|---|---|---|"]
        for spec in table.values():
            labels = "; ".join(f"`{label}`: {what}" for label, what in spec.labels.items())
            lines.append(f"| `{spec.name}` | {labels or '-'} | {spec.doc} |")
    return "\n".join(lines) + "\n"
