"""What a step's record says of its rows is what the engine did: order, progress, and the context that was read."""

import itertools
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from ganglion.engine.step import Engine
from ganglion.types import RequestId, RowRecord, SpanKind, StepRecord
from tests.cpu.test_engine import engine
from tests.cpu.toy import NUM_STEPS, SPEC, Toy, observation

TINY_BUDGET_US = 1  # one unit of one stage a step


def late_toy() -> Toy:
    """Any of its flow steps may read a newer context."""
    toy = Toy()
    toy.spec = replace(SPEC, late_context_steps=NUM_STEPS)
    return toy


def drive(core: Engine) -> list[StepRecord]:
    records = []
    while (record := core.step()) is not None:
        records.append(record)
    return records


def rows_of(records: list[StepRecord], request: int, kind: SpanKind) -> list[RowRecord]:
    return [
        row
        for record in records
        for piece in record.pieces
        if piece.kind is kind
        for row in piece.rows
        if row.request_id == request
    ]


def test_a_chunk_under_way_is_recorded_from_perception_to_its_last_step() -> None:
    core = engine(late_toy(), budget_us=TINY_BUDGET_US)
    core.submit(RequestId(5), "toy", observation("a", 3, pixel=7), deadline_s=1.0)
    records = drive(core)
    perceived = rows_of(records, 5, SpanKind.ENCODE) + rows_of(records, 5, SpanKind.PREFILL)
    assert [row.context_version for row in perceived] == [0, 1], "published by the last stage"
    flow = rows_of(records, 5, SpanKind.DENOISE)
    assert [(row.first_unit, row.num_left) for row in flow] == [
        (at, NUM_STEPS - 1 - at) for at in range(NUM_STEPS)
    ]
    assert {(row.session_id, row.seq, row.context_seq) for row in flow} == {("a", 3, 3)}
    assert {row.context_version for row in flow} == {1}


def test_a_row_that_goes_over_to_a_newer_context_says_so() -> None:
    core = engine(late_toy(), budget_us=TINY_BUDGET_US)
    core.submit(RequestId(1), "toy", observation("a", 0, pixel=7), deadline_s=1.0)
    records = []
    while not rows_of(records, 1, SpanKind.DENOISE):
        record = core.step()
        assert record is not None
        records.append(record)
    core.submit(RequestId(2), "toy", observation("a", 1, pixel=9), deadline_s=0.5)
    records += drive(core)
    read = [(row.context_version, row.context_seq) for row in rows_of(records, 1, SpanKind.DENOISE)]
    assert read[0] == (1, 0)
    assert read[-1] == (2, 1), "its own observation is 0; it read that of the later request"
    assert {row.seq for row in rows_of(records, 1, SpanKind.DENOISE)} == {0}


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_records_of_random_lives(data: st.DataObject) -> None:
    """Each row begins where its last one ended, and versions of one session never go back."""
    budget_us = data.draw(st.sampled_from([TINY_BUDGET_US, 2_500, 10_000_000]))
    core, numbers = engine(late_toy(), budget_us=budget_us), itertools.count(1)
    next_seq = dict.fromkeys("abc", 0)
    records = []
    for _ in range(data.draw(st.integers(1, 25))):
        if data.draw(st.booleans()):
            name = data.draw(st.sampled_from("abc"))
            seen = observation(name, next_seq[name], pixel=data.draw(st.integers(0, 3)))
            next_seq[name] += 1
            deadline_s = data.draw(st.floats(0.0, 1.0))
            core.submit(RequestId(next(numbers)), "toy", seen, deadline_s=deadline_s)
        record = core.step()
        records += [] if record is None else [record]
    records += drive(core)
    for request in range(1, next(numbers)):
        flow = rows_of(records, request, SpanKind.DENOISE)
        assert flow[-1].num_left == 0
        for before, after in itertools.pairwise(flow):
            assert after.first_unit == NUM_STEPS - before.num_left
            assert after.context_seq >= before.context_seq
            assert after.context_version >= before.context_version
        assert flow[-1].context_seq >= flow[-1].seq
