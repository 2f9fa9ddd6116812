"""Values that cross rooms: ids, observations, chunks, spans, statistics. Frozen data, no behaviour beyond properties.

Used by everybody. Knows numpy, but neither torch nor sockets.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NewType

import numpy as np
import numpy.typing as npt

SessionId = NewType("SessionId", str)
RobotId = NewType("RobotId", str)
RequestId = NewType("RequestId", int)
PageId = NewType("PageId", int)

UInt8Array = npt.NDArray[np.uint8]
Float32Array = npt.NDArray[np.float32]


class SpanKind(StrEnum):
    """What a span advances. `unit` of its cursor: an image, a prompt token, a flow step."""

    ENCODE = "encode"
    PREFILL = "prefill"
    DENOISE = "denoise"


class Execution(StrEnum):
    """How a robot goes from one chunk to the next, when the next takes several control ticks to compute.

    The first three and the last need nothing of the server: what differs is what the robot does with the chunks.
    """

    SYNC = "sync"  # stands still until the chunk of its newest observation is there
    NAIVE = "naive"  # the newest chunk, each row at its own tick
    BLEND = "blend"  # overlapping rows are averaged (LeRobot's asynchronous inference)
    RTC = "rtc"  # the chunk is guided to the one that is executed (arXiv 2506.07339)
    RTC_IDENTITY = "rtc-identity"  # the same without the network's Jacobian, as LeRobot computes it
    PREFIX = "prefix"  # the chunk begins with the actions that run anyway (arXiv 2512.05964)
    ROLLED = "rolled"  # the state is rolled forward to the tick of execution (arXiv 2512.01031)


@dataclass(frozen=True, slots=True, kw_only=True)
class Renewal:
    """What of an observation pages hold already, as a gate found.

    `is_repeat`: it shows what the session's last one did, and carries its very images and state. `images`: view key -> uint8 [height, width, 3], the image whose features are there. `tokens`: view key -> bool
    [row, column], the tokens to compute anew; all others equal those of that image.
    """

    images: Mapping[str, UInt8Array]
    tokens: Mapping[str, npt.NDArray[np.bool_]]
    is_repeat: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """One checked observation of one robot, as every dialect delivers it.

    `images`: view key -> uint8 [height, width, 3]. `state`: float32 [state_dim], in the robot's units.
    `obs_time_ns` is the robot's own monotonic clock; it is echoed and never compared with ours.
    `executed_until`: actions that the robot had executed when it was taken: its control tick.
    `action_prefix`: float32 [d, action_dim], the actions that run from that tick on, whatever the server answers.
    `inference_delay_hint`: control ticks from that tick to the first one that the chunk is expected for.
    `renewal`: the server's own, never a robot's.
    """

    session_id: SessionId
    robot_id: RobotId
    seq: int
    images: Mapping[str, UInt8Array]
    state: Float32Array
    prompt: str
    obs_time_ns: int | None = None
    control_hz: float | None = None
    deadline_ms: float | None = None
    seed: int | None = None
    execution: Execution = Execution.NAIVE
    executed_until: int | None = None
    action_prefix: Float32Array | None = None
    inference_delay_hint: int | None = None
    renewal: Renewal | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a robot executes from an observation's tick on, as far as it is known: the rest of its chunks.

    `actions`: float32 [n, action_dim] in the robot's units, row 0 for that tick. The first `num_committed` of them run
    before the chunk that is being made can arrive.
    """

    actions: Float32Array
    num_committed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row of a piece. [0, `first_unit`) of its units are computed.

    A row that denoises reads the newest `observation` that its session's public context rests on. `shift`: control
    ticks from the observation that it read last to this one; row i of its chunk becomes row i - shift.
    """

    observation: Observation
    first_unit: int
    is_new: bool = False  # its own pages hold nothing yet
    shift: int = 0
    plan: Plan | None = None
    num_units: int | None = None  # flow steps that it takes in all; None: its stage's number


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Where a request's time went on the server, milliseconds of the server's monotonic clock."""

    queue_ms: float  # submit -> first piece starts
    perceive_ms: float  # model time of the steps' encode and prefill pieces that carried it
    generate_ms: float  # model time of the steps' denoise pieces that carried it
    wait_ms: float  # between its pieces, and everything else
    infer_ms: float  # submit -> result


@dataclass(frozen=True, slots=True, kw_only=True)
class ActionChunk:
    """An array of future actions and the observation it rests on.

    `actions`: float32 [horizon, action_dim], read-only; row i is for the control tick `i` after that of observation
    `context_seq`, the newest that went into it: `obs_seq`, which it answers, or a newer one.
    """

    session_id: SessionId
    obs_seq: int
    obs_time_ns: int | None
    context_seq: int
    actions: Float32Array
    prompt: str
    is_prompt_overridden: bool
    model_version: str
    context_version: int
    batch_size: int
    is_deadline_met: bool
    timing: Timing


# --- commands of the edge to a session -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ResetSession:
    """Forget the session's context and cancel its work; only its owner may."""

    session_id: SessionId
    robot_id: RobotId


@dataclass(frozen=True, slots=True, kw_only=True)
class CloseSession:
    """The robot is gone: cancel its work and give its pages back. Only its owner may."""

    session_id: SessionId
    robot_id: RobotId


@dataclass(frozen=True, slots=True, kw_only=True)
class OverridePrompt:
    """An operator's instruction replaces the robot's own from the next observation on; None gives it back."""

    session_id: SessionId
    prompt: str | None


