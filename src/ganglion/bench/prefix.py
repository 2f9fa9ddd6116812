"""Bench prefix: time to the first token with a shared prefix in pages, against the same without.

Called by `ganglion bench prefix`. Each round has a new prefix: cold, then other questions behind the same prefix.
"""

import os
import statistics

import numpy as np
import torch

from ganglion.bench.generators import Pages
from ganglion.bench.result import BenchResult, Plot
from ganglion.bench.shapes import DENSE, TOY_DENSE
from ganglion.clock import Clock, RealClock
from ganglion.engine.language_requests import Ended
from ganglion.errors import GanglionError
from ganglion.generation import TokenDelta, Usage
from ganglion.models.decoder_load import random_language
from ganglion.units import MIB

NUM_SHARED, NUM_OWN = 2048, 32
NUM_ROUNDS, NUM_WARM = 5, 3


def run(*, quick: bool, seed: int) -> BenchResult:
    """Rounds of one cold and some warm prompts; quick: a toy and a short prefix."""
    torch.set_num_threads(1 if quick else len(os.sched_getaffinity(0)))
    config = TOY_DENSE if quick else DENSE
    num_shared, num_own = (256, 16) if quick else (NUM_SHARED, NUM_OWN)
    model = random_language(config, dtype=torch.bfloat16, name="bench", seed=seed)
    pages = Pages(model, arena_bytes=1024 * MIB, max_rows=4)
    random, clock = np.random.default_rng(seed), RealClock()
    cold_s: list[float] = []
    warm_s: list[float] = []
    cached: list[int] = []

    def draw(num_tokens: int) -> list[int]:
        drawn: list[int] = random.integers(0, model.spec.vocab_size, num_tokens).tolist()
        return drawn

    first_token(pages, clock, draw(num_shared))  # warms up
    for _ in range(2 if quick else NUM_ROUNDS):
        prefix = draw(num_shared)
        took_s, num_cached = first_token(pages, clock, prefix + draw(num_own))
        if num_cached:
            raise GanglionError(f"a new prompt found {num_cached} of its tokens in pages")
        cold_s.append(took_s)
        for _ in range(NUM_WARM):
            took_s, num_cached = first_token(pages, clock, prefix + draw(num_own))
            warm_s.append(took_s)
            cached.append(num_cached)
    pages.engine.close()
    cold, warm = statistics.median(cold_s), statistics.median(warm_s)
    return BenchResult(
        name="prefix",
        metrics={
            "cold_ttft_ms": cold * 1e3,
            "warm_ttft_ms": warm * 1e3,
            "warm_ttft_ratio": warm / cold,
            "cached_share": min(cached) / (num_shared + num_own),
        },
        detail={
            "cold_s": cold_s,
            "warm_s": warm_s,
            "num_shared_tokens": num_shared,
            "num_own_tokens": num_own,
            "num_threads": torch.get_num_threads(),
        },
        n=len(warm_s),
        seed=seed,
        plots=(
            Plot(
                title=f"A prompt of {num_shared} shared and {num_own} own tokens",
                x_label="",
                y_label="ms to the first token",
                names=("prefix is new", "prefix is in pages"),
                series={"p50": (cold * 1e3, warm * 1e3)},
            ),
        ),
    )


def first_token(pages: Pages, clock: Clock, prompt: list[int]) -> tuple[float, int]:
    """Seconds to the first new token, and how many tokens of the prompt were in pages."""
    start_s = clock.now_s()
    pages.submit(prompt, 1)
    took_s = 0.0
    while True:
        for event in pages.step():
            if isinstance(event, TokenDelta) and not took_s:
                took_s = clock.now_s() - start_s
            if isinstance(event, Ended):
                assert isinstance(event.outcome, Usage), event
                return took_s, event.outcome.num_cached_tokens
