"""Temporal dataset: episodes as the frozen trunk sees them, encoded once, and the batches of one training step.

Called by `train.temporal`. Keys and values of every frame stay in memory (0.2 MB each for the shipped sizes), so that a
step costs the memory's and the expert's work only. A batch is a pure function of (seed, step).
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ganglion.errors import FieldError
from ganglion.models.policies.flow_checkpoint import FlowCheckpoint
from ganglion.models.policies.temporal import TemporalPolicy
from ganglion.robots.metaworld import TASKS

GOAL_SCALE_M = 0.1  # of the auxiliary target: a grasp's tolerance is a visible error
_ENCODE_ROWS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class TemporalBatch:
    """Whole episodes for the recurrent road, and rows (frames of these episodes) for the flow loss.

    `frames` [episode, place] are frame ids, -1 behind an episode's end. `rows` are frame ids, `row_episode` and
    `row_place` say where they stand in `frames`. `past` [row, T] are places in the same episode, -1 for none.
    """

    frames: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]
    row_episode: npt.NDArray[np.int64]
    row_place: npt.NDArray[np.int64]
    past: npt.NDArray[np.int64]
    has_history: npt.NDArray[np.bool_]
    has_recurrent: npt.NDArray[np.bool_]


class TemporalDataset:
    """All frames of all shards in a folder. Frames of an episode are adjacent and in order."""

    def __init__(
        self, data_dir: Path, policy: TemporalPolicy, checkpoint: FlowCheckpoint, *, num_past: int
    ) -> None:
        paths = sorted(data_dir.glob("*.npz"))
        states, chunks, goals, visible = [], [], [], []
        kvs, pages, tasks, starts = [], [], [], []
        self._num_past = num_past
        names = tuple(TASKS)
        num_frames = 0
        self.prompts = tuple(
            text for task in TASKS.values() for text in (task.prompt, *task.paraphrases)
        )
        flow = policy.flow
        with torch.inference_mode():
            self.text_kv = flow.prefill_text(checkpoint.processor.tokens(self.prompts))
        for path in paths:
            with np.load(path) as shard:
                if "state" not in shard:
                    continue
                task = names.index(path.name.split(".")[0])
                episode, places = shard["episode"], []
                for first in np.flatnonzero(np.diff(episode, prepend=-1)):
                    starts.append(num_frames + int(first))
                    places.append(int(first))
                seq = np.arange(len(episode)) - np.repeat(places, np.diff([*places, len(episode)]))
                images = np.stack([shard["corner"], shard["gripper"]], axis=1)
                state = checkpoint.processor.state(shard["state"].astype(np.float32))
                kv, page = self._encoded(policy, images, state, torch.from_numpy(seq), task)
                kvs.append(kv)
                pages.append(page)
                states.append(state)
                chunks.append(checkpoint.processor.prefix(shard["chunk"].astype(np.float32)))
                goals.append(torch.from_numpy(shard["privileged"][:, 36:39].astype(np.float32)))
                visible.append(shard["is_goal_visible"])
                tasks.append(np.full(len(episode), task))
                num_frames += len(episode)
        if not kvs:
            raise FieldError(
                "data_dir", expected="shards (*.npz) with samples", got=f"none in {data_dir}"
            )
        self.observation_kv, self.pages = torch.cat(kvs), torch.cat(pages)
        self.chunk = torch.cat(chunks)
        goal = torch.cat(goals)
        self.goal = (goal - goal.mean(0)) / GOAL_SCALE_M
        self.is_goal_visible = torch.from_numpy(np.concatenate(visible))
        self._task = np.concatenate(tasks)
        self._bounds = np.array([*starts, num_frames])

    def __len__(self) -> int:
        return len(self.chunk)

    @property
    def num_episodes(self) -> int:
        """Episodes in all shards."""
        return len(self._bounds) - 1

    def _encoded(
        self,
        policy: TemporalPolicy,
        images: npt.NDArray[np.uint8],
        state: Tensor,
        seq: Tensor,
        task: int,
    ) -> tuple[Tensor, Tensor]:
        """Keys and values [frame layer 2 obs head dim], memory pages [frame row column], under the canonical prompt."""
        kvs, pages = [], []
        flow = policy.flow
        with torch.inference_mode():
            for first in range(0, len(images), _ENCODE_ROWS):
                part = slice(first, first + _ENCODE_ROWS)
                features = flow.encode_views(torch.from_numpy(images[part]))
                text_kv = self.text_kv[[3 * task]].expand(len(features), -1, -1, -1, -1, -1)
                kv = flow.prefill_observation(features, state[part].to(flow.dtype), text_kv)
                kvs.append(kv)
                pages.append(policy.remember(kv, state[part], seq[part]))
        return torch.cat(kvs).clone(), torch.cat(pages).clone()

    def text_of(self, rows: npt.NDArray[np.int64]) -> Tensor:
        """Keys and values of each row's canonical instruction."""
        return self.text_kv[torch.from_numpy(3 * self._task[rows])]

    def batch(
        self, *, step: int, num_episodes: int, num_rows: int, seed: int, road_dropout: float
    ) -> TemporalBatch:
        """The rows of one step. Every road is dropped now and then, so that each learns to do without the other."""
        rng = np.random.default_rng([seed, step])
        chosen = rng.choice(self.num_episodes, num_episodes, replace=False)
        lengths = self._bounds[chosen + 1] - self._bounds[chosen]
        places = np.arange(int(lengths.max()))
        frames = np.where(places < lengths[:, None], self._bounds[chosen, None] + places, -1)
        row_episode = rng.choice(num_episodes, num_rows, p=lengths / lengths.sum())
        row_place = rng.integers(lengths[row_episode])
        past = np.full((num_rows, self._num_past), -1)
        for row, place in enumerate(row_place):
            kept = _past_of(rng, int(place), self._num_past)
            past[row, : len(kept)] = kept
        return TemporalBatch(
            frames=frames,
            rows=frames[row_episode, row_place],
            row_episode=row_episode,
            row_place=row_place,
            past=past,
            has_history=rng.random(num_rows) >= road_dropout,
            has_recurrent=rng.random(num_rows) >= road_dropout,
        )


def _past_of(rng: np.random.Generator, place: int, num_past: int) -> npt.NDArray[np.int64]:
    """Earlier places that a row remembers: some of the newest, and others that whatever retention rule may have kept."""
    num_kept = min(place, num_past)
    num_newest = int(rng.integers(num_kept + 1))
    older = place - num_newest
    others = rng.permutation(older)[: num_kept - num_newest]
    return np.sort(np.concatenate([others, np.arange(older, place)])).astype(np.int64)
