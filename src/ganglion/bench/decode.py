"""Bench decode: new tokens per second at several batch sizes, against transformers and the peers of `make peers`.

Called by `ganglion bench decode`. A dense 0.5 B and a 1.8 B mixture of experts (0.3 B active), bfloat16, random weights,
prompts of 128 tokens, 64 timed tokens; every engine has all cores.
"""

from dataclasses import asdict

from ganglion.bench.result import BenchResult, Plot
from ganglion.bench.shapes import DENSE, MOE, TOY_DENSE, TOY_MOE
from ganglion.bench.speed import Case, Speeds, decode_rate, measure_speeds

NUM_PROMPT, NUM_NEW = 128, 64
ROWS = (1, 8, 32)
NUM_ROUNDS = 5


def run(*, quick: bool, seed: int) -> BenchResult:
    """Both models; quick: toys of both, one round, no peers."""
    cases = tuple(
        Case(
            name=f"decode_{rows}",
            num_rows=rows,
            num_prompt=16 if quick else NUM_PROMPT,
            num_new=8 if quick else NUM_NEW,
        )
        for rows in (ROWS[:2] if quick else ROWS)
    )
    num_rounds = 1 if quick else NUM_ROUNDS
    speeds = {
        prefix: measure_speeds(
            config, cases, decode_rate, num_rounds=num_rounds, seed=seed, is_quick=quick
        )
        for prefix, config in (
            ("", TOY_DENSE if quick else DENSE),
            ("moe_", TOY_MOE if quick else MOE),
        )
    }
    return result_of("decode", speeds, num_rounds=num_rounds, seed=seed, unit="new tokens/s")


def result_of(
    name: str, speeds: dict[str, Speeds], *, num_rounds: int, seed: int, unit: str
) -> BenchResult:
    """All metrics, and one bar chart a model."""
    metrics: dict[str, float] = {}
    for prefix, measured in speeds.items():
        metrics |= measured.metrics(prefix)
    metrics["worst_foreign_cores"] = max(each.worst_foreign_cores for each in speeds.values())
    return BenchResult(
        name=name,
        metrics=metrics,
        detail={
            "dtype": "bfloat16",
            "models": {
                _title(prefix): {
                    "rounds": {
                        case: {
                            other: [asdict(pair) for pair in pairs] for other, pairs in of.items()
                        }
                        for case, of in measured.pairs.items()
                    },
                    "engines": dict(measured.facts),
                }
                for prefix, measured in speeds.items()
            },
        },
        n=num_rounds,
        seed=seed,
        plots=tuple(
            Plot(
                title=_title(prefix),
                x_label="",
                y_label=unit,
                names=tuple(measured.pairs),
                series={
                    engine: tuple(rates.values()) for engine, rates in measured.rates().items()
                },
            )
            for prefix, measured in speeds.items()
        ),
    )


def _title(prefix: str) -> str:
    return "Mixture of experts" if prefix else "Dense"
