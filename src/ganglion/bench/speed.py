"""Speed: several engines on one workload, interleaved, and the ratios between them. Called by bench decode and prefill.

Every figure is a median over rounds; in a round each engine runs each case once, in an order that turns. Ratios are taken
within a round, so that a slow minute of the machine is everybody's.
"""

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from ganglion.bench.baselines.hugging_face import HuggingFaceGenerator
from ganglion.bench.baselines.peer import PeerGenerator, installed_peers
from ganglion.bench.generators import Generator, OurGenerator
from ganglion.bench.shapes import shape_folder

OURS = OurGenerator.name
BASELINE = HuggingFaceGenerator.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One point of a workload: `num_rows` prompts of `num_prompt` tokens, `num_new` tokens each."""

    name: str  # "decode_8", "prefill_2048"
    num_rows: int
    num_prompt: int
    num_new: int

    @property
    def max_tokens(self) -> int:
        """Of one row."""
        return self.num_prompt + self.num_new


@dataclass(frozen=True, slots=True, kw_only=True)
class Speeds:
    """Tokens per second: case -> engine -> one figure a round. `facts`: what engines said of themselves."""

    rates: Mapping[str, Mapping[str, tuple[float, ...]]]
    facts: Mapping[str, Any]

    def metrics(self, prefix: str) -> dict[str, float]:
        """Rates of ours, of transformers and of the best peer, and ours against theirs."""
        found: dict[str, float] = {}
        for case, rates in self.rates.items():
            name = prefix + case
            found[f"{name}_tokens_per_s"] = statistics.median(rates[OURS])
            found[f"{name}_transformers_tokens_per_s"] = statistics.median(rates[BASELINE])
            found[f"{name}_ratio_transformers"] = self._ratio(case, BASELINE)
            peers = [engine for engine in rates if engine not in (OURS, BASELINE)]
            if peers:
                best = max(peers, key=lambda peer: statistics.median(rates[peer]))
                found[f"{name}_best_peer_tokens_per_s"] = statistics.median(rates[best])
                found[f"{name}_ratio_best_peer"] = self._ratio(case, best)
        return found

    def _ratio(self, case: str, other: str) -> float:
        pairs = zip(self.rates[case][OURS], self.rates[case][other], strict=True)
        return statistics.median(ours / theirs for ours, theirs in pairs)


Rate = Callable[[Generator, Case, np.random.Generator, int], float]


def measure_speeds(
    config: Mapping[str, Any],
    cases: Sequence[Case],
    rate: Rate,
    *,
    num_rounds: int,
    seed: int,
    is_quick: bool,
) -> Speeds:
    """Load every engine once, warm each case up, then run the rounds.

    Every engine gets the whole machine; when it `is_quick`, one thread, and there are no peers.
    """
    torch.set_num_threads(1 if is_quick else len(os.sched_getaffinity(0)))
    folder = shape_folder(config, seed=seed)
    max_rows = max(case.num_rows for case in cases)
    max_tokens = max(case.max_tokens for case in cases)
    random = np.random.default_rng(seed)
    vocab_size = int(config["vocab_size"])
    with ExitStack() as stack:
        engines: list[Generator] = []
        facts: dict[str, Any] = {
            "num_threads": torch.get_num_threads(),
            "transformers": version("transformers"),
        }

        def keep(engine: Generator) -> None:
            engines.append(stack.enter_context(closing(engine)))

        keep(OurGenerator(folder, max_rows=max_rows, max_tokens=max_tokens))
        keep(HuggingFaceGenerator(folder))
        for name, python in ({} if is_quick else installed_peers()).items():
            peer = PeerGenerator(name, python, folder, max_rows=max_rows, max_tokens=max_tokens)
            facts[name] = dict(peer.loaded)
            keep(peer)
        rates: dict[str, dict[str, list[float]]] = {
            case.name: {engine.name: [] for engine in engines} for case in cases
        }
        for at in range(num_rounds + 1):
            for case in cases:
                turn = at % len(engines)
                for engine in engines[turn:] + engines[:turn]:
                    tokens_per_s = rate(engine, case, random, vocab_size)
                    if at:  # the first is warming up
                        rates[case.name][engine.name].append(tokens_per_s)
        facts["load_average"] = os.getloadavg()[0]
    return Speeds(
        rates={
            case: {name: tuple(values) for name, values in engines_rates.items()}
            for case, engines_rates in rates.items()
        },
        facts=facts,
    )


def decode_rate(
    engine: Generator, case: Case, random: np.random.Generator, vocab_size: int
) -> float:
    """Tokens after the first, per second: the time of `num_new` + 1 less the time of one."""
    one_s = engine.generate(_prompts(case, random, vocab_size), 1)
    all_s = engine.generate(_prompts(case, random, vocab_size), case.num_new + 1)
    return case.num_rows * case.num_new / max(all_s - one_s, 1e-9)


def prefill_rate(
    engine: Generator, case: Case, random: np.random.Generator, vocab_size: int
) -> float:
    """Prompt tokens per second up to the first new one."""
    took_s = engine.generate(_prompts(case, random, vocab_size), 1)
    return case.num_rows * case.num_prompt / took_s


def _prompts(case: Case, random: np.random.Generator, vocab_size: int) -> list[list[int]]:
    """New ones every time: no engine has seen them."""
    drawn: list[list[int]] = random.integers(
        0, vocab_size, (case.num_rows, case.num_prompt)
    ).tolist()
    return drawn
