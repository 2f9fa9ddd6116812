"""The language engine: requests for tokens, advanced one forward of a mixed batch at a time.

The synchronous core, sibling of `engine.step` for robots: same ledger, arena and thread. `pipeline` calls it between
robots' steps with the time that is left. Owns its requests and their rows; knows no text, sockets, robots or sessions.
"""

import logging
from collections import deque
from collections.abc import Mapping, Sequence

import torch

from ganglion.clock import Clock
from ganglion.engine.drafter import DraftCounts, Drafter, Speculation
from ganglion.engine.language_batch import LanguageBatches
from ganglion.engine.language_commit import Commits
from ganglion.engine.language_forward import Forward
from ganglion.engine.language_host import ENCODE, HEAD, LAYERS, LanguageHost, open_host
from ganglion.engine.language_policy import Policy, chunked
from ganglion.engine.language_record import (
    MAX_RECORDS,
    Progress,
    progress,
    step_record,
)
from ganglion.engine.language_requests import Event, LanguageRequests
from ganglion.engine.language_work import LanguageRow, LanguageWork, Part
from ganglion.engine.pooling import Pool
from ganglion.engine.sampler import (
    Matcher,
    SamplerState,
    check_sampling,
)
from ganglion.errors import (
    CancelledError,
    FieldError,
    GanglionError,
    InternalError,
)
from ganglion.generation import (
    FinishReason,
    GenerateRequest,
)
from ganglion.memory.arena import Arena
from ganglion.memory.ledger import Ledger
from ganglion.memory.orders import Moves
from ganglion.models.language import LanguageModel
from ganglion.models.lora_load import AdapterSet
from ganglion.plan.cost import CostModel
from ganglion.types import LanguageStepRecord, RequestId

logger = logging.getLogger(__name__)


