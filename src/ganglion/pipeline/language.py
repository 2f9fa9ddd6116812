"""LanguageFront: the LanguageService over a language engine: admission, and text from tokens.

`generate` and `cancel` come from any thread and are posted to the engine's; all else here runs on that one, called by
`pipeline.local`. Knows text and requests; neither pages nor tensors.
"""

import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from ganglion.clock import Clock
from ganglion.engine.language_record import WorkTrace
from ganglion.engine.language_requests import Ended
from ganglion.engine.sampler import Matcher
from ganglion.errors import (
    CancelledError,
    FieldError,
    GanglionError,
    InternalError,
    OverloadedError,
)
from ganglion.generation import (
    Embedded,
    FinishReason,
    GenerateRequest,
    LanguageSpec,
    PromptScored,
    Sampling,
    TextDelta,
    TokenDelta,
    TokenLogprob,
    Usage,
)
from ganglion.metrics import Metrics
from ganglion.models.detokenizer import Detokenizer, StopMatcher
from ganglion.pipeline.language_watch import UNKNOWN, LanguageWatch, WatchedCore
from ganglion.pipeline.residents import Residents, ResidentsMessage
from ganglion.pipeline.served import ServedLanguage, ShowingTokenizer
from ganglion.service import ModelState, OnGenerated, Residence, TextTokenizer
from ganglion.types import LanguageStats, RequestId

PINNED = Residence(state=ModelState.LOADED, stay="pinned", weight_bytes=0)
SMOOTHING = 0.2
WARM_UP_TOKENS, WARM_UP_US = 16, 10_000_000


