"""Generators: engines that make tokens, each behind one method, so that they can be timed alike. Ours is here.

Called by the language benches; the others are in `baselines`. Knows no workload.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch

from ganglion.clock import RealClock
from ganglion.engine.language import LanguageEngine
from ganglion.engine.language_policy import Policy, chunked
from ganglion.engine.language_requests import Ended, Event
from ganglion.errors import GanglionError
from ganglion.generation import GenerateRequest, Sampling, TokenDelta
from ganglion.layout import PoolLayout
from ganglion.memory.arena import Arena
from ganglion.memory.ledger import Ledger
from ganglion.models.decoder_load import load_language
from ganglion.models.language import LanguageModel
from ganglion.plan.cost import MeasuredCost
from ganglion.types import RequestId
from ganglion.units import MIB

UNHURRIED_US = 10**9  # a step's budget when no robot waits


class Generator(Protocol):
    """One engine with one model loaded."""

    @property
    def name(self) -> str:
        """As in metrics."""
        ...

    def generate(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> float:
        """Greedily `num_tokens` more for each prompt, all at once, whatever they are; seconds that it took."""
        ...

    def close(self) -> None:
        """Give its memory back."""
        ...


class Pages:
    """Ledger, arena and engine around one model."""

    def __init__(
        self,
        model: LanguageModel,
        *,
        arena_bytes: int,
        max_rows: int,
        max_batch_tokens: int = 2048,
        policy: Policy = chunked,
    ) -> None:
        layouts = tuple(group.layout for group in model.groups)
        large_page_bytes = max(MIB, *(layout.page_bytes for layout in layouts))
        layout = PoolLayout(large_page_bytes=large_page_bytes, layouts=layouts)
        num_large_pages = arena_bytes // large_page_bytes
        if not num_large_pages:
            raise GanglionError(f"{arena_bytes} bytes are less than a large page")
        self.model = model
        self.ledger = Ledger(layout, num_large_pages)
        self.arena = Arena(layout, num_large_pages)
        self._cost = MeasuredCost()
        self.engine = LanguageEngine(
            {model.spec.name: model},
            self.ledger,
            self.arena,
            RealClock(),
            max_rows=max_rows,
            cost=self._cost,
            policy=policy,
            max_batch_tokens=max_batch_tokens,
        )
        self._ids = itertools.count(1)

    def submit(self, prompt: Sequence[int], num_tokens: int) -> RequestId:
        """Queue one prompt, greedy, for exactly `num_tokens`."""
        request_id = RequestId(next(self._ids))
        sampling = Sampling(temperature=0.0, max_tokens=num_tokens, is_eos_ignored=True)
        self.engine.submit(
            request_id,
            GenerateRequest(model=self.model.spec.name, prompt=tuple(prompt), sampling=sampling),
        )
        return request_id

    def estimate_us(self, stage: str, num_tokens: int) -> float:
        """What one layer, or the head, takes for so many tokens, by what has run so far."""
        name = self.model.spec.name
        return float(self._cost.estimate_us(name, stage, num_rows=num_tokens, num_units=1))

    def step(self) -> list[Event]:
        """One batch; its events. Raises the error that a request ended with."""
        self.engine.step(UNHURRIED_US)
        events = self.engine.drain()
        for event in events:
            if isinstance(event, Ended) and isinstance(event.outcome, GanglionError):
                raise event.outcome
        return events


class OurGenerator:
    """The language engine over pages of its own, in this process, with torch's present number of threads."""

    name = "ganglion"

    def __init__(self, folder: Path, *, max_rows: int, max_tokens: int) -> None:
        """Room for `max_rows` sequences of `max_tokens` each, and a little."""
        model = load_language(folder, dtype=torch.bfloat16, name="bench")
        row_bytes = sum(
            group.layout.num_pages(max_tokens) * _room_bytes(group.layout.page_bytes)
            for group in model.groups
        )
        self._pages = Pages(model, arena_bytes=max_rows * row_bytes + 64 * MIB, max_rows=max_rows)
        self._clock = RealClock()

    def generate(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> float:
        start_s = self._clock.now_s()
        counts = {self._pages.submit(prompt, num_tokens): 0 for prompt in prompts}
        while self._pages.engine.has_work:
            for event in self._pages.step():
                if isinstance(event, TokenDelta):
                    counts[event.request_id] += len(event.token_ids)
        took_s = self._clock.now_s() - start_s
        check_counts(self.name, counts, num_tokens)
        return took_s

    def close(self) -> None:
        self._pages.engine.close()
        del self._pages


def check_counts(name: str, counts: Mapping[RequestId, int], expected: int) -> None:
    """A figure of an engine that made other tokens than asked for is none."""
    wrong = {number for number in counts.values() if number != expected}
    if wrong:
        raise GanglionError(f"{name} made {sorted(wrong)} tokens a row, {expected} were asked for")


def _room_bytes(page_bytes: int) -> int:
    """Of a large page that a page takes, its share of the rest among it."""
    return page_bytes if page_bytes >= MIB else MIB // (MIB // page_bytes)
