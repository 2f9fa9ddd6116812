"""Config: one frozen tree; each part receives only its own section, values already resolved.

Built once by `cli`: `load` lays flags over a TOML file over auto values over the defaults below, and remembers where
each value came from. Knows what values mean, not who uses them.
"""

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from math import inf
from pathlib import Path
from typing import Any, get_type_hints

from ganglion.errors import ConfigError
from ganglion.units import KIB, MIB, format_bytes, parse_bytes

AUTO = "auto"
SECRETS = frozenset({"serve.api_key"})


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
    language_slice_us: int = 10_000  # of a language model's step while robots are connected
    language_share: float = 0.5  # of the time, at most, that language models take from robots' work
    language_floor: float = 0.05  # of the time, that they take even where robots are late
    language_threads: int = 0  # 0 = auto
    language_policy: str = "chunked"  # how prompts are cut into batches: "chunked" by tokens, "layered" by layers, "whole" not


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineConfig:
    """How the chunks of one robot overlap."""

    degree: int = 0  # chunks of one robot under way at once; 0 = tuned on this machine
    max_degree: int = 6  # of the tuned ones
    max_age_ms: float = (
        250.0  # the tuner's bound of an observation's age when its first action is due
    )
    context: str = (
        "public"  # "public": chunks under way see newer observations; "private": their own only
    )
    warm_start: float = (
        0.0  # share of the flow steps that a chunk skips by starting from the last one's rest
    )
    ladder: str = ""  # result of `ganglion bench ladder` for this policy; "" = one quality
    gate_refresh_ms: float = 0.0  # how long a still view may go unperceived; 0 = no gate
    gate_noise_std: float = 2.0  # of the cameras, in levels of 255
    gate_motion_rms: float = 0.0  # change beyond noise that may pass unseen, in levels
    gate_state_change: float = 0.0  # of a number of a robot's state that may pass with still views


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryConfig:
    """The byte budget and its pages."""

    budget_bytes: int = 0  # weights and pages together; 0 = no bound beside arena_bytes
    arena_bytes: int = 256 * MIB  # pages at most; they keep a quarter of it, whatever is loaded
    large_page_bytes: int = 1 * MIB
    defrag_step_bytes: int = 256 * KIB  # pages may move by so much before an engine step; 0 = never
    history_whole: int = 0  # remembered observations that stay as written, the others int8; 0 = all


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyConfig:
    """Which policy, and how many flow steps (0 = the checkpoint's own number)."""

    path: str = (
        "metaworld-ten"  # a shipped name, a checkpoint folder, "file.py:Class"; "" = no policy
    )
    num_flow_steps: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatConfig:
    """Language models, beside a policy or alone."""

    # shipped names, or folders in Hugging Face layout; with ",pinned", ",on_demand" or ",ttl_s=600"
    models: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()  # "NAME=FOLDER" in PEFT's layout; "NAME@MODEL=FOLDER" of several
    load_wait_s: float = 30.0  # that a request waits for room for its model, before it is refused
    max_tokens: int = 0  # of one request, prompt and answer; 0 = as many as the model can
    max_choices: int = 256  # under way or waiting at once; past that, requests are refused
    max_rows: int = 32  # computed in one step
    speculate: str = "off"  # who drafts: "ngram", or a model of the same tokenizer among `models`
    speculate_tokens: int = 8  # drafted at once, at most
    speculate_ahead: bool = False  # a model drafts on while another checks


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoConfig:
    """The arms of `ganglion demo`."""

    num_arms: int = 4
    rate_hz: float = 20.0  # Meta-World's own rate is 80 Hz: this is quarter speed
    tasks: tuple[str, ...] = ()  # () = all that the policy was trained on, spread over the arms
    world: str = (
        "metaworld"  # "metaworld-moving", "metaworld-jumping": goals do not stay where they are
    )
    executions: tuple[str, ...] = ("naive",)  # in turn; arms side by side then do the same task


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The whole tree."""

    serve: ServeConfig = field(default_factory=ServeConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    chat: ChatConfig = field(default_factory=ChatConfig)
    demo: DemoConfig = field(default_factory=DemoConfig)


# path -> [lowest, highest]; other numbers are only checked for their type.
LIMITS: dict[str, tuple[float, float]] = {
    "serve.port": (0, 65535),
    "serve.max_frame_bytes": (64 * 1024, 1024 * MIB),
    "serve.max_connections": (1, 65536),
    "engine.step_budget_us": (100, 10_000_000),
    "engine.max_rows": (1, 4096),
    "engine.max_sessions": (1, 65536),
    "engine.deadline_ms": (1, 3_600_000),
    "engine.num_step_records": (1, 100_000),
    "engine.language_slice_us": (100, 10_000_000),
    "engine.language_share": (0, 0.95),
    "engine.language_floor": (0, 0.95),
    "engine.language_threads": (0, 1024),
    "pipeline.degree": (0, 16),
    "pipeline.max_degree": (1, 16),
    "pipeline.max_age_ms": (1, 60_000),
    "pipeline.warm_start": (0, 0.9),
    "pipeline.gate_refresh_ms": (0, 60_000),
    "pipeline.gate_noise_std": (0.25, 64),
    "pipeline.gate_motion_rms": (0, 255),
    "pipeline.gate_state_change": (0, inf),
    "memory.arena_bytes": (1 * MIB, inf),
    "memory.large_page_bytes": (4096, 1024 * MIB),
    "memory.defrag_step_bytes": (0, 1024 * MIB),
    "policy.num_flow_steps": (0, 10),
    "memory.budget_bytes": (0, inf),
    "chat.load_wait_s": (0, 3600),
    "chat.max_tokens": (0, 10_000_000),
    "chat.max_choices": (1, 65536),
    "chat.max_rows": (1, 4096),
    "chat.speculate_tokens": (1, 64),
    "demo.num_arms": (1, 64),
    "demo.rate_hz": (0.1, 1000),
}
CHOICES: dict[str, tuple[str, ...]] = {
    "engine.dtype": ("bfloat16", "float32", AUTO),
    "engine.language_policy": ("chunked", "layered", "whole"),
    "pipeline.context": ("public", "private"),
    "demo.world": ("metaworld", "metaworld-moving", "metaworld-jumping"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Auto:
    """A value that follows from the machine, and the formula with its numbers."""

    value: Any
    formula: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One resolved value. `origin`: "default", "ganglion.toml", "--port", "auto: 2 cores // 2"."""

    path: str
    value: Any
    origin: str

    def line(self) -> str:
        """`memory.arena_bytes = 256.0 MiB  (auto: ...)`; secrets are not shown."""
        if self.path in SECRETS and self.value is not None:
            shown = "(set)"
        elif self.path.endswith("_bytes"):
            shown = format_bytes(self.value)
        else:
            shown = repr(self.value)
        return f"{self.path} = {shown}  ({self.origin})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """The tree, and where each value came from."""

    config: Config
    settings: tuple[Setting, ...]

    def explain(self) -> str:
        """One line a value, in the order of the tree."""
        return "\n".join(setting.line() for setting in self.settings)


def paths() -> dict[str, Any]:
    """Every config path and its type, in the order of the tree."""
    found: dict[str, Any] = {}
    for section, kind in get_type_hints(Config).items():
        for name, hint in get_type_hints(kind).items():
            found[f"{section}.{name}"] = hint
    return found


def load(
    *,
    file: Path | None = None,
    flags: Mapping[str, tuple[str, Any]] | None = None,
    autos: Mapping[str, Auto] | None = None,
) -> Resolved:
    """Resolve the tree. `flags`: path -> (flag, value). `autos`: path -> what "auto" means here.

    A path of `autos` that nobody sets is auto too. Raises ConfigError for a file or value that cannot be used.
    """
    flags, autos = flags or {}, autos or {}
    from_file = _read(file) if file is not None else {}
    types = paths()
    for path, (flag, _) in flags.items():
        assert path in types, f"{flag} names no config path: {path}"
    defaults = Config()
    settings = []
    for path, hint in types.items():
        section, name = path.split(".")
        value, origin = getattr(getattr(defaults, section), name), "default"
        if path in autos:
            value = AUTO
        if path in from_file:
            value, origin = from_file[path], str(file.name if file else "")
        if path in flags:
            origin, value = flags[path]
        if value == AUTO and path in autos:
            auto = autos[path]
            value, origin = auto.value, f"auto: {auto.formula}"
        settings.append(
            Setting(path=path, value=_checked(path, value, hint, origin), origin=origin)
        )
    values: dict[str, dict[str, Any]] = {}
    for setting in settings:
        section, name = setting.path.split(".")
        values.setdefault(section, {})[name] = setting.value
    tree = {section: kind(**values[section]) for section, kind in get_type_hints(Config).items()}
    return Resolved(config=Config(**tree), settings=tuple(settings))


def _read(file: Path) -> dict[str, Any]:
    """path -> value of a TOML file; refuses what is not in the tree, with the nearest name."""
    try:
        document = tomllib.loads(file.read_text())
    except OSError as error:
        raise ConfigError(
            f"{file}: {error.strerror}", next_step="name a file that exists with --config"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not TOML: {error}", next_step="fix that line") from error
    sections = [section.name for section in fields(Config)]
    known = list(paths())
    found: dict[str, Any] = {}
    for section, table in document.items():
        if section not in sections:
            raise _unknown(file, f"[{section}]", section, sections)
        if not isinstance(table, dict):
            raise ConfigError(f"{file}: {section} must be a table", next_step=f"write [{section}]")
        for name, value in table.items():
            path = f"{section}.{name}"
            if path not in known:
                raise _unknown(file, path, path, known)
            found[path] = value
    return found


def _unknown(file: Path, shown: str, name: str, known: list[str]) -> ConfigError:
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    return ConfigError(
        f"{file}: unknown key {shown}; the nearest is {nearest}",
        next_step=f"write {nearest} or remove the key",
    )


def _checked(path: str, value: Any, hint: Any, origin: str) -> Any:
    """`value` as `hint` wants it. Sizes may be text ("64 MiB"); ints become floats where floats belong."""
    if hint is int and path.endswith("_bytes") and isinstance(value, str):
        try:
            value = parse_bytes(value)
        except ValueError as error:
            raise _bad(path, "a size such as '64 MiB'", value, origin) from error
    if hint is float and type(value) is int:
        value = float(value)
    if hint in (int, float, str, bool):
        if type(value) is not hint:
            raise _bad(path, f"{_article(hint.__name__)} {hint.__name__}", value, origin)
    elif hint == str | None:
        if value is not None and not isinstance(value, str):
            raise _bad(path, "a str", value, origin)
    elif hint == tuple[str, ...]:
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise _bad(path, "a list of str", value, origin)
        value = tuple(value)
    else:
        assert hint == tuple[tuple[int, ...], ...], f"{path}: no check for {hint}"
        value = _checked_lanes(path, value, origin)
    if path in LIMITS:
        low, high = LIMITS[path]
        if not low <= value <= high:
            raise _bad(path, f"a number from {low:g} to {high:g}", value, origin)
    if path in CHOICES and value not in CHOICES[path]:
        raise _bad(path, f"one of {', '.join(CHOICES[path])}", value, origin)
    return value


def _checked_lanes(path: str, value: Any, origin: str) -> tuple[tuple[int, ...], ...]:
    expected = "a list of lanes, each a list of core ids: [[2, 3], [4, 5]]"
    if not isinstance(value, list | tuple):
        raise _bad(path, expected, value, origin)
    for lane in value:
        if not isinstance(lane, list | tuple) or not all(type(c) is int and c >= 0 for c in lane):
            raise _bad(path, expected, value, origin)
    return tuple(tuple(lane) for lane in value)


def _article(noun: str) -> str:
    return "an" if noun[0] in "aeiou" else "a"


def _bad(path: str, expected: str, got: Any, origin: str) -> ConfigError:
    shown = "(not shown)" if path in SECRETS else repr(got)
    return ConfigError(
        f"{path}: expected {expected}, got {shown} from {origin}", next_step=f"change {path}"
    )
