"""Server: a policy behind the edge, in this process: config -> model -> service -> app. Called by serve and demo."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ganglion.cli.policy import load_model
from ganglion.clock import Clock, RealClock
from ganglion.config import Config
from ganglion.metrics import Metrics
from ganglion.pipeline.ladder import read_ladder
from ganglion.pipeline.local import LocalService
from ganglion.serve.app import ServerThread


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A server that answers."""

    service: LocalService
    edge: ServerThread
    clock: Clock


@contextmanager
def serving(config: Config, *, on_stage: Callable[[str], None]) -> Iterator[Served]:
    """Load, bind, calibrate, serve; everything is closed at the end. `on_stage` hears of each stage as it starts."""
    torch.set_num_threads(1)  # lanes set their own; nothing else here may compute on many threads
    clock, metrics = RealClock(), Metrics()
    on_stage(f"loading {config.policy.path} in {config.engine.dtype}")
    model = load_model(config.policy, dtype=config.engine.dtype)
    path = config.pipeline.ladder
    service = LocalService(
        model,
        engine=config.engine,
        memory=config.memory,
        pipeline=config.pipeline,
        ladder=read_ladder(Path(path), model.spec) if path else None,
        clock=clock,
        metrics=metrics,
    )
    with ServerThread(service, config=config.serve, clock=clock, metrics=metrics) as edge:
        on_stage("calibrating: measuring what each batch size costs here")
        service.start()
        try:
            yield Served(service=service, edge=edge, clock=clock)
        finally:
            service.close()
