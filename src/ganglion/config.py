"""Config: one frozen tree; each part receives only its own section, values already resolved.

Built by `cli` from defaults, a TOML file and flags. Knows what values mean, not who uses them.
"""

from dataclasses import dataclass, field

from ganglion.units import MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """The edge: sockets, limits and keys."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None  # needed for any host that is not loopback
    max_frame_bytes: int = 16 * MIB
    max_connections: int = 256
    allowed_hosts: tuple[str, ...] = ()  # besides loopback names and `host`


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Lanes and the step budget. A lane is a thread pinned to `cores` with one torch thread a core."""

    lanes: tuple[tuple[int, ...], ...] = ()  # () = auto
    step_budget_us: int = 20_000
    max_rows: int = 64  # rows of one piece
    dtype: str = "auto"  # "bfloat16" | "float32" | "auto"
    max_sessions: int = 256
    deadline_ms: float = 250.0  # of sessions that name none
    num_step_records: int = 240  # kept for the timeline


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryConfig:
    """The byte budget and its pages."""

    arena_bytes: int = 256 * MIB
    large_page_bytes: int = 1 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyConfig:
    """Which policy, and how many flow steps (0 = the checkpoint's own number)."""

    path: str = "metaworld-ten"  # a shipped name, a checkpoint folder, or "file.py:Class"
    num_flow_steps: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The whole tree."""

    serve: ServeConfig = field(default_factory=ServeConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
