"""LocalService: the Service in this process: a policy, language models, or both. One pool of pages, one thread.

Called by the edge (through `Service` and `LanguageService`), by `cli` and by `bench`. Its public methods are thread-safe
and never wait for a step. Robots' steps come first; language models take the turns that `pipeline.turns` gives them.
"""

import itertools
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Self

import torch

from ganglion.clock import Clock, RealClock
from ganglion.config import ChatConfig, EngineConfig, MemoryConfig, PipelineConfig
from ganglion.engine.lane import Crew, Lanes
from ganglion.engine.language import LanguageEngine
from ganglion.engine.language_policy import POLICIES
from ganglion.engine.loop import EngineLoop
from ganglion.errors import (
    CancelledError,
    ConfigError,
    FieldError,
    GanglionError,
    InternalError,
    OverloadedError,
    SessionConflictError,
)
from ganglion.layout import PoolLayout
from ganglion.memory.arena import Arena
from ganglion.memory.ledger import Ledger
from ganglion.metrics import Metrics
from ganglion.models.base import Model
from ganglion.pipeline.dispatch import Cancel, Message, Refresh
from ganglion.pipeline.drafting import read_speculation
from ganglion.pipeline.ladder import Ladder
from ganglion.pipeline.language import Abandon, Generate, LanguageFront, LanguageMessage
from ganglion.pipeline.language_watch import LanguageWatch
from ganglion.pipeline.policy_part import PolicyPart, policy_layouts
from ganglion.pipeline.residency import Residency, Terms
from ganglion.pipeline.residents import (
    Loaded,
    Look,
    NotLoaded,
    PageBudget,
    Residents,
    ResidentsMessage,
)
from ganglion.pipeline.served import ServedLanguage
from ganglion.pipeline.session import Submission
from ganglion.pipeline.turns import Turns
from ganglion.plan.cost import MeasuredCost
from ganglion.service import OnDone
from ganglion.spec import PolicySpec
from ganglion.types import (
    CloseSession,
    Command,
    Observation,
    OverridePrompt,
    RequestId,
    RobotId,
    ServiceStats,
    SessionId,
)

logger = logging.getLogger(__name__)

PICTURE_PERIOD_S = 0.05
PAGE_FLOOR = 4  # pages keep 1 / so much of arena_bytes, whatever is loaded


