import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ganglion import wire
from ganglion.client.conversation import MAX_UNANSWERED, Conversation, ResetDone
from ganglion.clock import SimulatedClock
from ganglion.errors import FieldError, ReplyError

TIMING = dict.fromkeys(("queue_ms", "perceive_ms", "generate_ms", "wait_ms", "infer_ms"), 1.0)


def chunk(seq: int) -> bytes:
    return wire.encode(
        {
            "actions": np.full((2, 3), seq, np.float32),
            "obs_seq": seq,
            "obs_time_ns": 5,
            "session_id": "s",
            "prompt": "push",
            "prompt_overridden": False,
            "deadline_met": True,
            "model_version": "v",
            "context_version": 1,
            "batch_size": 4,
            "timing": TIMING,
            "server_timing": {"infer_ms": 2.5},
        }
    )


@pytest.fixture
def clock():
    return SimulatedClock(10.0)


@pytest.fixture
def talk(clock):
    return Conversation(robot_id="arm", session_id="s", clock=clock)


def observe(talk, **hints):
    return talk.observe({"x": np.zeros(2)}, prompt="push", **hints)


def test_a_request_names_who_what_and_when(talk):
    fields = wire.decode(observe(talk, deadline_ms=100.0).frame)
    assert fields.pop("x").shape == (2,)
    assert fields == {
        "prompt": "push",
        "obs_time_ns": 10_000_000_000,
        "deadline_ms": 100.0,
        "robot_id": "arm",
        "session_id": "s",
        "seq": 0,
    }


def test_the_clock_measures_the_round_trip(talk, clock):
    observe(talk)
    clock.advance(0.0125)
    assert talk.receive(chunk(0)).round_trip_ms == pytest.approx(12.5)


def test_a_session_name_is_made_when_none_is_given(clock):
    names = {
        Conversation(robot_id="arm", session_id=None, clock=clock).session_id for _ in range(9)
    }
    assert len(names) == 9
    assert all(name.startswith("arm-") for name in names)


def test_a_refused_observation_takes_no_number(talk):
    with pytest.raises(FieldError):
        talk.observe({"x": np.zeros(2, object)}, prompt="push")
    assert observe(talk).seq == 0


def test_an_answer_is_handed_out_once(talk):
    observe(talk)
    assert talk.receive(chunk(0)).seq == 0
    assert talk.receive(chunk(0)) is None


def test_a_reset_voids_what_was_asked_before(talk):
    observe(talk)
    reset = talk.reset()
    assert wire.decode(reset.frame)["endpoint"] == "reset"
    assert talk.receive(chunk(0)) is None
    done = wire.encode({"status": "reset successful", "obs_seq": reset.seq})
    assert talk.receive(done) == ResetDone(seq=1)


def test_an_error_keeps_its_words(talk):
    observe(talk)
    body = {
        "code": "overloaded",
        "message": "full",
        "next_step": "wait",
        "error_id": "ab",
        "field": None,
    }
    error = talk.receive(wire.encode({"obs_seq": 0, "error": body}))
    assert isinstance(error, ReplyError)
    assert (error.seq, error.code, str(error), error.advice) == (0, "overloaded", "full", "wait")


def test_unanswered_requests_are_bounded(talk):
    for _ in range(MAX_UNANSWERED + 1):
        observe(talk)
    assert talk.receive(chunk(0)) is None
    assert talk.receive(chunk(1)).seq == 1


class Talk(RuleBasedStateMachine):
    """However requests, answers, resets and give-ups interleave, only wanted answers come out, each once."""

    def __init__(self):
        super().__init__()
        self.talk = Conversation(robot_id="arm", session_id="s", clock=SimulatedClock())
        self.wanted: set[int] = set()
        self.sent: list[int] = []

    @rule()
    def ask(self):
        seq = observe(self.talk).seq
        assert all(seq > old for old in self.sent)
        self.sent.append(seq)
        self.wanted.add(seq)

    @rule(skip=st.integers(1, 5))
    def ask_by_number(self, skip):
        seq = max(self.sent, default=-1) + skip
        assert observe(self.talk, seq=seq).seq == seq
        self.sent.append(seq)
        self.wanted.add(seq)

    @rule(seq=st.integers(0, 60))
    def answer(self, seq):
        answer = self.talk.receive(chunk(seq))
        assert (answer is not None) == (seq in self.wanted)
        if answer is not None:
            assert answer.seq == seq
            assert float(answer.actions[0, 0]) == seq
        self.wanted.discard(seq)

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def give_up(self, data):
        seq = data.draw(st.sampled_from(self.sent))
        self.talk.forget(seq)
        self.wanted.discard(seq)

    @rule()
    def reset(self):
        self.sent.append(self.talk.reset().seq)
        self.wanted = set()
        self.talk.forget(self.sent[-1])

    @invariant()
    def numbers_rise(self):
        assert self.sent == sorted(set(self.sent))


TestTalk = Talk.TestCase
TestTalk.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
