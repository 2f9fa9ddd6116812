"""Side: the messages of the robots' side channel as checked data. The contract is hub's docstring.

Called by `serve.hub`. Takes decoded maps; knows neither sockets nor msgpack.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from ganglion.errors import FieldError
from ganglion.types import RobotId, SessionId
from ganglion.units import KIB
from ganglion.wire import describe

MAX_JPEG_BYTES = 256 * KIB
MAX_MESSAGE_BYTES = MAX_JPEG_BYTES + 32 * KIB
MAX_VIEW_HZ = 10.0
MAX_QUEUE_ROWS = 64
MAX_ACTION_DIM = 32
MAX_IMPAIR_MS = 2000.0  # of a link's added delay, and of its jitter
MAX_COUNT = 2**53  # integers that a browser's numbers hold exactly

Message = Mapping[Any, Any]
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Impair:
    """How bad a robot is asked to make its own link to the server; all zero: as it is.

    Milliseconds are of the round trip, half of them on each way; jitter is up to so much more, drawn anew for each
    message. `loss`: share of the messages, on either way, that never arrive.
    """

    delay_ms: float = 0.0
    jitter_ms: float = 0.0
    loss: float = 0.0

    def message(self) -> dict[str, Any]:
        """As it goes to the robot."""
        return {
            "type": "impair",
            "delay_ms": self.delay_ms,
            "jitter_ms": self.jitter_ms,
            "loss": self.loss,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """Who a robot says it is."""

    robot_id: RobotId
    session_id: SessionId
    world: str
    task: str
    prompt: str
    control_hz: float
    impair: Impair | None  # how bad it makes its own link; None: it cannot


@dataclass(frozen=True, slots=True, kw_only=True)
class Telemetry:
    """The newest state of a robot's control loop."""

    tick: int
    queue: tuple[tuple[float, ...], ...]
    rate_hz: float
    obs_age_ms: float | None
    num_misses: int
    num_holds: int
    episode: int
    num_episodes: int
    num_successes: int
    is_success: bool
    task: str | None
    prompt: str | None
    reply_prompt: str | None
    latency_ms: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """What a robot is asked to send."""

    is_watched: bool
    max_view_hz: float

    def message(self) -> dict[str, Any]:
        """As it goes to the robot."""
        return {"watch": self.is_watched, "max_view_hz": self.max_view_hz}


# kind -> the fields its body may have; a view's body is bare bytes
KINDS: Mapping[str, frozenset[str]] = {
    "hello": frozenset(Hello.__dataclass_fields__),
    "telemetry": frozenset(Telemetry.__dataclass_fields__),
    "jpeg": frozenset(),
}


def kind_of(message: Message) -> str:
    """The one kind that this message names. Raises FieldError when it names none or two."""
    kinds = [kind for kind in KINDS if kind in message]
    if len(kinds) != 1:
        _refuse("message", f"one of {', '.join(KINDS)}", _keys(message))
    return kinds[0]


def unknown_keys(message: Message) -> tuple[str, ...]:
    """Keys that a message has and the contract has not, with their place."""
    names = [f"message.{_key(key)}" for key in message if key not in KINDS]
    kind = kind_of(message)
    body = message[kind]
    if isinstance(body, Mapping):
        names += [f"{kind}.{_key(key)}" for key in body if key not in KINDS[kind]]
    return tuple(names)


def parse_hello(message: Message) -> Hello:
    """Raises FieldError, also when the message is not a hello."""
    body = _body(message, "hello")
    return Hello(
        robot_id=RobotId(_name(body, "hello.robot_id")),
        session_id=SessionId(_name(body, "hello.session_id")),
        world=_label(body, "hello.world"),
        task=_label(body, "hello.task"),
        prompt=_prompt(body, "hello.prompt"),
        control_hz=_control_hz(body, "hello.control_hz"),
        impair=_optional(_impair, body, "hello.impair"),
    )


def parse_impair(body: Message) -> Impair:
    """What an operator asks of a robot's link. Raises FieldError."""
    return Impair(
        delay_ms=_at_most(body, "impair.delay_ms", MAX_IMPAIR_MS),
        jitter_ms=_at_most(body, "impair.jitter_ms", MAX_IMPAIR_MS),
        loss=_at_most(body, "impair.loss", 1.0),
    )


def parse_telemetry(message: Message) -> Telemetry:
    """Raises FieldError, also when the message is not telemetry."""
    body = _body(message, "telemetry")
    return Telemetry(
        tick=_count(body, "telemetry.tick"),
        queue=_queue(body, "telemetry.queue"),
        rate_hz=_number(body, "telemetry.rate_hz"),
        obs_age_ms=_optional(_number, body, "telemetry.obs_age_ms"),
        num_misses=_count(body, "telemetry.num_misses"),
        num_holds=_count(body, "telemetry.num_holds"),
        episode=_count(body, "telemetry.episode"),
        num_episodes=_count(body, "telemetry.num_episodes"),
        num_successes=_count(body, "telemetry.num_successes"),
        is_success=_truth(body, "telemetry.is_success"),
        task=_optional(_label, body, "telemetry.task"),
        prompt=_optional(_prompt, body, "telemetry.prompt"),
        reply_prompt=_optional(_prompt, body, "telemetry.reply_prompt"),
        latency_ms=_optional(_number, body, "telemetry.latency_ms"),
    )


