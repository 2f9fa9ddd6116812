"""Detokenizer and stop strings: from the bytes of tokens to text that may be shown. One of each per choice.

Called by `pipeline.language` for every token. Knows neither models nor tokenizers.
"""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass


class Detokenizer:
    """Bytes in, whole characters out. Constant work per token, however long the text is by now."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, data: bytes) -> str:
        """The characters that `data` completes; bytes that are no UTF-8 become U+FFFD."""
        return self._decoder.decode(data)

    def finish(self) -> str:
        """The end: a character that was never completed becomes U+FFFD."""
        return self._decoder.decode(b"", final=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Passed:
    """Text that may be shown now, and the stop string that ended it, if one did."""

    text: str
    stop: str | None = None


class StopMatcher:
    """Lets text through up to the first stop string, and holds back what may be the start of one.

    Knuth, Morris and Pratt's automaton per stop string: a constant number of steps per character and stop string. The
    string that ends first wins; of several that end together, the longest. After a match nothing passes any more.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._failures = [_failures(stop) for stop in self._stops]
        self._states = [0] * len(
            self._stops
        )  # characters of each stop string that the text ends with
        self._held = ""
        self._is_over = False

    def feed(self, text: str) -> Passed:
        """What of the text so far may be shown."""
        if self._is_over:
            return Passed(text="")
        if not self._stops:
            return Passed(text=text)
        text = self._held + text
        for index in range(len(self._held), len(text)):
            stop = self._advance(text[index])
            if stop is not None:
                self._is_over, self._held = True, ""
                return Passed(text=text[: index + 1 - len(stop)], stop=stop)
        cut = len(text) - max(self._states)
        self._held = text[cut:]
        return Passed(text=text[:cut])

    def finish(self) -> str:
        """The end without a stop string: what was held back."""
        held, self._held, self._is_over = self._held, "", True
        return held

    def _advance(self, character: str) -> str | None:
        """Take one character; the longest stop string that it completes."""
        matched: str | None = None
        for which, stop in enumerate(self._stops):
            failures, state = self._failures[which], self._states[which]
            while state and stop[state] != character:
                state = failures[state - 1]
            if stop[state] == character:
                state += 1
            self._states[which] = state
            if state == len(stop) and (matched is None or len(stop) > len(matched)):
                matched = stop
        return matched


def _failures(stop: str) -> list[int]:
    """Per prefix, the length of the longest shorter prefix that it ends with."""
    failures, length = [0] * len(stop), 0
    for index in range(1, len(stop)):
        while length and stop[index] != stop[length]:
            length = failures[length - 1]
        if stop[index] == stop[length]:
            length += 1
        failures[index] = length
    return failures
