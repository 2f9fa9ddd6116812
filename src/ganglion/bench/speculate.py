"""Bench speculate: tokens per second with drafts, made before the target's step or while it is in flight, against plain.

Called by `ganglion bench speculate`. Target and drafting model are real shapes with random weights, and every layer and
head is computed; only what they say is scripted by position, so that a drafted token holds with a given chance,
whatever rounding does. Beside it the shipped pair, which says what it was trained to.
"""

import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ganglion.bench.result import BenchResult, Plot
from ganglion.bench.shapes import DENSE, TOY_DENSE
from ganglion.clock import RealClock
from ganglion.engine.drafter import NGRAM, OFF, DraftCounts, Speculation
from ganglion.engine.language import LanguageEngine
from ganglion.engine.language_requests import Ended
from ganglion.errors import GanglionError
from ganglion.generation import GenerateRequest, LanguageSpec, Sampling, TokenDelta
from ganglion.layout import PoolLayout
from ganglion.memory.arena import Arena
from ganglion.memory.ledger import Ledger
from ganglion.models.decoder_load import load_language, random_language
from ganglion.models.language import KvGroup, KvSpace, LanguageModel, StateGroup
from ganglion.plan.cost import MeasuredCost
from ganglion.types import RequestId
from ganglion.units import MIB

