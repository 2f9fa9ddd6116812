"""The in-process Service with real threads: exactly one outcome each, newest wins, owners, overrides, defects."""

import threading
from collections.abc import Sequence

import numpy as np
import pytest

from ganglion.config import EngineConfig, MemoryConfig
from ganglion.errors import (
    CancelledError,
    DeadlineMissedError,
    FieldError,
    GanglionError,
    InternalError,
    OverloadedError,
    SessionConflictError,
    SupersededError,
    UnsafeActionError,
)
from ganglion.models.policies.plain import PlainModel
from ganglion.pipeline.local import LocalService
from ganglion.service import Outcome, Service
from ganglion.types import (
    ActionChunk,
    CloseSession,
    Float32Array,
    Observation,
    OverridePrompt,
    ResetSession,
    RobotId,
    ServiceStats,
    SessionId,
)
from tests.cpu.toy import SPEC, Toy, expected, observation

MEMORY = MemoryConfig(arena_bytes=1 << 16, large_page_bytes=1 << 10)
TIMEOUT_S = 10.0


class Box:
    """Collects outcomes; waits for them without sleeping."""

    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []
        self._ready = threading.Semaphore(0)

    def __call__(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        self._ready.release()

    def wait(self, num_outcomes: int = 1) -> list[Outcome]:
        for _ in range(num_outcomes):
            assert self._ready.acquire(timeout=TIMEOUT_S), "no outcome"
        return self.outcomes


class Held:
    """A plain policy that waits at a gate, so that a test decides what is in flight."""

    spec = SPEC

    def __init__(self) -> None:
        self.gate, self.entered = threading.Event(), threading.Semaphore(0)
        self.gate.set()
        self.prompts: list[str] = []

    def __call__(self, observations: Sequence[Observation]) -> Float32Array:
        self.prompts += [seen.prompt for seen in observations]
        self.entered.release()
        assert self.gate.wait(TIMEOUT_S)
        return np.stack([expected(seen) for seen in observations])


def service(model: object, **engine: object) -> LocalService:
    return LocalService(model, engine=EngineConfig(**engine), memory=MEMORY)  # type: ignore[arg-type]


def held_service() -> tuple[Held, LocalService]:
    policy = Held()
    return policy, service(PlainModel(policy))


def hold(policy: Held) -> None:
    policy.gate.clear()
    while policy.entered.acquire(blocking=False):
        pass


def test_a_chunk_carries_what_it_rests_on() -> None:
    with service(Toy()) as served:
        assert isinstance(served, Service)
        box, seen = Box(), observation("a", 41, pixel=3, obs_time_ns=12345)
        served.submit(seen, box)
        (chunk,) = box.wait()
        assert isinstance(chunk, ActionChunk)
        np.testing.assert_array_equal(chunk.actions, expected(seen))
        assert (chunk.obs_seq, chunk.obs_time_ns, chunk.context_version) == (41, 12345, 1)
        assert chunk.is_deadline_met
        assert chunk.timing.infer_ms >= chunk.timing.perceive_ms + chunk.timing.generate_ms
        stats = served.stats()
        assert stats.is_ready
        assert stats.stage == "serving"


def test_many_robots_from_many_threads_each_get_their_own() -> None:
    with service(Toy()) as served:
        boxes = [Box() for _ in range(12)]

        def robot(at: int) -> None:
            for seq in range(20):
                served.submit(observation(f"r{at}", seq, pixel=at, seed=seq), boxes[at])
                boxes[at].wait()

        threads = [threading.Thread(target=robot, args=(at,)) for at in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(TIMEOUT_S)
        for at, box in enumerate(boxes):
            assert len(box.outcomes) == 20
            for seq, chunk in enumerate(box.outcomes):
                assert isinstance(chunk, ActionChunk)
                seen = observation(f"r{at}", seq, pixel=at, seed=seq)
                np.testing.assert_array_equal(chunk.actions, expected(seen))


def test_newest_observation_wins() -> None:
    policy, served = held_service()
    with served:
        hold(policy)
        box = Box()
        served.submit(observation("a", 0), box)
        assert policy.entered.acquire(timeout=TIMEOUT_S)
        for seq in (1, 2, 3):
            served.submit(observation("a", seq), box)
        policy.gate.set()
        box.wait(4)
        chunks = [o.obs_seq for o in box.outcomes if isinstance(o, ActionChunk)]
        assert chunks == [0, 3]
        assert sum(isinstance(o, SupersededError) for o in box.outcomes) == 2


def test_a_strict_deadline_drops_work_that_has_not_started() -> None:
    policy, served = held_service()
    with served:
        hold(policy)
        box = Box()
        served.submit(observation("a", 0), box)
        assert policy.entered.acquire(timeout=TIMEOUT_S)
        late = Box()
        served.submit(observation("a", 1, deadline_ms=0.001), late)
        policy.gate.set()
        (error,) = late.wait()
        assert isinstance(error, DeadlineMissedError)


def test_an_operator_re_instructs_and_gives_back() -> None:
    policy, served = held_service()
    with served:
        box = Box()
        served.submit(observation("a", 0), box)
        box.wait()
        served.control(OverridePrompt(session_id=SessionId("a"), prompt="close the drawer"))
        served.submit(observation("a", 1), box)
        box.wait()
        served.control(OverridePrompt(session_id=SessionId("a"), prompt=None))
        served.submit(observation("a", 2), box)
        box.wait()
        assert policy.prompts[-3:] == ["toy", "close the drawer", "toy"]
        said = [
            (o.prompt, o.is_prompt_overridden) for o in box.outcomes if isinstance(o, ActionChunk)
        ]
        assert said == [("toy", False), ("close the drawer", True), ("toy", False)]


def test_a_session_belongs_to_its_robot() -> None:
    with service(Toy()) as served:
        box = Box()
        served.submit(observation("a", 0), box)
        box.wait()
        with pytest.raises(SessionConflictError, match="belongs to robot 'a', not to 'b'"):
            served.control(ResetSession(session_id=SessionId("a"), robot_id=RobotId("b")))
        with pytest.raises(SessionConflictError):
            served.submit(observation("a", 1, robot_id=RobotId("b")), box)
        with pytest.raises(FieldError, match="session_id: expected an open session"):
            served.control(OverridePrompt(session_id=SessionId("nobody"), prompt="x"))


def test_reset_forgets_and_numbers_may_start_again() -> None:
    with service(Toy()) as served:
        box = Box()
        served.submit(observation("a", 9), box)
        box.wait()
        served.control(ResetSession(session_id=SessionId("a"), robot_id=RobotId("a")))
        served.submit(observation("a", 0), box)
        assert isinstance(box.wait()[-1], ActionChunk)
        served.control(CloseSession(session_id=SessionId("a"), robot_id=RobotId("a")))
        served.submit(observation("b", 0), box)
        box.wait()
        assert {s.session_id for s in _newer(served).sessions} == {"b"}


def test_too_many_sessions_are_refused_with_the_number() -> None:
    with service(Toy(), max_sessions=2) as served:
        box = Box()
        for name in "ab":
            served.submit(observation(name, 0), box)
        with pytest.raises(OverloadedError, match=r"table of sessions is full \(2\)"):
            served.submit(observation("c", 0), box)
        box.wait(2)


def test_nan_never_leaves_and_the_next_observation_is_served() -> None:
    with service(Toy()) as served:
        box = Box()
        served.submit(observation("a", 0, pixel=255), box)
        served.submit(observation("b", 0, state=13.0), box)
        box.wait(2)
        assert {type(outcome) for outcome in box.outcomes} == {UnsafeActionError, InternalError}
        served.submit(observation("a", 1), box)
        assert isinstance(box.wait()[-1], ActionChunk)


def test_cancel_and_close_answer_everybody() -> None:
    policy, served = held_service()
    with served:
        hold(policy)
        first, second, third = Box(), Box(), Box()
        served.submit(observation("a", 0), first)
        assert policy.entered.acquire(timeout=TIMEOUT_S)
        cancelled = served.submit(observation("a", 1), second)
        served.cancel(cancelled)
        served.submit(observation("b", 0), third)
        closer = threading.Thread(target=served.close)
        closer.start()
        policy.gate.set()
        closer.join(TIMEOUT_S)
        assert isinstance(second.wait()[0], CancelledError)
        for box in (first, third):
            assert isinstance(box.wait()[0], ActionChunk | CancelledError)


def test_a_policy_with_a_wrong_shape_is_named_before_serving() -> None:
    class Wrong:
        spec = SPEC

        def __call__(self, observations: Sequence[Observation]) -> Float32Array:
            return np.zeros((len(observations), 1, 1), dtype=np.float32)

    with pytest.raises(GanglionError, match="failed in calibration"):
        service(PlainModel(Wrong())).start()


def _newer(served: LocalService) -> ServiceStats:
    """A picture made after this call: stats never waits, so ask until it is another one."""
    old, pause = served.stats(), threading.Event()
    while (new := served.stats()) is old:
        pause.wait(0.01)
    return new
