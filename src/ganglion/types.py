"""Values that cross rooms: ids, observations, chunks, spans, statistics. Frozen data, no behaviour beyond properties.

Used by everybody. Knows numpy, but neither torch nor sockets.
"""

from collections.abc import Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """One checked observation of one robot, as every dialect delivers it.

    `images`: view key -> uint8 [height, width, 3]. `state`: float32 [state_dim], in the robot's units.
    `obs_time_ns` is the robot's own monotonic clock; it is echoed and never compared with ours.
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

    `actions`: float32 [horizon, action_dim], read-only; row i is for the control tick `obs tick + i`.
    """

    session_id: SessionId
    obs_seq: int
    obs_time_ns: int | None
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
    sessions: tuple[SessionId, ...]


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