class LocalService:
    """A policy and language models on one arena. `with LocalService(model, ...) as service: ...`

    Without a policy (`model` None) only `language` and `stats` may be used.
    """

    def __init__(
        self,
        model: Model | None,
        *,
        engine: EngineConfig,
        memory: MemoryConfig,
        pipeline: PipelineConfig | None = None,
        chat: ChatConfig | None = None,
        languages: Sequence[ServedLanguage] = (),
        policy_bytes: int = 0,
        ladder: Ladder | None = None,
        clock: Clock | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        """`policy_bytes`: of the policy's weights, which count in `memory.budget_bytes`.

        Raises ConfigError where the budget holds not even what is pinned.
        """
        assert model is not None or languages, "nothing to serve"
        names = [spec.name for each in languages for spec in each.specs]
        if len(set(names)) < len(names):
            raise ConfigError(
                f"two language models of one name among {', '.join(names)}",
                next_step="rename a folder: it names its model",
            )
        self._config, self._clock = engine, clock or RealClock()
        self._metrics = metrics or Metrics()
        self._watch = LanguageWatch(self._metrics, self._clock, num_lanes=max(1, len(engine.lanes)))
        self._lanes = Lanes(engine.lanes if engine.lanes and model is not None else ((),))
        layouts = () if model is None else policy_layouts(model, memory)
        for served in languages:
            layouts = (*layouts, *served.layouts)
        layout = PoolLayout(large_page_bytes=memory.large_page_bytes, layouts=layouts)
        self._residency = Residency(
            models={
                each.spec.name: Terms(weight_bytes=each.source.weight_bytes, stay=each.stay)
                for each in languages
            },
            budget_bytes=memory.budget_bytes or None,
            other_bytes=policy_bytes,
            arena_bytes=memory.arena_bytes,
            floor_bytes=memory.arena_bytes // PAGE_FLOOR,
        )
        max_large_pages = memory.arena_bytes // memory.large_page_bytes
        self._ledger = Ledger(
            layout,
            self._residency.page_bytes // memory.large_page_bytes,
            max_large_pages=max_large_pages,
        )
        self._arena = Arena(layout, max_large_pages)
        self._memory = memory
        self._timers: set[threading.Timer] = set()
        self._defrag_step_bytes = memory.defrag_step_bytes
        self._policy: PolicyPart | None = None
        if model is not None:
            self._policy = PolicyPart(
                model,
                ledger=self._ledger,
                arena=self._arena,
                lanes=self._lanes,
                engine=engine,
                memory=memory,
                pipeline=pipeline or PipelineConfig(),
                ladder=ladder,
                clock=self._clock,
                metrics=self._metrics,
                make_room=self._make_room,
            )
        self._loop: EngineLoop[Message | LanguageMessage] = EngineLoop(
            open_=self._open,
            handle=self._handle,
            step=self._step,
            on_defect=self._on_defect,
            close=self._close,
        )
        self._front: LanguageFront | None = None
        self._crew: Crew | None = None
        self._turns = Turns(
            step_us=engine.step_budget_us,
            slice_us=engine.language_slice_us,
            share=engine.language_share,
            floor=engine.language_floor,
        )
        if languages:
            self._front = self._language_front(languages, chat or ChatConfig())
            if engine.language_threads > 1:
                self._crew = Crew(engine.language_threads)
        self._request_ids = itertools.count(1)
        self._owners_lock = threading.Lock()
        self._owners: dict[SessionId, RobotId] = {}
        self._is_ready = False
        self._stage = "starting"
        self._opened = threading.Event()
        self._picture = self._paint()

    # --- life --------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the engine's thread and wait until it has calibrated itself.

        Raises InternalError when the model cannot run its own shapes.
        """
        self._loop.start()
        self._opened.wait()
        self._check_ready()

    def start_here(self) -> None:
        """As `start`, but the calling thread takes each `turn`: for a simulated clock."""
        self._loop.start_here()
        self._check_ready()

    def turn(self) -> bool:
        """After `start_here`: what was posted, then one step; is there more to do?"""
        return self._loop.turn()

    def _check_ready(self) -> None:
        if not self._is_ready:
            self.close()
            raise InternalError(
                f"{self._names()} failed in calibration",
                next_step="see the traceback in the log above",
            )

    def close(self) -> None:
        """Cancel what is open, stop the thread, give the memory back."""
        self._loop.stop()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # --- Service -----------------------------------------------------------------------------------------------

    @property
    def has_policy(self) -> bool:
        """Is there a policy, or are there language models only?"""
        return self._policy is not None

    @property
    def language(self) -> LanguageFront | None:
        """The LanguageService; None: no language model is served."""
        return self._front

    @property
    def spec(self) -> PolicySpec:
        return self._served_policy().spec

    def submit(self, observation: Observation, on_done: OnDone) -> RequestId:
        self._served_policy()
        self._claim(observation.session_id, observation.robot_id)
        request_id = RequestId(next(self._request_ids))
        now_s = self._clock.now_s()
        deadline_ms = observation.deadline_ms
        self._loop.post(
            Submission(
                request_id=request_id,
                observation=observation,
                on_done=on_done,
                submitted_s=now_s,
                deadline_s=now_s + (deadline_ms or self._config.deadline_ms) * 1e-3,
                is_deadline_strict=deadline_ms is not None,
            )
        )
        return request_id

    def cancel(self, request_id: RequestId) -> None:
        self._loop.post(Cancel(request_id))

    def control(self, command: Command) -> None:
        self._served_policy()
        with self._owners_lock:
            owner = self._owners.get(command.session_id)
        if owner is None:
            raise FieldError("session_id", expected="an open session", got=repr(command.session_id))
        if not isinstance(command, OverridePrompt) and owner != command.robot_id:
            raise SessionConflictError(command.session_id, owner=owner, asked_by=command.robot_id)
        if isinstance(command, CloseSession):
            with self._owners_lock:
                self._owners.pop(command.session_id, None)
        self._loop.post(command)

    def stats(self) -> ServiceStats:
        if self._is_picture_old():
            self._loop.post(Refresh())
        return self._picture

    def _is_picture_old(self) -> bool:
        return self._clock.now_s() - self._picture.now_s > PICTURE_PERIOD_S

    def _claim(self, session_id: SessionId, robot_id: RobotId) -> None:
        with self._owners_lock:
            owner = self._owners.get(session_id)
            if owner is None:
                if len(self._owners) >= self._config.max_sessions:
                    raise OverloadedError(
                        "the table of sessions", limit=self._config.max_sessions, retry_after_s=1.0
                    )
                self._owners[session_id] = robot_id
            elif owner != robot_id:
                raise SessionConflictError(session_id, owner=owner, asked_by=robot_id)

    # --- on the loop's thread ------------------------------------------------------------------------------------

    def _open(self) -> None:
        try:
            self._lanes.open()
            self._stage = "calibrating"
            if self._policy is not None:
                self._policy.calibrate()
            if self._front is not None:
                self._on_crew(self._front.warm_up)
            self._is_ready, self._stage = True, "serving"
        finally:
            if not self._is_ready:
                self._stage = "failed"
            self._refresh()
            self._opened.set()

    def _handle(self, message: Message | LanguageMessage) -> None:
        match message:
            case Generate() | Abandon() | Loaded() | NotLoaded() | Look():
                assert self._front is not None, "posted by the front"
                self._front.handle(message)
            case Refresh():
                if self._is_picture_old():
                    self._refresh()
            case _:
                self._served_policy().dispatcher.handle(message)

    def _step(self) -> bool:
        has_robot_work = False
        if self._policy is not None:
            start_s = self._clock.now_s()
            has_robot_work = self._policy.dispatcher.step()
            self._turns.observe_robots((self._clock.now_s() - start_s) * 1e6)
        else:
            self._tidy_up()
        if self._front is None or not self._front.has_work:
            return has_robot_work
        dispatcher = None if self._policy is None else self._policy.dispatcher
        has_robots = dispatcher is not None and dispatcher.has_sessions
        slack_us = None if dispatcher is None else dispatcher.slack_us()
        kind = self._turns.kind(has_robots=has_robots, slack_us=slack_us)
        budget_us = self._turns.budget_us(has_robots=has_robots, slack_us=slack_us)
        if budget_us is None:
            self._watch.hold_back()
        else:
            start_s = self._clock.now_s()
            front = self._front
            self._on_crew(lambda: front.step(budget_us))
            run_us = (self._clock.now_s() - start_s) * 1e6
            self._turns.observe_turn(run_us, budget_us=budget_us, has_robot_work=has_robot_work)
            self._watch.observe_turn(kind, run_us, slack_us)
        return has_robot_work or self._front.has_work

    def _tidy_up(self) -> None:
        """Where no policy's engine does it before its steps: pages move, so that large ones become free."""
        moves = self._ledger.plan_moves(self._defrag_step_bytes, num_spare=1)
        if moves is not None:
            with torch.inference_mode():
                self._arena.copy(moves.copies)
                self._arena.release(moves.released)

    def _on_crew(self, task: Callable[[], None]) -> None:
        if self._crew is None:
            task()
        else:
            self._crew.run(task)

    def _make_room(self) -> bool:
        """Robots are out of pages: the language request that came last gives its own back."""
        return self._front is not None and self._front.make_room()

    def _on_defect(self, error: Exception) -> None:
        self._fail_all(
            error if isinstance(error, GanglionError) else InternalError("the engine failed")
        )

    def _close(self) -> None:
        self._is_ready, self._stage = False, "stopped"
        for timer in list(self._timers):
            timer.cancel()
        if self._front is not None:
            self._front.close()
        self._fail_all(
            CancelledError("the server is stopping", next_step="reconnect when it is back")
        )
        self._refresh()
        self._lanes.close()
        if self._crew is not None:
            self._crew.close()

    def _fail_all(self, error: GanglionError) -> None:
        if self._policy is not None:
            self._policy.dispatcher.fail_all(error)
        if self._front is not None:
            self._front.fail_all(error)

    def _refresh(self) -> None:
        self._picture = self._paint()

    # --- parts ---------------------------------------------------------------------------------------------------

    def _language_front(
        self, languages: Sequence[ServedLanguage], chat: ChatConfig
    ) -> LanguageFront:
        served = {each.spec.name: each for each in languages}
        core = LanguageEngine(
            {name: each.source.load() for name, each in served.items() if each.stay.is_pinned},
            self._ledger,
            self._arena,
            self._clock,
            max_rows=chat.max_rows,
            cost=MeasuredCost(),
            policy=POLICIES[self._config.language_policy],
            adapters={
                name: each.adapters for name, each in served.items() if each.adapters is not None
            },
            speculation=read_speculation(chat, languages),
        )
        residents = Residents(
            core,
            {name: each.source for name, each in served.items()},
            self._residency,
            PageBudget(
                self._ledger,
                self._arena,
                large_page_bytes=self._memory.large_page_bytes,
                step_bytes=self._memory.defrag_step_bytes,
            ),
            self._clock,
            self._loop.post,
            metrics=self._metrics,
            wait_s=chat.load_wait_s,
            later=self._later,
        )
        return LanguageFront(
            core,
            served,
            self._clock,
            self._loop.post,
            max_choices=chat.max_choices,
            residents=residents,
            watch=self._watch,
        )

    def _later(self, delay_s: float, message: ResidentsMessage) -> None:
        def post() -> None:
            self._timers.discard(timer)
            self._loop.post(message)

        timer = threading.Timer(delay_s, post)
        timer.daemon = True
        self._timers.add(timer)
        timer.start()

    def _served_policy(self) -> PolicyPart:
        assert self._policy is not None, (
            "this service has no policy: the edge gives robots no door to it"
        )
        return self._policy

    def _names(self) -> str:
        names = [] if self._policy is None else [f"the policy {self._policy.spec.name!r}"]
        if self._front is not None:
            names += [f"the model {spec.name!r}" for spec in self._front.language_models()]
        return " or ".join(names)

    def _paint(self) -> ServiceStats:
        language = None if self._front is None else self._front.stats()
        if self._policy is not None:
            picture = self._policy.dispatcher.picture(is_ready=self._is_ready, stage=self._stage)
            return replace(picture, language=language)
        return ServiceStats(
            now_s=self._clock.now_s(),
            is_ready=self._is_ready,
            stage=self._stage,
            sessions=(),
            pool=self._ledger.stats(),
            steps=(),
            num_requests=0,
            num_results=0,
            num_errors=0,
            num_cancelled=0,
            language=language,
        )