ACCEPTANCES = (0.2, 0.4, 0.6, 0.8, 0.9)
NUM_PROMPT, NUM_NEW, NUM_ROUNDS = 64, 128, 3
ARENA_BYTES = 192 * MIB
SMALL = {"hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 768}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
TARGET, DRAFT = "target", "draft"
PLACES = 128  # a position is kept as two numbers below it, which bfloat16 holds exactly
CERTAIN = 1e4  # logit of what the script says
TEXT = "import os\n\n\ndef read(path: str) -> str:\n    with open(path) as file:\n        return file.read()\n\n\ndef "


class Scripted:
    """A model that computes all that it would, and says `script[position]` next."""

    def __init__(self, inner: LanguageModel, script: Tensor) -> None:
        self._inner, self._script = inner, script

    @property
    def spec(self) -> LanguageSpec:
        return self._inner.spec

    @property
    def groups(self) -> tuple[KvGroup | StateGroup, ...]:
        return self._inner.groups

    def embed(self, token_ids: Tensor) -> Tensor:
        return self._inner.embed(token_ids)

    def run(self, hidden: Tensor, positions: Tensor, kv: KvSpace, layers: range) -> Tensor:
        out = self._inner.run(hidden, positions, kv, layers)
        if layers.stop == self.spec.num_layers:
            out[:, 0], out[:, 1] = positions // PLACES, positions % PLACES
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        scores = self._inner.logits(hidden)
        positions = hidden[:, 0].long() * PLACES + hidden[:, 1].long()
        scores[torch.arange(len(scores)), self._script[positions]] = CERTAIN
        return scores


def scripts(
    vocab_size: int, num_tokens: int, acceptance: float, seed: int
) -> tuple[Tensor, Tensor]:
    """What the target says at each position, and a draft that says the same with the chance `acceptance`."""
    random = np.random.default_rng(seed)
    target = random.integers(0, vocab_size, num_tokens)
    is_wrong = random.random(num_tokens) >= acceptance
    other = (target + random.integers(1, vocab_size, num_tokens)) % vocab_size
    return torch.from_numpy(target), torch.from_numpy(np.where(is_wrong, other, target))


class Stand:
    """An engine with a target and whoever drafts for it, greedy."""

    def __init__(
        self, models: Sequence[LanguageModel], names: Sequence[str], how: Speculation
    ) -> None:
        layouts = tuple(group.layout for model in models for group in model.groups)
        large_page_bytes = max(MIB, *(layout.page_bytes for layout in layouts))
        layout = PoolLayout(large_page_bytes=large_page_bytes, layouts=layouts)
        num_large_pages = ARENA_BYTES // large_page_bytes
        self._clock, self._num_asked = RealClock(), 0
        self.engine = LanguageEngine(
            dict(zip(names, models, strict=True)),
            Ledger(layout, num_large_pages),
            Arena(layout, num_large_pages),
            self._clock,
            max_rows=8,
            cost=MeasuredCost(),
            speculation=how,
        )

    def rate(self, prompts: Sequence[Sequence[int]], num_new: int) -> float:
        """Tokens per second after the first of each, all rows together."""
        for prompt in prompts:
            self._num_asked += 1
            self.engine.submit(
                RequestId(self._num_asked),
                GenerateRequest(
                    model=TARGET,
                    prompt=tuple(prompt),
                    sampling=Sampling(temperature=0.0, max_tokens=num_new, is_eos_ignored=True),
                    tenant=str(self._num_asked),  # nothing is read from pages of earlier rounds
                ),
            )
        num_tokens, start_s = 0, self._clock.now_s()
        firsts: set[RequestId] = set()
        while self.engine.has_work:
            self.engine.step(10**9)
            for event in self.engine.drain():
                if isinstance(event, Ended) and isinstance(event.outcome, GanglionError):
                    raise event.outcome
                if isinstance(event, TokenDelta):
                    num_tokens += len(event.token_ids)
                    if len(firsts) < len(prompts):
                        firsts.add(event.request_id)
                        if len(firsts) == len(prompts):
                            start_s, num_tokens = self._clock.now_s(), 0
        return num_tokens / (self._clock.now_s() - start_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One pair under all ways of drafting: medians of rounds run in turn."""

    rates: dict[str, float]
    ratios: dict[str, float]  # to plain, within a round
    counts: dict[str, DraftCounts]


def measure(
    models: Sequence[LanguageModel],
    ways: dict[str, Speculation],
    prompts: Sequence[Sequence[int]],
    *,
    num_new: int,
    num_rounds: int,
) -> Case:
    """Each way in turn, `num_rounds` times, after a round that warms up and shows what drafts are worth."""
    stands = {}
    for name, how in ways.items():
        num_models = 1 if how.source in (OFF, NGRAM) else 2
        stands[name] = Stand(models[:num_models], (TARGET, DRAFT)[:num_models], how)
    rounds = [
        {name: stand.rate(prompts, num_new) for name, stand in stands.items()}
        for _ in range(num_rounds + 1)
    ]
    counts = {name: stand.engine.draft_counts for name, stand in stands.items()}
    for stand in stands.values():
        stand.engine.close()
    measured = rounds[1:]
    return Case(
        rates={name: statistics.median(each[name] for each in measured) for name in ways},
        ratios={
            name: statistics.median(each[name] / each["plain"] for each in measured)
            for name in ways
        },
        counts=counts,
    )


WAYS = {
    "plain": Speculation(),
    "sync": Speculation(source=DRAFT),
    "async": Speculation(source=DRAFT, is_ahead=True),
}
BY_NGRAM = {"plain": Speculation(), "ngram": Speculation(source=NGRAM)}


def run(*, quick: bool, seed: int) -> BenchResult:
    """Acceptances of 0.2 to 0.9, n-grams where they help and where not, and the shipped pair; quick: toys, two acceptances."""
    torch.set_num_threads(1 if quick else len(os.sched_getaffinity(0)))
    shape = TOY_DENSE if quick else DENSE
    small = {**shape, **({} if quick else SMALL)}
    target = random_language(shape, dtype=torch.bfloat16, name=TARGET, seed=seed)
    draft = random_language(small, dtype=torch.bfloat16, name=DRAFT, seed=seed + 1)
    num_new, num_rounds = (24, 1) if quick else (NUM_NEW, NUM_ROUNDS)
    vocab_size = target.spec.vocab_size
    prompt = np.random.default_rng(seed).integers(0, vocab_size, NUM_PROMPT).tolist()
    num_places = NUM_PROMPT + num_new
    acceptances = (0.2, 0.9) if quick else ACCEPTANCES
    cases: dict[float, Case] = {}
    for acceptance in acceptances:
        said, drafted = scripts(vocab_size, num_places, acceptance, seed)
        pair = (Scripted(target, said), Scripted(draft, drafted))
        cases[acceptance] = measure(pair, WAYS, [prompt], num_new=num_new, num_rounds=num_rounds)
    said, _ = scripts(vocab_size, num_places, 1.0, seed)
    period = torch.tensor(prompt[:16]).repeat(num_places // 16 + 1)[:num_places]
    new = measure(
        (Scripted(target, said),), BY_NGRAM, [prompt], num_new=num_new, num_rounds=num_rounds
    )
    copied = measure(
        (Scripted(target, period),), BY_NGRAM, [prompt], num_new=num_new, num_rounds=num_rounds
    )
    shipped = measure(
        [_shipped("tiny-moe", TARGET), _shipped("tiny-dense", DRAFT)],
        WAYS,
        [list(TEXT.encode())],
        num_new=num_new if quick else 4 * NUM_NEW,
        num_rounds=num_rounds,
    )
    ratios = [case.ratios[way] for case in cases.values() for way in ("sync", "async")]
    ratios += [new.ratios["ngram"], copied.ratios["ngram"]]
    layers = [case.counts["async"].layers for case in cases.values()]
    num_saved = sum(work.num_saved for work in layers)
    num_stale = sum(work.num_stale for work in layers)
    metrics = {
        "worst_ratio_to_plain": min(ratios),
        "best_speedup": max(ratios),
        "layer_work_saved_share": num_saved / max(1, num_saved + num_stale),
        "plain_tokens_per_s": statistics.median(case.rates["plain"] for case in cases.values()),
        "ngram_new_ratio": new.ratios["ngram"],
        "ngram_copied_ratio": copied.ratios["ngram"],
        "shipped_sync_ratio": shipped.ratios["sync"],
        "shipped_async_ratio": shipped.ratios["async"],
        "shipped_acceptance": _held(shipped.counts["sync"]),
    }
    for acceptance, case in cases.items():
        for way in ("sync", "async"):
            metrics[f"{way}_{acceptance * 100:.0f}_ratio"] = case.ratios[way]
    return BenchResult(
        name="speculate",
        metrics=metrics,
        detail={
            "acceptances": list(acceptances),
            "tokens_per_s": {str(key): case.rates for key, case in cases.items()},
            "held_share": {
                str(key): {way: _held(case.counts[way]) for way in ("sync", "async")}
                for key, case in cases.items()
            },
            "num_new_tokens": num_new,
            "num_threads": torch.get_num_threads(),
        },
        n=num_rounds * len(cases),
        seed=seed,
        plots=(
            Plot(
                title="Speculation",
                x_label="chance that a drafted token holds",
                y_label="tokens/s",
                x=tuple(acceptances),
                series={way: tuple(case.rates[way] for case in cases.values()) for way in WAYS},
            ),
        ),
    )


def _held(counts: DraftCounts) -> float:
    """Share of all drafted tokens that held, those after a wrong one among them."""
    return counts.num_held / max(1, counts.num_drafted)


def _shipped(name: str, called: str) -> LanguageModel:
    folder = Path(str(resources.files("ganglion"))) / "assets" / "language" / name
    return load_language(folder, dtype=torch.float32, name=called)
