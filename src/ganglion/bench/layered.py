"""Bench layered: long prompts beside running decodes, cut by tokens (chunked) and by layers (layered), on a mixture of experts.

Called by `ganglion bench layered`. Both ways cut a prompt into as many batches. What differs is how often experts are
read: every chunk goes through all layers and asks nearly all their experts, a group of layers is asked once a prompt.
"""

import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ganglion.bench.foreign import ForeignLoad
from ganglion.bench.generators import Pages
from ganglion.bench.result import BenchResult, Plot
from ganglion.bench.shapes import MOE, TOY_MOE
from ganglion.clock import Clock, RealClock
from ganglion.engine.language_policy import POLICIES
from ganglion.engine.language_requests import Ended
from ganglion.generation import TokenDelta
from ganglion.layout import DTYPE_BYTES
from ganglion.models.decoder_load import random_language
from ganglion.models.moe import ExpertBackend, Moe, MoeSpec
from ganglion.types import RequestId
from ganglion.units import MIB

WAYS = ("chunked", "layered")
NUM_PROMPT_TOKENS, NUM_CHUNK_TOKENS = (
    2048,
    512,
)  # layered prefill takes 4 groups of layers for as many
NUM_DECODES, NUM_CONTEXT_TOKENS = 4, 128
NUM_ROUNDS, NUM_PROMPTS = 4, 4  # prompts of one way in a round
MAX_TOKENS = 4096


@dataclass(slots=True)
class Tally:
    """Bytes of experts that forwards read: each expert that a batch asks in a layer counts once."""

    touched_bytes: int = 0


class CountedExperts(nn.Module):
    """An ExpertBackend around another that counts what it reads."""

    def __init__(self, inner: ExpertBackend, spec: MoeSpec, tally: Tally, *, dtype: str) -> None:
        super().__init__()
        self._inner, self._tally = inner, tally
        self._expert_bytes = 3 * spec.width * spec.inner * DTYPE_BYTES[dtype]

    def experts(
        self,
        x: Float[Tensor, "token width"],
        indices: Int[Tensor, "token k"],
        weights: Float[Tensor, "token k"],
        layer: int,
    ) -> Float[Tensor, "token width"]:
        """As `ExpertBackend.experts`."""
        self._tally.touched_bytes += (
            int(indices.flatten().bincount().count_nonzero()) * self._expert_bytes
        )
        return self._inner.experts(x, indices, weights, layer)


@dataclass(slots=True, kw_only=True)
class Seen:
    """What one way did so far, over rounds."""

    gaps_s: list[float] = field(default_factory=list)  # between two tokens of a running decode
    first_s: list[float] = field(default_factory=list)  # from a prompt to its first token
    num_prompt_tokens: int = 0
    touched_bytes: int = 0

    @property
    def bytes_per_token(self) -> float:
        """Of experts, for each prompt token."""
        return self.touched_bytes / self.num_prompt_tokens


def run(*, quick: bool, seed: int) -> BenchResult:
    """Rounds in which each way takes a few prompts, in turns; quick: a toy and shorter prompts."""
    torch.set_num_threads(1 if quick else len(os.sched_getaffinity(0)))
    num_prompt, num_chunk = (1024, 512) if quick else (NUM_PROMPT_TOKENS, NUM_CHUNK_TOKENS)
    num_rounds, num_prompts = (1, 2) if quick else (NUM_ROUNDS, NUM_PROMPTS)
    tally, model = (
        Tally(),
        random_language(TOY_MOE if quick else MOE, dtype=torch.bfloat16, name="bench", seed=seed),
    )
    assert isinstance(model, nn.Module), "made from a config, not by an adapter"
    for part in [part for part in model.modules() if isinstance(part, Moe)]:
        part.experts = CountedExperts(part.experts, part.spec, tally, dtype=model.spec.dtype)
    clock, random = RealClock(), np.random.default_rng(seed)

    def prompts(num_rows: int, num_tokens: int) -> list[list[int]]:
        drawn: list[list[int]] = random.integers(
            0, model.spec.vocab_size, (num_rows, num_tokens)
        ).tolist()
        return drawn

    sides = {
        way: _Side(
            Pages(
                model,
                arena_bytes=(128 if quick else 1024) * MIB,
                max_rows=NUM_DECODES + 1,
                max_batch_tokens=num_chunk + NUM_DECODES,  # a chunk, and a token of each decode
                policy=POLICIES[way],
            ),
            clock,
            tally,
        )
        for way in WAYS
    }
    # without decodes: warms up, and shows the prompts' own share
    own = prompts(1, num_prompt)
    alone = {way: side.take(own) for way, side in sides.items()}
    for side in sides.values():
        side.begin_decodes(prompts(NUM_DECODES, NUM_CONTEXT_TOKENS))
    beside = {way: Seen() for way in WAYS}
    load = ForeignLoad(clock, (os.getpid(),))
    for _ in range(num_rounds):
        of_round = prompts(num_prompts, num_prompt)
        for way, side in sides.items():
            side.take(of_round, beside[way])
    foreign_cores = load.cores()
    for side in sides.values():
        side.close()
    return _result(
        alone,
        beside,
        seed=seed,
        detail={
            "num_prompt_tokens": num_prompt,
            "num_chunk_tokens": num_chunk,
            "num_decodes": NUM_DECODES,
            "num_rounds": num_rounds,
            "num_prompts_a_round": num_prompts,
            "num_threads": torch.get_num_threads(),
            "worst_foreign_cores": foreign_cores,
        },
    )


