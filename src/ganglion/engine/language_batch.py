"""Batches: who comes in, which tokens the next forward computes, and who gives way when pages run out.

Called by `engine.language` between two forwards. Asks the policy, reserves pages, prepares their bytes; runs no layer.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from ganglion.engine.drafter import Drafter
from ganglion.engine.language_draft import prepare
from ganglion.engine.language_forward import Forward, Stage, Strand
from ganglion.engine.language_host import LAYERS, LanguageHost
from ganglion.engine.language_images import Encoding
from ganglion.engine.language_pages import Growth, image_content
from ganglion.engine.language_policy import Policy, batch_room, stage_layers
from ganglion.engine.language_work import LanguageRow, LanguageWork, Part
from ganglion.errors import GanglionError, OutOfPagesError
from ganglion.memory.arena import Arena

logger = logging.getLogger(__name__)

ADAPTER_BYTES_PER_US = 500  # that are read in within a budget: half of what a slow disk gives


class LanguageBatches:
    """Earlier requests never wait for later ones: whoever came last gives its pages away, and computes them again."""

    def __init__(
        self,
        hosts: Mapping[str, LanguageHost],
        arena: Arena,
        policy: Policy,
        drafter: Drafter,
        *,
        max_rows: int,
        max_batch_tokens: int,
        is_deterministic: bool,
    ) -> None:
        self._hosts, self._arena = hosts, arena
        self._policy, self._drafter = policy, drafter
        self._max_rows, self._max_batch_tokens = max_rows, max_batch_tokens
        self._is_deterministic = is_deterministic
        self.num_preemptions = 0
        self.starved: list[tuple[LanguageWork, GanglionError]] = []  # can never run: to be ended

    def begin(self, host: LanguageHost, budget_us: int) -> Forward | None:
        """The next batch; None when nobody can run now."""
        self._admit(host)
        self._read_adapters(host, budget_us)
        growth = Growth()
        if host.suspects:
            parts = self._parts(host, host.suspects[:1], [host.suspects[0].num_left], {}, growth)
            return self._forward(host, parts, growth)
        staged = set(host.staged)
        rows = [row for row in host.admitted if row not in staged and host.is_ready(row)]
        num_left = [row.num_left for row in rows]
        room = batch_room(
            lambda num_tokens: host.estimate_us(LAYERS, num_tokens),
            num_decoding=sum(left == 1 for left in num_left),
            slice_us=budget_us,
            most=self._max_batch_tokens,
        )
        order = self._policy(
            num_left,
            room.num_tokens,
            is_stage_busy=host.stage is not None,
            max_layer_tokens=room.num_layer_tokens,
        )
        parts = self._parts(host, rows, order.num_tokens, self._drafter.take(host), growth)
        chosen = {rows[at] for at in order.staged}
        forward_parts = [part for part in parts if part.row not in chosen]
        staged_parts = [part for part in parts if part.row in chosen]
        if staged_parts:
            prepare(self._arena, growth)
            host.stage = Stage(
                strand=self._strand(host, staged_parts),
                groups=stage_layers(host.model.spec.num_layers, order.num_stages),
            )
        return self._forward(host, forward_parts, growth, stage=host.stage)

    def begin_encoding(self, host: LanguageHost) -> Encoding | None:
        """The picture to be encoded in this step, of the request that came first; None: a batch is next.

        Where both wait they take turns, so that an answer under way does not stand still for another one's pictures.
        """
        images = host.images
        if images is None:
            return None
        self._admit(host)
        waiting = [row for row in host.admitted if not images.is_ready(row)]
        is_turn = not images.is_turn_taken or len(waiting) == len(host.admitted)
        images.is_turn_taken = bool(waiting) and is_turn
        if not images.is_turn_taken:
            return None
        for row in waiting:
            if images.encoding is None and row.is_admitted:
                self._with_room(row.work, partial(images.begin, row))
        return images.encoding

    def preempt_latest(self) -> bool:
        """Drafts give their pages back, else the request that came last; False: nobody holds any."""
        if self._drafter.give_pages():
            return True
        works = self._holders()
        if works:
            self._preempt(max(works, key=lambda work: work.arrival))
        return bool(works)

    def _forward(
        self,
        host: LanguageHost,
        parts: Sequence[Part],
        growth: Growth,
        stage: Stage | None = None,
    ) -> Forward | None:
        prepare(self._arena, growth)
        if not parts and stage is None:
            return None
        return Forward(
            host.model,
            self._arena,
            self._strand(host, parts) if parts else None,
            stage,
            adapters=host.adapters,
            is_deterministic=self._is_deterministic,
        )

    def _strand(self, host: LanguageHost, parts: Sequence[Part]) -> Strand:
        strand = Strand(host.model, parts, self._arena.device)
        if host.images is not None:
            host.images.fill(strand)
        return strand

    def _admit(self, host: LanguageHost) -> None:
        """Let waiting rows come in, the oldest first, while there is room for them."""
        admitted = host.admitted
        num_running = sum(self._num_choices(row) for row in admitted)
        for row in host.rows:
            if row.is_admitted:
                continue
            num_more = self._num_choices(row)
            is_alone = not self._holders()
            if not is_alone:
                if num_running + num_more > self._max_rows:
                    return
                needs = (len(row.tokens), len(admitted))
                if not host.pages.has_room(*needs) and not (
                    self._drafter.give_pages() and host.pages.has_room(*needs)
                ):
                    return
                if not host.adapters.has_room(
                    row.work.request.adapter, num_other_larges=host.pages.num_larges(needs[0])
                ):
                    return
            if any(_makes_prefix_of(row, other, host.pages.unit) for other in admitted):
                continue
            if not self._take_adapter(host, row):
                return
            row.is_admitted = True
            admitted.append(row)
            num_running += num_more
            work = row.work
            needs_all = work.request.needs_all_tokens and not work.is_forked
            num_hit = 0 if needs_all else host.pages.match(row)
            if work.num_cached is None:
                work.num_cached = num_hit
            if host.images is not None:
                host.images.open(row)

    def _take_adapter(self, host: LanguageHost, row: LanguageRow) -> bool:
        """False: there is no room for the row's adapter now."""
        try:
            host.adapters.take(row.work)
        except OutOfPagesError as error:
            if not self._holders():
                self.starved.append((row.work, error))
            return False
        return True

    def _read_adapters(self, host: LanguageHost, budget_us: int) -> None:
        errors = host.adapters.fill(ADAPTER_BYTES_PER_US * budget_us)
        for work in {row.work for row in host.admitted if row.work.request.adapter in errors}:
            self.starved.append((work, errors[work.request.adapter]))
            self._release(work)

    @staticmethod
    def _num_choices(row: LanguageRow) -> int:
        return 1 if row.work.is_forked else row.work.request.num_choices

    def _parts(
        self,
        host: LanguageHost,
        rows: Sequence[LanguageRow],
        num_tokens: Sequence[int],
        drafts: Mapping[LanguageRow, tuple[int, ...]],
        growth: Growth,
    ) -> list[Part]:
        """Give every row the pages that it writes. Where there are none, drafts go, then whoever came last gives way."""
        parts: list[Part] = []
        for row, count in zip(rows, num_tokens, strict=True):
            if not count or not row.is_admitted:
                continue
            draft = drafts.get(row, ()) if row.num_left == 1 else ()
            if draft and not self._has_grown(host, row, count + len(draft), growth):
                draft = ()
            if draft or self._grow(host, row, count, growth):
                start = row.num_computed
                size = count + len(draft)
                parts.append(Part(row=row, start=start, num_tokens=size, draft=draft))
        return [part for part in parts if part.row.is_admitted]

    @staticmethod
    def _has_grown(host: LanguageHost, row: LanguageRow, count: int, growth: Growth) -> bool:
        """With free pages only."""
        try:
            host.pages.grow(row, row.num_computed + count, growth)
        except OutOfPagesError:
            return False
        return True

    def _grow(self, host: LanguageHost, row: LanguageRow, count: int, growth: Growth) -> bool:
        end = row.num_computed + count
        return self._with_room(row.work, lambda: host.pages.grow(row, end, growth))

    def _with_room(self, work: LanguageWork, reserve: Callable[[], object]) -> bool:
        """Reserve pages for a request; False: it came last itself, and gave its own back."""
        while True:
            try:
                reserve()
                return True
            except OutOfPagesError as error:
                if self._drafter.give_pages():
                    continue
                holders = self._holders()
                last = max(holders, key=lambda other: other.arrival)
                if holders == {work}:  # nobody else can give any
                    self.starved.append((work, error))
                    self._release(work)
                    return False
                self._preempt(last)
                if last is work:
                    return False

    def _holders(self) -> set[LanguageWork]:
        """Requests that may hold pages, of all models."""
        return {row.work for host in self._hosts.values() for row in host.admitted}

    def _preempt(self, work: LanguageWork) -> None:
        """Its pages go; its rows wait again, with all that they know."""
        self.num_preemptions += 1
        work.num_preemptions += 1
        logger.info("request %s gives its pages back and waits", work.request_id)
        self._release(work)

    def _release(self, work: LanguageWork) -> None:
        for row in work.rows:
            self._drafter.release(row)
            self._hosts[work.request.model].release(row)


def _makes_prefix_of(row: LanguageRow, other: LanguageRow, unit: int) -> bool:
    """Is `other` computing a page that `row` would match once it is there?"""
    asked, asks = other.work.request, row.work.request
    if (asked.tenant, asked.adapter) != (asks.tenant, asks.adapter) or other.num_left <= 1:
        return False
    end = (other.num_computed // unit + 1) * unit
    if not len(row.tokens) > end <= len(other.tokens) or row.tokens[:end] != other.tokens[:end]:
        return False
    return image_content(asked.images, 0, end) == image_content(asks.images, 0, end)
