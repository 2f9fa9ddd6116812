"""Fleets of real processes against a real server: what they do, and what happens when a part of it dies."""

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
from websockets.sync.client import connect

from ganglion.clock import RealClock
from ganglion.config import ServeConfig
from ganglion.errors import FieldError
from ganglion.robots.episode import EpisodePlan
from ganglion.robots.fleet import Fleet, FleetConfig, own_episodes, run_fleet, shared_episodes
from ganglion.robots.loop import LoopConfig, Pace
from ganglion.robots.metaworld import TASKS
from ganglion.serve.app import ServerThread
from ganglion.serve.fake import FakeService, fake_spec
from ganglion.spec import ViewSpec

pytest.importorskip("gym_pusht")

SPEC = replace(
    fake_spec(),
    views=(ViewSpec(key="observation.image", height=96, width=96),),
    state_dim=2,
    action_dim=2,
    action_low=(0.0, 0.0),
    action_high=(512.0, 512.0),
)
LIMIT_S = 60.0  # this machine may be busy


@pytest.fixture
def server():
    with FakeService(SPEC, infer_s=0.005) as service, ServerThread(service) as thread:
        yield thread


def until(is_true, limit_s: float = LIMIT_S) -> None:
    clock, pause = RealClock(), threading.Event()
    end_s = clock.now_s() + limit_s
    while not is_true():
        assert clock.now_s() < end_s, f"not within {limit_s} s"
        pause.wait(0.02)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"


def config_for(url: str, *robots: str, **loop) -> FleetConfig:
    return FleetConfig(url=url, robots=robots, loop=LoopConfig(**{"max_ticks": 20, **loop}))


def test_two_robots_run_their_episodes(server):
    heard = []
    result = run_fleet(
        config_for(server.ws_url, "a", "b"),
        own_episodes([["pusht"], ["pusht"]], first_seed=3, num_episodes=2),
        on_result=heard.append,
    )
    assert result.failures == ()
    assert sorted(heard, key=id) == sorted(result.episodes, key=id)
    assert {(e.robot_id, e.seed) for e in result.episodes} == {
        ("a", 3),
        ("b", 4),
        ("a", 5),
        ("b", 6),
    }
    for episode in result.episodes:
        assert episode.num_ticks - episode.num_overruns == 20
        assert len(episode.ages_ms) + episode.num_holds == 20
        assert episode.run_s >= 19 / 20.0
        assert len(episode.stages_ms["round_trip"]) == episode.num_chunks > 0
    for robot in result.robots:
        assert robot.counts["ticks"] == sum(
            e.num_ticks for e in result.episodes if e.robot_id == robot.robot_id
        )


def test_lockstep_is_as_fast_as_the_machine_and_repeats_exactly(server):
    def actions_run():
        plans = [EpisodePlan(world="pusht", seed=1)]
        config = config_for(server.ws_url, "a", pace=Pace.LOCKSTEP, max_ticks=40)
        episode = run_fleet(config, shared_episodes(plans)).episodes[0]
        return episode.num_ticks, episode.ages_ms, episode.num_chunks, episode.num_misses

    first = actions_run()
    assert first == actions_run()
    assert first[0] == 40
    assert first[3] == 0


def test_a_killed_server_stops_the_arms_and_a_new_one_moves_them_again():
    with FakeService(SPEC) as service:
        with ServerThread(service) as first:
            fleet = Fleet(
                config_for(first.ws_url, "a", max_ticks=100_000),
                own_episodes([["pusht"]], first_seed=0, num_episodes=None),
            )
            fleet.start()
            until(lambda: fleet.statuses()[0].mode == "run")
        try:
            until(lambda: fleet.statuses()[0].mode == "safe_stop")
            num_holds = fleet.statuses()[0].counts["holds"]
            until(lambda: fleet.statuses()[0].counts["holds"] > num_holds)
            with ServerThread(service, config=ServeConfig(port=first.port)):
                until(lambda: fleet.statuses()[0].mode == "run")
                fleet.stop()
        finally:
            fleet.stop()
    status = fleet.statuses()[0]
    assert not status.is_alive
    assert status.failure == ""
    assert status.counts["safe_stops"] >= 1


