"""Commands: every command and flag as one literal table. Read by `main` (parser), `docs` (docs/cli.md) and the test.

Knows what exists and what it is called; imports nothing that runs it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """One flag ("--port") or positional ("POLICY"). With `path` it sets that config value; else it is for this run."""

    name: str
    help: str
    path: str = ""
    kind: Callable[[str], Any] = str
    metavar: str = ""
    default: Any = None
    choices: tuple[str, ...] = ()
    is_switch: bool = False
    is_repeatable: bool = False
    nargs: str = ""

    @property
    def dest(self) -> str:
        """Name in argparse's namespace."""
        return self.name.removeprefix("--").replace("-", "_").lower()


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Flags under one heading of the help."""

    title: str
    flags: tuple[Flag, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One command. `target`: "module:function" of what runs it, imported only then."""

    name: str
    summary: str
    examples: tuple[str, ...]
    target: str
    groups: tuple[Group, ...] = ()

    def flags(self) -> tuple[Flag, ...]:
        """All flags of all groups."""
        return tuple(flag for group in self.groups for flag in group.flags)


def names(text: str) -> tuple[str, ...]:
    """Comma-separated names."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


CONFIG_FILE = Flag(
    name="--config",
    help="a TOML file of settings (default: ganglion.toml here, if any)",
    metavar="FILE",
)
LOG_LEVEL = Flag(
    name="--log-level",
    help="least severe messages to show (default: %(default)s)",
    choices=("debug", "info", "warning", "error"),
    default="warning",
)
EXPLAIN = Flag(
    name="--explain", help="print every setting with its reason, then stop", is_switch=True
)
SEED = Flag(
    name="--seed", help="seed of everything random (default: %(default)s)", kind=int, default=0
)
JSON = Flag(name="--json", help="write what was measured to this file", metavar="FILE")
POLICY_FLAG = Flag(
    name="--policy", path="policy.path", help="shipped name, checkpoint folder or file.py:Class"
)
FLOW_STEPS = Flag(
    name="--flow-steps",
    path="policy.num_flow_steps",
    kind=int,
    metavar="K",
    help="denoising steps a chunk; 0 = the checkpoint's own number",
)
PORT = Flag(
    name="--port", path="serve.port", kind=int, help="port; 0 = any free one", metavar="PORT"
)
DTYPE = Flag(
    name="--dtype",
    path="engine.dtype",
    choices=("auto", "bfloat16", "float32"),
    help="numbers that the model computes in",
)
ARENA = Flag(
    name="--arena-bytes",
    path="memory.arena_bytes",
    metavar="SIZE",
    help='all pages together: "256 MiB"',
)
MEMORY = Flag(
    name="--memory",
    path="memory.budget_bytes",
    metavar="SIZE",
    help='weights and pages together: "8 GiB"',
)
DEADLINE = Flag(
    name="--deadline-ms",
    path="engine.deadline_ms",
    kind=float,
    metavar="MS",
    help="deadline of robots that name none",
)
URL = Flag(
    name="--url",
    help="the server (default: %(default)s)",
    default="ws://127.0.0.1:8000",
    metavar="URL",
)
KEY_FILE = Flag(
    name="--api-key-file",
    help="file that holds the API key (a flag would show it in the process list)",
    metavar="FILE",
)
RATE = Flag(
    name="--rate",
    kind=float,
    default=20.0,
    metavar="HZ",
    help="control ticks per second (default: %(default)s; Meta-World's own rate is 80: 20 is quarter speed)",
)
DATA = Flag(
    name="--data",
    default="data/metaworld-ten",
    metavar="DIR",
    help="demonstrations (default: %(default)s)",
)
RUN_DIR = Flag(
    name="--run",
    metavar="DIR",
    help="checkpoints (default: runs/metaworld-ten; lm: runs/language)",
)

_SETTINGS = Group(title="settings", flags=(CONFIG_FILE, EXPLAIN, LOG_LEVEL))

_PIPELINE = Group(
    title="pipeline",
    flags=(
        Flag(
            name="--degree",
            path="pipeline.degree",
            kind=int,
            metavar="N",
            help="chunks of one robot under way at once; 0 = tuned on this machine",
        ),
        Flag(
            name="--context",
            path="pipeline.context",
            metavar="WHICH",
            help="public: chunks under way see newer observations; private: their own only",
        ),
        Flag(
            name="--warm-start",
            path="pipeline.warm_start",
            kind=float,
            metavar="SHARE",
            help="share of the flow steps that a chunk skips by starting from the rest of the last one",
        ),
        Flag(
            name="--ladder",
            path="pipeline.ladder",
            metavar="FILE",
            help="result of `ganglion bench ladder`: fewer flow steps before robots miss",
        ),
    ),
)

DEMO = Command(
    name="demo",
    summary="server, simulated arms and dashboard on this machine; needs no GPU, key or download",
    examples=(
        "ganglion demo",
        "ganglion demo --arms 2 --tasks drawer-open,push",
        "ganglion demo --world metaworld-moving --tasks push,drawer-open --execution naive,prefix",
        "ganglion demo --headless --seconds 60 --json demo.json",
    ),
    target="ganglion.cli.demo:run",
    groups=(
        Group(
            title="arms",
            flags=(
                Flag(
                    name="--arms",
                    path="demo.num_arms",
                    kind=int,
                    metavar="N",
                    help="simulated arms",
                ),
                Flag(
                    name="--rate",
                    path="demo.rate_hz",
                    kind=float,
                    metavar="HZ",
                    help="control ticks per second; Meta-World's own rate is 80: 20 is quarter speed",
                ),
                Flag(
                    name="--tasks",
                    path="demo.tasks",
                    kind=names,
                    metavar="A,B",
                    help="tasks, spread over the arms (default: all that the policy knows)",
                ),
                Flag(
                    name="--world",
                    path="demo.world",
                    metavar="KIND",
                    help="metaworld, metaworld-moving or metaworld-jumping: goals that do not stay where they are",
                ),
                Flag(
                    name="--execution",
                    path="demo.executions",
                    kind=names,
                    metavar="A,B",
                    help="what arms do while their next chunk is computed; with several, arms side by side do the same task",
                ),
                SEED,
            ),
        ),
        Group(
            title="run",
            flags=(
                Flag(name="--seconds", kind=float, metavar="S", help="stop after this long"),
                Flag(name="--headless", is_switch=True, help="no browser and no live line"),
                Flag(name="--no-browser", is_switch=True, help="do not open a browser"),
                JSON,
            ),
        ),
        Group(title="server", flags=(POLICY_FLAG, FLOW_STEPS, PORT, DTYPE)),
        _PIPELINE,
        _SETTINGS,
    ),
)

SERVE = Command(
    name="serve",
    summary="serve a policy to robots, and language models beside it",
    examples=(
        "ganglion serve",
        "ganglion serve policy=metaworld-ten chat=tiny-moe",
        "ganglion serve chat=models/Qwen3-0.6B --memory 8GiB",
        "ganglion serve chat=tiny-moe chat=models/Qwen3-0.6B,ttl_s=600 chat=models/OLMoE,on_demand",
        "ganglion serve chat=models/Qwen3-0.6B --adapter sql=adapters/sql --adapter poet=adapters/poet",
        "ganglion serve policy=path/to/checkpoint --port 8001",
        "ganglion serve policy=examples/my_policy.py:MyPolicy",
        "ganglion serve --host 0.0.0.0 --api-key-file key.txt",
    ),
    target="ganglion.cli.serve:run",
    groups=(
        Group(
            title="models",
            flags=(
                Flag(
                    name="SERVED",
                    nargs="*",
                    metavar="KEY=VALUE",
                    help="policy=NAME, checkpoint folder or file.py:Class (policy.path); chat=NAME or Hugging Face "
                    "folder (chat.models), repeatable, with ,pinned (the default), ,on_demand or ,ttl_s=SECONDS. "
                    "Only what is named is served; nothing named: what the config file says, else policy=metaworld-ten",
                ),
                Flag(
                    name="--adapter",
                    path="chat.adapters",
                    is_repeatable=True,
                    metavar="NAME=DIR",
                    help="LoRA folder that requests may name as a model; NAME@MODEL=DIR beside several; repeatable",
                ),
                FLOW_STEPS,
                DTYPE,
            ),
        ),
        Group(
            title="network",
            flags=(
                Flag(
                    name="--host",
                    path="serve.host",
                    metavar="HOST",
                    help="address to bind; any but loopback needs a key",
                ),
                PORT,
                KEY_FILE,
                Flag(
                    name="--allow-host",
                    path="serve.allowed_hosts",
                    is_repeatable=True,
                    metavar="NAME",
                    help="one more name that browsers may call this server by; repeatable",
                ),
            ),
        ),
        Group(
            title="limits",
            flags=(
                DEADLINE,
                Flag(
                    name="--max-sessions",
                    path="engine.max_sessions",
                    kind=int,
                    metavar="N",
                    help="robots at once",
                ),
                MEMORY,
                ARENA,
            ),
        ),
        _PIPELINE,
        _SETTINGS,
    ),
)

RUN = Command(
    name="run",
    summary="simulated robots against a server that runs already",
    examples=(
        "ganglion run --world metaworld:drawer-open",
        "ganglion run --world metaworld:push,metaworld:pick-place --episodes 5",
        "ganglion run --world pusht --url ws://robot-box:8000 --api-key-file key.txt",
    ),
    target="ganglion.cli.run:run",
    groups=(
        Group(
            title="robots",
            flags=(
                Flag(
                    name="--world",
                    kind=names,
                    default=("metaworld:drawer-open",),
                    metavar="WORLD",
                    help="metaworld:TASK, metaworld-moving:TASK, metaworld-jumping:TASK or pusht; several with commas, one robot each",
                ),
                Flag(
                    name="--episodes",
                    kind=int,
                    default=1,
                    metavar="N",
                    help="episodes of each robot (default: %(default)s)",
                ),
                RATE,
                Flag(
                    name="--seed",
                    kind=int,
                    default=30_000,
                    help="seed of the first episode (default: %(default)s; training used 0 to 9999)",
                ),
                Flag(
                    name="--prompt", metavar="TEXT", help="instruction in place of the task's own"
                ),
                Flag(
                    name="--execution",
                    default="naive",
                    metavar="MODE",
                    help="what a robot does while its next chunk is computed: sync, naive, blend, rtc, "
                    "rtc-identity, prefix, rolled (default: %(default)s)",
                ),
            ),
        ),
        Group(title="server", flags=(URL, KEY_FILE)),
        Group(title="output", flags=(JSON, LOG_LEVEL)),
    ),
)

TRAIN = Command(
    name="train",
    summary="make the shipped policy again: demonstrations, training, evaluation; lm: the language models",
    examples=(
        "ganglion train all",
        "ganglion train collect --workers 2",
        "ganglion train fit --until 2500",
        "ganglion train evaluate --checkpoint runs/metaworld-ten",
        "ganglion train lm --moe",
    ),
    target="ganglion.cli.train:run",
    groups=(
        Group(
            title="stage",
            flags=(
                Flag(
                    name="STAGE",
                    choices=("collect", "fit", "correct", "delays", "evaluate", "all", "lm"),
                    help="collect demonstrations, fit a policy to them, correct its mistakes, evaluate it; "
                    "all: collect, half of fit, correct, the rest of fit, evaluate; "
                    "delays: from a trained policy on, to one that works with late chunks; "
                    "lm: tiny language models, on text of this Python installation",
                ),
            ),
        ),
        Group(
            title="lm",
            flags=(
                Flag(name="--moe", is_switch=True, help="the mixture of experts (default: both)"),
                Flag(name="--dense", is_switch=True, help="its dense sibling (default: both)"),
                Flag(name="--quick", is_switch=True, help="a few steps on a little text"),
            ),
        ),
        Group(
            title="where",
            flags=(
                DATA,
                RUN_DIR,
                Flag(
                    name="--checkpoint",
                    metavar="DIR",
                    help="policy to evaluate, or to go on from (delays): folder or shipped name "
                    "(default: what fit wrote; delays: the shipped policy)",
                ),
                JSON,
            ),
        ),
        Group(
            title="how much",
            flags=(
                Flag(name="--episodes", kind=int, metavar="N", help="demonstrations of each task"),
                Flag(name="--steps", kind=int, metavar="N", help="training steps in all"),
                Flag(
                    name="--until",
                    kind=int,
                    metavar="N",
                    help="fit, lm: stop at this step; a later run goes on",
                ),
                Flag(
                    name="--eval-episodes", kind=int, metavar="N", help="unseen seeds of each task"
                ),
                Flag(
                    name="--workers",
                    kind=int,
                    default=2,
                    metavar="N",
                    help="simulator processes (default: %(default)s)",
                ),
                SEED,
            ),
        ),
        Group(title="output", flags=(LOG_LEVEL,)),
    ),
)

PLAN = Command(
    name="plan",
    summary="what a model needs here and how fast it can go, from its headers, before anything is loaded",
    examples=(
        "ganglion plan metaworld-ten",
        "ganglion plan models/Qwen3-0.6B --context 8192 --rows 4",
        "ganglion plan models/Qwen3-30B-A3B --json plan.json",
    ),
    target="ganglion.cli.plan:run",
    groups=(
        Group(
            title="what",
            flags=(
                Flag(name="MODEL", help="checkpoint folder, or the name of a shipped model"),
                Flag(
                    name="--context",
                    kind=int,
                    metavar="N",
                    help="tokens of a sequence (default: 2048, or what the model can)",
                ),
                Flag(
                    name="--rows",
                    kind=int,
                    metavar="N",
                    help="sequences, or robots, at once (default: 8)",
                ),
                DTYPE,
                ARENA,
            ),
        ),
        Group(
            title="machine",
            flags=(
                Flag(
                    name="--measure",
                    is_switch=True,
                    help="measure this machine again (a second; else it is done once and kept)",
                ),
                Flag(name="--json", help="write the plan to this file, too", metavar="FILE"),
            ),
        ),
        _SETTINGS,
    ),
)

DOCTOR = Command(
    name="doctor",
    summary="what works on this machine, and one line to fix what does not",
    examples=("ganglion doctor",),
    target="ganglion.cli.doctor:run",
    groups=(Group(title="output", flags=(JSON,)),),
)

BENCH = Command(
    name="bench",
    summary="measure, with the baseline in the same run; write and compare results",
    examples=(
        "ganglion bench --quick",
        "ganglion bench control",
        "ganglion bench all",
        "ganglion bench report",
        "ganglion bench compare old/pool.json docs/results/pool.json",
    ),
    target="ganglion.cli.bench:run",
    groups=(
        Group(
            title="what",
            flags=(
                Flag(
                    name="WHAT",
                    nargs="*",
                    help="names of benches, or: all, report, compare OLD NEW",
                ),
                Flag(
                    name="--quick",
                    is_switch=True,
                    help="short runs of all that is named (default: of all); prints, writes nothing unless --out",
                ),
                SEED,
            ),
        ),
        Group(
            title="output",
            flags=(
                Flag(
                    name="--out",
                    metavar="DIR",
                    help="folder of results (default: docs/results; with --quick: none)",
                ),
                LOG_LEVEL,
            ),
        ),
    ),
)

COMMANDS: dict[str, Command] = {
    "demo": DEMO,
    "serve": SERVE,
    "run": RUN,
    "train": TRAIN,
    "plan": PLAN,
    "doctor": DOCTOR,
    "bench": BENCH,
}
