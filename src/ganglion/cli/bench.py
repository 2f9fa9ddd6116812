"""`ganglion bench`: runs benches, writes results, renders and compares them."""

import argparse
import importlib
from collections.abc import Callable
from pathlib import Path

from ganglion.bench.compare import compare, read
from ganglion.bench.report import BENCHES, claims_table, draw, provenance
from ganglion.bench.result import BenchResult, read_all, write
from ganglion.cli.docs import write_pages
from ganglion.errors import FieldError, GanglionError

RESULTS = Path("docs/results")


def run(args: argparse.Namespace) -> int:
    """Dispatch on WHAT."""
    what = list(args.what)
    if what[:1] == ["compare"]:
        if len(what) != 3:
            raise FieldError("WHAT", expected="compare OLD NEW", got=" ".join(what))
        print(compare(read(Path(what[1])), read(Path(what[2]))))
        return 0
    if what == ["report"]:
        return report(Path(args.out) if args.out else RESULTS)
    if what == ["all"] or (not what and args.quick):
        what = list(BENCHES)
    if not what:
        raise FieldError(
            "WHAT", expected=f"one of {', '.join(BENCHES)}, all, report, compare", got="nothing"
        )
    unknown = [name for name in what if name not in BENCHES]
    if unknown:
        raise FieldError(
            "WHAT", expected=f"names out of {', '.join(BENCHES)}", got=", ".join(unknown)
        )
    return measure(what, args)


def measure(names: list[str], args: argparse.Namespace) -> int:
    """Run `names`; full runs are written to docs/results, quick ones only where --out says."""
    folder = Path(args.out) if args.out else None if args.quick else RESULTS
    failed = []
    documents = []
    for name in names:
        print(f"bench {name} ...", flush=True)
        flags = "".join(
            [" --quick" if args.quick else "", f" --seed {args.seed}" if args.seed else ""]
        )
        try:
            result = load(name)(quick=args.quick, seed=args.seed)
        except GanglionError as error:
            print(f"bench {name}: {error}" + (f"\n  next: {error.advice}" if error.advice else ""))
            failed.append(name)
            continue
        command = f"ganglion bench {name}{flags}"
        documents.append(write_somewhere(result, folder, command))
        if not args.quick:
            width = max(len(metric) for metric in result.metrics)
            for metric, value in result.metrics.items():
                print(f"  {metric:<{width}}  {value:.6g}")
    print()
    print(claims_table(documents))
    print()
    print(provenance(documents))
    if folder is not None and documents:
        print(f"\nwritten to {folder}; `ganglion bench report` renders it")
    return 1 if failed else 0


def write_somewhere(result: BenchResult, folder: Path | None, command: str) -> dict[str, object]:
    """Write `result` and read it back; without a folder it is written to one that is gone afterwards."""
    import tempfile

    if folder is not None:
        return read(write(result, folder, command=command))
    with tempfile.TemporaryDirectory() as gone:
        return read(write(result, Path(gone), command=command))


def load(name: str) -> Callable[..., BenchResult]:
    """The `run` of a bench; imported only now, since benches import torch and simulators."""
    module_name, _, function_name = BENCHES[name].partition(":")
    function: Callable[..., BenchResult] = getattr(
        importlib.import_module(module_name), function_name
    )
    return function


def report(folder: Path) -> int:
    """Draw the plots; write the results page and the README's table."""
    results = read_all(folder)
    if not results:
        raise GanglionError(f"{folder}: no result files", next_step="run ganglion bench all")
    for path in draw(results, folder):
        print(f"drew {path}")
    for path in write_pages(Path.cwd()):
        print(f"wrote {path}")
    return 0