def test_a_killed_robot_is_reported_and_the_others_live_on(server):
    config = config_for(server.ws_url, "a", "b", max_ticks=60)
    plans = own_episodes([["pusht"], ["pusht"]], first_seed=0, num_episodes=1)
    with Fleet(config, plans) as fleet:
        until(lambda: all(robot.mode == "run" for robot in fleet.statuses()))
        fleet.kill("a")
        assert fleet.wait(LIMIT_S)
        result = fleet.result()
    assert [robot.robot_id for robot in result.failures] == ["a"]
    assert "-9" in result.failures[0].failure
    assert [episode.robot_id for episode in result.episodes] == ["b"]


def test_stop_ends_running_robots_at_once_and_is_no_failure(server):
    config = config_for(server.ws_url, "a", max_ticks=100_000)
    fleet = Fleet(config, own_episodes([["pusht"]], first_seed=0, num_episodes=None))
    fleet.start()
    until(lambda: fleet.statuses()[0].mode == "run")
    clock = RealClock()
    start_s = clock.now_s()
    fleet.stop()
    assert clock.now_s() - start_s < 5.0
    assert not fleet.is_running
    assert fleet.result().failures == ()
    with pytest.raises(FieldError):
        fleet.kill("nobody")


def test_a_callers_defect_ends_its_robot_and_says_so(server):
    def on_result(result):
        raise RuntimeError("no room for results")

    def next_plan(robot):
        raise ValueError("no plan for you")

    config = config_for(server.ws_url, "a", max_ticks=2)
    plans = own_episodes([["pusht"]], first_seed=0, num_episodes=None)
    for fleet in (Fleet(config, plans, on_result=on_result), Fleet(config, next_plan)):
        with fleet:
            assert fleet.wait(LIMIT_S)
            status = fleet.statuses()[0]
        assert not status.is_alive
        assert not is_alive(status.pid)
        assert "no room for results" in status.failure or "no plan for you" in status.failure


def test_a_fleet_that_cannot_start_leaves_no_robot(server, monkeypatch):
    pids = []
    popen = subprocess.Popen

    def start_one(*args, **kwargs):
        if pids:
            raise OSError("no more processes")
        process = popen(*args, **kwargs)
        pids.append(process.pid)
        return process

    monkeypatch.setattr(subprocess, "Popen", start_one)
    plans = own_episodes([["pusht"], ["pusht"]], first_seed=0, num_episodes=None)
    with pytest.raises(OSError, match="no more"):
        Fleet(config_for(server.ws_url, "a", "b"), plans).start()
    assert len(pids) == 1
    assert not is_alive(pids[0])


def test_a_common_start_waits_for_all_that_live():
    config = FleetConfig(
        url="ws://127.0.0.1:9", robots=("a", "late", "dead"), has_common_start=True
    )
    fleet = Fleet(config, own_episodes([["pusht"]] * 3, first_seed=0, num_episodes=1))
    waiting = threading.Thread(target=fleet.await_start)
    waiting.start()
    for index in (0, 2):
        fleet.note_prepared(index)
        waiting.join(0.1)
        assert waiting.is_alive()
    fleet.note_prepared(1)
    waiting.join(LIMIT_S)
    assert not waiting.is_alive()


def test_with_a_common_start_nobody_moves_before_all_are_ready_and_the_dead_hold_nobody_up():
    plans = own_episodes([["pusht"]] * 3, first_seed=0, num_episodes=None)
    with FakeService(SPEC) as service, ServerThread(service) as server:
        config = config_for(server.ws_url, "a", "late", "dead", max_ticks=100_000)
        with Fleet(replace(config, has_common_start=True), plans) as fleet:
            late_pid = fleet.statuses()[1].pid
            os.kill(late_pid, signal.SIGSTOP)
            fleet.kill("dead")
            until(lambda: not fleet.statuses()[2].is_alive)
            threading.Event().wait(3.0)
            assert not service.received
            os.kill(late_pid, signal.SIGCONT)
            until(lambda: all(robot.mode == "run" for robot in fleet.statuses()[:2]))
            fleet.stop()


