"""Speed: our engine and another on one workload, in turns, and the ratio between them. Called by bench decode and prefill.

The others come one after the other, since together they would not fit into memory; ours stays and runs again beside each.
In a round both run each case once. A ratio is the median over rounds of ours / theirs, so that a slow minute of the
machine is both's.
"""

import gc
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from ganglion.bench.baselines.hugging_face import HuggingFaceGenerator
from ganglion.bench.baselines.peer import PeerGenerator, installed_peers
from ganglion.bench.foreign import ForeignLoad
from ganglion.bench.generators import Generator, OurGenerator
from ganglion.bench.shapes import shape_folder
from ganglion.clock import RealClock
from ganglion.errors import GanglionError

BASELINE = HuggingFaceGenerator.name
NUM_TRIES = 5  # of a figure that came out as none


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
        return self.num_prompt + self.num_new + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Tokens per second of one round."""

    ours: float
    theirs: float
    foreign_cores: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Speeds:
    """Case -> the other engine -> one pair a round. `facts`: what engines said of themselves."""

    pairs: Mapping[str, Mapping[str, tuple[Pair, ...]]]
    facts: Mapping[str, Any]

    def metrics(self, prefix: str) -> dict[str, float]:
        """Rates of ours, of transformers and of the best peer, and ours against theirs."""
        found: dict[str, float] = {}
        for case, others in self.pairs.items():
            name = prefix + case
            found[f"{name}_tokens_per_s"] = self.ours(case)
            found[f"{name}_transformers_tokens_per_s"] = _theirs(others[BASELINE])
            found[f"{name}_ratio_transformers"] = _ratio(others[BASELINE])
            peers = [pairs for other, pairs in others.items() if other != BASELINE]
            if peers:
                best = max(peers, key=_theirs)
                found[f"{name}_best_peer_tokens_per_s"] = _theirs(best)
                found[f"{name}_ratio_best_peer"] = _ratio(best)
        return found

    def ours(self, case: str) -> float:
        """Tokens per second, median over all rounds."""
        return statistics.median(pair.ours for pairs in self.pairs[case].values() for pair in pairs)

    def rates(self) -> dict[str, dict[str, float]]:
        """Engine -> case -> tokens per second."""
        found = {OurGenerator.name: {case: self.ours(case) for case in self.pairs}}
        for case, others in self.pairs.items():
            for other, pairs in others.items():
                found.setdefault(other, {})[case] = _theirs(pairs)
        return found

    @property
    def worst_foreign_cores(self) -> float:
        """Of all rounds."""
        return max(
            pair.foreign_cores
            for others in self.pairs.values()
            for pairs in others.values()
            for pair in pairs
        )


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
    """Ours against each of the others: a round to warm up, then those that count.

    Every engine gets the whole machine; when it `is_quick`, one thread, and there are no peers.
    """
    torch.set_num_threads(1 if is_quick else len(os.sched_getaffinity(0)))
    folder = shape_folder(config, seed=seed)
    max_rows = max(case.num_rows for case in cases)
    max_tokens = max(case.max_tokens for case in cases)
    random, clock = np.random.default_rng(seed), RealClock()
    vocab_size = int(config["vocab_size"])
    facts: dict[str, Any] = {
        "num_threads": torch.get_num_threads(),
        BASELINE: {"version": version("transformers")},
    }

    def others() -> Iterator[Generator]:
        yield HuggingFaceGenerator(folder)
        for name, python in ({} if is_quick else installed_peers()).items():
            peer = PeerGenerator(name, python, folder, max_rows=max_rows, max_tokens=max_tokens)
            facts[name] = dict(peer.loaded)
            yield peer

    pairs: dict[str, dict[str, tuple[Pair, ...]]] = {case.name: {} for case in cases}
    with closing(OurGenerator(folder, max_rows=max_rows, max_tokens=max_tokens)) as ours:
        for other in others():
            with closing(other):
                rounds: dict[str, list[Pair]] = {case.name: [] for case in cases}
                for _ in range(num_rounds + 1):
                    for case in cases:
                        load = ForeignLoad(clock, (os.getpid(),))
                        mine = rate(ours, case, random, vocab_size)
                        theirs = rate(other, case, random, vocab_size)
                        rounds[case.name].append(
                            Pair(ours=mine, theirs=theirs, foreign_cores=load.cores())
                        )
                for case in cases:
                    pairs[case.name][other.name] = tuple(rounds[case.name][1:])
            del other  # its memory, before the next one takes its own
            gc.collect()
    return Speeds(pairs=pairs, facts=facts)


def decode_rate(
    engine: Generator, case: Case, random: np.random.Generator, vocab_size: int
) -> float:
    """Tokens after the first, per second: the time of `num_new` + 1 less the time of one.

    Raises GanglionError when more tokens keep taking less time: the machine is too busy to measure.
    """
    for _ in range(NUM_TRIES):
        one_s = engine.generate(_prompts(case, random, vocab_size), 1)
        all_s = engine.generate(_prompts(case, random, vocab_size), case.num_new + 1)
        if all_s > one_s:
            return case.num_rows * case.num_new / (all_s - one_s)
    raise GanglionError(
        f"{engine.name}: {case.num_new + 1} tokens took {all_s:.3f} s, 1 took {one_s:.3f} s, "
        f"{NUM_TRIES} times in a row",
        next_step="end what else runs on this machine and measure again",
    )


def prefill_rate(
    engine: Generator, case: Case, random: np.random.Generator, vocab_size: int
) -> float:
    """Prompt tokens per second up to the first new one."""
    took_s = engine.generate(_prompts(case, random, vocab_size), 1)
    return case.num_rows * case.num_prompt / took_s


def _theirs(pairs: Sequence[Pair]) -> float:
    return statistics.median(pair.theirs for pair in pairs)


def _ratio(pairs: Sequence[Pair]) -> float:
    return statistics.median(pair.ours / pair.theirs for pair in pairs)


def _prompts(case: Case, random: np.random.Generator, vocab_size: int) -> list[list[int]]:
    """New ones every time: no engine has seen them."""
    drawn: list[list[int]] = random.integers(
        0, vocab_size, (case.num_rows, case.num_prompt)
    ).tolist()
    return drawn