class LanguageEngine:
    """Continuous batching over tokens: each step's batch brings cursors towards what is known.

    Invariants, per row: [0, num_computed) of `tokens` stand in its pages; a row that is not admitted holds no page.
    Earlier requests never wait for later ones: whoever came last gives its pages away, and computes them again.
    """

    def __init__(
        self,
        models: Mapping[str, LanguageModel],
        ledger: Ledger,
        arena: Arena,
        clock: Clock,
        *,
        max_rows: int,
        cost: CostModel,
        adapters: Mapping[str, AdapterSet] | None = None,
        policy: Policy = chunked,
        max_batch_tokens: int = 2048,
        is_deterministic: bool = False,
        speculation: Speculation | None = None,
    ) -> None:
        """`max_rows`: choices that are computed at a time, for each model.

        `adapters`: by model. `max_batch_tokens`: bounds the workspace. `is_deterministic`: every token is computed alone, so that its scores
        are the same, bit by bit, whatever it is batched with and however its prompt is cut; slow. `speculation`: who
        drafts where a request does not say; nobody by default.
        """
        self._ledger, self._arena, self._clock, self._cost = ledger, arena, clock, cost
        self._adapters = adapters or {}
        self._hosts: dict[str, LanguageHost] = {}
        for name, model in models.items():
            self.open_model(name, model)
        self._requests = LanguageRequests(self._hosts, lambda row: self._drafter.forget(row))
        self._drafter = Drafter(
            self._hosts, arena, clock, speculation or Speculation(), self._requests.draws
        )
        self._commits = Commits(self._requests, self._drafter, clock)
        self._batches = LanguageBatches(
            self._hosts,
            arena,
            policy,
            self._drafter,
            max_rows=max_rows,
            max_batch_tokens=max_batch_tokens,
            is_deterministic=is_deterministic,
        )
        self._num_arrivals = 0
        self._last_host = ""
        self._num_steps = 0
        self.records: deque[LanguageStepRecord] = deque(maxlen=MAX_RECORDS)
        ledger.attach(self)

    @property
    def has_work(self) -> bool:
        """Is a request waiting or in flight?"""
        return bool(self._requests.works)

    @property
    def num_under_way(self) -> int:
        """Requests waiting or in flight."""
        return len(self._requests.works)

    @property
    def num_preemptions(self) -> int:
        """Times that a request gave its pages back before its end."""
        return self._batches.num_preemptions

    @property
    def num_running(self) -> int:
        """Rows that hold pages."""
        return sum(len(host.admitted) for host in self._hosts.values())

    @property
    def draft_counts(self) -> DraftCounts:
        """What was drafted, and what of it held."""
        return self._drafter.counts

    def progress(self) -> dict[RequestId, Progress]:
        """How far each request is, in the order in which they came."""
        return {request_id: progress(work) for request_id, work in self._requests.works.items()}

    # --- models --------------------------------------------------------------------------------------------------

    def open_model(self, name: str, model: LanguageModel) -> None:
        """Requests may name it from now on. The pool must have the layouts of its groups."""
        assert name not in self._hosts, f"{name} is open already"
        adapters = self._adapters.get(name)
        self._hosts[name] = open_host(
            name, model, self._ledger, self._arena, self._cost, adapters=adapters
        )

    def close_model(self, name: str) -> None:
        """Nobody uses this model any more: no reference to it is kept. Its cached pages stay to be found again."""
        host = self._hosts.pop(name)
        assert not host.rows, f"{name} has {len(host.rows)} rows"
        self._drafter.close_model(name)

    # --- requests ------------------------------------------------------------------------------------------------

    def submit(
        self, request_id: RequestId, request: GenerateRequest, *, matchers: Sequence[Matcher] = ()
    ) -> None:
        """Queue one request; what is wrong with it is its end. `matchers`: one per choice where there is a grammar."""
        try:
            self._check(request, matchers)
            pool = None
            if request.pooling is not None:
                pool = Pool(self._hosts[request.model].model, request.pooling)
        except GanglionError as error:
            self._requests.refuse(request_id, error)
            return
        host = self._hosts[request.model]
        self._num_arrivals += 1
        work = LanguageWork(request_id=request_id, request=request, arrival=self._num_arrivals)
        tables, keys = host.pages.open_tables()
        work.rows = [
            LanguageRow(work=work, choice=0, tokens=list(request.prompt), tables=tables, keys=keys)
        ]
        draws = [
            SamplerState(
                request.sampling,
                prompt_ids=request.prompt,
                choice=choice,
                grammar=matchers[choice] if matchers else None,
            )
            for choice in range(request.num_choices)
        ]
        self._requests.open(work, draws, pool)
        host.rows += work.rows

    def cancel(self, request_id: RequestId, reason: GanglionError | None = None) -> None:
        """Drop a request; its pages are back at once, its outcome is `reason` (default CancelledError)."""
        work = self._requests.works.get(request_id)
        if work is not None:
            self._requests.end(work, reason or CancelledError("request was cancelled"))

    def stop(self, request_id: RequestId, choice: int) -> None:
        """One choice has what its user wants (a stop string): the others go on, Usage comes with the last."""
        work = self._requests.works.get(request_id)
        row = None if work is None else next((r for r in work.rows if r.choice == choice), None)
        if work is not None and work.is_forked and row is not None and row.finish is None:
            self._requests.finish_row(row, FinishReason.STOP)
            self._requests.end_if_done(work)

    def drain(self) -> list[Event]:
        """What happened since the last call, in order."""
        return self._requests.drain()

    def preempt_latest(self) -> bool:
        """Give the pages of the request that came last back, to be computed again later. False: nobody holds any."""
        return self._batches.preempt_latest()

    def relocate(self, moves: Moves) -> None:
        """The ledger moved pages: rows follow."""
        for host in self._hosts.values():
            for row in host.admitted:
                host.relocate(row, moves)
            host.adapters.relocate(moves)
            if host.forward is not None:
                host.forward.forget_pages()
        self._drafter.relocate(moves)

    def close(self) -> None:
        """Drop all requests; the ledger may go on without this engine."""
        for request_id in list(self._requests.works):
            self.cancel(request_id)
        self._drafter.close()
        self._ledger.detach(self)

    def _check(self, request: GenerateRequest, matchers: Sequence[Matcher]) -> None:
        host = self._hosts.get(request.model)
        if host is None:
            raise FieldError("model", expected=f"one of {sorted(self._hosts)}", got=request.model)
        spec, num_tokens = host.model.spec, len(request.prompt)
        if not 0 < num_tokens <= spec.max_tokens:
            raise FieldError(
                "prompt",
                expected=f"1 to {spec.max_tokens} tokens",
                got=f"{num_tokens}",
                next_step="send a shorter prompt",
            )
        low, high = min(request.prompt), max(request.prompt)
        if low < 0 or high >= spec.vocab_size:
            raise FieldError(
                "prompt",
                expected=f"token ids of 0 to {spec.vocab_size - 1}",
                got=str(low if low < 0 else high),
            )
        if request.num_choices < 1:
            raise FieldError("n", expected="at least 1", got=str(request.num_choices))
        check_sampling(request.sampling, spec)
        needs_matchers = request.sampling.grammar is not None
        assert len(matchers) == (request.num_choices if needs_matchers else 0), len(matchers)
        self._drafter.check(request)
        host.adapters.check(request.adapter)
        num_larges = host.adapters.num_larges(request.adapter)
        host.pages.check_capacity(num_tokens, num_other_larges=num_larges)

    # --- one step ------------------------------------------------------------------------------------------------

    def step(self, budget_us: int) -> bool:
        """Advance one batch of one model for about `budget_us`; False when there is nothing to do.

        A batch that takes longer stops between two layers and goes on with the next call: at least one layer is run.
        """
        start_s = self._clock.now_s()
        host = self._next_host()
        if host is None:
            return False
        with torch.inference_mode():
            try:
                if host.forward is None and self._encode(host, budget_us):
                    pass  # that was this step
                elif host.forward is None and self._has_drafted(host, budget_us):
                    host.forward = self._batches.begin(host, budget_us)
                    for row in host.admitted:
                        if row.work.started_s is None:
                            row.work.started_s = start_s
                if host.forward is not None:
                    self._run_recorded(host, host.forward, budget_us, start_s)
            except GanglionError as error:
                self._fail(host, error)
            except Exception:
                logger.exception("a batch of %s failed", host.name)
                self._fail(host, InternalError("the model failed on this request"))
            finally:
                self._drafter.pause()
        self._drafter.end_step(host, (self._clock.now_s() - start_s) * 1e6)
        self._end_starved()
        return True

    def _has_drafted(self, host: LanguageHost, budget_us: int) -> bool:
        """Have the next batch's drafts made; False: the budget is spent and some are missing."""
        self._drafter.open(host)
        try:
            return self._drafter.advance(host, budget_us)
        except Exception:
            logger.exception("drafting for %s failed", host.name)
            self._drafter.fail(host)
            return True

    def _encode(self, host: LanguageHost, budget_us: int) -> bool:
        """Advance a picture for about `budget_us`, at least through one unit of the tower; False: none is to be encoded."""
        encoding = self._batches.begin_encoding(host)
        if encoding is None or host.images is None:
            return False
        images, work, start_s = host.images, encoding.row.work, self._clock.now_s()
        if work.started_s is None:
            work.started_s = start_s
        now_s = start_s
        try:
            while images.encoding is encoding:
                unit_us = host.estimate_us(ENCODE, 1)
                left_us = budget_us - (now_s - start_s) * 1e6
                if now_s > start_s and left_us < unit_us:
                    break
                num_units = max(1, int(left_us / unit_us)) if unit_us else 1
                num_run = images.advance(encoding, num_units)
                began_s, now_s = now_s, self._clock.now_s()
                host.observe(ENCODE, 1, num_run, (now_s - began_s) * 1e6)
        except GanglionError as error:
            self._requests.end(work, error)
        except Exception:
            logger.exception("a picture of %s failed", work.request_id)
            self._requests.end(work, InternalError("the model failed on this picture"))
        self._record(host, (), range(0), budget_us, start_s)
        return True

    def _next_host(self) -> LanguageHost | None:
        """The model whose batch is under way, else the next in turn that has rows."""
        names = list(self._hosts)
        at = names.index(self._last_host) + 1 if self._last_host in names else 0
        for name in names[at:] + names[:at]:
            if self._hosts[name].rows:
                current = self._hosts.get(self._last_host)
                if current is not None and current.forward is not None:
                    return current
                self._last_host = name
                return self._hosts[name]
        return None

    def _run_recorded(
        self, host: LanguageHost, forward: Forward, budget_us: int, start_s: float
    ) -> None:
        parts, first_layer = forward.parts, forward.next_layer
        self._run(host, forward, budget_us, start_s)
        self._record(host, parts, range(first_layer, forward.next_layer), budget_us, start_s)

    def _record(
        self,
        host: LanguageHost,
        parts: Sequence[Part],
        layers: range,
        budget_us: int,
        start_s: float,
    ) -> None:
        """A step ended. No parts and no layers: it encoded a picture."""
        self._num_steps += 1
        self.records.append(
            step_record(
                self._num_steps,
                host,
                parts,
                layers,
                hosts=self._hosts,
                start_s=start_s,
                end_s=self._clock.now_s(),
                budget_us=budget_us,
            )
        )

    def _run(self, host: LanguageHost, forward: Forward, budget_us: int, start_s: float) -> None:
        has_run = False
        now_s = self._clock.now_s()
        self._drafter.run_ahead(host)
        while not forward.is_done:
            num_tokens = forward.num_tokens
            layer_us = host.estimate_us(LAYERS, num_tokens)
            left_us = budget_us - (now_s - start_s) * 1e6
            if has_run and left_us < layer_us:
                return
            num_layers = forward.next_cut - forward.next_layer
            if layer_us:
                num_layers = min(num_layers, max(1, int(left_us / layer_us)))
            began_s = self._clock.now_s()
            forward.run(num_layers)
            now_s, has_run = self._clock.now_s(), True
            if num_tokens:  # all may have been cancelled
                host.observe(LAYERS, num_tokens, num_layers, (now_s - began_s) * 1e6)
        left_us = budget_us - (now_s - start_s) * 1e6
        if not has_run or left_us >= host.estimate_us(HEAD, forward.num_tokens):
            self._commits.commit(host, forward)

    def _end_starved(self) -> None:
        starved, self._batches.starved = self._batches.starved, []
        for work, error in starved:
            self._requests.end(work, error)

    def _fail(self, host: LanguageHost, error: GanglionError) -> None:
        """A batch raised: every row of it is run alone, so that one bad request does not spoil its batch mates."""
        self._drafter.abandon(host)
        rows = host.abandon()
        if len(rows) > 1:
            host.suspects = rows
            return
        for row in rows or host.admitted:
            if row.finish is None:
                self._requests.end(row.work, error)
        for work in list(
            self._requests.works.values()
        ):  # it had its last token before the batch raised
            self._requests.end_if_done(work)