PARENT = """
import json, sys, threading
from ganglion.robots.fleet import Fleet, FleetConfig, own_episodes
from ganglion.robots.loop import LoopConfig
config = FleetConfig(url=sys.argv[1], robots=("a", "b"), loop=LoopConfig(max_ticks=100_000))
fleet = Fleet(config, own_episodes([["pusht"], ["pusht"]], first_seed=0, num_episodes=None))
fleet.start()
while not all(robot.mode == "run" for robot in fleet.statuses()):
    threading.Event().wait(0.05)
print(json.dumps([robot.pid for robot in fleet.statuses()]), flush=True)
fleet.wait()
"""


def test_no_robot_outlives_its_fleet(server):
    command = [sys.executable, "-c", PARENT, server.ws_url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = json.loads(parent.stdout.readline())
        assert all(is_alive(pid) for pid in pids)
        parent.send_signal(signal.SIGKILL)
    until(lambda: not any(is_alive(pid) for pid in pids), limit_s=10.0)


def test_a_policy_for_another_robot_is_named():
    plans = own_episodes([["pusht"]], first_seed=0, num_episodes=1)
    with FakeService(fake_spec(size=64)) as service, ServerThread(service) as server:
        failure = run_fleet(config_for(server.ws_url, "a"), plans).failures[0].failure
    assert "observation.images.corner: expected [64, 64, 3]" in failure
    assert "pusht" in failure


def test_a_world_renders_in_the_size_that_the_policy_wants():
    small = replace(SPEC, views=(ViewSpec(key="observation.image", height=64, width=64),))
    plans = own_episodes([["pusht"]], first_seed=0, num_episodes=1)
    with FakeService(small) as service, ServerThread(service) as server:
        result = run_fleet(config_for(server.ws_url, "a"), plans)
        shapes = {seen.images["observation.image"].shape for seen in service.received}
    assert result.failures == ()
    assert shapes == {(64, 64, 3)}


def test_metaworld_arms_run_under_their_instructions():
    worlds = [["metaworld:push", "metaworld:door-close"], ["metaworld:drawer-open"]]
    with FakeService(fake_spec(size=80)) as service, ServerThread(service) as server:
        result = run_fleet(
            config_for(server.ws_url, "a", "b"),
            own_episodes(worlds, first_seed=0, num_episodes=3),
        )
        prompts = {seen.prompt for seen in service.received}
    if any("OpenGL" in robot.failure for robot in result.failures):
        pytest.skip(result.failures[0].failure)
    assert result.failures == ()
    tasks = {
        robot: [episode.task for episode in result.episodes if episode.robot_id == robot]
        for robot in ("a", "b")
    }
    assert tasks == {"a": ["push", "door-close", "push"], "b": ["drawer-open"] * 3}
    assert prompts == {TASKS[task].prompt for task in ("push", "door-close", "drawer-open")}
    assert all(episode.num_chunks >= 3 for episode in result.episodes)


def test_no_server_is_said_with_its_address():
    plans = own_episodes([["pusht"]], first_seed=0, num_episodes=1)
    config = replace(config_for("ws://127.0.0.1:9", "a"), connect_s=0.3)
    failure = run_fleet(config, plans).failures[0].failure
    assert "ws://127.0.0.1:9" in failure


def test_a_watched_robot_shows_its_scene_and_its_queue(server):
    config = replace(config_for(server.ws_url, "a", max_ticks=100_000), has_side_channel=True)
    plans = own_episodes([["pusht"]], first_seed=0, num_episodes=None)
    with Fleet(config, plans), connect(f"{server.ws_url}/v1/dashboard", proxy=None) as browser:
        views, shown = [], []
        while len(views) < 3 or not shown:
            message = browser.recv(timeout=LIMIT_S)
            if isinstance(message, bytes):
                views.append(message)
                continue
            arms = json.loads(message).get("arms", [])
            shown += [arm["robot"] for arm in arms if arm["robot"] and arm["robot"]["telemetry"]]
    assert all(view[4:6] == b"\xff\xd8" for view in views)
    assert shown[-1]["world"] == "pusht"
    assert len(shown[-1]["telemetry"]["queue"][0]) == 2
