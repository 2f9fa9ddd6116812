"""Fields: small readers of one JSON object, each naming the field, what was expected and what came.

Called by the readers of requests. Knows nothing of what the fields mean. A field that is absent or null reads as None: so do
OpenAI's own servers.
"""

import json
import math
from collections.abc import Collection, Mapping
from typing import Any

from ganglion.errors import FieldError, UnsupportedFieldError, WireError
from ganglion.wire import describe

MAX_DEPTH = 64  # of nested lists and objects in a request


class Fields:
    """One JSON object at `path` ("" is the body). Remembers which names were asked for, so that the rest is unknown."""

    def __init__(self, value: object, path: str = "") -> None:
        if not isinstance(value, dict):
            raise FieldError(path or "body", expected="a JSON object", got=describe(value))
        self._values: dict[str, Any] = value
        self._path, self._asked = path, set[str]()

    def at(self, name: str) -> str:
        """The path of a field: "messages[2].content"."""
        return f"{self._path}.{name}" if self._path else name

    def raw(self, name: str) -> Any:
        """The value as it came."""
        self._asked.add(name)
        return self._values.get(name)

    def flag(self, name: str) -> bool | None:
        """true or false."""
        value = self.raw(name)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def integer(self, name: str, low: int, high: int) -> int | None:
        """A whole number from `low` to `high`. 3.0 is one, true is none."""
        value = self.raw(name)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.wrong(name, f"a whole number in {low}..{high}")
        return value

    def number(self, name: str, low: float, high: float) -> float | None:
        """A finite number from `low` to `high`."""
        value = self.raw(name)
        if value is None:
            return None
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not low <= value <= high:  # false for NaN
            raise self.wrong(name, f"a number in {low:g}..{high:g}")
        return float(value)

    def text(self, name: str, *, max_length: int | None = None) -> str | None:
        """A string, of at most `max_length` characters."""
        value = self.raw(name)
        if value is not None and not isinstance(value, str):
            raise self.wrong(name, "a string")
        if value is not None and max_length is not None and len(value) > max_length:
            raise self.wrong(name, f"a string of at most {max_length} characters")
        return value

    def json_text(self, name: str) -> Any:
        """What a string holds as JSON, checked as a body is: depth, NaN, half surrogate pairs."""
        text = self.text(name)
        if text is None:
            raise self.wrong(name, "a string of JSON")
        try:
            return parse_json(text.encode())
        except WireError as error:
            expected = f"JSON of at most {MAX_DEPTH} levels"
            raise FieldError(self.at(name), expected=expected, got=repr(text)[:80]) from error

    def choice(self, name: str, choices: Collection[str]) -> str | None:
        """One of a few words."""
        value = self.raw(name)
        if value is not None and (not isinstance(value, str) or value not in choices):
            raise self.wrong(name, " | ".join(repr(word) for word in choices))
        return value

    def rows(self, name: str, *, low: int = 0, high: int) -> list[Any] | None:
        """A list of `low` to `high` things."""
        value = self.raw(name)
        if value is None:
            return None
        if not isinstance(value, list) or not low <= len(value) <= high:
            raise self.wrong(name, f"a list of {low}..{high} items")
        return value

    def child(self, name: str) -> "Fields | None":
        """An object inside this one."""
        value = self.raw(name)
        return None if value is None else Fields(value, self.at(name))

    def children(self, name: str, *, low: int = 0, high: int) -> list["Fields"]:
        """A list of objects; [] when absent."""
        rows = self.rows(name, low=low, high=high) or []
        return [Fields(row, f"{self.at(name)}[{index}]") for index, row in enumerate(rows)]

    def wrong(self, name: str, expected: str, *, next_step: str = "") -> FieldError:
        """The error of a field that does not fit."""
        got = describe(self._values.get(name))
        return FieldError(self.at(name), expected=expected, got=got, next_step=next_step)

    def refuse(self, reasons: Mapping[str, str]) -> None:
        """Raises UnsupportedFieldError for a field that we know but do not serve. What changes nothing may stay."""
        for name, why in reasons.items():
            if self.raw(name) not in (None, False, "", [], {}):
                raise UnsupportedFieldError(self.at(name), why=why, next_step=f"leave {name} out")

    def unknown(self) -> set[str]:
        """Names that nobody asked for."""
        return self._values.keys() - self._asked


def parse_json(data: bytes) -> Any:
    """One JSON value. Raises WireError: not UTF-8, not JSON, NaN or infinite, half a surrogate pair, or nested too deep."""
    try:
        value = json.loads(
            data.decode(), parse_constant=_refuse_constant, parse_float=_finite_float
        )
    except RecursionError:
        raise WireError(f"the body is nested deeper than {MAX_DEPTH}") from None
    except ValueError as error:  # also UnicodeDecodeError, and an integer of thousands of digits
        raise WireError(
            f"the body is not JSON: {error}"[:200], next_step="send one JSON object, in UTF-8"
        ) from None
    _check(value)
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is too large for a number")
    return value


def _check(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner.extend(item.keys())
                inner.extend(item.values())
            elif isinstance(item, list):
                inner.extend(part for part in item if type(part) in (str, list, dict))
            elif isinstance(item, str) and not item.isascii():
                _check_text(item)
        if not inner:
            return
        level = inner
    raise WireError(f"the body is nested deeper than {MAX_DEPTH}", next_step="nest it less")


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise WireError("the body holds half a surrogate pair: that is no character") from None
