"""Dataset: every sample of every shard in memory, and the batches of one training step.

Called by `train.fit`. Knows no model. A batch is a pure function of (seed, step), so a resumed run sees what an
uninterrupted one would have seen.

Samples of `train.delays` know what was executed after them. Of such a sample a batch asks one of three things:

| share | picture and state of | is given | must say |
|---|---|---|---|
| `late_share` | tick t | what ran in t .. t + d | that, then the expert's actions from t + d on |
| `rolled_share` | tick t, the state rolled forward to t + d | nothing | the expert's actions from t + d on |
| the rest | tick t | nothing | the expert's actions from t on |
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ganglion.errors import FieldError
from ganglion.robots.catalog import METAWORLD_ARM
from ganglion.robots.execution import roll
from ganglion.robots.metaworld import ACTION_DIM, TASKS
from ganglion.train.delays import MAX_DELAY_TICKS
from ganglion.train.demonstrations import DEMONSTRATION_KINDS
from ganglion.types import Float32Array, UInt8Array

ANY = -1
# What samples of `train.delays` have beside the others, and the shape of one.
_EMPTY: dict[str, tuple[int, ...]] = {
    "executed": (MAX_DELAY_TICKS, ACTION_DIM),
    "tick": (),
    "episode": (),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AugmentConfig:
    """How pictures and state are varied; each view on its own."""

    max_shift_px: int = 2
    gain: float = 0.15
    bias: float = 0.06
    state_noise: float = 0.02  # in standard deviations
    unknown_word_share: float = 0.03
    late_share: float = 0.5
    rolled_share: float = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """Mean and standard deviation of state and action."""

    state_mean: Float32Array
    state_std: Float32Array
    action_mean: Float32Array
    action_std: Float32Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """`images` uint8 [b, view, h, w, 3]; `state` and `chunk` normalised; `prompt_index` into `prompts()`."""

    images: UInt8Array
    state: Float32Array
    chunk: Float32Array
    target: Float32Array  # hand to object in 5 cm, object to goal in 10 cm
    prompt_index: npt.NDArray[np.int64]
    num_committed: npt.NDArray[np.int64]  # first actions that are given; ANY: a sample of no delay


def prompts() -> tuple[str, ...]:
    """All training sentences, a fixed number per task, the canonical one first."""
    return tuple(text for task in TASKS.values() for text in (task.prompt, *task.paraphrases))


class Dataset:
    """Samples of all shards in a folder.

    `statistics` are the given ones, else those of the demonstrations alone: what comes later does not move them.
    """

    def __init__(self, data_dir: Path, statistics: Statistics | None = None) -> None:
        paths = sorted(data_dir.glob("*.npz"))
        names = tuple(TASKS)
        parts: dict[str, list[npt.NDArray[np.generic]]] = {}
        for path in paths:
            with np.load(path) as shard:
                if "state" not in shard:
                    continue  # the expert failed in all of its episodes
                for key in ("corner", "gripper", "state", "privileged", "chunk"):
                    parts.setdefault(key, []).append(shard[key])
                num_rows = len(shard["state"])
                parts.setdefault("is_late", []).append(np.full(num_rows, "executed" in shard))
                for key in _EMPTY:
                    empty = np.zeros((num_rows, *_EMPTY[key]), np.float32)
                    values = shard[key] if "executed" in shard else empty
                    parts.setdefault(key, []).append(values)
                parts.setdefault("shard", []).append(np.full(num_rows, len(parts["is_late"])))
            task, kind, *_ = path.name.split(".")
            parts.setdefault("task", []).append(np.full(num_rows, names.index(task)))
            parts.setdefault("is_demonstration", []).append(
                np.full(num_rows, kind in DEMONSTRATION_KINDS)
            )
        if not parts:
            raise FieldError(
                "data_dir",
                expected="shards (*.npz) with samples",
                got=f"none in {data_dir}",
                next_step="run: ganglion train collect",
            )
        self.num_shards = len(paths)
        self._views = tuple(np.concatenate(parts.pop(key)) for key in ("corner", "gripper"))
        self._state = np.concatenate(parts["state"]).astype(np.float32)
        self._chunk = np.concatenate(parts["chunk"]).astype(np.float32)
        self._task = np.concatenate(parts["task"]).astype(np.int64)
        privileged = np.concatenate(parts["privileged"]).astype(np.float32)
        hand, thing, goal = privileged[:, :3], privileged[:, 4:7], privileged[:, 36:39]
        # in units in which a grasp's tolerance is a visible error
        self._target = np.concatenate([(thing - hand) / 0.05, (goal - thing) / 0.1], axis=1)
        self._executed = np.concatenate(parts["executed"]).astype(np.float32)
        shard, episode, tick = (
            np.concatenate(parts[key]).astype(np.int64) for key in ("shard", "episode", "tick")
        )
        is_late = np.concatenate(parts["is_late"]).astype(bool)
        self._later = _later_rows(shard, episode, tick, is_late)
        rows = np.concatenate(parts["is_demonstration"]).astype(bool)
        rows |= not rows.any()
        self.statistics = statistics or _statistics(self._state[rows], self._chunk[rows])

    def __len__(self) -> int:
        return len(self._state)

    def batch(self, *, step: int, batch_size: int, seed: int, augment: AugmentConfig) -> Batch:
        """The samples of one step: every epoch is a fresh permutation."""
        steps_per_epoch = max(1, len(self) // batch_size)
        epoch, index = divmod(step, steps_per_epoch)
        order = np.random.default_rng([seed, 1, epoch]).permutation(len(self))
        rows = np.sort(order[index * batch_size : (index + 1) * batch_size])
        rng = np.random.default_rng([seed, 2, step])
        views = [_varied(view[rows], rng, augment) for view in self._views]
        statistics = self.statistics
        state, chunk, num_committed = self._asked(rows, rng, augment)
        state = (state - statistics.state_mean) / statistics.state_std
        state += rng.normal(size=state.shape) * augment.state_noise
        per_task = len(prompts()) // len(TASKS)
        # half of the time the canonical sentence, else one of its paraphrases
        wording = np.where(rng.random(len(rows)) < 0.5, 0, rng.integers(1, per_task, len(rows)))
        return Batch(
            images=np.stack(views, axis=1),
            state=state.astype(np.float32),
            chunk=(chunk - statistics.action_mean) / statistics.action_std,
            target=self._target[rows],
            prompt_index=self._task[rows] * per_task + wording,
            num_committed=num_committed,
        )

    def _asked(
        self, rows: npt.NDArray[np.int64], rng: np.random.Generator, augment: AugmentConfig
    ) -> tuple[Float32Array, Float32Array, npt.NDArray[np.int64]]:
        """State, chunk and number of given actions of each row, by the table above."""
        state, chunk = self._state[rows], self._chunk[rows]
        num_committed = np.full(len(rows), ANY)
        draws = rng.random((len(rows), 2))
        for index, row in enumerate(rows):
            later = self._later[row]
            if later is None:
                continue
            num_committed[index] = 0
            kind, which = draws[index]
            if kind >= augment.late_share + augment.rolled_share or not len(later):
                continue
            other, delay = later[int(which * len(later))]
            executed = self._executed[row, :delay]
            if kind < augment.late_share:
                num_committed[index] = delay
                chunk[index] = np.concatenate([executed, self._chunk[other]])[: chunk.shape[1]]
            else:
                state[index] = roll(state[index], executed, METAWORLD_ARM)
                chunk[index] = self._chunk[other]
        return state, chunk, num_committed


def _later_rows(
    shard: npt.NDArray[np.int64],
    episode: npt.NDArray[np.int64],
    tick: npt.NDArray[np.int64],
    is_late: npt.NDArray[np.bool_],
) -> list[npt.NDArray[np.int64] | None]:
    """Of each row the rows [n, 2] (row, ticks later) of its episode within reach; None without delay."""
    found: list[npt.NDArray[np.int64] | None] = []
    for row in range(len(tick)):
        if not is_late[row]:
            found.append(None)
            continue
        others = np.arange(row + 1, min(row + 1 + MAX_DELAY_TICKS, len(tick)))
        delay = tick[others] - tick[row]
        is_same = (shard[others] == shard[row]) & (episode[others] == episode[row])
        kept = is_same & (delay > 0) & (delay <= MAX_DELAY_TICKS)
        found.append(np.stack([others[kept], delay[kept]], axis=1))
    return found


def _statistics(state: Float32Array, chunk: Float32Array) -> Statistics:
    return Statistics(
        state_mean=state.mean(0),
        state_std=state.std(0) + 1e-4,
        action_mean=chunk.mean((0, 1)),
        action_std=chunk.std((0, 1)) + 1e-4,
    )


def _varied(views: UInt8Array, rng: np.random.Generator, augment: AugmentConfig) -> UInt8Array:
    """Each picture shifted by whole pixels (edges repeated), and its brightness and contrast changed."""
    num_rows, height_px, width_px, _ = views.shape
    reach = augment.max_shift_px
    padded = np.pad(views, ((0, 0), (reach, reach), (reach, reach), (0, 0)), mode="edge")
    offsets = rng.integers(0, 2 * reach + 1, (num_rows, 2))
    gains = 1 + rng.uniform(-augment.gain, augment.gain, (num_rows, 1))
    biases = 255 * rng.uniform(-augment.bias, augment.bias, (num_rows, 1))
    levels = np.clip(np.arange(256)[None] * gains + biases, 0, 255).astype(np.uint8)
    out = np.empty_like(views)
    for row, (top, left) in enumerate(offsets):
        out[row] = levels[row][padded[row, top : top + height_px, left : left + width_px]]
    return out
