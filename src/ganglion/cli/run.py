"""`ganglion run`: simulated robots against a server that runs already, on this machine or another."""

import argparse
import json
import os
import sys
from pathlib import Path

from ganglion.cli.settings import read_key
from ganglion.cli.signals import stop_signal
from ganglion.cli.tally import Tally, by_task, counted, episode_line, report_failures
from ganglion.errors import FieldError
from ganglion.robots.episode import EpisodeResult
from ganglion.robots.fleet import Fleet, FleetConfig, own_episodes
from ganglion.robots.loop import LoopConfig
from ganglion.types import Execution

REFRESH_S = 0.2


def read_execution(name: str) -> Execution:
    """The mode called `name`. Raises FieldError listing the modes."""
    if name not in list(Execution):
        raise FieldError("--execution", expected=f"one of {', '.join(Execution)}", got=repr(name))
    return Execution(name)


def run(args: argparse.Namespace) -> int:
    """Run the episodes; 1 when a robot failed, whatever the tasks' success."""
    if args.episodes < 1:
        raise FieldError("--episodes", expected="at least 1", got=str(args.episodes))
    plans = own_episodes(
        [[world] for world in args.world],
        first_seed=args.seed,
        num_episodes=args.episodes,
        prompt=args.prompt,
    )
    names = [world.partition(":")[2] or world for world in args.world]
    config = FleetConfig(
        url=args.url,
        robots=tuple(f"{name}-{os.getpid()}-{at + 1}" for at, name in enumerate(names)),
        api_key=read_key(args.api_key_file),
        loop=LoopConfig(rate_hz=args.rate, execution=read_execution(args.execution)),
        has_side_channel=True,
    )

    def on_result(result: EpisodeResult) -> None:
        print(episode_line(result), flush=True)

    print(f"{counted(len(names), 'robot')} at {args.rate:g} Hz for {args.url}", file=sys.stderr)
    with stop_signal() as stopped, Fleet(config, plans, on_result=on_result) as fleet:
        while not fleet.wait(REFRESH_S) and not stopped.is_set():
            pass
        result = fleet.result()
    tally = Tally.of(result)
    if tally.num_ticks:
        print(tally.line())
    report_failures(tally)
    if args.json:
        document = {
            **tally.to_json(),
            "rate_hz": args.rate,
            "tasks": by_task(result.episodes),
            "episodes": [episode.to_json() for episode in result.episodes],
        }
        Path(args.json).write_text(json.dumps(document) + "\n")
    return 1 if tally.failures else 0
