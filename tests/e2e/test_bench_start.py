"""Bench start: a server really starts and answers; what it says of its memory; servers that end are named."""

import os
from pathlib import Path

import pytest

from ganglion.bench import first_token, start
from ganglion.clock import RealClock
from ganglion.errors import GanglionError
from ganglion.units import KIB, MIB


def test_a_toy_from_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    metrics, detail = start._language(is_quick=True, seed=0)
    assert 0 < metrics["first_token_empty_s"] < 60
    (started,) = detail["language_starts"]
    assert 0 < started["listening_s"] < started["first_token_s"] == metrics["first_token_s"]
    assert started["peak_bytes"] > started["own_bytes"] > 20 * MIB
    assert detail["weight_bytes"] > 100 * KIB


def test_a_server_that_ends_says_why() -> None:
    with pytest.raises(GanglionError, match=r"(?s)the server ended with 1: .*no-such-model"):
        first_token.start("no-such-model", clock=RealClock())


def test_memory_is_read_in_bytes(tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "status").write_text("Name:\tx\nVmHWM:\t    12 kB\nRssAnon:\t 5 kB\n")
    assert first_token.resident_bytes(7, "VmHWM", proc=tmp_path) == 12 * KIB
    with pytest.raises(GanglionError, match="VmPeak: not in"):
        first_token.resident_bytes(7, "VmPeak", proc=tmp_path)
    assert first_token.resident_bytes(os.getpid(), "VmHWM") > MIB