def parse_jpeg(message: Message) -> bytes:
    """Raises FieldError unless it is a whole JPEG of bounded size; its pixels are not decoded."""
    jpeg = message.get("jpeg")
    if not isinstance(jpeg, bytes):
        _refuse("jpeg", "bytes", describe(jpeg))
    if len(jpeg) > MAX_JPEG_BYTES:
        _refuse("jpeg", f"at most {MAX_JPEG_BYTES} bytes", f"{len(jpeg)} bytes")
    if not (jpeg.startswith(b"\xff\xd8\xff") and jpeg.endswith(b"\xff\xd9")):
        _refuse("jpeg", "a whole JPEG (FF D8 FF ... FF D9)", f"{len(jpeg)} other bytes")
    return jpeg


def _body(message: Message, kind: str) -> Message:
    if kind_of(message) != kind:
        _refuse("message", f"a {kind}", _keys(message))
    body = message[kind]
    if not isinstance(body, Mapping):
        _refuse(kind, "a map", describe(body))
    return body


def _get(body: Message, field: str) -> object:
    key = field.rpartition(".")[2]
    if key not in body:
        _refuse(field, "a value", "nothing")
    return body[key]


def _optional(parse: Callable[[Message, str], T], body: Message, field: str) -> T | None:
    return None if body.get(field.rpartition(".")[2]) is None else parse(body, field)


def _impair(body: Message, field: str) -> Impair:
    impair = _get(body, field)
    if not isinstance(impair, Mapping):
        _refuse(field, "a map", describe(impair))
    return parse_impair(impair)


def _text(body: Message, field: str, min_bytes: int, max_bytes: int) -> str:
    value = _get(body, field)
    if not isinstance(value, str):
        _refuse(field, "text", describe(value))
    num_bytes = len(value.encode("utf-8", "surrogatepass"))
    if not min_bytes <= num_bytes <= max_bytes:
        _refuse(field, f"{min_bytes} to {max_bytes} bytes of text", f"{num_bytes} bytes")
    return value


def _name(body: Message, field: str) -> str:
    return _text(body, field, 1, 128)


def _label(body: Message, field: str) -> str:
    return _text(body, field, 0, 64)


def _prompt(body: Message, field: str) -> str:
    return _text(body, field, 0, 4096)


def _truth(body: Message, field: str) -> bool:
    value = _get(body, field)
    if not isinstance(value, bool):
        _refuse(field, "true or false", describe(value))
    return value


def _count(body: Message, field: str) -> int:
    value = _get(body, field)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_COUNT:
        _refuse(field, f"an integer of 0 to {MAX_COUNT}", describe(value))
    return value


def _finite(value: object, field: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        _refuse(field, "a number", describe(value))
    if not abs(value) <= MAX_COUNT:  # also not NaN
        _refuse(field, f"a finite number of at most {MAX_COUNT}", describe(value))
    return float(value)


def _number(body: Message, field: str) -> float:
    number = _finite(_get(body, field), field)
    if number < 0:
        _refuse(field, "a number that is not negative", describe(number))
    return number


def _at_most(body: Message, field: str, limit: float) -> float:
    number = _number(body, field)
    if number > limit:
        _refuse(field, f"a number of at most {limit:g}", describe(number))
    return number


def _control_hz(body: Message, field: str) -> float:
    rate_hz = _number(body, field)
    if not 0 < rate_hz <= 1000:
        _refuse(field, "a rate above 0 and at most 1000", describe(rate_hz))
    return rate_hz


def _queue(body: Message, field: str) -> tuple[tuple[float, ...], ...]:
    rows = _get(body, field)
    if not isinstance(rows, list | tuple) or len(rows) > MAX_QUEUE_ROWS:
        _refuse(field, f"a list of at most {MAX_QUEUE_ROWS} rows", describe(rows))
    for row in rows:
        if not isinstance(row, list | tuple) or not 1 <= len(row) <= MAX_ACTION_DIM:
            _refuse(f"{field}[]", f"a list of 1 to {MAX_ACTION_DIM} numbers", describe(row))
        if len(row) != len(rows[0]):
            _refuse(f"{field}[]", f"{len(rows[0])} numbers like the first", f"{len(row)} numbers")
    return tuple(tuple(_finite(value, f"{field}[][]") for value in row) for row in rows)


def _refuse(field: str, expected: str, got: str) -> NoReturn:
    raise FieldError(
        field, expected=expected, got=got, next_step="see the side channel in docs/dashboard.md"
    )


def _keys(message: Message) -> str:
    return f"keys {', '.join(_key(key) for key in list(message)[:8]) or '(none)'}"


def _key(key: object) -> str:
    return key[:40] if isinstance(key, str) else describe(key)
