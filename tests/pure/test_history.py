"""Histories keep what was attended to: relevance as a Value, and the ladder whole - encoded - gone."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ganglion.memory.retention.history import History, HistoryConfig
from ganglion.memory.retention.relevance import Relevance
from ganglion.memory.retention.value import Value


def test_it_is_a_value() -> None:
    assert isinstance(Relevance(half_life=4.0), Value)


def test_attention_halves_with_every_half_life() -> None:
    value = Relevance(half_life=4.0, first_score=0.5)
    value.keep(1, 0)
    value.note(1, 0.5, 0)
    assert value.score(1, 0) == pytest.approx(1.0)
    assert value.score(1, 4) == pytest.approx(0.5)
    assert value.score(1, 8) == pytest.approx(0.25)
    assert value.worth(1) == pytest.approx(0.0)  # a score of 1 at 0 is worth what Lru says of 0


def test_a_page_that_is_read_outlives_newer_ones_that_are_not() -> None:
    value = Relevance(half_life=8.0)
    for now in range(20):
        value.keep(now, now)
        value.note(0, 0.5, now)
    assert value.weakest() == 1
    value.drop(1)
    assert value.weakest() == 2


def test_a_share_of_attention_lies_between_0_and_1() -> None:
    with pytest.raises(ValueError, match=r"1\.5"):
        Relevance(half_life=1.0).note(0, 1.5, 0)
    with pytest.raises(ValueError, match="half_life 0"):
        Relevance(half_life=0)


def test_scores_of_items_that_are_gone_do_not_pile_up() -> None:
    value = Relevance(half_life=8.0)
    for item in range(5_000):
        value.keep(item, item)
        value.drop(item)
    assert len(value._ranks) < 1_100
    assert len(value._heap) < 100
    assert value.weakest() is None


STEPS = st.lists(
    st.tuples(st.sampled_from(["keep", "drop", "note", "forget"]), st.integers(0, 7)), max_size=80
)


@given(steps=STEPS)
def test_the_weakest_is_the_least_of_a_plain_model(steps: list[tuple[str, int]]) -> None:
    value, half_life = Relevance(half_life=3.0), 3.0
    scores: dict[int, tuple[float, int]] = {}
    kept: set[int] = set()

    def score(item: int, now: int) -> float:
        mass, at = scores.get(item, (0.25, now))
        return float(mass * 0.5 ** ((now - at) / half_life))

    for now, (verb, item) in enumerate(steps):
        if verb == "keep" and item not in kept:
            value.keep(item, now)
            kept.add(item)
            scores.setdefault(item, (0.25, now))
        elif verb == "drop" and item in kept:
            value.drop(item)
            kept.remove(item)
        elif verb == "note":
            value.note(item, 0.1 * item, now)
            scores[item] = (score(item, now) + 0.1 * item, now)
        elif verb == "forget":
            value.forget(item)
            kept.discard(item)
            scores.pop(item, None)
        weakest = value.weakest()
        if not kept:
            assert weakest is None
            continue
        assert weakest in kept
        least = min(score(other, now) for other in kept)
        assert math.isclose(score(weakest, now), least, rel_tol=1e-6)


def test_the_ladder_goes_from_whole_to_encoded_to_gone() -> None:
    history = History(HistoryConfig(num_whole=2, num_encoded=3))
    encoded: list[int] = []
    dropped: list[int] = []
    for item in range(12):
        history.note(0, 0.9, item)
        descent = history.add(item, item)
        encoded += descent.encode
        dropped += descent.drop
    assert len(history.whole) == 2
    assert len(history.encoded) == 3
    assert 0 in history.whole  # the oldest of all, and the one that was read
    assert set(history.items) == set(range(12)) - set(dropped)
    assert set(history.encoded) <= set(encoded)
    assert set(history.clear()) == set(range(12)) - set(dropped)
    assert history.items == ()


@given(
    num_whole=st.integers(0, 3),
    num_encoded=st.integers(0, 3),
    masses=st.lists(st.lists(st.floats(0, 0.2), min_size=6, max_size=6), max_size=40),
)
def test_every_item_goes_down_once_and_places_are_never_exceeded(
    num_whole: int, num_encoded: int, masses: list[list[float]]
) -> None:
    if num_whole + num_encoded == 0:
        with pytest.raises(ValueError, match="needs places"):
            HistoryConfig(num_whole=0, num_encoded=0)
        return
    history = History(HistoryConfig(num_whole=num_whole, num_encoded=num_encoded))
    is_encoded: dict[int, bool] = {}
    for now, of_items in enumerate(masses):
        for item, mass in zip(history.items, of_items, strict=False):
            history.note(item, mass, now)
        is_encoded[now] = False
        descent = history.add(now, now)
        for item in descent.encode:
            assert not is_encoded[item]
            is_encoded[item] = True
        for item in descent.drop:
            del is_encoded[item]
        assert history.encoded == tuple(item for item, low in is_encoded.items() if low)
        assert history.whole == tuple(item for item, low in is_encoded.items() if not low)
        assert len(history.whole) <= num_whole
        assert len(history.encoded) <= num_encoded


def test_without_attention_a_history_is_a_window() -> None:
    history = History(HistoryConfig(num_whole=1, num_encoded=2))
    for item in range(9):
        history.add(item, item)
    assert history.items == (6, 7, 8)


def test_a_page_that_is_worth_enough_at_first_makes_a_window_whatever_is_attended_to() -> None:
    history = History(HistoryConfig(num_whole=3, num_encoded=0, first_score=1e6))
    for item in range(40):
        for old in history.items:
            history.note(old, 1.0 if old == history.items[0] else 0.0, item)
        history.add(item, item)
    assert history.items == (37, 38, 39)