class LanguageCore(WatchedCore, Protocol):
    """What this asks of the language engine."""

    def submit(
        self, request_id: RequestId, request: GenerateRequest, *, matchers: Sequence[Matcher] = ()
    ) -> None:
        """Take a request in; `matchers`: of its grammar, one per choice."""
        ...

    def cancel(self, request_id: RequestId, reason: GanglionError | None = None) -> None:
        """Drop a request; it still ends, with `reason`."""
        ...

    def stop(self, request_id: RequestId, choice: int) -> None:
        """One choice has what its user wants; the others go on, a Usage comes with the last."""
        ...

    def step(self, budget_us: int) -> bool:
        """One forward; is there more to do?"""
        ...

    def drain(self) -> Sequence[TokenDelta | PromptScored | Embedded | Ended]:
        """What came out since the last call, in order."""
        ...

    def preempt_latest(self) -> bool:
        """Give pages back, to be computed again later; False: nobody holds any."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Generate:
    """Message: a checked request."""

    request_id: RequestId
    request: GenerateRequest
    matchers: tuple[Matcher, ...]
    on_generated: OnGenerated
    submitted_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Abandon:
    """Message: drop a request."""

    request_id: RequestId


LanguageMessage = Generate | Abandon | ResidentsMessage


class LanguageFront:
    """Language models behind the LanguageService protocol. `core` belongs to the engine's thread, like `handle` and `step`."""

    def __init__(
        self,
        core: LanguageCore,
        served: Mapping[str, ServedLanguage],
        clock: Clock,
        post: Callable[[LanguageMessage], None],
        *,
        max_choices: int,
        residents: Residents | None = None,
        watch: LanguageWatch | None = None,
    ) -> None:
        """`residents` None: all models are in `core`, and stay."""
        self._residents = residents
        if residents is not None:
            residents.on_ready, residents.on_failed = self._start, self._refuse
            residents.busy = self._busy
        self._waiting: dict[str, list[RequestId]] = {}  # model -> requests that wait for it
        self._watch = watch or LanguageWatch(Metrics(), clock, num_lanes=1)
        self._core, self._served, self._clock, self._post = core, dict(served), clock, post
        self._named = {spec.name: each for each in self._served.values() for spec in each.specs}
        self._max_choices = max_choices
        self._lock = threading.Lock()
        self._num_choices = 0  # of all requests that have not ended
        self._mean_request_s = 1.0
        self._request_ids = itertools.count(1)
        self._open: dict[RequestId, _Open] = {}
        self._is_closed = False

    # --- LanguageService, from any thread ------------------------------------------------------------------------

    def language_models(self) -> tuple[LanguageSpec, ...]:
        """Those that a request may name."""
        return tuple(spec for served in self._served.values() for spec in served.specs)

    def tokenizer(self, model: str) -> TextTokenizer:
        """Of one of them."""
        return self._find(model).tokenizer

    def residence(self, model: str) -> Residence:
        """Is it in memory?"""
        name = self._find(model).spec.name
        return PINNED if self._residents is None else self._residents.residence(name)

    def generate(self, request: GenerateRequest, on_generated: OnGenerated) -> RequestId:
        """Check, count and queue one prompt. `max_tokens` becomes what the model has room for."""
        try:
            served = self._find(request.model)
            request = served.checked(request)
            matchers = served.matchers(request)
            self._let_in(request.num_choices)
        except GanglionError as error:
            self._watch.refuse(request.model if request.model in self._named else UNKNOWN, error)
            raise
        request_id = RequestId(next(self._request_ids))
        self._post(
            Generate(
                request_id=request_id,
                request=request,
                matchers=matchers,
                on_generated=on_generated,
                submitted_s=self._clock.now_s(),
            )
        )
        return request_id

    def cancel(self, request_id: RequestId) -> None:
        """Drop a request between two steps."""
        self._post(Abandon(request_id=request_id))

    def _let_in(self, num_choices: int) -> None:
        with self._lock:
            if self._is_closed:
                raise _stopping()
            if self._num_choices + num_choices > self._max_choices:
                raise OverloadedError(
                    "the queue of prompts",
                    limit=self._max_choices,
                    retry_after_s=self._mean_request_s,
                )
            self._num_choices += num_choices

    # --- on the engine's thread ----------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Is there a request that can be worked on, or a model to make room for?"""
        is_making_room = self._residents is not None and self._residents.has_work
        return is_making_room or len(self._open) > sum(map(len, self._waiting.values()))

    def handle(self, message: LanguageMessage) -> None:
        """Apply one message."""
        match message:
            case Generate():
                self._submit(message)
            case Abandon(request_id=request_id):
                self._abandon(request_id, None)
            case _:
                assert self._residents is not None, "posted by it"
                self._residents.handle(message)

    def step(self, budget_us: int) -> None:
        """One forward of the engine, and the text that it makes."""
        if self._residents is not None:
            self._residents.step()
        self._core.step(budget_us)
        self._watch.observe_steps(self._core.records)
        self._pass_on()

    def stats(self) -> LanguageStats:
        """Everything that an operator sees of language models, as of now."""
        layouts = {
            layout.name: name for name, served in self._served.items() for layout in served.layouts
        }
        return self._watch.stats(self._core, layouts)

    def make_room(self) -> bool:
        """Robots need pages: whoever came last gives its own back and computes them again. False: nobody holds any."""
        return self._core.preempt_latest()

    def warm_up(self) -> None:
        """Run a made-up prompt through each model, before the first request: maps its weights, measures its layers.

        Raises the GanglionError of a model that cannot run.
        """
        for name, served in self._served.items():
            if not served.stay.is_pinned:
                continue  # the thread that loads it warms it up
            num_tokens = min(WARM_UP_TOKENS, served.spec.max_tokens - 1)
            request = GenerateRequest(
                model=name,
                prompt=tuple(index % served.spec.vocab_size for index in range(num_tokens)),
                sampling=Sampling(temperature=0.0, max_tokens=1),
                tenant="warm-up",
            )
            self._core.submit(RequestId(-1), request)
            while self._core.step(WARM_UP_US):
                for item in self._core.drain():
                    if isinstance(item, Ended) and isinstance(item.outcome, GanglionError):
                        raise item.outcome
        self._watch.skip_steps(self._core.records)

    def fail_all(self, error: GanglionError) -> None:
        """End every open request with `error` (a defect, or the server is stopping)."""
        for request_id in list(self._open):
            self._abandon(request_id, error)
        assert not self._open, f"{len(self._open)} requests outlived their cancellation"

    def close(self) -> None:
        """End what is open; take no more."""
        with self._lock:
            self._is_closed = True
        self.fail_all(_stopping())
        if self._residents is not None:
            self._residents.close()

    def _submit(self, message: Generate) -> None:
        request = message.request
        tokenizer = self._served[request.model].tokenizer
        self._watch.open(message.request_id, request, message.submitted_s)
        self._open[message.request_id] = _Open(
            message=message,
            choices=[_Choice(tokenizer, request) for _ in range(request.num_choices)],
        )
        if self._residents is not None and not self._residents.is_loaded(request.model):
            self._waiting.setdefault(request.model, []).append(message.request_id)
            self._residents.want(request.model)
        else:
            self._hand_over(message)

    def _hand_over(self, message: Generate) -> None:
        request = message.request
        try:
            self._core.submit(message.request_id, request, matchers=message.matchers)
        except GanglionError as error:
            self._end(message.request_id, error, None)
            return
        except Exception:
            self._end(message.request_id, InternalError("the language engine failed"), None)
            raise
        self._pass_on()

    def _start(self, model: str) -> None:
        """It is loaded: what waited for it is worked on, in order."""
        for request_id in self._waiting.pop(model, ()):
            self._hand_over(self._open[request_id].message)

    def _refuse(self, model: str, error: GanglionError) -> None:
        """It cannot be loaded."""
        for request_id in self._waiting.pop(model, ()):
            self._end(request_id, error, None)

    def _busy(self) -> set[str]:
        """Models whose weights are in use."""
        return {open_.message.request.model for open_ in self._open.values()} - set(self._waiting)

    def _abandon(self, request_id: RequestId, reason: GanglionError | None) -> None:
        open_ = self._open.get(request_id)
        if open_ is None:
            return
        model = open_.message.request.model
        waiting = self._waiting.get(model, [])
        if request_id not in waiting:
            self._core.cancel(request_id, reason)
            self._pass_on()
            return
        waiting.remove(request_id)
        if not waiting:
            del self._waiting[model]
            assert self._residents is not None, "nothing waits without it"
            self._residents.unwant(model)
        self._end(request_id, reason or CancelledError("request was cancelled"), None)

    def _pass_on(self) -> None:
        """From tokens to text, until the engine has nothing more to say: ending a choice may end its request."""
        while items := self._core.drain():
            for item in items:
                open_ = self._open.get(item.request_id)
                if open_ is None:
                    continue
                match item:
                    case TokenDelta():
                        self._show(item, open_)
                    case PromptScored() | Embedded():
                        open_.message.on_generated(item)
                    case Ended():
                        self._end(item.request_id, item.outcome, item.trace)

    def _show(self, item: TokenDelta, open_: "_Open") -> None:
        choice = open_.choices[item.choice]
        if choice.is_over:
            return
        delta = choice.take(item)
        finish = None if delta is None else delta.finish
        self._watch.show(item.request_id, len(item.token_ids) - choice.num_unused, finish)
        if delta is not None:
            open_.message.on_generated(delta)
        if choice.is_over and item.finish is None:
            self._core.stop(item.request_id, item.choice)

    def _end(
        self, request_id: RequestId, outcome: Usage | GanglionError, trace: WorkTrace | None
    ) -> None:
        open_ = self._open.pop(request_id)
        if isinstance(outcome, Usage):
            num_unused = sum(choice.num_unused for choice in open_.choices)
            num_used = outcome.num_completion_tokens - num_unused
            outcome = replace(outcome, num_completion_tokens=num_used)
        self._watch.end(request_id, outcome, trace)
        took_s = self._clock.now_s() - open_.message.submitted_s
        with self._lock:
            self._num_choices -= len(open_.choices)
            self._mean_request_s += SMOOTHING * (took_s - self._mean_request_s)
        open_.message.on_generated(outcome)
        model = open_.message.request.model
        if self._residents is not None and self._residents.is_loaded(model):
            num_tokens = 0
            if isinstance(outcome, Usage):
                num_tokens = outcome.num_prompt_tokens + outcome.num_completion_tokens
            self._residents.count(model, num_tokens)

    def _find(self, model: str) -> ServedLanguage:
        served = self._named.get(model)
        if served is None:
            names = ", ".join(self._named)
            raise FieldError("model", expected=f"one of {names}", got=repr(model)[:200])
        return served


