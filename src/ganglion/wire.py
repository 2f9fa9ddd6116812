"""Wire: maps with numpy arrays to bytes and back, in openpi's msgpack form. The one codec of robots' sockets.

Called by `client`, `serve` and `robots`. Knows neither sockets nor what a field means.

A frame is one msgpack map with text keys. An array travels as a map with *bytes* keys
`{__ndarray__: true, data: bytes, dtype: "<f4", shape: [2, 3]}`, a numpy scalar as
`{__npgeneric__: true, data: 1.5, dtype: "<f4"}`.

Reading has two halves, so that an error in one array can name its field and still be answered by sequence number:
`unpack` checks the structure (size, depth, number of items) and leaves arrays packed; `read_array` checks one array
(dtype, dimensions, exact byte count) and only then makes a view of its bytes. `decode` does both for a whole frame.
"""

from dataclasses import dataclass
from math import prod
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt

from ganglion.errors import FieldError, WireError
from ganglion.units import MIB

Array = npt.NDArray[Any]

# What may travel: plain numbers of fixed size, little-endian, spelled as numpy's dtype.str.
DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(name)
    for name in (
        "|b1", "|i1", "<i2", "<i4", "<i8", "|u1", "<u2", "<u4", "<u8", "<f2", "<f4", "<f8",
    )
}  # fmt: skip
_DTYPE_NAMES = ", ".join(DTYPES)

