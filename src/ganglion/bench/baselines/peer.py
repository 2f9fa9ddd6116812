"""Peer: another engine in an environment of its own (`make peers`), a process that is asked by lines of JSON.

Called by bench. The scripts that run over there are `bench/peers/*_peer.py`; they import nothing of ours.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ganglion.bench import peers
from ganglion.errors import GanglionError

PEERS: tuple[str, ...] = ("vllm", "openvino")


def installed_peers(root: Path | None = None) -> dict[str, Path]:
    """Name -> python of each environment that `make peers` finished."""
    folder = root or Path(os.environ.get("GANGLION_PEERS", ".peers"))
    return {
        name: (folder / name / "bin" / "python").absolute()
        for name in PEERS
        if (folder / name / ".installed").is_file()
    }


class PeerGenerator:
    """One engine with one model, loaded in its own process."""

    def __init__(
        self, name: str, python: Path, folder: Path, *, max_rows: int, max_tokens: int
    ) -> None:
        """Waits until it has loaded. Raises GanglionError with its last words when it does not."""
        self.name = name
        script = Path(peers.__file__).parent / f"{name}_peer.py"
        num_threads = torch.get_num_threads()
        settings = {
            "folder": str(folder),
            "max_rows": max_rows,
            "max_tokens": max_tokens,
            "num_threads": num_threads,
        }
        self._words = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed by `close`
        self._process = subprocess.Popen(
            [str(python), str(script), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
            text=True,
            env=_environment(num_threads),
        )
        try:
            self.loaded: Mapping[str, Any] = self._read()
        except GanglionError:
            self.close()
            raise

    def generate(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> float:
        assert self._process.stdin is not None
        request = {"prompts": [list(prompt) for prompt in prompts], "num_tokens": num_tokens}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._read()
        counts = set(answer["num_tokens"])
        if counts != {num_tokens}:
            raise GanglionError(
                f"{self.name} made {sorted(counts)} tokens a row, {num_tokens} were asked for"
            )
        return float(answer["seconds"])

    def close(self) -> None:
        """End the process and wait for it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._words.close()

    def _read(self) -> dict[str, Any]:
        """The next line that is an answer; engines print things of their own in between."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{") and (answer := _object(line)) is not None:
                return answer
        self._words.seek(0)
        words = self._words.read().strip()[-1500:]
        raise GanglionError(
            f"peer {self.name} ended with {self._process.wait()}: {words}",
            next_step=f"rm -r .peers/{self.name} and run make peers again",
        )


def _object(line: str) -> dict[str, Any] | None:
    try:
        answer = json.loads(line)
    except ValueError:
        return None
    return answer if isinstance(answer, dict) and "ganglion_peer" in answer else None


def _environment(num_threads: int) -> dict[str, str]:
    """Ours without what belongs to our interpreter."""
    ours = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
    kept = {key: value for key, value in os.environ.items() if key not in ours}
    return kept | {"OMP_NUM_THREADS": str(num_threads), "GANGLION_PYTHON": sys.executable}
