"""Guidance: the numbers of the papers, the true Jacobian, and rows that are not guided stay what they were."""

import math
import queue
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from ganglion.config import EngineConfig, MemoryConfig
from ganglion.kernels.cpu import why_not_packed
from ganglion.models.base import StageBatch
from ganglion.models.packing import pack
from ganglion.models.policies.flow_checkpoint import FlowCheckpoint
from ganglion.models.policies.flow_model import FlowModel
from ganglion.models.policies.guidance import Aim, Guide, Pull, linear_weights, soft_weights
from ganglion.models.tiny import TINY_FLOW, TINY_PROMPTS, tiny_flow
from ganglion.pipeline.local import LocalService
from ganglion.service import Outcome
from ganglion.types import ActionChunk, Execution, Observation, Plan, RobotId, Row, SessionId

ROWS, HORIZON, ACTION_DIM = 3, TINY_FLOW.horizon, TINY_FLOW.action_dim
STEPS = TINY_FLOW.num_flow_steps


@pytest.fixture(scope="module")
def tiny() -> FlowCheckpoint:
    torch.set_num_threads(1)
    return tiny_flow(seed=3)


def context_and_noise(tiny: FlowCheckpoint, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(11)
    size = (rows, 2, TINY_FLOW.view_height_px, TINY_FLOW.view_width_px, 3)
    images = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
    state = torch.randn(rows, TINY_FLOW.state_dim, generator=generator).to(tiny.policy.dtype)
    prompts = [TINY_PROMPTS[at % 3] for at in range(rows)]
    with torch.inference_mode():
        text = tiny.policy.prefill_text(tiny.processor.tokens(prompts))
        seen = tiny.policy.prefill_observation(tiny.policy.encode_views(images), state, text)
        context = torch.cat([text, seen], dim=3)
    return context, torch.randn(rows, HORIZON, ACTION_DIM, generator=generator)


def aim(pull: Pull, *, num_known: int = 8, num_committed: int = 3, value: float = 0.7) -> Aim:
    known = torch.full((num_known, ACTION_DIM), value)
    return Aim(pull=pull, known=known, num_committed=num_committed)


def denoised(
    tiny: FlowCheckpoint, aims: tuple[Aim | None, ...], *, rows: slice = slice(None)
) -> Tensor:
    context, noise = (value[rows] for value in context_and_noise(tiny))
    tau = torch.zeros(len(noise), HORIZON)
    width = torch.full((len(noise),), 1 / STEPS)
    return tiny.policy.denoise(noise, tau, width, context, STEPS, aims)


# --- weights and strength against the formulas, number by number ---------------------------------------------------


@pytest.mark.parametrize(("d", "n"), [(0, 12), (3, 8), (8, 8), (4, 5), (0, 0), (2, 40)])
def test_soft_mask_is_the_papers(d: int, n: int) -> None:
    got = soft_weights(d, n, 12)
    for i in range(12):
        c = (n - i) / (n - d + 1)  # n rows are known: H - s in the paper
        want = 1.0 if i < min(d, n) else c * (math.e**c - 1) / (math.e - 1) if i < n else 0.0
        assert got[i].item() == pytest.approx(want, abs=1e-6), i


@pytest.mark.parametrize(("d", "n"), [(0, 48), (3, 48), (8, 40), (12, 48), (4, 6), (0, 0), (2, 2)])
def test_linear_weights_are_lerobots(d: int, n: int) -> None:
    end = min(10, n)
    start = min(d, end)
    line = np.linspace(1.0, 0.0, end - start + 2)[1:-1]
    want = np.concatenate([np.ones(start), line, np.zeros(48 - end)])
    np.testing.assert_allclose(linear_weights(d, n, 48).numpy(), want, atol=1e-6)


@pytest.mark.parametrize(("pull", "beta"), [(Pull.JACOBIAN, 5.0), (Pull.IDENTITY, 10.0)])
def test_strength_is_the_formula_and_clipped_at_beta(pull: Pull, beta: float) -> None:
    guide = Guide.of([aim(pull)], pull, HORIZON, ACTION_DIM)
    taus = [0.0, 0.05, 0.2, 0.4, 0.5, 0.8, 0.99, 1.0]
    for tau in taus:
        got = guide.strength(torch.full((1, HORIZON), tau))
        if 0.0 < tau < 1.0:
            r_squared = (1 - tau) ** 2 / (tau**2 + (1 - tau) ** 2)
            want = min(beta, (1 - tau) / (tau * r_squared))
        else:
            want = beta
        assert got.unique().item() == pytest.approx(want, rel=1e-4), tau


def test_identity_is_lerobots_step() -> None:
    """Its code counts time from 1 down to 0 and its velocity points to the noise."""
    generator = torch.Generator().manual_seed(0)
    x, v = torch.randn(2, 1, HORIZON, ACTION_DIM, generator=generator)
    one = aim(Pull.IDENTITY)
    guide = Guide.of([one], Pull.IDENTITY, HORIZON, ACTION_DIM)
    for tau in (0.0, 0.2, 0.6, 0.8):
        time, v_theirs = 1.0 - tau, -v
        left_over = torch.zeros(HORIZON, ACTION_DIM)
        left_over[:8] = 0.7
        weights = linear_weights(3, 8, HORIZON)[:, None]
        error = (left_over - (x - time * v_theirs)) * weights
        inv_r2 = ((1 - tau) ** 2 + tau**2) / (1 - tau) ** 2
        strength = 10.0 if tau == 0.0 else min((1 - tau) / tau * inv_r2, 10.0)
        theirs = v_theirs - strength * error
        got = guide.identity(x, torch.full((1, HORIZON), tau), v)
        torch.testing.assert_close(got, -theirs)


# --- the Jacobian ------------------------------------------------------------------------------------------------


def test_correction_is_the_transposed_jacobian_by_finite_differences() -> None:
    tiny = tiny_flow(seed=3, dtype=torch.float64)
    context, noise = context_and_noise(tiny, rows=1)
    context, x = context.clone(), noise.double()
    tau = torch.full((1, HORIZON), 0.4, dtype=torch.float64)
    guide = Guide.of([aim(Pull.JACOBIAN)], Pull.JACOBIAN, HORIZON, ACTION_DIM)

    def velocity(x: Tensor, tau: Tensor) -> Tensor:
        return tiny.policy.velocity(x, tau, context)

    def heading(x: Tensor) -> Tensor:
        return x + 0.6 * velocity(x, tau)

    v = velocity(x, tau)
    correction = (guide.jacobian(x, tau, velocity) - v) / guide.strength(tau)
    error = (guide.target - heading(x)) * guide.weights[..., None]
    generator = torch.Generator().manual_seed(1)
    for _ in range(8):
        direction = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        slope = (heading(x + 1e-5 * direction) - heading(x - 1e-5 * direction)) / 2e-5
        assert (slope * error).sum().item() == pytest.approx(
            (correction * direction).sum().item(), rel=1e-5
        )
    assert (correction - error).abs().max() > 1e-2, "the Jacobian is not the identity"


@pytest.mark.skipif(
    bool(why_not_packed(torch.bfloat16)), reason="no bfloat16 weights laid out here"
)
def test_packed_weights_have_the_same_jacobian() -> None:
    plain, packed = tiny_flow(seed=3, dtype=torch.bfloat16), tiny_flow(seed=3, dtype=torch.bfloat16)
    assert pack(packed.policy) > 0
    aims = (aim(Pull.JACOBIAN),) * ROWS
    exact = denoised(tiny_flow(seed=3), aims)
    plain_error = (denoised(plain, aims) - exact).abs().mean().item()
    packed_error = (denoised(packed, aims) - exact).abs().mean().item()
    assert packed_error < 1.5 * plain_error + 1e-3, f"packed {packed_error}, plain {plain_error}"


# --- whole chunks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pull", list(Pull))
def test_guided_chunks_begin_near_what_runs_anyway(tiny: FlowCheckpoint, pull: Pull) -> None:
    free = denoised(tiny, ())
    guided = denoised(tiny, (aim(pull),) * ROWS)
    assert torch.isfinite(guided).all()
    assert (guided[:, :3] - 0.7).abs().mean() < 0.3 * (free[:, :3] - 0.7).abs().mean()
    assert (guided - free)[:, 3:].abs().max() > 1e-3, "the rest follows"


def test_a_batch_may_mix_modes_and_others_stay_as_they_are(tiny: FlowCheckpoint) -> None:
    mixed = denoised(tiny, (aim(Pull.JACOBIAN), None, aim(Pull.IDENTITY)))
    free = denoised(tiny, ())
    assert (mixed[1] - free[1]).abs().max() < 1e-5
    for row, pull in ((0, Pull.JACOBIAN), (2, Pull.IDENTITY)):
        alone = denoised(tiny, (aim(pull),), rows=slice(row, row + 1))
        assert (mixed[row] - alone[0]).abs().max() < 1e-5
        assert (mixed[row] - free[row]).abs().max() > 1e-2


@pytest.mark.parametrize("pull", list(Pull))
def test_nothing_known_is_no_guidance(tiny: FlowCheckpoint, pull: Pull) -> None:
    none = aim(pull, num_known=0, num_committed=0)
    assert (denoised(tiny, (none,) * ROWS) - denoised(tiny, ())).abs().max() < 1e-5


# --- as the engine asks for it -----------------------------------------------------------------------------------


def row(execution: Execution, *, plan: Plan | None, at: int = 0, first_unit: int = 0) -> Row:
    seen = Observation(
        session_id=SessionId(f"arm-{at}"),
        robot_id=RobotId(f"arm-{at}"),
        seq=0,
        images={},
        state=np.zeros(TINY_FLOW.state_dim, np.float32),
        prompt="",
        seed=at,
        execution=execution,
    )
    return Row(observation=seen, first_unit=first_unit, is_new=first_unit == 0, plan=plan)


def run_denoise(tiny: FlowCheckpoint, rows: tuple[Row, ...], *, cuts: tuple[int, ...]) -> Tensor:
    """The denoise stage, cut into pieces of `cuts` flow steps."""
    model = FlowModel(tiny.policy, tiny.processor, tiny.spec)
    stage = model.stages[-1]
    context, _ = context_and_noise(tiny, rows=len(rows))
    by_token = context.permute(0, 3, 1, 2, 4, 5)
    num_slots = -(-by_token.shape[1] // 4) * 4
    padded = by_token.new_zeros(len(rows), num_slots, *by_token.shape[2:])
    padded[:, : by_token.shape[1]] = by_token
    pages = padded.view(len(rows), -1, 4, *by_token.shape[2:])
    latents = torch.zeros(len(rows), 1, HORIZON, ACTION_DIM)
    done = 0
    for num_units in cuts:
        now = tuple(
            Row(observation=r.observation, first_unit=done, is_new=done == 0, plan=r.plan)
            for r in rows
        )
        reads = {"text": pages[:, :4], "observation": pages[:, 4:], stage.name: latents}
        with torch.inference_mode():
            latents = model.run(stage, StageBatch(rows=now, reads=reads, num_units=num_units))
        done += num_units
    return latents[:, 0]


PLAN = Plan(actions=np.full((7, ACTION_DIM), 0.2, np.float32), num_committed=3)


def test_rows_are_guided_by_their_own_mode_and_plan(tiny: FlowCheckpoint) -> None:
    modes = (Execution.RTC, Execution.RTC_IDENTITY, Execution.PREFIX, Execution.NAIVE)
    rows = tuple(row(mode, plan=PLAN, at=at) for at, mode in enumerate(modes))
    guided = run_denoise(tiny, rows, cuts=(STEPS,))
    plain = tuple(row(mode, plan=None, at=at) for at, mode in enumerate(modes))
    free = run_denoise(tiny, plain, cuts=(STEPS,))
    target = tiny.processor.prefix(PLAN.actions)[:3]
    for at in range(2):
        before, after = ((chunk[at, :3] - target).abs().mean() for chunk in (free, guided))
        assert after < 0.5 * before, modes[at]
    torch.testing.assert_close(guided[2, :3], target)
    assert torch.equal(guided[3], free[3]) or (guided[3] - free[3]).abs().max() < 1e-5


@pytest.mark.parametrize("mode", [Execution.RTC, Execution.RTC_IDENTITY])
def test_guided_steps_may_be_cut_anywhere(tiny: FlowCheckpoint, mode: Execution) -> None:
    rows = (row(mode, plan=PLAN), row(Execution.NAIVE, plan=PLAN, at=1))
    whole = run_denoise(tiny, rows, cuts=(STEPS,))
    cut = run_denoise(tiny, rows, cuts=(1, 3, 1))
    assert (whole - cut).abs().max() < 1e-5


@pytest.mark.parametrize("mode", list(Execution))
def test_served_chunks_continue_what_the_robot_says_it_executes(
    tiny: FlowCheckpoint, mode: Execution
) -> None:
    model = FlowModel(tiny.policy, tiny.processor, tiny.spec)
    rng = np.random.default_rng(5)
    prefix = np.full((3, ACTION_DIM), 0.2, np.float32)
    seen = Observation(
        session_id=SessionId("arm"),
        robot_id=RobotId("arm"),
        seq=0,
        images={
            view.key: rng.integers(0, 256, (view.height, view.width, 3), dtype=np.uint8)
            for view in tiny.spec.views
        },
        state=np.zeros(TINY_FLOW.state_dim, np.float32),
        prompt=TINY_PROMPTS[0],
        seed=1,
        execution=mode,
        executed_until=0,
    )
    late = replace(seen, seq=1, executed_until=4, action_prefix=prefix, inference_delay_hint=3)
    memory = MemoryConfig(arena_bytes=1 << 22, large_page_bytes=1 << 16)
    chunks: list[ActionChunk] = []
    with LocalService(model, engine=EngineConfig(), memory=memory) as service:
        for item in (seen, late):
            outcomes: queue.Queue[Outcome] = queue.Queue()
            service.submit(item, outcomes.put)
            outcome = outcomes.get(timeout=20.0)
            assert isinstance(outcome, ActionChunk), outcome
            chunks.append(outcome)
    free, continued = (np.abs(chunk.actions[:3] - prefix).mean() for chunk in chunks)
    match mode:
        case Execution.PREFIX:
            assert continued < 1e-6
        case Execution.RTC | Execution.RTC_IDENTITY:
            assert continued < 0.5 * free
        case _:
            assert continued == pytest.approx(free), "the server is not asked to do anything"