Command = ResetSession | CloseSession | OverridePrompt


# --- statistics for the dashboard ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionStats:
    """One session as an operator sees it."""

    session_id: SessionId
    robot_id: RobotId
    prompt: str
    is_prompt_overridden: bool
    num_chunks: int
    num_superseded: int
    num_deadline_misses: int
    num_errors: int
    chunk_hz: float  # over the last seconds
    last_infer_ms: float
    last_seq: int
    context_version: int
    num_pages: Mapping[str, int]  # layout name -> pages it holds
    in_flight: tuple[RequestId, ...] = ()  # its chunks under way, oldest first
    execution: Execution = Execution.NAIVE  # as its newest observation in the engine says
    wait_ratio: float = 0.0  # time it waited for chunks over time it executed, of late


@dataclass(frozen=True, slots=True, kw_only=True)
class LivePage:
    """One page in use or cached. `owner` is a session id, "shared" (several) or "cached" (none).

    `page_id` says where it lies: large page * pages_per_large[layout] + place in that large page.
    """

    page_id: PageId
    layout: str
    kind: str
    owner: str
    num_refs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolStats:
    """The pool of one tier."""

    large_page_bytes: int
    num_large_pages: int
    num_free_large_pages: int
    pages_per_large: Mapping[str, int]  # layout name -> small pages in one large page
    num_used_pages: Mapping[str, int]
    num_cached_pages: Mapping[str, int]
    num_hits: int
    num_misses: int
    live_pages: tuple[LivePage, ...]
    kinds: Mapping[str, str] = field(default_factory=dict)  # layout name -> what its pages hold

    def kind(self, layout: str) -> str:
        """What pages of a layout hold; where nobody said so, the last part of its name."""
        return self.kinds.get(layout, layout.rpartition(".")[2])


@dataclass(frozen=True, slots=True, kw_only=True)
class RowRecord:
    """One row of a piece: which chunk it brought forward, how far, and what it read.

    `seq` is the observation that the chunk answers, `context_seq` the newest that this piece read for it, and
    `context_version` what that is in the session's public context; 0: no version (yet). Units [0, `first_unit`) were
    computed before; `num_left` remain.
    """

    session_id: SessionId
    request_id: RequestId
    seq: int
    first_unit: int
    num_left: int
    context_version: int
    context_seq: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PieceRecord:
    """One piece of a finished engine step, for the timeline."""

    model: str
    stage: str
    kind: SpanKind
    lane: int
    num_rows: int
    num_units: int
    start_s: float
    run_us: float
    rows: tuple[RowRecord, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One finished engine step."""

    step: int
    start_s: float
    run_us: float
    budget_us: int
    num_waiting: int
    pieces: tuple[PieceRecord, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DegreeStats:
    """What one degree of pipelining brings each robot, by forecast."""

    degree: int
    rate_hz: float  # chunks per second
    latency_ms: float  # observation to chunk


@dataclass(frozen=True, slots=True, kw_only=True)
class PaceStats:
    """How many chunks of one robot may be under way at once, and why."""

    degree: int
    reason: str
    max_age_ms: float  # degrees with a longer latency are not chosen
    forecasts: tuple[DegreeStats, ...]  # by degree; empty when there is nothing to choose


class PromptPhase(StrEnum):
    """Where a request for tokens is."""

    WAITING = "waiting"  # it holds no pages, for the first time or again
    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageRequestStats:
    """One request for tokens under way. `tokens_per_s`: since its first token, over all its choices."""

    request_id: RequestId
    model: str
    phase: PromptPhase
    age_s: float
    num_choices: int
    num_prompt_tokens: int
    num_computed_tokens: int  # of the prompt, cached ones included
    num_cached_tokens: int
    num_new_tokens: int
    max_new_tokens: int
    tokens_per_s: float
    num_pages: int
    num_preemptions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageStepRecord:
    """One step of the language engine: `num_layers` layers from `first_layer` on, for so many rows and tokens.

    No rows and no layers: it encoded a picture.
    """

    step: int
    model: str
    start_s: float
    run_us: float
    budget_us: int
    num_rows: int
    num_prefill_tokens: int
    num_decode_tokens: int
    first_layer: int
    num_layers: int
    num_running: int  # rows that hold pages, of all models
    num_waiting: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageStats:
    """Language models between two steps. Tokens and requests are counted since the start."""

    requests: tuple[LanguageRequestStats, ...]  # oldest first, bounded
    num_under_way: int
    num_running: int  # rows that hold pages
    num_waiting: int  # rows that do not
    num_results: int
    num_errors: int
    num_cancelled: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_new_tokens: int
    num_preemptions: int
    num_drafted_tokens: int
    num_held_tokens: int  # of the drafted ones: those that the model would have drawn, too
    first_token_p50_ms: float | None  # of late; None: there was none
    steps: tuple[LanguageStepRecord, ...]  # newest last, bounded
    layouts: Mapping[str, str]  # page layout of a language model -> the model


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceStats:
    """A consistent picture of the service between two engine steps."""

    now_s: float
    is_ready: bool
    stage: str  # "loading weights", "calibrating", "serving", ...
    sessions: tuple[SessionStats, ...]
    pool: PoolStats | None
    steps: tuple[StepRecord, ...]  # newest last, bounded
    num_requests: int
    num_results: int
    num_errors: int
    num_cancelled: int
    pace: PaceStats | None = None
    rung: str | None = None  # of the quality ladder; None: there is none
    language: LanguageStats | None = None  # None: no language model is served
