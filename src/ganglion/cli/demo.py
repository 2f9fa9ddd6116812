"""`ganglion demo`: server, simulated arms and dashboard in one command, until Ctrl-C or --seconds."""

import argparse
import json
import os
import queue
import sys
import threading
import webbrowser
from pathlib import Path
from typing import NoReturn

from ganglion.cli.progress import LiveLine, Stages
from ganglion.cli.run import read_execution
from ganglion.cli.server import Served, serving
from ganglion.cli.settings import resolve
from ganglion.cli.signals import leave, stop_signal
from ganglion.cli.tally import Tally, by_task, counted, episode_line, modes, report_failures
from ganglion.clock import Clock, RealClock
from ganglion.config import DemoConfig
from ganglion.errors import FieldError, GanglionError
from ganglion.robots.catalog import check_world
from ganglion.robots.episode import EpisodeResult
from ganglion.robots.fleet import Fleet, FleetConfig, FleetResult, own_episodes
from ganglion.robots.loop import LoopConfig
from ganglion.robots.metaworld import DEMO_SEEDS, TASKS
from ganglion.types import Execution

REFRESH_S = 0.5


def run(args: argparse.Namespace) -> NoReturn:
    """Serve, start the arms, show what they do; 1 when no arm ever moved."""
    clock = RealClock()
    start_s = clock.now_s()
    resolved = resolve(args)
    if not resolved.config.demo.executions:
        raise FieldError("demo.executions", expected="one mode at least", got="none")
    executions = tuple(read_execution(name) for name in resolved.config.demo.executions)
    worlds = spread(resolved.config.demo)
    is_headless = bool(args.headless)
    stages = Stages(clock)
    print("ganglion demo: server, simulated arms, dashboard", file=sys.stderr)
    results: queue.SimpleQueue[EpisodeResult] = queue.SimpleQueue()
    with stop_signal() as stopped, serving(resolved.config, on_stage=stages) as served:
        stages.end()
        config = FleetConfig(
            url=served.edge.ws_url,
            robots=tuple(f"arm-{at + 1}" for at in range(len(worlds))),
            api_key=resolved.config.serve.api_key,
            loop=LoopConfig(rate_hz=resolved.config.demo.rate_hz),
            executions=dealt(executions, len(worlds)),
            has_side_channel=True,
            has_common_start=True,
        )
        plans = own_episodes(worlds, first_seed=DEMO_SEEDS[0] + args.seed, num_episodes=None)
        announce(served, resolved.config.demo, is_headless=is_headless)
        if not is_headless and not args.no_browser:
            open_browser(served.edge.url)
        with Fleet(config, plans, on_result=results.put) as fleet:
            end_s = None if args.seconds is None else clock.now_s() + args.seconds
            first_action_s = watch(
                fleet, served, results, stopped, clock, end_s=end_s, is_headless=is_headless
            )
            result = fleet.result()
    tally = Tally.of(result)
    seconds_to_first_action = None if first_action_s is None else round(first_action_s - start_s, 2)
    print(f"{counted(len(worlds), 'arm')}: {tally.line()}")
    report_failures(tally)
    if args.json:
        document = {
            "seconds_to_first_action": seconds_to_first_action,
            "seconds": round(clock.now_s() - start_s, 2),
            "rate_hz": resolved.config.demo.rate_hz,
            "policy": resolved.config.policy.path,
            "num_arms": len(worlds),
            **tally.to_json(),
            "tasks": by_task(result.episodes),
        }
        Path(args.json).write_text(json.dumps(document, indent=1) + "\n")
    if first_action_s is None and not stopped.is_set():
        raise GanglionError("no arm ever moved", next_step="run ganglion doctor")
    leave(0)


def spread(config: DemoConfig) -> list[list[str]]:
    """Worlds of each arm: the tasks dealt out like cards; more arms than tasks share them.

    With several ways of execution as many arms in a row share a hand, to be compared.
    """
    tasks = config.tasks or tuple(TASKS)
    worlds = tuple(f"{config.world}:{task}" for task in tasks)
    for world in worlds:
        check_world(world)
    num_alike = len(config.executions)
    num_hands = -(-config.num_arms // num_alike)
    hands = [worlds[at::num_hands] or (worlds[at % len(worlds)],) for at in range(num_hands)]
    return [list(hands[arm // num_alike]) for arm in range(config.num_arms)]


def dealt(executions: tuple[Execution, ...], num_arms: int) -> tuple[Execution, ...]:
    """Of each arm, in turn."""
    return tuple(executions[arm % len(executions)] for arm in range(num_arms))


def announce(served: Served, config: DemoConfig, *, is_headless: bool) -> None:
    """The address, before anything moves."""
    print(f"dashboard  {served.edge.url}/", flush=True)
    print(
        f"{counted(config.num_arms, 'arm')} at {config.rate_hz:g} Hz (Meta-World's own rate is 80 Hz: "
        f"{config.rate_hz / 80:.0%} of its speed)" + ("" if is_headless else "; Ctrl-C stops"),
        flush=True,
    )


def open_browser(url: str) -> None:
    """Open the dashboard where there is a screen and a person."""
    has_screen = sys.platform == "darwin" or any(
        os.environ.get(n) for n in ("DISPLAY", "WAYLAND_DISPLAY")
    )
    if has_screen and sys.stdout.isatty():
        webbrowser.open(url)


def watch(
    fleet: Fleet,
    served: Served,
    results: "queue.SimpleQueue[EpisodeResult]",
    stopped: threading.Event,
    clock: Clock,
    *,
    end_s: float | None,
    is_headless: bool,
) -> float | None:
    """Show the fleet until it is over; returns when the first arm moved."""
    line = LiveLine()
    first_action_s: float | None = None
    while (
        not stopped.wait(REFRESH_S)
        and fleet.is_running
        and (end_s is None or clock.now_s() < end_s)
    ):
        result = fleet.result()
        if first_action_s is None and any(robot.counts.get("ticks") for robot in result.robots):
            first_action_s = clock.now_s()
        if is_headless:
            continue
        while not results.empty():
            line.show("")
            print(episode_line(results.get()), flush=True)
        line.show(status_line(result, served))
    line.end()
    return first_action_s


def status_line(result: FleetResult, served: Served) -> str:
    """One line: what the server and the arms do now."""
    sessions = served.service.stats().sessions
    chunk_hz = sum(session.chunk_hz for session in sessions)
    infer_ms = sorted(session.last_infer_ms for session in sessions if session.num_chunks)
    latency = f", {infer_ms[len(infer_ms) // 2]:.0f} ms each" if infer_ms else ""
    return f"{chunk_hz:.0f} chunks/s{latency} | {Tally.of(result).line()} | {modes(result.robots)}"