_ARRAY, _SCALAR, _DATA, _DTYPE, _SHAPE = (
    b"__ndarray__", b"__npgeneric__", b"data", b"dtype", b"shape",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class WireLimits:
    """What one received frame may hold. Depth counts containers: a flat map has depth 1, an array in it 3."""

    max_frame_bytes: int = 16 * MIB
    max_depth: int = 8
    max_items: int = 16_384
    max_container_items: int = 4_096
    max_ndim: int = 8


DEFAULT_LIMITS = WireLimits()


class Encoder:
    """Packs values into frames; keeps its buffer between calls. Not thread-safe: one for each thread."""

    def __init__(self) -> None:
        self._packer = msgpack.Packer(default=_pack_numpy)

    def encode(self, value: Any) -> bytes:
        """One frame. Raises FieldError for a dtype that may not travel, TypeError for other objects."""
        frame: bytes = self._packer.pack(value)
        return frame


def encode(value: Any) -> bytes:
    """One frame, with an encoder of its own."""
    return Encoder().encode(value)


def unpack(
    frame: bytes | bytearray | memoryview, limits: WireLimits = DEFAULT_LIMITS
) -> dict[str, Any]:
    """The map in `frame`, structure checked, arrays still packed (see `read_array`). Raises WireError."""
    num_bytes = len(frame)
    if num_bytes > limits.max_frame_bytes:
        raise WireError(f"frame of {num_bytes} bytes, at most {limits.max_frame_bytes} are taken")
    counter = _ItemCounter(limits.max_items)
    try:
        message = msgpack.unpackb(
            frame,
            object_hook=counter.count,
            list_hook=counter.count,
            ext_hook=_refuse_extension,
            max_array_len=min(limits.max_container_items, num_bytes),
            max_map_len=min(limits.max_container_items, num_bytes // 2),
            max_ext_len=0,
        )
    except WireError:
        raise
    except UnicodeDecodeError as error:
        raise WireError(f"frame of {num_bytes} bytes: a text in it is not UTF-8") from error
    except (ValueError, TypeError, RecursionError) as error:  # all that msgpack raises
        what = str(error) or type(error).__name__
        raise WireError(f"frame of {num_bytes} bytes is not one msgpack value: {what}") from error
    if type(message) is not dict:
        raise WireError(f"frame holds {describe(message)} where one map is expected")
    _check_structure(message, limits)
    return message


def decode(
    frame: bytes | bytearray | memoryview, limits: WireLimits = DEFAULT_LIMITS
) -> dict[str, Any]:
    """The map in `frame` with its arrays as read-only views of the frame's bytes.

    Raises WireError for a broken frame, FieldError for an array in it that does not add up.
    """
    message = unpack(frame, limits)
    return {key: _resolve(key, value, limits) for key, value in message.items()}


def is_array(value: object) -> bool:
    """Is this value of an unpacked frame an array?"""
    return type(value) is dict and _ARRAY in value


def read_array(field: str, packed: object, limits: WireLimits = DEFAULT_LIMITS) -> Array:
    """A read-only view of a packed array's bytes. Nothing is allocated before every length is checked.

    Raises FieldError naming `field`.
    """
    if type(packed) is not dict or packed.get(_ARRAY) is not True:
        raise FieldError(field, expected="an array", got=describe(packed))
    name, data, shape = packed.get(_DTYPE), packed.get(_DATA), packed.get(_SHAPE)
    dtype = _read_dtype(field, name)
    if type(shape) is not list or len(shape) > limits.max_ndim:
        raise FieldError(
            f"{field}.shape", expected=f"at most {limits.max_ndim} dimensions", got=describe(shape)
        )
    max_dim = limits.max_frame_bytes
    if not all(type(dim) is int and 0 <= dim <= max_dim for dim in shape) or (
        prod(dim or 1 for dim in shape) > max_dim  # also bounds shapes of no bytes: [0, 2**60]
    ):
        raise FieldError(
            f"{field}.shape", expected=f"dimensions of at most {max_dim} items", got=describe(shape)
        )
    num_bytes = prod(shape) * dtype.itemsize
    if type(data) is not bytes or len(data) != num_bytes:
        got = f"{len(data)} bytes" if type(data) is bytes else describe(data)
        raise FieldError(f"{field}.data", expected=f"{num_bytes} bytes for {name} {shape}", got=got)
    array: Array = np.ndarray(shape, dtype, data)
    if dtype.kind == "b" and num_bytes and array.view(np.uint8).max() > 1:
        raise FieldError(f"{field}.data", expected="booleans of 0 or 1", got="another byte")
    return array


def describe(value: object) -> str:
    """A short, safe description of a received value for an error message: its type and size, cut text."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype.name} {list(value.shape)}"
    match value:
        case None:
            return "nothing"
        case bool() | int() | float():
            return f"{type(value).__name__} {str(value)[:40]}"
        case str():
            shown = repr(value) if len(value) <= 40 else f"{value[:40]!r}..."
            return f"text of {len(value)} characters {shown}"
        case bytes():
            return f"{len(value)} bytes"
        case dict() if _ARRAY in value:
            return f"array {_describe_name(value.get(_DTYPE))} {str(value.get(_SHAPE))[:60]}"
        case dict():
            return f"a map of {len(value)} items"
        case list():
            shown = str(value)[:60] if all(type(item) is int for item in value[:8]) else ""
            return f"a list of {len(value)} items {shown}".rstrip()
        case _:
            return type(value).__name__


def _describe_name(value: object) -> str:
    """A received name for an error message, cut to 40 characters."""
    return value[:40] if isinstance(value, str) else describe(value)


class _ItemCounter:
    """Counts items while msgpack builds them, so that a small frame cannot become millions of objects."""

    def __init__(self, max_items: int) -> None:
        self._max_items, self._num_items = max_items, 0

    def count(self, container: Any) -> Any:
        self._num_items += len(container) + 1
        if self._num_items > self._max_items:
            raise WireError(f"frame holds more than {self._max_items} items")
        return container


def _refuse_extension(kind: int, data: bytes) -> Any:
    raise WireError(f"frame holds msgpack extension {kind} of {len(data)} bytes; none is known")


def _check_structure(message: dict[Any, Any], limits: WireLimits) -> None:
    for key in message:
        if type(key) is not str:
            raise WireError(f"frame's map has {describe(key)} as a key where text is expected")
    depth, level = 0, [message]
    while level:
        depth += 1
        if depth > limits.max_depth:
            raise WireError(f"frame is nested deeper than {limits.max_depth} containers")
        below: list[Any] = []
        for container in level:
            items = container.values() if type(container) is dict else container
            for item in items:
                kind = type(item)
                if kind is dict or kind is list:
                    below.append(item)
                elif kind is msgpack.Timestamp:
                    raise WireError("frame holds a msgpack timestamp; send nanoseconds as a number")
        level = below


def _resolve(field: str, value: Any, limits: WireLimits) -> Any:
    if type(value) is list:
        return [_resolve(f"{field}[{i}]", item, limits) for i, item in enumerate(value)]
    if type(value) is not dict:
        return value
    if _ARRAY in value:
        return read_array(field, value, limits)
    if _SCALAR in value:
        return _read_scalar(field, value)
    return {key: _resolve(f"{field}.{key}", item, limits) for key, item in value.items()}


def _read_scalar(field: str, packed: dict[Any, Any]) -> Any:
    dtype, data = _read_dtype(field, packed.get(_DTYPE)), packed.get(_DATA)
    if type(data) not in (bool, int, float):
        raise FieldError(f"{field}.data", expected=f"a number for {dtype.name}", got=describe(data))
    try:
        return dtype.type(data)
    except (OverflowError, ValueError) as error:
        expected = f"a number in the range of {dtype.name}"
        raise FieldError(f"{field}.data", expected=expected, got=describe(data)) from error


def _read_dtype(field: str, name: object) -> np.dtype[Any]:
    dtype = DTYPES.get(name) if isinstance(name, str) else None
    if dtype is None:
        got = _describe_name(name)
        raise FieldError(f"{field}.dtype", expected=f"one of {_DTYPE_NAMES}", got=got)
    return dtype


def _pack_numpy(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        name = _sendable_dtype(value.dtype)
        data = value.data if value.flags.c_contiguous and value.size else value.tobytes()
        return {_ARRAY: True, _DATA: data, _DTYPE: name, _SHAPE: value.shape}
    if isinstance(value, np.generic):
        name = _sendable_dtype(value.dtype)
        return {_SCALAR: True, _DATA: value.item(), _DTYPE: name}
    raise TypeError(
        f"{type(value).__name__} cannot travel; send numbers, text, bytes, arrays, lists or maps"
    )


def _sendable_dtype(dtype: np.dtype[Any]) -> str:
    name = dtype.str
    if name not in DTYPES:
        raise FieldError("dtype", expected=f"one of {_DTYPE_NAMES}", got=name)
    return name
