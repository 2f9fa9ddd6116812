"""Progress: what a command is doing, on stderr: a line a stage, and one live line. Called by the commands."""

import shutil
import sys

from ganglion.clock import Clock


class Stages:
    """Prints each stage with the time that it took. `stages("loading")` starts one and ends the one before."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._start_s: float | None = None

    def __call__(self, text: str) -> None:
        self.end()
        self._start_s = self._clock.now_s()
        print(f"  {text} ... ", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        """End the running stage, if any."""
        if self._start_s is not None:
            print(f"{self._clock.now_s() - self._start_s:.1f} s", file=sys.stderr, flush=True)
            self._start_s = None


class LiveLine:
    """One line that is written over on a terminal, and never written elsewhere."""

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._width = 0

    def show(self, text: str) -> None:
        """Replace the line."""
        if self._is_terminal:
            text = text[
                : shutil.get_terminal_size().columns - 1
            ]  # a wrapped line cannot be written over
            print(f"\r{text:<{self._width}}", end="", file=sys.stderr, flush=True)
            self._width = len(text)

    def end(self) -> None:
        """Leave the last text standing."""
        if self._width:
            print(file=sys.stderr)
            self._width = 0
