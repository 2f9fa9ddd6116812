"""The `ganglion` command as a child process, read line by line; ended by Ctrl-C as a person would."""

import os
import queue
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}


def ganglion(*args: str, timeout_s: float, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run to its end."""
    command = [sys.executable, "-m", "ganglion.cli.main", *args]
    return subprocess.run(
        command,
        cwd=cwd,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


class Running:
    """`with Running("serve", "--port", "0", until="Ctrl-C stops") as command: command.text`"""

    def __init__(self, *args: str, until: str, timeout_s: float = 60.0, cwd: Path = ROOT) -> None:
        self._args, self._until, self._timeout_s, self._cwd = args, until, timeout_s, cwd
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self.text = ""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-u", "-m", "ganglion.cli.main", *self._args],
            cwd=self._cwd,
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.wait_for(self._until)
        return self

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def wait_for(self, text: str) -> None:
        """Read until `text` was printed."""
        while text not in self.text:
            try:
                line = self._lines.get(timeout=self._timeout_s)
            except queue.Empty:
                self._process.kill()
                raise AssertionError(
                    f"no {text!r} within {self._timeout_s} s: {self.text}"
                ) from None
            assert line is not None, f"ended before {text!r}: {self.text}"
            self.text += line

    def find(self, pattern: str) -> str:
        """The first group of `pattern` in what was printed."""
        match = re.search(pattern, self.text, re.MULTILINE)
        assert match is not None, f"no {pattern!r} in {self.text}"
        return match[1]

    def stop(self) -> int:
        """Ctrl-C; returns the exit code."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
        try:
            code = self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise
        self._reader.join()
        while (line := self._lines.get()) is not None:
            self.text += line
        assert self._process.stdout is not None
        self._process.stdout.close()
        return code

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        code = self.stop()
        if error is None:
            assert code == 0, f"exit code {code}: {self.text}"
            assert "Traceback" not in self.text