@dataclass(slots=True)
class _Open:
    """A request that has not ended."""

    message: Generate
    choices: "list[_Choice]" = field(default_factory=list)


class _Choice:
    """From the tokens of one choice to text that may be shown, with the tokens that made it."""

    def __init__(self, tokenizer: ShowingTokenizer, request: GenerateRequest) -> None:
        self._tokenizer = tokenizer
        self._min_tokens = request.sampling.min_tokens
        self._detokenizer, self._matcher = Detokenizer(), StopMatcher(request.sampling.stop)
        self._num_tokens = 0
        self._ids: list[int] = []  # of text that is held back
        self._logprobs: list[TokenLogprob] = []
        self.is_over = False
        self.num_unused = 0  # tokens that came after a stop string, together with its end

    def take(self, item: TokenDelta) -> TextDelta | None:
        """What of it may be shown now. A stop string ends the choice at the token that completes it."""
        text, stop, num_taken = "", None, 0
        for token_id in item.token_ids:
            num_taken += 1
            self._num_tokens += 1
            new = self._detokenizer.feed(self._tokenizer.shown_bytes(token_id))
            if self._num_tokens <= self._min_tokens:
                text += new
                continue
            passed = self._matcher.feed(new)
            text, stop = text + passed.text, passed.stop
            if stop is not None:
                break
        self.num_unused += len(item.token_ids) - num_taken
        self._ids += item.token_ids[:num_taken]
        self._logprobs += item.logprobs[:num_taken]
        finish = FinishReason.STOP if stop is not None else item.finish
        if finish is not None and stop is None:
            passed = self._matcher.feed(self._detokenizer.finish())
            text += passed.text + self._matcher.finish()
        self.is_over = finish is not None
        if not text and finish is None:
            return None
        delta = TextDelta(
            choice=item.choice,
            text=text,
            token_ids=tuple(self._ids),
            logprobs=tuple(self._logprobs),
            finish=finish,
            stop=item.stop_token_id if stop is None else stop,
        )
        self._ids, self._logprobs = [], []
        return delta


def _stopping() -> CancelledError:
    return CancelledError("the server is stopping", next_step="ask again when it is back")
