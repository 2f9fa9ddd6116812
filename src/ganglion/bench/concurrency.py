"""Bench concurrency: sequences under way at equal bytes, in pages against contiguous buffers of the longest length.

Called by `ganglion bench concurrency`. Lengths are drawn with a mean of 0.3 of the longest; both ways serve the same queue,
which never runs dry while it is counted. A server with buffers must reserve the longest length for each sequence.
"""

import statistics
from dataclasses import dataclass

import numpy as np
import torch

from ganglion.bench.generators import Pages
from ganglion.bench.result import BenchResult, Plot
from ganglion.bench.shapes import TOY_DENSE
from ganglion.engine.language_requests import Ended
from ganglion.models.decoder_load import random_language
from ganglion.units import MIB

MAX_TOKENS, MEAN_SHARE = 1024, 0.3
PROMPT_SHARE = 0.7  # of a sequence, the rest is generated
NUM_BUFFERS, NUM_REQUESTS = 16, 200
# little arithmetic, but pages as of a real model: 4 KiB of keys and values a token
CONFIG = {**TOY_DENSE, "num_hidden_layers": 8, "num_key_value_heads": 4, "head_dim": 32}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """Rows under way after each step while others waited, and what was computed twice."""

    num_running: tuple[int, ...]
    num_preemptions: int
    num_steps: int


def run(*, quick: bool, seed: int) -> BenchResult:
    """One queue through pages worth `NUM_BUFFERS` buffers; quick: a shorter queue and shorter sequences."""
    torch.set_num_threads(1)  # sequences are counted, not timed
    max_tokens = 256 if quick else MAX_TOKENS
    num_buffers, num_requests = (8, 60) if quick else (NUM_BUFFERS, NUM_REQUESTS)
    config = {**CONFIG, "max_position_embeddings": max_tokens}
    lengths = draw_lengths(num_requests, max_tokens, seed)
    model = random_language(config, dtype=torch.bfloat16, name="bench", seed=seed)
    token_bytes = sum(group.layout.page_bytes // group.layout.slots for group in model.groups)
    # whole large pages: those that remain of the buffers' bytes belong to neither
    arena_bytes = num_buffers * max_tokens * token_bytes // MIB * MIB
    buffers = arena_bytes // (max_tokens * token_bytes)
    pages = Pages(model, arena_bytes=arena_bytes, max_rows=num_requests)
    served = _serve(pages, lengths, seed)
    pages.engine.close()
    mean_running = statistics.fmean(served.num_running)
    return BenchResult(
        name="concurrency",
        metrics={
            "admitted_ratio": mean_running / buffers,
            "mean_sequences": mean_running,
            "most_sequences": float(max(served.num_running)),
            "buffers": float(buffers),
            "mean_length_share": float(lengths.mean() / max_tokens),
            "bound_ratio": max_tokens / mean_held(lengths),
            "preemptions_per_request": served.num_preemptions / num_requests,
        },
        detail={
            "arena_bytes": arena_bytes,
            "token_bytes": token_bytes,
            "max_tokens": max_tokens,
            "num_requests": num_requests,
            "num_steps": served.num_steps,
        },
        n=len(served.num_running),
        seed=seed,
        plots=(
            Plot(
                title="Sequences under way at equal bytes",
                x_label="step",
                y_label="sequences",
                x=tuple(float(at) for at in range(0, len(served.num_running), 4)),
                series={
                    "pages": tuple(float(count) for count in served.num_running[::4]),
                    "buffers": tuple(float(buffers) for _ in served.num_running[::4]),
                },
            ),
        ),
    )


def draw_lengths(
    num_requests: int, max_tokens: int, seed: int
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Whole lengths, of 16 tokens at least: skewed as conversations are, mean `MEAN_SHARE` of the longest."""
    shares = np.random.default_rng(seed).beta(
        1.2, 1.2 * (1 - MEAN_SHARE) / MEAN_SHARE, num_requests
    )
    lengths: np.ndarray[tuple[int], np.dtype[np.int64]] = np.clip(
        (shares * max_tokens).astype(np.int64), 16, max_tokens
    )
    return lengths


def mean_held(lengths: np.ndarray[tuple[int], np.dtype[np.int64]]) -> float:
    """Tokens that a sequence under way holds on average, when nothing is wasted: long ones are under way for longer."""
    prompts = np.maximum(1, (lengths * PROMPT_SHARE).astype(np.int64))
    num_steps = lengths - prompts
    return float((num_steps * (prompts + num_steps / 2)).sum() / num_steps.sum())


def _serve(pages: Pages, lengths: np.ndarray[tuple[int], np.dtype[np.int64]], seed: int) -> _Run:
    """The whole queue at once; counted from when the arena is full first to when the last one is let in."""
    random = np.random.default_rng(seed + 1)
    vocab_size = pages.model.spec.vocab_size
    for length in lengths:
        num_prompt = max(1, int(length * PROMPT_SHARE))
        prompt: list[int] = random.integers(0, vocab_size, num_prompt).tolist()
        pages.submit(prompt, int(length) - num_prompt)
    engine, running, num_steps, has_ended = pages.engine, [], 0, False
    while engine.has_work:
        events = pages.step()
        num_steps += 1
        has_ended = has_ended or any(isinstance(event, Ended) for event in events)
        if has_ended and engine.num_running < engine.num_under_way:
            running.append(engine.num_running)
    return _Run(
        num_running=tuple(running) or (0,),
        num_preemptions=engine.num_preemptions,
        num_steps=num_steps,
    )