class _Side:
    """One way's engine; both share the model."""

    def __init__(self, pages: Pages, clock: Clock, tally: Tally) -> None:
        self._pages, self._clock, self._tally = pages, clock, tally
        self._decodes: dict[RequestId, float] = {}  # when each made its last token

    def begin_decodes(self, contexts: Sequence[Sequence[int]]) -> None:
        """They run until the end, while prompts come and between them."""
        room = min(MAX_TOKENS, self._pages.model.spec.max_tokens) - NUM_CONTEXT_TOKENS
        waiting = {self._pages.submit(context, room) for context in contexts}
        while waiting:
            for event in self._pages.step():
                if isinstance(event, TokenDelta):
                    waiting.discard(event.request_id)
                    self._decodes[event.request_id] = 0.0

    def take(self, prompts: Sequence[Sequence[int]], seen: Seen | None = None) -> Seen:
        """One prompt after the other; adds what was seen to `seen`."""
        seen = seen or Seen()
        before_bytes, now_s = self._tally.touched_bytes, self._clock.now_s()
        self._decodes = dict.fromkeys(self._decodes, now_s)
        for prompt in prompts:
            start_s, is_open = self._clock.now_s(), True
            request_id = self._pages.submit(prompt, 1)
            while is_open:
                events = self._pages.step()
                now_s = self._clock.now_s()
                for event in events:
                    if event.request_id == request_id:
                        is_open = not isinstance(event, Ended)
                    elif isinstance(event, TokenDelta):
                        seen.gaps_s.append(now_s - self._decodes[event.request_id])
                        self._decodes[event.request_id] = now_s
                    else:
                        raise AssertionError(f"a decode ended before the prompts did: {event}")
            seen.first_s.append(now_s - start_s)
            seen.num_prompt_tokens += len(prompt)
        seen.touched_bytes += self._tally.touched_bytes - before_bytes
        return seen

    def close(self) -> None:
        self._pages.engine.close()


def _result(
    alone: Mapping[str, Seen],
    beside: Mapping[str, Seen],
    *,
    seed: int,
    detail: Mapping[str, object],
) -> BenchResult:
    metrics: dict[str, float] = {
        "expert_bytes_ratio": _ratio({way: seen.bytes_per_token for way, seen in beside.items()}),
        "expert_bytes_ratio_alone": _ratio(
            {way: seen.bytes_per_token for way, seen in alone.items()}
        ),
    }
    p99_ms = {way: float(np.percentile(seen.gaps_s, 99)) * 1e3 for way, seen in beside.items()}
    first_ms = {way: statistics.median(seen.first_s) * 1e3 for way, seen in beside.items()}
    metrics |= {"tbt_p99_ratio": _ratio(p99_ms), "ttft_p50_ratio": _ratio(first_ms)}
    for way, seen in beside.items():
        metrics[f"expert_mib_per_prompt_token_{way}"] = seen.bytes_per_token / MIB
        metrics[f"tbt_p50_ms_{way}"] = float(np.percentile(seen.gaps_s, 50)) * 1e3
        metrics[f"tbt_p99_ms_{way}"] = p99_ms[way]
        metrics[f"ttft_p50_ms_{way}"] = first_ms[way]
    return BenchResult(
        name="layered",
        metrics=metrics,
        detail={
            **detail,
            "num_gaps": {way: len(seen.gaps_s) for way, seen in beside.items()},
            "note": "An expert that a batch asks counts as read once in each layer. `alone`: no decodes run beside "
            "the prompts; beside them both ways read the experts of the decodes in every batch.",
        },
        n=min(len(seen.gaps_s) for seen in beside.values()),
        seed=seed,
        plots=(
            Plot(
                title="Long prompts beside running decodes, layered against chunked",
                x_label="",
                y_label="layered / chunked",
                names=("expert bytes", "time between tokens, p99", "time to first token, p50"),
                series={
                    "ratio": tuple(
                        metrics[name]
                        for name in ("expert_bytes_ratio", "tbt_p99_ratio", "ttft_p50_ratio")
                    )
                },
            ),
        ),
    )


def _ratio(of: Mapping[str, float]) -> float:
    return of["layered"] / of["chunked"]
