"""Docs: the generated pages, and the check that they are current. Called by `make docs`, `make check`, `bench report`.

docs/cli.md from the command table, docs/metrics.md from the metrics, docs/results/README.md and the README's table
from the result files.
"""

import argparse
import sys
from pathlib import Path

from ganglion.bench.report import (
    claims_table,
    fill,
    plot_name,
    provenance,
    results_page,
    trace_table,
)
from ganglion.bench.result import read_all
from ganglion.cli.commands import COMMANDS, Flag
from ganglion.metrics import metrics_page


def _cell(flag: Flag) -> str:
    shown = flag.help if "%(default)s" not in flag.help else flag.help % {"default": _default(flag)}
    return shown.replace("|", "\\|")


def _default(flag: Flag) -> str:
    return ",".join(flag.default) if isinstance(flag.default, tuple) else str(flag.default)


def _value(flag: Flag) -> str:
    if flag.is_switch:
        return ""
    return " " + ("\\|".join(flag.choices) if flag.choices else flag.metavar or flag.dest.upper())


def cli_page() -> str:
    """docs/cli.md."""
    lines = [
        "# Command line",
        "",
        "Generated from `src/ganglion/cli/commands.py` by `make docs`; do not edit. A flag with a setting can stand in",
        "`ganglion.toml` instead: `--port 8001` is `port = 8001` under `[serve]`. Flags win over the file, the file over",
        "values that follow from the machine, those over the defaults; `--explain` prints where each one came from.",
    ]
    for command in COMMANDS.values():
        lines += [
            "",
            f"## ganglion {command.name}",
            "",
            f"{command.summary[0].upper()}{command.summary[1:]}.",
            "",
        ]
        lines += [
            "```sh",
            *command.examples,
            "```",
            "",
            "| flag | setting | what |",
            "|---|---|---|",
        ]
        for flag in command.flags():
            name = (
                f"`{flag.name}{_value(flag)}`" if flag.name.startswith("--") else f"`{flag.name}`"
            )
            setting = f"`{flag.path}`" if flag.path else ""
            lines.append(f"| {name} | {setting} | {_cell(flag)} |")
    return "\n".join(lines) + "\n"


def pages(root: Path) -> dict[Path, str]:
    """Path below `root` -> what it must hold."""
    results = read_all(root / "docs" / "results")
    readme = (root / "README.md").read_text()
    numbers = (
        f"{claims_table(results)}\n\n{provenance(results)}" if results else "Not measured yet."
    )
    return {
        Path("docs/cli.md"): cli_page(),
        Path("docs/metrics.md"): metrics_page(),
        Path("docs/results/README.md"): results_page(results),
        Path("README.md"): fill(readme, "results", numbers),
        Path("docs/architecture.md"): fill(
            (root / "docs" / "architecture.md").read_text(), "trace", trace_table(results)
        ),
    }


def write_pages(root: Path) -> list[Path]:
    """Write what is not current; returns those paths."""
    written = []
    for path, text in pages(root).items():
        target = root / path
        if not target.exists() or target.read_text() != text:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
            written.append(path)
    return written


def stale_pages(root: Path) -> list[str]:
    """What is not current, and which plots are missing."""
    stale = [
        str(path)
        for path, text in pages(root).items()
        if not (root / path).exists() or (root / path).read_text() != text
    ]
    folder = root / "docs" / "results"
    for result in read_all(folder):
        plots = [folder / plot_name(str(result["name"]), at) for at in range(len(result["plots"]))]
        stale += [str(plot.relative_to(root)) for plot in plots if not plot.exists()]
    return stale


def main() -> int:
    """`python -m ganglion.cli.docs [--check]`, from the repository's root."""
    parser = argparse.ArgumentParser(prog="python -m ganglion.cli.docs", allow_abbrev=False)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail when a page is stale"
    )
    args = parser.parse_args()
    root = Path.cwd()
    if args.check:
        stale = stale_pages(root)
        if stale:
            print(f"stale: {', '.join(stale)}; run make docs (plots: ganglion bench report)")
            return 1
        print("generated docs are current")
        return 0
    for path in write_pages(root):
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
