"""The quality ladder: down before a miss, up after a quiet while, no swinging; files are checked."""

import json
from pathlib import Path

import pytest
from tests.pure.test_triage import SPEC

from ganglion.errors import ConfigError
from ganglion.pipeline.ladder import (
    DOWN_PRESSURE,
    MAX_QUIET_S,
    QUIET_S,
    Ladder,
    LadderRouter,
    Rung,
    read_ladder,
)

LADDER = Ladder(
    rungs=(
        Rung(num_flow_steps=5, chunk_ms=10.0),
        Rung(num_flow_steps=3, max_degree=1, chunk_ms=7.0),
        Rung(num_flow_steps=1, max_degree=1, chunk_ms=4.0),
    )
)
TICK_S = 0.05


def run(router: LadderRouter, start_s: float, run_s: float, load: float) -> float:
    """Chunks every 50 ms, whose pressure is `load` times what the rung costs."""
    now_s = start_s
    while now_s < start_s + run_s:
        router.observe(load * router.rung.chunk_ms, now_s)
        router.decide(now_s)
        now_s += TICK_S
    return now_s


def test_it_goes_down_before_it_misses_and_no_further_than_it_must() -> None:
    router = LadderRouter(LADDER)
    now_s = run(router, 0.0, 5.0, 0.05)
    assert router.rung.num_flow_steps == 5
    run(router, now_s, 0.5, 0.08)  # 0.8 of the time: no miss yet
    assert router.rung.num_flow_steps == 3
    run(router, now_s + 0.5, 5.0, 0.08)
    assert router.rung.num_flow_steps == 3, "0.56 on this rung, 0.8 on the one above"


def test_it_comes_back_one_rung_at_a_time_after_a_quiet_while() -> None:
    router = LadderRouter(LADDER)
    now_s = run(router, 0.0, 3.0, 0.3)
    assert router.rung.num_flow_steps == 1
    now_s = run(router, now_s, QUIET_S / 2, 0.01)
    assert router.rung.num_flow_steps == 1
    now_s = run(router, now_s, QUIET_S, 0.01)
    assert router.rung.num_flow_steps == 3
    run(router, now_s, 2 * QUIET_S, 0.01)
    assert router.rung.num_flow_steps == 5


def test_a_load_that_only_the_lower_rung_carries_does_not_make_it_swing() -> None:
    """Costs that lie: the rung above is far dearer than measured offline."""
    router, now_s = LadderRouter(LADDER), 0.0
    while now_s < 300.0:
        router.observe(0.9 if router.rung.num_flow_steps == 5 else 0.3, now_s)
        router.decide(now_s)
        now_s += TICK_S
    assert router.num_moves <= 2 * (300.0 / MAX_QUIET_S + 6)


def test_one_rung_never_moves() -> None:
    router = LadderRouter(Ladder.of(SPEC))
    run(router, 0.0, 5.0, 10.0)
    assert router.rung.num_flow_steps == SPEC.num_flow_steps
    assert not router.has_choice


def test_nothing_measured_moves_nothing() -> None:
    router = LadderRouter(LADDER)
    router.observe(DOWN_PRESSURE + 1, 0.0)
    assert router.decide(0.1).num_flow_steps == 5, "one hiccup is no load"
    assert router.decide(100.0).num_flow_steps == 5


def write(path: Path, **more: object) -> Path:
    raw = {
        "model_version": "1",
        "rungs": [
            {"num_flow_steps": k, "max_degree": 0, "success_rate": s, "chunk_ms": float(k)}
            for k, s in ((1, 0.4), (5, 1.0), (2, 0.97), (7, 1.0))
        ],
    } | more
    path.write_text(json.dumps({"detail": raw}))
    return path


def test_a_file_gives_the_rungs_that_keep_the_success(tmp_path: Path) -> None:
    ladder = read_ladder(write(tmp_path / "ladder.json"), SPEC)
    assert [rung.num_flow_steps for rung in ladder.rungs] == [5, 2]


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"model_version": "2"}, "served is '1'"),
        ({"rungs": [{"num_flow_steps": 3}]}, "not a result"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    tmp_path: Path, more: dict[str, object], text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        read_ladder(write(tmp_path / "ladder.json", **more), SPEC)
    with pytest.raises(ConfigError, match="No such file"):
        read_ladder(tmp_path / "none.json", SPEC)
