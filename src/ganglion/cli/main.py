"""Main: builds the parser from the table, runs one command, turns errors into text and an exit code.

Called by the `ganglion` script. Exit codes: 0 done, 1 failed and said why, 2 wrong usage, 130 Ctrl-C.
"""

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, metadata

import ganglion
from ganglion.cli.commands import COMMANDS, Command, Flag
from ganglion.cli.settings import gathered, resolve
from ganglion.errors import GanglionError, MissingDependencyError

# What a missing module belongs to; the base install is the client alone.
EXTRAS: dict[str, str] = {
    "torch": "server",
    "safetensors": "server",
    "starlette": "server",
    "uvicorn": "server",
    "prometheus_client": "server",
    "tokenizers": "chat",
    "jinja2": "chat",
    "llguidance": "chat",
    "metaworld": "sim",
    "mujoco": "sim",
    "gymnasium": "sim",
    "gym_pusht": "sim",
    "PIL": "sim",
    "tqdm": "train",
    "matplotlib": "bench",
}
SERVING = ("serve", "demo")


def _add(parser: argparse._ArgumentGroup, flag: Flag) -> None:
    options: dict[str, object] = {"help": flag.help}
    if flag.is_switch:
        options["action"] = "store_true"
    else:
        options |= {"type": flag.kind, "default": flag.default}
        if flag.is_repeatable:
            options["action"] = "append"
        if flag.choices:
            options["choices"] = flag.choices
        if flag.nargs:
            options["nargs"] = flag.nargs
        if flag.metavar:
            options["metavar"] = flag.metavar
    if flag.name.startswith("--"):
        options["dest"] = flag.dest
        parser.add_argument(flag.name, **options)  # type: ignore[arg-type]
    else:
        options.setdefault("metavar", flag.name)
        parser.add_argument(flag.dest, **options)  # type: ignore[arg-type]


def _description(command: Command) -> str:
    examples = "\n".join(f"  {example}" for example in command.examples)
    return f"{command.summary}\n\nexamples:\n{examples}"


def _usage(command: Command) -> str:
    positionals = [
        f"[{flag.name}]" if flag.nargs else flag.name
        for flag in command.flags()
        if not flag.name.startswith("--")
    ]
    return " ".join(["ganglion", command.name, *positionals, "[flags]"])


def build_parser() -> argparse.ArgumentParser:
    """The whole parser, every flag of the table."""
    width = max(len(name) for name in COMMANDS)
    listing = "\n".join(f"  {name:<{width}}  {c.summary}" for name, c in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="ganglion",
        usage="ganglion COMMAND [flags]",
        description="An inference server for embodied AI.\n\n"
        "start here:\n  ganglion demo\n  ganglion doctor\n\n" + f"commands:\n{listing}",
        epilog="`ganglion COMMAND --help` shows a command's examples and flags.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"ganglion {ganglion.__version__}")
    subparsers = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, help=argparse.SUPPRESS
    )
    for name, command in COMMANDS.items():
        sub = subparsers.add_parser(
            name,
            usage=_usage(command),
            description=_description(command),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        for group in command.groups:
            section = sub.add_argument_group(group.title)
            for flag in group.flags:
                _add(section, flag)
    return parser


def missing_dependency(error: ModuleNotFoundError) -> MissingDependencyError | None:
    """What to install when `error` is about a module of one of our extras; None when it is a defect of ours."""
    root = (error.name or "").split(".")[0]
    extra = EXTRAS.get(root)
    if extra is None:
        return None
    return MissingDependencyError(
        f"this command needs the package {root!r}, which is not installed",
        next_step=f"pip install 'ganglion[{extra}]'",
    )


def _fail(error: GanglionError) -> int:
    print(f"ganglion: {error}", file=sys.stderr)
    if error.advice:
        print(f"  next: {error.advice}", file=sys.stderr)
    return 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = build_parser().parse_args(gathered(sys.argv[1:] if argv is None else argv))
    command = COMMANDS[args.command]
    logging.basicConfig(
        level=getattr(args, "log_level", "warning").upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    if getattr(args, "log_level", "warning") == "warning":
        # its warnings are the failures that demo and run print at their end
        logging.getLogger("ganglion.robots.fleet").setLevel(logging.ERROR)
    module_name, _, function_name = command.target.partition(":")
    try:
        if getattr(args, "explain", False):
            print(resolve(args).explain())
            return 0
        if command.name in SERVING or getattr(args, "what", None) == "mixed":
            # Threads that wait for each other's part of a forward must sleep: where they share cores with robots, those
            # that spin take the time of those that they wait for (measured: 30 times slower). Read when torch is loaded.
            os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        function = getattr(importlib.import_module(module_name), function_name)
        return int(function(args))
    except GanglionError as error:
        return _fail(error)
    except ModuleNotFoundError as error:
        missing = missing_dependency(error)
        if missing is None:
            raise
        return _fail(missing)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output went away: nothing left to tell
        return 1


def installed_version(package: str) -> str | None:
    """Version of a distribution, or None."""
    try:
        return metadata(package)["Version"]
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
