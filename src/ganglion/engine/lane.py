"""Lanes: threads pinned to cores, each with as many torch threads as cores. Called by the executor.

Lane 0 is the engine loop's own thread, so a server with one lane hands no work over. Beside them a crew: one thread that
computes on many cores, for forwards that no lane could do alone. Knows nothing of plans.
"""

import os
import queue
import threading
from collections.abc import Callable, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor

import torch

Task = Callable[[], None]


def pin_this_thread(cores: Set[int], *, allowed: Set[int]) -> None:
    """Bind the calling thread to `cores` (to none: to all that are `allowed`) and give torch one thread a core."""
    if allowed:
        os.sched_setaffinity(0, cores or allowed)
    torch.set_num_threads(max(1, len(cores)))


class Lanes:
    """A fixed set of lanes; `run` blocks until every task of a wave is done.

    Cores that the thread which makes it may not run on are left out; a lane without a core runs on any.
    """

    def __init__(self, cores: Sequence[Sequence[int]]) -> None:
        assert cores, "an engine needs at least one lane"
        # asked here: once lane 0 is pinned, the threads that it starts inherit its one core
        self._allowed: Set[int] = (
            os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else frozenset()
        )
        self._cores = [
            self._allowed.intersection(group) if self._allowed else frozenset(group)
            for group in cores
        ]
        self._queues: list[queue.SimpleQueue[tuple[Task, Future[None]] | None]] = [
            queue.SimpleQueue() for _ in self._cores[1:]
        ]
        self._threads = [
            threading.Thread(target=self._serve, args=(at,), name=f"lane-{at + 1}", daemon=True)
            for at in range(len(self._queues))
        ]

    def __len__(self) -> int:
        return len(self._cores)

    def open(self) -> None:
        """Pin the calling thread as lane 0 and start the others."""
        pin_this_thread(self._cores[0], allowed=self._allowed)
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Stop the other lanes; waits for the tasks that they run."""
        for box, thread in zip(self._queues, self._threads, strict=True):
            box.put(None)
            if thread.is_alive():
                thread.join()

    def run(self, tasks: Sequence[tuple[int, Task]]) -> None:
        """Run (lane, task) pairs, those of one lane in order; returns when all are done.

        A task must not raise: it keeps its own errors.
        """
        pending: list[Future[None]] = []
        for lane, task in tasks:
            if lane:
                future: Future[None] = Future()
                self._queues[lane - 1].put((task, future))
                pending.append(future)
        for lane, task in tasks:
            if not lane:
                task()
        for future in pending:
            future.result()

    def _serve(self, at: int) -> None:
        pin_this_thread(self._cores[at + 1], allowed=self._allowed)
        with torch.inference_mode():
            while (item := self._queues[at].get()) is not None:
                task, future = item
                task()
                future.set_result(None)


class Crew:
    """A thread that computes with `num_threads` of torch's, on any core; whoever asks waits for it, so lanes lie still.

    Made before lane 0 is pinned, since threads inherit their cores.
    """

    def __init__(self, num_threads: int) -> None:
        assert num_threads >= 1, num_threads
        self._num_threads = num_threads
        self._allowed: Set[int] = (
            os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else frozenset()
        )
        self._thread = ThreadPoolExecutor(1, "crew", initializer=self._open)

    def run(self, task: Task) -> None:
        """Run a task to its end; raises what it raised."""
        self._thread.submit(task).result()

    def close(self) -> None:
        """Stop the thread."""
        self._thread.shutdown()

    def _open(self) -> None:
        pin_this_thread(frozenset(), allowed=self._allowed)
        torch.set_num_threads(self._num_threads)
