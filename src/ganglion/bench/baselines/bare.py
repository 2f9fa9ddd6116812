"""The bare model: its stages called one after another on one batch; no engine, no pages, no sessions.

The upper bound of what batching can bring, and with one row the plain one-by-one server. Called by bench.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ganglion.models.base import Model, StageBatch
from ganglion.types import Float32Array, Observation, Row


class BareModel:
    """Runs whole requests; instructions are encoded once and kept, as the engine's shared pages are."""

    def __init__(self, model: Model) -> None:
        self._model, self.spec = model, model.spec
        self._known: dict[bytes, Tensor] = {}
        views = {name for stage in model.stages for name in stage.reads}
        self._cached_stages = {
            stage.name
            for stage in model.stages
            if stage.is_shared and stage.kind == "prefill" and stage.name in views
        }

    def infer(self, observations: Sequence[Observation]) -> Float32Array:
        """Actions [row, horizon, action_dim]."""
        rows = tuple(observations)
        outputs: dict[str, Tensor] = {}
        with torch.inference_mode():
            for stage in self._model.stages:
                if stage.name in self._cached_stages:
                    outputs[stage.name] = torch.stack(
                        [self._recall(stage.name, row) for row in rows]
                    )
                    continue
                reads = {name: outputs[name] for name in stage.reads}
                if stage.is_divisible:
                    layout = next(x for x in self._model.layouts if x.name == stage.layout)
                    reads[stage.name] = torch.zeros(len(rows), stage.num_pages, *layout.shape)
                batch = StageBatch(
                    rows=tuple(_first(observation) for observation in rows),
                    reads=reads,
                    num_units=stage.num_units,
                )
                outputs[stage.name] = self._model.run(stage, batch)
            return self._model.emit(outputs[self._model.stages[-1].name], rows)

    def _recall(self, name: str, observation: Observation) -> Tensor:
        stage = next(stage for stage in self._model.stages if stage.name == name)
        key = self._model.key(stage, observation)
        if key not in self._known:
            batch = StageBatch(rows=(_first(observation),), reads={}, num_units=stage.num_units)
            self._known[key] = self._model.run(stage, batch)[0]
        return self._known[key]


def _first(observation: Observation) -> Row:
    return Row(observation=observation, first_unit=0, is_new=True)
