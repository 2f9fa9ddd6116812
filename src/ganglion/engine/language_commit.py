"""Commit of a language batch: cursors move, and who is up to date draws its next tokens.

Called by `engine.language` when a forward is through. Owns how choices part, draw, end and are scored. Knows neither how
batches are made nor when they run.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ganglion.clock import Clock
from ganglion.engine.drafter import Drafter
from ganglion.engine.language_forward import Forward
from ganglion.engine.language_host import HEAD, LanguageHost
from ganglion.engine.language_requests import LanguageRequests
from ganglion.engine.language_work import LanguageRow, LanguageWork, Part
from ganglion.engine.sampler import Sampled, score_tokens
from ganglion.engine.verify import verify
from ganglion.errors import GanglionError
from ganglion.generation import Embedded, FinishReason, PromptScored

MAX_SCORED_TOKENS = 64  # whose scores of the whole vocabulary exist at once


class Commits:
    """What a batch has computed becomes tokens, scores and vectors of its requests."""

    def __init__(self, requests: LanguageRequests, drafter: Drafter, clock: Clock) -> None:
        self._requests, self._drafter, self._clock = requests, drafter, clock

    def commit(self, host: LanguageHost, forward: Forward) -> None:
        """Cursors move, full pages can be found, and who is up to date draws a token."""
        host.forward = None
        self._drafter.pause()
        strands = [] if forward.lead is None else [forward.lead]
        if forward.stage is not None:
            forward.stage.next_group += 1
            if forward.stage.is_done:
                strands.append(forward.stage.strand)
                host.stage = None
            elif not forward.stage.strand.parts:
                host.stage = None
        drawing: list[Part] = []
        hidden: list[Tensor] = []
        num_taken: dict[LanguageRow, int] = {}
        for strand in strands:
            at = 0
            for part in strand.parts:
                of_part = strand.hidden[at : at + part.num_tokens]
                at += part.num_tokens
                self._score_prompt(forward, part, of_part)
                part.row.num_computed = part.end
                host.settle(part.row)
                if part.row in host.suspects:
                    host.suspects.remove(part.row)
                pool = self._requests.pool(part.row.work)
                if pool is not None:
                    pool.add(part.start, of_part)
                elif part.is_newest:
                    drawing.append(part)
                    hidden.append(of_part[-1 - len(part.draft) :])
        if drawing:
            began_s = self._clock.now_s()
            lines = torch.cat(hidden)
            num_taken = self._draw(host, drawing, forward.logits(lines))
            run_us = (self._clock.now_s() - began_s) * 1e6
            host.observe(HEAD, len(lines), 1, run_us)
        parts = [part for strand in strands for part in strand.parts]
        self._drafter.commit(host, parts, num_taken)
        for part in parts:
            if part.is_newest:
                self._embed(part.row.work)

    def _embed(self, work: LanguageWork) -> None:
        """The prompt is computed: where its vector was asked for, that is all."""
        pool = self._requests.pool(work)
        if pool is not None:
            self._requests.say(Embedded(request_id=work.request_id, vector=pool.vector()))
            self._requests.end(work, work.usage)

    def _score_prompt(self, forward: Forward, part: Part, hidden: Tensor) -> None:
        """Keep what the model gives the prompt's tokens, where that was asked for."""
        work = part.row.work
        num_top = work.request.num_prompt_logprobs
        if num_top is None or work.is_forked:
            return
        if not part.start:
            work.prompt_scores = [None]
        prompt = work.request.prompt
        assert work.prompt_scores is not None, "the prompt was not computed from its start"
        for start in range(part.start, part.end, MAX_SCORED_TOKENS):
            targets = prompt[start + 1 : min(start + MAX_SCORED_TOKENS, part.end) + 1]
            first = start - part.start
            logits = forward.logits(hidden[first : first + len(targets)]) if targets else None
            if logits is not None:
                work.prompt_scores += score_tokens(logits, targets, [num_top] * len(targets))

    def _draw(
        self, host: LanguageHost, parts: Sequence[Part], logits: Tensor
    ) -> dict[LanguageRow, int]:
        """The next tokens of every choice; where the prompt was computed just now, the choices part.

        `logits` [line, vocab]: of each part, one line and one more for each token of its draft. Returns how many tokens
        were drawn for each row, with the one that ends a text.
        """
        choices: list[LanguageRow] = []
        firsts: list[int] = []
        drafts: list[tuple[int, ...]] = []
        line = 0
        for part in parts:
            row = part.row
            forked = [row] if row.work.is_forked else self._fork(host, row)
            choices += forked
            firsts += [line] * len(forked)
            drafts += [part.draft] * len(forked)
            line += 1 + len(part.draft)
        draws = [self._requests.draws(row) for row in choices]
        taken = verify(host.sampler, logits, firsts, draws, drafts)
        num_taken: dict[LanguageRow, int] = {}
        for row, drawn, state, draft in zip(choices, taken, draws, drafts, strict=True):
            if row.finish is None and self._requests.is_open(row.work):
                num_taken[row] = self._take(host, row, drawn, draft, is_complete=state.is_done)
        for work in {part.row.work for part in parts}:
            self._requests.end_if_done(work)
        return num_taken

    def _fork(self, host: LanguageHost, row: LanguageRow) -> list[LanguageRow]:
        """The prompt is computed: one row for each choice goes on from it."""
        work = row.work
        work.is_forked = True
        if work.prompt_scores is not None:
            self._requests.say(
                PromptScored(request_id=work.request_id, logprobs=tuple(work.prompt_scores))
            )
            work.prompt_scores = None
        at = host.rows.index(row)
        for choice in range(1, work.request.num_choices):
            tables, keys = host.pages.fork(row)
            other = LanguageRow(
                work=work,
                choice=choice,
                tokens=list(row.tokens),
                tables=tables,
                keys=keys,
                num_computed=row.num_computed,
                is_admitted=True,
            )
            work.rows.append(other)
            host.rows.insert(at + choice, other)
        return work.rows

    def _take(
        self,
        host: LanguageHost,
        row: LanguageRow,
        drawn: Sequence[Sampled | GanglionError],
        draft: Sequence[int],
        *,
        is_complete: bool,
    ) -> int:
        """Give a choice its tokens, up to its end; returns how many of them were used, an end of text included."""
        spec, sampling = host.model.spec, row.work.request.sampling
        kept: list[Sampled] = []
        finish, stop_token_id, num_used = None, None, 0
        for one in drawn:
            if isinstance(one, GanglionError):
                if kept:
                    self._requests.emit(row, kept, finish=None)
                self._requests.end(row.work, one)
                return num_used
            num_used += 1
            token_id = one.token_id
            is_eos = token_id in spec.eos_ids and not sampling.is_eos_ignored
            if is_eos or token_id in sampling.stop_token_ids:
                finish, stop_token_id = FinishReason.STOP, token_id
                break
            row.tokens.append(token_id)
            row.work.num_emitted += 1
            kept.append(one)
            if row.num_drawn >= sampling.max_tokens or len(row.tokens) >= spec.max_tokens:
                finish = FinishReason.LENGTH
                break
        if is_complete and stop_token_id is None and num_used == len(drawn):
            finish = FinishReason.STOP
        if draft:  # as if its tokens had been computed one by one
            row.num_computed += num_used - 1
            host.pages.settle(row)
            host.pages.trim(row)
        self._requests.emit(row, kept, finish=finish, stop_token_id=stop_token_id)
        return num_used
