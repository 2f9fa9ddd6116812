import random
import tracemalloc

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ganglion import wire
from ganglion.errors import FieldError, GanglionError, WireError
from ganglion.wire import WireLimits

DTYPES = st.sampled_from([np.dtype(name) for name in wire.DTYPES])
ARRAYS = hnp.arrays(DTYPES, hnp.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=6))
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=20)
    | st.binary(max_size=20)
)
VALUES = st.recursive(
    SCALARS | ARRAYS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


def same(left: object, right: object) -> bool:
    if isinstance(left, np.ndarray):
        return (
            isinstance(right, np.ndarray)
            and left.dtype == right.dtype
            and left.shape == right.shape
            and left.tobytes() == right.tobytes()
        )
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    return type(left) is type(right) and left == right


@given(st.dictionaries(st.text(max_size=8), VALUES, max_size=5))
def test_what_is_encoded_decodes_to_the_same(message):
    limits = WireLimits(max_depth=32)
    assert same(message, wire.decode(wire.encode(message), limits))


@given(
    hnp.arrays(DTYPES.filter(lambda dtype: dtype.str != "<f8"), 6)
)  # a float64 is a Python float
def test_numpy_scalars_keep_type_and_bits(values):
    for value in values:
        back = wire.decode(wire.encode({"x": value}))["x"]
        assert type(back) is type(value)
        assert back == value or (np.isnan(back) and np.isnan(value))


def test_bytes_are_exactly_openpis():
    golden = (
        b"\x82\xa1a\x84\xc4\x0b__ndarray__\xc3\xc4\x04data\xc4\x08\x00\x00\x80?\x00\x00\x00@"
        b"\xc4\x05dtype\xa3<f4\xc4\x05shape\x91\x02"
        b"\xa1b\x83\xc4\x0d__npgeneric__\xc3\xc4\x04data\x07\xc4\x05dtype\xa3<i8"
    )
    message = {"a": np.array([1.0, 2.0], np.float32), "b": np.int64(7)}
    assert wire.encode(message) == golden
    assert same(wire.decode(golden)["a"], message["a"])


def test_bytes_equal_the_published_clients():
    openpi = pytest.importorskip("openpi_client.msgpack_numpy")
    rng = np.random.default_rng(0)
    message = {
        "image": rng.integers(0, 255, (16, 16, 3), dtype=np.uint8),
        "turned": rng.standard_normal((3, 4)).astype(np.float32).T,
        "state": rng.standard_normal(8),
        "flag": np.bool_(True),
        "prompt": "open the drawer",
    }
    frame = wire.encode(message)
    assert frame == openpi.packb(message)
    theirs = openpi.unpackb(frame)
    assert all(np.array_equal(theirs[key], message[key]) for key in message)


def test_arrays_are_read_only_views_of_the_received_bytes():
    array = wire.decode(wire.encode({"a": np.zeros((2, 3), np.float32)}))["a"]
    assert not array.flags.writeable
    assert not array.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1


def test_an_encoder_is_usable_after_an_error():
    encoder = wire.Encoder()
    with pytest.raises(TypeError, match="object cannot travel"):
        encoder.encode({"x": np.zeros(3), "y": object()})
    assert encoder.encode({"x": 1}) == msgpack.packb({"x": 1})


@pytest.mark.parametrize(
    "dtype", ["complex64", "object", ">f4", "datetime64[s]", "U4", "V8", "longdouble"]
)
def test_only_plain_numbers_are_sent(dtype):
    with pytest.raises(FieldError, match="dtype"):
        wire.encode({"x": np.zeros(2, dtype)})


def packed(**changes: object) -> dict[bytes, object]:
    array = {b"__ndarray__": True, b"data": b"\0" * 24, b"dtype": "<f4", b"shape": [2, 3]}
    array.update({key.encode(): value for key, value in changes.items()})
    return {key: value for key, value in array.items() if value is not ...}


@pytest.mark.parametrize(
    ("changes", "field", "got"),
    [
        ({"dtype": "|O"}, "view.dtype", "|O"),
        ({"dtype": "<c8"}, "view.dtype", "<c8"),
        ({"dtype": "<f4,<f4"}, "view.dtype", "<f4,<f4"),
        ({"dtype": 7}, "view.dtype", "int 7"),
        ({"dtype": ...}, "view.dtype", "nothing"),
        ({"data": b"\0" * 23}, "view.data", "23 bytes"),
        ({"data": b"\0" * 25}, "view.data", "25 bytes"),
        ({"data": "text"}, "view.data", "text"),
        ({"data": ...}, "view.data", "nothing"),
        ({"shape": [2, 4]}, "view.data", "24 bytes"),
        ({"shape": [2, -3]}, "view.shape", "list of 2"),
        ({"shape": [2, 3.0]}, "view.shape", "list of 2"),
        ({"shape": [True, 6]}, "view.shape", "list of 2"),
        ({"shape": [1 << 62, 1 << 62]}, "view.shape", "list of 2"),
        ({"shape": [0, 1 << 62]}, "view.shape", "list of 2"),
        ({"shape": [1] * 9}, "view.shape", "list of 9"),
        ({"shape": 6}, "view.shape", "int 6"),
        ({"__ndarray__": 1}, "view", "array"),
        ({"dtype": "|b1", "shape": [24], "data": b"\2" * 24}, "view.data", "another byte"),
    ],
)
def test_an_array_that_does_not_add_up_names_its_field(changes, field, got):
    with pytest.raises(FieldError) as error:
        wire.read_array("view", packed(**changes))
    assert error.value.field == field
    assert got in error.value.got


def test_decode_names_the_path_of_a_bad_array():
    frame = msgpack.packb({"a": {"b": [packed(), packed(data=b"")]}})
    with pytest.raises(FieldError, match=r"a\.b\[1\]\.data"):
        wire.decode(frame)


def test_empty_arrays_travel():
    for shape in ((0,), (2, 0, 3), ()):
        array = np.zeros(shape, np.float32)
        assert same(wire.decode(wire.encode({"a": array}))["a"], array)


@pytest.mark.parametrize(
    ("frame", "why"),
    [
        (b"", "not one msgpack value"),
        (b"\x81\xa1a", "not one msgpack value"),
        (wire.encode({"a": np.zeros(9)})[:-9], "not one msgpack value"),
        (b"\x80\x80", "not one msgpack value"),
        (b"\xc1", "not one msgpack value"),
        (b"\x93\x01\x02\x03", "a list of 3 items"),
        (b"\x01", "int 1"),
        (b"\x81\x01\x02", "not one msgpack value"),
        (b"\x81\xc4\x01a\x02", "as a key"),
        (b"\x81\xa1a\xa1\xff", "UTF-8"),
        (b"\x81\xa1a\xc7\x01\x05a", "not one msgpack value"),
        (b"\x81\xa1a\xd6\xff\x00\x00\x00\x00", "not one msgpack value|timestamp"),
        (b"\x81\xa1a" + b"\x91" * 600 + b"\xc0", "deeper than 8"),
        (b"\x81\xa1a" + b"\x91" * 6000 + b"\xc0", "not one msgpack value: "),
        (b"\x81\xa1a" + b"\x91" * 9 + b"\xc0", "deeper than 8"),
        (b"\x81\xa1a\xdd\xff\xff\xff\xff", "max_array_len"),
        (b"\x81\xa1a\xdf\xff\xff\xff\xff", "max_map_len"),
        (b"\x81\xa1a\xc6\xff\xff\xff\xff", "not one msgpack value"),
        (msgpack.packb({"a": [0] * 5000}), "4096"),
        (msgpack.packb({"a": [[0] * 4000] * 5}), "more than 16384 items"),
    ],
)
def test_a_broken_frame_is_refused(frame, why):
    with pytest.raises(WireError, match=why):
        wire.unpack(frame)


def test_a_frame_above_the_cap_is_refused_before_it_is_read():
    with pytest.raises(WireError, match="65 bytes, at most 64"):
        wire.unpack(b"\xc1" * 65, WireLimits(max_frame_bytes=64))


@pytest.mark.parametrize(
    "bomb",
    [
        b"\x81\xa1a" + b"\xdc\xff\xff" * 500,  # lists that promise 65,535 items, inside each other
        b"\x81\xa1a" + b"\xdc\x0f\xff" * 500,
        b"\x81\xa1a\xdc\x0f\xff"
        + (b"\xdc\x0f\xff" + b"\x80" * 4095) * 400,  # 1.6 million empty maps
        b"\x81\xa1a\xc6\x7f\xff\xff\xff" + b"\0" * 100,
    ],
)
def test_a_small_frame_cannot_take_much_memory(bomb):
    tracemalloc.start()
    with pytest.raises(WireError):
        wire.unpack(bomb)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 24 * 2**20


def mutate(frame: bytes, rng: random.Random) -> bytes:
    data = bytearray(frame)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(6):
            case 0 if data:
                data[at % len(data)] ^= 1 << rng.randrange(8)
            case 1 if data:
                data[at % len(data)] = rng.choice(
                    b"\x00\x7f\x80\x90\xa0\xc0\xc1\xc4\xc6\xd9\xdc\xdd\xde\xdf\xff"
                )
            case 2:
                del data[at : at + rng.randint(1, 16)]
            case 3:
                data[at:at] = rng.randbytes(rng.randint(1, 8))
            case 4:
                data = data[:at]
            case _:
                data[at:at] = data[max(0, at - 12) : at]
    return bytes(data)


@settings(max_examples=200)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_map_or_a_clear_error(frame):
    try:
        outcome: object = wire.decode(frame)
    except GanglionError as error:
        outcome = str(error)
    assert isinstance(outcome, dict | str)
    assert outcome != ""


def test_mutated_frames_decode_or_say_why():
    rng = random.Random(7)
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    frame = wire.encode(
        {"a": array, "b": {"c": [1, 2.5, None]}, "prompt": "push", "n": np.float32(1)}
    )
    num_refused = 0
    for _ in range(10_000):
        try:
            wire.decode(mutate(frame, rng))
        except (WireError, FieldError):
            num_refused += 1
    assert 5_000 < num_refused < 10_000
