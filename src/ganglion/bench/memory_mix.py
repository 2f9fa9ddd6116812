"""The mix of `bench memory`: sixteen sessions of two models, their cameras, instructions, histories and phases.

Pure data and seeded pictures; knows neither pages nor the engine. Called by `bench.memory` and `bench.memory_paged`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from ganglion.spec import PolicySpec
from ganglion.types import Observation, RobotId, SessionId, UInt8Array

HISTORIES = (1, 2, 4, 16)  # observations whose features a session keeps, in turns
QUICK_HISTORIES = (1, 2, 1, 2)
PERIOD_STEPS = 8  # engine steps from one observation of a session to its next
NUM_FLOW_STEPS = (
    10  # more than the period: a chunk is still being made when the next observation comes
)
COARSE_PX = 10  # a picture: smooth patches of this size, and noise


class Cell(StrEnum):
    """What the sessions of one work cell look through."""

    TWO_SHARED = "two shared cameras"
    ONE_SHARED = "one shared camera, one of its own"
    NONE_SHARED = "two cameras of its own"


CELLS = {Cell.TWO_SHARED: 3, Cell.ONE_SHARED: 3, Cell.NONE_SHARED: 2}  # sessions of each model
PROMPTS = {  # who sees one scene works at one task
    Cell.TWO_SHARED: "open the drawer",
    Cell.ONE_SHARED: "push the puck to the goal",
    Cell.NONE_SHARED: "close the door",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One session. `cameras`: one a view of its model; equal names are one camera. `phase`: of PERIOD_STEPS."""

    session_id: SessionId
    model: str
    cell: Cell
    cameras: tuple[str, ...]
    prompt: str
    history: int
    phase: int


def members(models: Sequence[str], histories: Sequence[int]) -> tuple[Member, ...]:
    """Each model gets every cell; robots of one cell are out of phase, so are the models."""
    found: list[Member] = []
    for model in models:
        of_model = 0
        for cell, num_sessions in CELLS.items():
            for at in range(num_sessions):
                own = f"{model}/{cell}/{at}"
                shared = f"{model}/{cell}"
                cameras = {
                    Cell.TWO_SHARED: (f"{shared}/fixed", f"{shared}/second"),
                    Cell.ONE_SHARED: (f"{shared}/fixed", f"{own}/wrist"),
                    Cell.NONE_SHARED: (f"{own}/fixed", f"{own}/wrist"),
                }[cell]
                found.append(
                    Member(
                        session_id=SessionId(own),
                        model=model,
                        cell=cell,
                        cameras=cameras,
                        prompt=PROMPTS[cell],
                        history=histories[of_model % len(histories)],
                        phase=of_model % PERIOD_STEPS,
                    )
                )
                of_model += 1
    return tuple(found)


class Cameras:
    """What every camera sees in every period: smooth patches that drift, and sensor noise; never the same twice."""

    def __init__(self, specs: Mapping[str, PolicySpec], seed: int) -> None:
        self._specs, self._seed = specs, seed

    def observation(self, member: Member, at: int) -> Observation:
        """The member's observation of period `at`."""
        spec = self._specs[member.model]
        rng = np.random.default_rng([self._seed, at, *member.session_id.encode()])
        return Observation(
            session_id=member.session_id,
            robot_id=RobotId(member.session_id),
            seq=at,
            images={
                view.key: self._picture(camera, at, view.height, view.width)
                for view, camera in zip(spec.views, member.cameras, strict=True)
            },
            state=rng.standard_normal(spec.state_dim).astype(np.float32) * 0.1,
            prompt=member.prompt,
        )

    def _picture(self, camera: str, at: int, height: int, width: int) -> UInt8Array:
        scene = np.random.default_rng([self._seed, *camera.encode()])
        patches = scene.integers(20, 220, (-(-height // COARSE_PX), -(-width // COARSE_PX), 3))
        smooth = np.kron(patches, np.ones((COARSE_PX, COARSE_PX, 1)))[:height, :width]
        noise = np.random.default_rng([self._seed, at, *camera.encode()])
        drifted = np.roll(smooth, at, axis=1) + noise.normal(0.0, 4.0, (height, width, 3))
        return np.clip(drifted, 0, 255).astype(np.uint8)
