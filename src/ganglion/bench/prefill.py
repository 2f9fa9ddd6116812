"""Bench prefill: prompt tokens per second of one prompt, against transformers and the peers of `make peers`.

Called by `ganglion bench prefill`. The models of bench decode; the time is that to the first new token.
"""

from ganglion.bench.decode import NUM_ROUNDS, result_of
from ganglion.bench.result import BenchResult
from ganglion.bench.shapes import DENSE, MOE, TOY_DENSE, TOY_MOE
from ganglion.bench.speed import Case, measure_speeds, prefill_rate

PROMPTS, QUICK_PROMPTS = (512, 2048), (64, 128)


def run(*, quick: bool, seed: int) -> BenchResult:
    """Both models; quick: toys of both, one round, no peers."""
    cases = tuple(
        Case(name=f"prefill_{num_prompt}", num_rows=1, num_prompt=num_prompt, num_new=1)
        for num_prompt in (QUICK_PROMPTS if quick else PROMPTS)
    )
    num_rounds = 1 if quick else NUM_ROUNDS
    speeds = {
        prefix: measure_speeds(
            config, cases, prefill_rate, num_rounds=num_rounds, seed=seed, is_quick=quick
        )
        for prefix, config in (
            ("", TOY_DENSE if quick else DENSE),
            ("moe_", TOY_MOE if quick else MOE),
        )
    }
    return result_of("prefill", speeds, num_rounds=num_rounds, seed=seed, unit="prompt tokens/s")
