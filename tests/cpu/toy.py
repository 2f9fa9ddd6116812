"""A staged toy whose right answer is known in closed form: batching, cutting and sharing must not change it."""

import numpy as np
import torch
from torch import Tensor

from ganglion.layout import PageKind, PageLayout
from ganglion.models.base import StageBatch
from ganglion.spec import PolicySpec, Stage, ViewSpec
from ganglion.types import Float32Array, Observation, RobotId, SessionId, SpanKind

VIEW = ViewSpec(key="observation.images.corner", height=4, width=4)
NUM_STEPS = 4

SPEC = PolicySpec(
    name="toy",
    family="toy",
    version="1",
    views=(VIEW,),
    state_key="observation.state",
    state_dim=2,
    action_dim=2,
    horizon=3,
    num_flow_steps=NUM_STEPS,
    control_hz=20.0,
    action_low=(-1e6, -1e6),
    action_high=(1e6, 1e6),
)


def _stage(name: str, kind: SpanKind, layout: str, **more: object) -> Stage:
    values: dict[str, object] = {
        "name": name,
        "kind": kind,
        "num_units": 1,
        "reads": (),
        "layout": layout,
        "num_pages": 1,
        "num_slots": 1,
        "is_shared": False,
        "is_divisible": False,
    }
    return Stage(**(values | more))  # type: ignore[arg-type]


class Toy:
    """view: mean of the image. context: view + state, on two pages. flow: x += context mean, NUM_STEPS times.

    A state of 13 makes its row raise; an image mean of 255 makes the result NaN.
    """

    def __init__(self) -> None:
        self.spec = SPEC
        self.layouts = (
            PageLayout(name="feature", kind=PageKind.FEATURE, shape=(1,), dtype="float32", slots=1),
            PageLayout(name="kv", kind=PageKind.KV, shape=(2, 2), dtype="float32", slots=2),
            PageLayout(name="state", kind=PageKind.STATE, shape=(3, 2), dtype="float32", slots=1),
        )
        self.stages = (
            _stage("view", SpanKind.ENCODE, "feature", is_shared=True),
            _stage("context", SpanKind.PREFILL, "kv", reads=("view",), num_pages=2),
            _stage(
                "flow",
                SpanKind.DENOISE,
                "state",
                reads=("context",),
                num_units=NUM_STEPS,
                is_divisible=True,
            ),
        )
        self.num_rows_run: list[tuple[str, int]] = []

    def key(self, stage: Stage, observation: Observation) -> bytes:
        return observation.images[VIEW.key].tobytes()

    def run(self, stage: Stage, batch: StageBatch) -> Tensor:
        rows = batch.observations
        self.num_rows_run.append((stage.name, len(rows)))
        if stage.name == "view":
            means = [float(row.images[VIEW.key].mean()) for row in rows]
            return torch.tensor(means)[:, None, None]
        if stage.name == "context":
            for row in rows:
                if row.state[0] == 13:
                    raise RuntimeError("the toy breaks on 13")
            states = torch.from_numpy(np.stack([row.state for row in rows]))
            return (batch.reads["view"] + states[:, None])[:, None].expand(-1, 2, 2, 2)
        x = batch.reads["flow"].clone()
        for at, row in enumerate(batch.rows):
            if row.is_new:
                x[at] = rows[at].seed or 0
        mean = batch.reads["context"].mean(dim=(1, 2))
        x = x + batch.num_units * mean[:, None, None, :]
        return torch.where(mean[:, None, None, :] > 254, torch.nan, x)

    def emit(self, pages: Tensor, observations: tuple[Observation, ...]) -> Float32Array:
        return pages[:, 0].numpy()


def observation(
    session: str, seq: int, *, pixel: int = 1, state: float = 0.0, seed: int = 0, **more: object
) -> Observation:
    values: dict[str, object] = {
        "session_id": SessionId(session),
        "robot_id": RobotId(session),
        "seq": seq,
        "images": {VIEW.key: np.full((4, 4, 3), pixel, dtype=np.uint8)},
        "state": np.full(2, state, dtype=np.float32),
        "prompt": "toy",
        "seed": seed,
    }
    return Observation(**(values | more))  # type: ignore[arg-type]


def expected(seen: Observation) -> Float32Array:
    value = (seen.seed or 0) + NUM_STEPS * (float(seen.images[VIEW.key].mean()) + seen.state[0])
    return np.full((3, 2), value, dtype=np.float32)
