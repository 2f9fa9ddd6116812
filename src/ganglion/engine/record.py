"""Record: a finished engine step as operators see it. Called by `engine.step`. Pure; decides nothing."""

from collections.abc import Mapping, Sequence

from ganglion.engine.executor import PieceResult
from ganglion.engine.work import Piece, StepPlan, Work
from ganglion.types import PieceRecord, RequestId, Row, RowRecord, StepRecord


def step_record(
    plan: StepPlan,
    results: Sequence[PieceResult],
    works: Mapping[RequestId, Work],
    *,
    start_s: float,
    end_s: float,
) -> StepRecord:
    """What the step ran, for whom. `works`: at least those of the plan, those that it finished included."""
    return StepRecord(
        step=plan.step,
        start_s=start_s,
        run_us=(end_s - start_s) * 1e6,
        budget_us=plan.budget_us,
        num_waiting=plan.num_waiting,
        pieces=tuple(
            _piece(piece, result, works) for piece, result in zip(plan.pieces, results, strict=True)
        ),
    )


def _piece(piece: Piece, result: PieceResult, works: Mapping[RequestId, Work]) -> PieceRecord:
    order = piece.order
    return PieceRecord(
        model=order.model,
        stage=order.stage.name,
        kind=order.stage.kind,
        lane=order.lane,
        num_rows=len(order.rows),
        num_units=order.num_units,
        start_s=result.start_s,
        run_us=result.run_us,
        rows=tuple(
            _row(row, works[request_id], order.stage.name, order.num_units)
            for row, request_id in zip(piece.rows, order.rows, strict=True)
        ),
    )


def _row(row: Row, work: Work, stage: str, num_units: int) -> RowRecord:
    span = work.spans[stage]
    return RowRecord(
        session_id=work.observation.session_id,
        request_id=work.request_id,
        seq=work.observation.seq,
        first_unit=row.first_unit,
        num_left=span.cursor + span.num_left - row.first_unit - num_units,
        # what a row perceived for itself is no version when a later observation's perception was faster
        context_version=work.context_version if row.observation is work.seen else 0,
        context_seq=row.observation.seq,
    )
