"""Detokenizer and stop strings: whole characters only, nothing of a stop string, nothing lost."""

from hypothesis import given
from hypothesis import strategies as st

from ganglion.models.detokenizer import Detokenizer, StopMatcher


@given(st.text(), st.lists(st.integers(1, 5), max_size=40))
def test_text_survives_any_cut(text: str, sizes: list[int]) -> None:
    data, start = text.encode(), 0
    detokenizer, parts = Detokenizer(), []
    for size in [*sizes, len(data)]:
        parts.append(detokenizer.feed(data[start : start + size]))
        start += size
    assert all(part == "" or "\ufffd" not in part or "\ufffd" in text for part in parts)
    assert "".join(parts) + detokenizer.finish() == text


@given(st.binary(), st.integers(1, 4))
def test_any_bytes_give_what_one_decode_gives(data: bytes, size: int) -> None:
    detokenizer = Detokenizer()
    text = "".join(detokenizer.feed(data[i : i + size]) for i in range(0, len(data), size))
    assert text + detokenizer.finish() == data.decode("utf-8", errors="replace")


def test_half_a_character_waits() -> None:
    detokenizer = Detokenizer()
    assert detokenizer.feed("é".encode()[:1]) == ""
    assert detokenizer.feed("é".encode()[1:]) == "é"
    assert detokenizer.finish() == ""


SMALL = st.text(alphabet="ab", max_size=30)


@given(SMALL, st.lists(st.text(alphabet="ab", min_size=1, max_size=5), max_size=4), st.data())
def test_stop_strings_cut_where_the_first_ends(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    matcher = StopMatcher(stops)
    shown, found, start = "", None, 0
    while start < len(text) and found is None:
        size = data.draw(st.integers(1, 7))
        passed = matcher.feed(text[start : start + size])
        start += size
        shown += passed.text
        found = passed.stop
        fed = text[:start]
        assert text.startswith(shown)
        if found is None:
            # what is held back is the longest end that may become a stop string, no more
            ends = [n for s in stops for n in range(1, len(s)) if fed.endswith(s[:n])]
            assert len(fed) - len(shown) == max(ends, default=0)
    ends = [
        (end, -len(stop), stop)
        for stop in stops
        for end in range(len(stop), len(text) + 1)
        if text[:end].endswith(stop)
    ]
    if ends:
        end, _, stop = min(ends)
        assert (found, shown) == (stop, text[: end - len(stop)])
        assert matcher.feed("aa").text == "" == matcher.finish()
    else:
        assert found is None
        assert shown + matcher.finish() == text


def test_a_stop_string_over_two_tokens_is_never_shown() -> None:
    matcher = StopMatcher(["\n\nUser:"])
    assert matcher.feed("Hello\n").text == "Hello"
    assert matcher.feed("\nUse").text == ""
    passed = matcher.feed("r: hi")
    assert (passed.text, passed.stop) == ("", "\n\nUser:")


def test_what_only_looked_like_a_stop_string_comes_out_whole() -> None:
    matcher = StopMatcher(["</s>"])
    assert matcher.feed("a </").text == "a "
    assert matcher.feed("p> b").text == "</p> b"
