"""A model that drafts for another: its own rows over its own pages, cut between layers, taken back where wrong.

Made and driven by `engine.drafter`. Obeys: computes as many tokens as it is told to, and counts the layers that it ran in
vain or was spared. `advance` may run on a thread of its own; all else belongs to the engine's, while `advance` rests.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ganglion.engine.kv_space import blank
from ganglion.engine.language_forward import Forward, Strand
from ganglion.engine.language_host import LanguageHost
from ganglion.engine.language_pages import Growth
from ganglion.engine.language_work import LanguageRow, LanguageWork, Part
from ganglion.engine.sampler import Sampled, SamplerState
from ganglion.generation import GenerateRequest
from ganglion.memory.arena import Arena

MAX_CHUNK = (
    256  # tokens of one row in one forward: a prompt that the drafting model does not know yet
)


@dataclass(slots=True, kw_only=True)
class LayerWork:
    """Tokens times layers of drafting models. `num_stale`: run for drafts that turned out wrong; `num_saved`: not run
    any more, because the target said so first."""

    num_run: int = 0
    num_stale: int = 0
    num_saved: int = 0


@dataclass(slots=True, kw_only=True, eq=False)
class DraftLine:
    """One choice as the drafting model has it.

    `shadow.tokens`: [0, base) are the target's, the others drafted. [0, cursor) stand in the shadow's pages, [0,
    shadow.num_computed) of them for good. It drafts until there are `wanted` tokens.
    """

    shadow: LanguageRow
    base: int
    cursor: int
    wanted: int
    state: SamplerState | None = None  # of the next token; None: as the target has it

    @property
    def draft(self) -> tuple[int, ...]:
        """What it says comes next."""
        return tuple(self.shadow.tokens[self.base :])

    @property
    def is_done(self) -> bool:
        """Has it drafted all that it shall?"""
        return len(self.shadow.tokens) >= self.wanted


class DraftRun:
    """All that one model drafts for the rows of another."""

    def __init__(self, host: LanguageHost, arena: Arena) -> None:
        self.host, self._arena = host, arena
        self.lines: dict[LanguageRow, DraftLine] = {}  # by the target's row
        self.work = LayerWork()
        self._forward: Forward | None = None

    @property
    def is_done(self) -> bool:
        """Is nothing left to draft?"""
        return all(line.is_done for line in self.lines.values())

    # --- rows ----------------------------------------------------------------------------------------------------

    def open(self, row: LanguageRow) -> None:
        """A line for a row, with what is known of its tokens."""
        asked = row.work.request
        request = GenerateRequest(
            model=self.host.name, prompt=asked.prompt, sampling=asked.sampling, tenant=asked.tenant
        )
        work = LanguageWork(
            request_id=row.work.request_id, request=request, arrival=row.work.arrival
        )
        tables, keys = self.host.pages.open_tables()
        shadow = LanguageRow(
            work=work, choice=row.choice, tokens=list(row.tokens), tables=tables, keys=keys
        )
        num_hit = self.host.pages.match(shadow)
        length = len(row.tokens)
        self.lines[row] = DraftLine(shadow=shadow, base=length, cursor=num_hit, wanted=length)

    def sync(self, row: LanguageRow) -> None:
        """The target has more tokens: what was drafted and is not among them goes, and so does the work on it."""
        line = self.lines[row]
        drafted, tokens = line.shadow.tokens, row.tokens
        same = line.base
        while same < min(len(drafted), len(tokens)) and drafted[same] == tokens[same]:
            same += 1
        if same < len(tokens):  # else all that was drafted beyond may still hold
            if same < len(drafted):
                self._cancel(line, same)
            del drafted[same:]
            drafted += tokens[same:]
            line.cursor = min(line.cursor, same)
            line.state = None
        line.base = line.wanted = len(tokens)
        line.shadow.num_computed = min(line.cursor, len(tokens))
        self.host.pages.settle(line.shadow)
        if self._forward is not None:
            self._forward.forget_pages()  # equal pages became one

    def want(self, row: LanguageRow, num_tokens: int, state: SamplerState) -> None:
        """Draft up to so many tokens past the target's, drawn as it would. Raises OutOfPagesError; the line is then as it was.

        `state`: the target's, at its newest token; the line must be in step with the target, or ahead of it.
        """
        line, growth = self.lines[row], Growth()
        if line.cursor == len(line.shadow.tokens):  # it could not draw the next one
            return
        end = max(line.base + num_tokens - 1, line.base)  # nobody asks what follows the last one
        try:
            self.host.pages.grow(line.shadow, end, growth)
        finally:
            prepare(self._arena, growth)
        line.wanted = line.base + num_tokens
        if line.state is None:
            line.state = state.sketch()

    def drop(self, row: LanguageRow) -> None:
        """Nothing more is drafted for this row; its pages are back."""
        line = self.lines.pop(row, None)
        if line is not None:
            self._cancel(line, 0)
            self.host.pages.release(line.shadow)

    def forget_pages(self) -> None:
        """Pages moved: the lines' tables say where they are now."""
        if self._forward is not None:
            self._forward.forget_pages()

    def _cancel(self, line: DraftLine, same: int) -> None:
        """Tokens from `same` on were drafted in vain; what of the work on them is left to do is not done."""
        num_layers, drafted = self.host.model.spec.num_layers, len(line.shadow.tokens)
        self.work.num_stale += max(0, line.cursor - max(same, line.base)) * num_layers
        if line.wanted > drafted:
            self.work.num_saved += (line.wanted - drafted - 1) * num_layers
        forward = self._forward
        if forward is None or forward.lead is None:
            return
        part = next((part for part in forward.lead.parts if part.row is line.shadow), None)
        if part is None or part.end <= same:
            return
        self.work.num_stale += forward.next_layer * part.num_tokens
        self.work.num_saved += forward.num_layers_left * part.num_tokens
        forward.lead.drop(line.shadow)
        if not forward.lead.parts:
            self._forward = None

    # --- forwards ------------------------------------------------------------------------------------------------

    def advance(self, num_fitting: Callable[[int, int], int]) -> None:
        """Draft on until all is drafted, or `num_fitting(tokens, layers left)` of the layers ahead, asked before each slice, is 0."""
        while not self.is_done:
            if self._forward is None:
                self._forward = self._begin()
            forward = self._forward
            while not forward.is_done:
                num_layers = num_fitting(forward.num_tokens, forward.num_layers_left)
                if not num_layers:
                    return
                forward.run(num_layers)
                self.work.num_run += num_layers * forward.num_tokens
            self._forward = None
            self._finish(forward)

    def _begin(self) -> Forward:
        parts = []
        for line in self.lines.values():
            if not line.is_done:
                num_tokens = min(len(line.shadow.tokens) - line.cursor, MAX_CHUNK)
                parts.append(Part(row=line.shadow, start=line.cursor, num_tokens=num_tokens))
        model = self.host.model
        strand = Strand(model, parts, self._arena.device)
        return Forward(model, self._arena, strand, None, is_deterministic=False)

    def _finish(self, forward: Forward) -> None:
        """Cursors move; who is up to date draws a token as the target would."""
        assert forward.lead is not None
        by_shadow: Mapping[LanguageRow, DraftLine] = {
            line.shadow: line for line in self.lines.values()
        }
        drawing, lasts, at = [], [], 0
        for part in forward.lead.parts:
            at += part.num_tokens
            line = by_shadow[part.row]
            line.cursor = part.end
            if part.is_newest and not line.is_done:
                drawing.append(line)
                lasts.append(at - 1)
        if not drawing:
            return
        hidden = forward.lead.hidden
        if len(lasts) < len(hidden):
            hidden = hidden[torch.tensor(lasts, device=hidden.device)]
        states = [line.state for line in drawing if line.state is not None]
        drawn = self.host.sampler.sample(self.host.model.logits(hidden), states)
        for line, state, one in zip(drawing, states, drawn, strict=True):
            if isinstance(one, Sampled):
                line.shadow.tokens.append(one.token_id)
            if not isinstance(one, Sampled) or state.is_done:
                line.wanted = len(line.shadow.tokens)


def prepare(arena: Arena, growth: Growth) -> None:
    """Copies first: a page that was given up meanwhile may be fresh again."""
    arena.copy(growth.copies)
    for layout_name, pages in growth.fresh.items():
        blank(arena, layout_name, pages)
