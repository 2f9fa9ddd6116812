"""First token: a server in a process of its own, timed from its start to the first token over HTTP, and its peak memory.

Called by `bench.start`. Reads Linux's /proc. Knows the command line and the OpenAI interface, nothing behind them.
"""

import http.client
import json
import os
import queue
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from ganglion.clock import Clock
from ganglion.errors import GanglionError
from ganglion.plan.headers import read_folder
from ganglion.units import KIB

NUM_PROMPT_TOKENS = 16
TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """One start. Bytes are of the process: `peak_bytes` the most that was ever resident, mapped files included;
    `own_bytes` what no file backs, after the first token."""

    listening_s: float
    first_token_s: float
    peak_bytes: int
    own_bytes: int


def start(chat: str, *, clock: Clock, flags: Sequence[str] = ()) -> Started:
    """Serve the language model `chat` (a shipped name or a folder) alone and ask it for one token.

    Raises GanglionError when the server ends, or says nothing for five minutes.
    """
    command = [sys.executable, "-m", "ganglion.cli.main", "serve", f"chat={chat}", "--port", "0"]
    start_s = clock.now_s()
    with _running([*command, *flags]) as (process, lines):
        url = _wait_for(r"OpenAI +(\S+)", process, lines)
        listening_s = clock.now_s() - start_s
        _ask(url, model=Path(chat).resolve().name)
        first_token_s = clock.now_s() - start_s
        return Started(
            listening_s=listening_s,
            first_token_s=first_token_s,
            peak_bytes=resident_bytes(process.pid, "VmHWM"),
            own_bytes=resident_bytes(process.pid, "RssAnon"),
        )


def weight_bytes(folder: Path) -> int:
    """Sum of the weights in a folder's files."""
    return sum(tensor.num_bytes for tensor in read_folder(folder))


def warm(folder: Path) -> None:
    """Read the folder's files once, so that the page cache has them."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass


def resident_bytes(pid: int, key: str, *, proc: Path = Path("/proc")) -> int:
    """A line of /proc/PID/status, such as VmHWM."""
    for line in (proc / str(pid) / "status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.removesuffix("kB")) * KIB
    raise GanglionError(f"{key}: not in {proc}/{pid}/status", next_step="measure on Linux")


def _ask(url: str, *, model: str) -> None:
    """One token over HTTP, streamed; returns when it is there."""
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.netloc, timeout=TIMEOUT_S)
    body = {
        "model": model,
        "prompt": list(range(1, NUM_PROMPT_TOKENS + 1)),
        "max_tokens": 1,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
    }
    try:
        connection.request(
            "POST",
            f"{address.path}/completions",
            json.dumps(body),
            {"Content-Type": "application/json"},
        )
        answer = connection.getresponse()
        if answer.status != http.HTTPStatus.OK:
            raise GanglionError(f"{url} answered {answer.status}: {answer.read()[:500]!r}")
        for line in answer:
            if line.startswith(b"data:") and b'"finish_reason"' in line:
                return
        raise GanglionError(f"{url} sent no token")
    except OSError as error:
        raise GanglionError(f"{url}: {error}", next_step="serve the folder by hand") from error
    finally:
        connection.close()


@contextmanager
def _running(
    command: Sequence[str],
) -> Iterator[tuple[subprocess.Popen[str], "queue.SimpleQueue[str | None]"]]:
    """The process and what it prints, line by line, None at its end."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    reader = threading.Thread(target=_read, args=(process.stdout, lines), daemon=True)
    reader.start()
    try:
        yield process, lines
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        reader.join()
        process.stdout.close()


def _read(stream: IO[str], lines: "queue.SimpleQueue[str | None]") -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def _wait_for(
    pattern: str, process: subprocess.Popen[str], lines: "queue.SimpleQueue[str | None]"
) -> str:
    said = ""
    while True:
        try:
            line = lines.get(timeout=TIMEOUT_S)
        except queue.Empty:
            raise GanglionError(
                f"the server said nothing for {TIMEOUT_S:.0f} s: {said[-1500:]}"
            ) from None
        if line is None:
            raise GanglionError(f"the server ended with {process.wait()}: {said[-1500:]}")
        said += line
        if found := re.search(pattern, line):
            return found[1]
