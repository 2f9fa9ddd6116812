"""Server: a policy, language models or both behind the edge, in this process: config -> models -> service -> app.

Called by serve and demo.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ganglion.cli.policy import load_model, weights_of
from ganglion.clock import Clock, RealClock
from ganglion.config import Config
from ganglion.errors import ConfigError
from ganglion.metrics import Metrics
from ganglion.pipeline.ladder import read_ladder
from ganglion.pipeline.local import LocalService
from ganglion.pipeline.served import ServedLanguage
from ganglion.serve.app import ServerThread


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A server that answers."""

    service: LocalService
    edge: ServerThread
    clock: Clock


def make_service(
    config: Config, *, clock: Clock, metrics: Metrics, on_stage: Callable[[str], None]
) -> LocalService:
    """Load what `config` names; not started yet."""
    model = None
    if config.policy.path:
        on_stage(f"loading {config.policy.path} in {config.engine.dtype}")
        model = load_model(config.policy, dtype=config.engine.dtype)
    languages: Sequence[ServedLanguage] = ()
    if config.chat.models:
        from ganglion.cli.chat import load_languages  # needs the extra `chat`

        languages = load_languages(
            config.chat,
            dtype=config.engine.dtype,
            max_page_bytes=config.memory.large_page_bytes,
            on_stage=on_stage,
        )
    path = config.pipeline.ladder
    if path and model is None:
        raise ConfigError(
            f"pipeline.ladder {path!r} without a policy", next_step="remove it, or serve a policy"
        )
    return LocalService(
        model,
        engine=config.engine,
        memory=config.memory,
        pipeline=config.pipeline,
        chat=config.chat,
        languages=languages,
        policy_bytes=weights_of(config.policy, dtype=config.engine.dtype),
        ladder=read_ladder(Path(path), model.spec) if path and model is not None else None,
        clock=clock,
        metrics=metrics,
    )


@contextmanager
def serving(config: Config, *, on_stage: Callable[[str], None]) -> Iterator[Served]:
    """Load, bind, calibrate, serve; everything is closed at the end. `on_stage` hears of each stage as it starts."""
    torch.set_num_threads(1)  # lanes set their own; nothing else here may compute on many threads
    clock, metrics = RealClock(), Metrics()
    service = make_service(config, clock=clock, metrics=metrics, on_stage=on_stage)
    with ServerThread(
        service,
        config=config.serve,
        clock=clock,
        metrics=metrics,
        language=service.language,
        is_language_only=not service.has_policy,
    ) as edge:
        on_stage("calibrating: measuring what each batch size costs here")
        service.start()
        gc.collect()
        gc.freeze()  # else all that was imported is walked through now and then, while robots wait
        try:
            yield Served(service=service, edge=edge, clock=clock)
        finally:
            gc.unfreeze()
            service.close()
