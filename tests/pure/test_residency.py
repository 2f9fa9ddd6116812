"""Which models are in memory: the bytes always fit, pinned ones and busy ones stay, the least worth goes first."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ganglion.errors import ConfigError
from ganglion.pipeline.residency import HALF_LIFE_S, Residency, Stay, Terms
from ganglion.service import ModelState

ON_DEMAND = Stay(is_pinned=False)


def books(
    *, budget_bytes: int | None = 100, other_bytes: int = 0, **models: tuple[int, Stay]
) -> Residency:
    return Residency(
        models={name: Terms(weight_bytes=size, stay=stay) for name, (size, stay) in models.items()},
        budget_bytes=budget_bytes,
        other_bytes=other_bytes,
        arena_bytes=40,
        floor_bytes=10,
    )


def load(residency: Residency, name: str, now_s: float = 0.0) -> tuple[str, ...]:
    room = residency.room(name, now_s, busy=())
    assert room is not None
    for other in room.evicted:
        residency.drop(other)
    residency.begin(name)
    residency.finish(name, now_s)
    assert residency.page_bytes == room.page_bytes
    return room.evicted


def test_pages_give_way_first_then_the_model_that_is_worth_least() -> None:
    residency = books(a=(50, ON_DEMAND), b=(30, ON_DEMAND), c=(20, ON_DEMAND))
    assert load(residency, "a") == ()
    assert residency.page_bytes == 40
    assert load(residency, "b") == ()
    assert residency.page_bytes == 20
    residency.count("a", 500, 1.0)  # ten tokens a byte
    residency.count("b", 150, 1.0)  # five
    assert load(residency, "c", 2.0) == ("b",)
    assert residency.state("b") is ModelState.UNLOADED
    assert residency.page_bytes == 30


def test_what_was_asked_long_ago_is_worth_less() -> None:
    residency = books(a=(45, ON_DEMAND), b=(45, ON_DEMAND), c=(20, ON_DEMAND))
    load(residency, "a")
    load(residency, "b")
    residency.count("a", 1000, 0.0)
    residency.count("b", 100, 5 * HALF_LIFE_S)
    assert load(residency, "c", 5 * HALF_LIFE_S) == ("a",)


def test_a_large_one_that_goes_spares_the_small_ones_before_it() -> None:
    residency = books(a=(5, ON_DEMAND), b=(80, ON_DEMAND), c=(60, ON_DEMAND))
    load(residency, "a")
    load(residency, "b")
    residency.count("b", 1000, 0.0)
    assert load(residency, "c") == ("b",)
    assert residency.state("a") is ModelState.LOADED


def test_busy_and_pinned_models_stay() -> None:
    residency = books(a=(40, Stay()), b=(40, ON_DEMAND), c=(30, ON_DEMAND))
    assert residency.state("a") is ModelState.LOADED
    load(residency, "b")
    assert residency.room("c", 0.0, busy={"b"}) is None
    assert load(residency, "c") == ("b",)


def test_a_time_is_over_once_nobody_asked_for_so_long() -> None:
    residency = books(a=(40, Stay(is_pinned=False, ttl_s=60)), b=(40, ON_DEMAND))
    load(residency, "a", 0.0)
    load(residency, "b", 0.0)
    assert residency.left_s("a", 20.0) == 40.0
    assert residency.left_s("b", 20.0) is None
    residency.count("a", 1, 50.0)
    assert residency.expired(109.0, busy=()) == ()
    assert residency.expired(110.0, busy={"a"}) == ()
    assert residency.expired(110.0, busy=()) == ("a",)


def test_what_can_never_fit_is_said_at_once() -> None:
    with pytest.raises(ConfigError, match="what is pinned needs 101 B"):
        books(a=(50, Stay()), b=(41, Stay()))
    with pytest.raises(ConfigError, match="b beside what is pinned needs 105 B"):
        books(a=(50, Stay()), b=(45, ON_DEMAND))
    with pytest.raises(ConfigError, match="pages' floor needs 105 B"):
        books(other_bytes=95)
    assert books(budget_bytes=None, a=(10**12, Stay())).page_bytes == 40


SIZES = {"a": 10, "b": 25, "c": 40, "d": 60}


@given(
    st.lists(
        st.tuples(st.sampled_from("abcd"), st.integers(0, 100), st.sets(st.sampled_from("abcd"))),
        max_size=40,
    )
)
def test_the_budget_holds_whatever_is_asked(steps: list[tuple[str, int, set[str]]]) -> None:
    residency = books(other_bytes=20, **{name: (size, ON_DEMAND) for name, size in SIZES.items()})
    for now_s, (name, num_tokens, busy) in enumerate(steps):
        before = {other for other in SIZES if residency.state(other) is ModelState.LOADED}
        if name not in before:
            room = residency.room(name, now_s, busy=busy)
            if room is None:
                kept = sum(SIZES[other] for other in before & busy)
                assert 20 + 10 + kept + SIZES[name] > 100
                continue
            assert not busy.intersection(room.evicted)
            for other in room.evicted:
                residency.drop(other)
            residency.begin(name)
            assert residency.page_bytes == room.page_bytes
            residency.finish(name, now_s)
        residency.count(name, num_tokens, now_s)
        weights = sum(SIZES[n] for n in SIZES if residency.state(n) is ModelState.LOADED)
        assert weights == residency.weight_bytes
        assert 10 <= residency.page_bytes <= 40
        assert 20 + weights + residency.page_bytes <= 100
