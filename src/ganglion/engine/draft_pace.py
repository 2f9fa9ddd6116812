"""When a drafting model runs: in slices before the target's batch, or on a thread of its own beside it.

Called by `engine.drafter`. Knows a run's `advance`, time and threads; not what is drafted or why.
"""

import threading
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from ganglion.clock import Clock
from ganglion.engine.language_draft import DraftRun


class LayerTimer:
    """How many layers fit, by what those before took; the first slice runs at least one."""

    def __init__(self, clock: Clock, budget_us: float) -> None:
        self._clock, self._budget_us, self._start_s = clock, budget_us, clock.now_s()
        self._slice: tuple[float, int, int] | None = None  # began, tokens, layers
        self._layer_us: dict[int, float] = {}  # by tokens

    def num_fitting(self, num_tokens: int, num_layers_left: int) -> int:
        """Of a forward of so many tokens; 0: the budget is spent."""
        now_s = self._clock.now_s()
        if self._slice is not None:
            began_s, of_tokens, num_layers = self._slice
            self._layer_us[of_tokens] = (now_s - began_s) * 1e6 / num_layers
        left_us = self._budget_us - (now_s - self._start_s) * 1e6
        if left_us <= 0.0 and self._slice is not None:
            return 0
        layer_us = self._layer_us.get(num_tokens)
        num_layers = 1 if layer_us is None else int(left_us / max(layer_us, 1e-3))
        if not num_layers and self._slice is not None:
            return 0
        num_layers = max(1, min(num_layers, num_layers_left))
        self._slice = (now_s, num_tokens, num_layers)
        return num_layers


class Ahead:
    """The thread that drafts while the target is busy, made when it is first needed."""

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        self._pool: ThreadPoolExecutor | None = None
        self._is_stopped = threading.Event()
        self._under_way: tuple[DraftRun, Future[None]] | None = None

    def start(self, run: DraftRun) -> None:
        """Let it draft until `pause`."""
        assert self._under_way is None
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "draft", initializer=self._open)
        self._is_stopped.clear()
        self._under_way = (run, self._pool.submit(self._advance, run))

    def pause(self) -> tuple[DraftRun | None, BaseException | None]:
        """Wait for the layer that it is in. Whose run it was, and how it failed."""
        if self._under_way is None:
            return None, None
        run, future = self._under_way
        self._is_stopped.set()
        self._under_way = None
        return run, future.exception()

    def close(self) -> None:
        """Stop the thread."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def _open(self) -> None:
        torch.set_num_threads(self._num_threads)

    def _advance(self, run: DraftRun) -> None:
        with torch.inference_mode():
            run.advance(lambda num_tokens, num_left: 0 if self._is_stopped.is_set() else 1)
