"""Contiguous memory: every session owns worst-case buffers, one a modality, made when it opens. Called by `bench.memory`.

What a policy server without pages allocates: a ring of features for the longest history, the instruction's KV, the
observation's KV twice (chunks under way read one while the next observation is written to the other), and a latent for
each chunk under way. Rows of tokens, no page rounding. Runs the same stages on the same observations.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ganglion.models.base import Model, StageBatch
from ganglion.spec import Stage
from ganglion.types import Float32Array, Observation, Row, SpanKind


@dataclass(slots=True)
class _Chunk:
    """One chunk under way: its latent's place and its flow steps."""

    place: int
    seq: int
    cursor: int = 0


@dataclass(slots=True)
class _Buffers:
    """One session's. `ring`: stage -> [observation, ...]; `double`: stage -> two contexts; `latents`: [chunk, ...]."""

    ring: dict[str, Tensor]
    single: dict[str, Tensor]
    double: dict[str, Tensor]
    latents: Tensor
    newest: int = 0  # of `double`
    num_seen: int = 0
    observation: Observation | None = None
    prompt: str | None = None
    chunks: list[_Chunk] = field(default_factory=list)


class ContiguousSession:
    """One session in buffers of its own; `num_bytes` is all that it has, from its first observation to its last."""

    def __init__(self, model: Model, *, max_history: int, max_chunks: int) -> None:
        self._model = model
        self._shape_of = {layout.name: layout for layout in model.layouts}
        *perceives, self._last = model.stages
        encodes = [stage for stage in perceives if stage.kind is SpanKind.ENCODE]
        texts = [stage for stage in perceives if stage.kind is SpanKind.PREFILL and stage.is_shared]
        seen = [stage for stage in perceives if stage not in (*encodes, *texts)]
        self._buffers = _Buffers(
            ring={stage.name: self._empty(stage, max_history + 1) for stage in encodes},
            single={stage.name: self._empty(stage, 1) for stage in texts},
            double={stage.name: self._empty(stage, 2) for stage in seen},
            latents=self._empty(self._last, max_chunks),
        )
        self._perceives = perceives

    @property
    def num_bytes(self) -> int:
        """Of all buffers."""
        own = self._buffers
        tensors = [*own.ring.values(), *own.single.values(), *own.double.values(), own.latents]
        return sum(tensor.numel() * tensor.itemsize for tensor in tensors)

    @property
    def spare_bytes(self) -> int:
        """Of which the second context, which a server without overlapping chunks does not need."""
        return sum(tensor[0].numel() * tensor.itemsize for tensor in self._buffers.double.values())

    def step(self, observation: Observation | None) -> dict[int, Float32Array]:
        """One flow step of every chunk under way; a new observation starts one more, the others see it from then on.

        Returns the finished chunks by their observation's number.
        """
        own = self._buffers
        finished = self._advance(own.chunks)
        if observation is not None:
            self._perceive(observation)
            finished |= self._advance(own.chunks[-1:])
        own.chunks = [chunk for chunk in own.chunks if chunk.seq not in finished]
        return finished

    def _perceive(self, observation: Observation) -> None:
        own = self._buffers
        own.num_seen += 1
        own.newest = 1 - own.newest
        for stage in self._perceives:
            if stage.name in own.single and own.prompt == observation.prompt:
                continue  # the instruction's KV is there
            row = Row(observation=observation, first_unit=0)
            self._write(stage, self._run(stage, row, stage.num_units))
        own.observation, own.prompt = observation, observation.prompt
        taken = {chunk.place for chunk in own.chunks}
        place = next(at for at in range(len(own.latents)) if at not in taken)
        own.chunks.append(_Chunk(place=place, seq=observation.seq))

    def _advance(self, chunks: Sequence[_Chunk]) -> dict[int, Float32Array]:
        own = self._buffers
        finished: dict[int, Float32Array] = {}
        for chunk in chunks:
            assert own.observation is not None, "nothing was perceived yet"
            row = Row(
                observation=own.observation, first_unit=chunk.cursor, is_new=chunk.cursor == 0
            )
            pages = self._run(self._last, row, 1, chunk.place)
            own.latents[chunk.place] = self._rows(self._last, pages)
            chunk.cursor += 1
            if chunk.cursor == self._last.num_units:
                latent = self._pages(self._last, own.latents[chunk.place])
                finished[chunk.seq] = self._model.emit(latent[None], (own.observation,))[0]
        return finished

    # --- buffers -----------------------------------------------------------------------------------------------

    def _run(self, stage: Stage, row: Row, num_units: int, place: int = 0) -> Tensor:
        """The stage's pages [page, *shape] for one row."""
        reads = {name: self._read(name)[None] for name in stage.reads}
        if stage.is_divisible:
            reads[stage.name] = self._pages(stage, self._buffers.latents[place])[None]
        batch = StageBatch(rows=(row,), reads=reads, num_units=num_units)
        with torch.inference_mode():
            return self._model.run(stage, batch)[0]

    def _read(self, name: str) -> Tensor:
        own = self._buffers
        stage = next(stage for stage in self._perceives if stage.name == name)
        return self._pages(stage, self._buffer(name)[self._place(own, name)])

    def _write(self, stage: Stage, pages: Tensor) -> None:
        own = self._buffers
        self._buffer(stage.name)[self._place(own, stage.name)] = self._rows(stage, pages)

    def _buffer(self, name: str) -> Tensor:
        own = self._buffers
        found: Mapping[str, Tensor] = own.ring | own.single | own.double
        return found[name]

    def _place(self, own: _Buffers, name: str) -> int:
        if name in own.ring:
            return own.num_seen % len(own.ring[name])
        return own.newest if name in own.double else 0

    def _empty(self, stage: Stage, num_copies: int) -> Tensor:
        layout = self._shape_of[stage.layout]
        dtype: torch.dtype = getattr(torch, layout.dtype)
        per_slot = layout.shape[0] // layout.slots
        shape = (num_copies, stage.num_slots * per_slot, *layout.shape[1:])
        return torch.zeros(shape, dtype=dtype)

    def _rows(self, stage: Stage, pages: Tensor) -> Tensor:
        """Pages end to end, without the slots behind the last one in use."""
        layout = self._shape_of[stage.layout]
        return pages.flatten(0, 1)[: stage.num_slots * (layout.shape[0] // layout.slots)]

    def _pages(self, stage: Stage, rows: Tensor) -> Tensor:
        """The other way: what the model's stages take."""
        layout = self._shape_of[stage.layout]
        pages = rows.new_zeros((stage.num_pages * layout.shape[0], *layout.shape[1:]))
        pages[: len(rows)] = rows
        return pages.view(stage.num_pages, *layout.shape)
