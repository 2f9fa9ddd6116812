import pytest

from ganglion.cli.tally import Tally, by_task, counted, episode_line, modes, report_failures
from ganglion.robots.episode import EpisodeResult
from ganglion.robots.fleet import FleetResult, RobotStatus


def episode(task: str, *, success_tick: int | None, round_trips_ms: list[float]) -> EpisodeResult:
    return EpisodeResult(
        robot_id="arm-1",
        world=f"metaworld:{task}",
        task=task,
        seed=1,
        prompt="open it",
        is_success=success_tick is not None,
        success_tick=success_tick,
        num_ticks=500,
        stages_ms={"round_trip": round_trips_ms},
    )


FLEET = FleetResult(
    episodes=(
        episode("drawer-open", success_tick=61, round_trips_ms=[10.0, 20.0]),
        episode("drawer-open", success_tick=None, round_trips_ms=[30.0]),
    ),
    robots=(
        RobotStatus(
            robot_id="arm-1",
            pid=1,
            is_alive=True,
            mode="run",
            counts={"ticks": 900, "misses": 3, "holds": 1},
        ),
        RobotStatus(
            robot_id="arm-2",
            pid=2,
            is_alive=False,
            counts={"ticks": 100, "misses": 7},
            failure="gone; next: look",
        ),
    ),
)


def test_a_tally_adds_robots_up() -> None:
    tally = Tally.of(FLEET)
    assert (tally.num_ticks, tally.num_misses, tally.num_holds) == (1000, 10, 1)
    assert tally.miss_rate == 0.01
    assert tally.line() == "1,000 ticks, 1.0% missed, 1 of 2 episodes solved, latency p50 20 ms"
    assert tally.to_json()["failures"] == ["arm-2: gone; next: look"]
    assert by_task(FLEET.episodes) == {"drawer-open": {"num_episodes": 2, "num_successes": 1}}
    assert modes(FLEET.robots) == "arm-1 run, arm-2 ended"


def test_a_fleet_that_never_moved_divides_by_nothing() -> None:
    tally = Tally.of(FleetResult(episodes=(), robots=()))
    assert tally.miss_rate == 0.0
    assert tally.line() == "0 ticks, 0.0% missed, 0 of 0 episodes solved"


def test_failures_end_with_the_next_step(capsys: pytest.CaptureFixture[str]) -> None:
    report_failures(Tally.of(FLEET))
    assert capsys.readouterr().err == "arm-2: gone\n  next: look\n"


def test_episodes_are_told_in_one_line() -> None:
    solved, failed = (episode_line(result) for result in FLEET.episodes)
    assert solved == 'arm-1  drawer-open  "open it"  solved after 61 ticks'
    assert failed.endswith("not solved in 500 ticks")
    assert counted(1, "arm") == "1 arm"
    assert counted(4, "arm") == "4 arms"
