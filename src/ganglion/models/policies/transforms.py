"""Transforms: a robot's numbers and words into the network's, and the network's actions back, in LeRobot's files.

Owns `Processor` and its two pipelines on disk (policy_preprocessor.json, policy_postprocessor.json and their state
files). Called by models and by `train`. Knows no network.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor

from ganglion.errors import CheckpointError
from ganglion.models.tokenizer import FILE_NAME as TOKENIZER_FILE
from ganglion.models.tokenizer import WordTokenizer
from ganglion.models.weights import load_tensors, save_tensors

STATE_KEY = "observation.state"
ACTION_KEY = "action"
PREPROCESSOR_FILE = "policy_preprocessor.json"
POSTPROCESSOR_FILE = "policy_postprocessor.json"
_EPS = 1e-8
# Steps that LeRobot writes and that mean nothing here: batching and devices are the engine's.
_PASSED_OVER = ("rename_observations_processor", "to_batch_processor", "device_processor")


@dataclass(frozen=True, slots=True, kw_only=True)
class MeanStd:
    """LeRobot's MEAN_STD normalisation of one vector."""

    mean: Float32[Tensor, " dim"]
    std: Float32[Tensor, " dim"]

    def normalised(self, values: Float[Tensor, "*b dim"]) -> Float[Tensor, "*b dim"]:
        return (values - self.mean) / (self.std + _EPS)

    def restored(self, values: Float[Tensor, "*b dim"]) -> Float[Tensor, "*b dim"]:
        return values * (self.std + _EPS) + self.mean


class Processor:
    """Robot's units in, network's units out, and back; actions are clipped to the bounds of the robot."""

    def __init__(
        self,
        *,
        tokenizer: WordTokenizer,
        state: MeanStd,
        action: MeanStd,
        action_low: Sequence[float],
        action_high: Sequence[float],
    ) -> None:
        self.tokenizer = tokenizer
        self._state, self._action = state, action
        self._low, self._high = torch.tensor(action_low), torch.tensor(action_high)

    @property
    def state_statistics(self) -> MeanStd:
        """What states are normalised with."""
        return self._state

    @property
    def action_statistics(self) -> MeanStd:
        """What actions are normalised with."""
        return self._action

    def tokens(self, prompts: Sequence[str]) -> Int[Tensor, "b text"]:
        """Token ids of instructions."""
        return torch.from_numpy(np.stack([self.tokenizer.encode(prompt) for prompt in prompts]))

    def state(self, state: Float32[np.ndarray, "b dim"]) -> Float32[Tensor, "b dim"]:
        """Normalised state."""
        return self._state.normalised(torch.tensor(state))

    def prefix(self, actions: Float32[np.ndarray, "*b dim"]) -> Float32[Tensor, "*b dim"]:
        """Committed actions in the network's units."""
        return self._action.normalised(torch.tensor(actions))  # a copy: plans are read-only

    def actions(
        self, latents: Float[Tensor, "b horizon dim"]
    ) -> Float32[np.ndarray, "b horizon dim"]:
        """The robot's actions of fully denoised latents. NaN stays NaN, for the guard behind to see."""
        restored = self._action.restored(latents.float())
        return torch.clamp(restored, self._low, self._high).numpy()

    def save(self, folder: Path) -> None:
        """Write both pipelines, their statistics and the vocabulary."""
        self.tokenizer.save(folder)
        steps: list[dict[str, Any]] = [
            {"registry_name": "rename_observations_processor", "config": {"rename_map": {}}},
            {"registry_name": "to_batch_processor", "config": {}},
            {
                "registry_name": "word_tokenizer_processor",
                "config": {"file": TOKENIZER_FILE, "max_length": self.tokenizer.num_tokens},
            },
            {"registry_name": "device_processor", "config": {"device": "cpu", "float_dtype": None}},
            {"registry_name": "normalizer_processor", "config": self._norm_config()},
        ]
        _save_pipeline(folder, PREPROCESSOR_FILE, steps, self._statistics())
        steps = [
            {"registry_name": "unnormalizer_processor", "config": self._norm_config()},
            {"registry_name": "device_processor", "config": {"device": "cpu", "float_dtype": None}},
        ]
        _save_pipeline(folder, POSTPROCESSOR_FILE, steps, self._statistics())

    def _norm_config(self) -> dict[str, Any]:
        return {
            "eps": _EPS,
            "features": {
                STATE_KEY: {"type": "STATE", "shape": list(self._state.mean.shape)},
                ACTION_KEY: {"type": "ACTION", "shape": list(self._action.mean.shape)},
            },
            "norm_map": {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"},
        }

    def _statistics(self) -> dict[str, Tensor]:
        return {
            f"{STATE_KEY}.mean": self._state.mean,
            f"{STATE_KEY}.std": self._state.std,
            f"{ACTION_KEY}.mean": self._action.mean,
            f"{ACTION_KEY}.std": self._action.std,
        }

    @classmethod
    def load(
        cls, folder: Path, *, action_low: Sequence[float], action_high: Sequence[float]
    ) -> "Processor":
        """Read both pipelines. Raises CheckpointError naming a step or a statistic that cannot be served."""
        before = _load_pipeline(
            folder, PREPROCESSOR_FILE, known=("word_tokenizer_processor", "normalizer_processor")
        )
        after = _load_pipeline(folder, POSTPROCESSOR_FILE, known=("unnormalizer_processor",))
        return cls(
            tokenizer=WordTokenizer.load(folder),
            state=_mean_std(folder / PREPROCESSOR_FILE, before, STATE_KEY),
            action=_mean_std(folder / POSTPROCESSOR_FILE, after, ACTION_KEY),
            action_low=action_low,
            action_high=action_high,
        )


def _save_pipeline(
    folder: Path, file_name: str, steps: list[dict[str, Any]], statistics: dict[str, Tensor]
) -> None:
    name = file_name.removesuffix(".json")
    for index, step in enumerate(steps):
        if step["registry_name"] in ("normalizer_processor", "unnormalizer_processor"):
            step["state_file"] = f"{name}_step_{index}_{step['registry_name']}.safetensors"
            save_tensors(statistics, folder / step["state_file"])
    text = json.dumps({"name": name, "steps": steps}, indent=2)
    (folder / file_name).write_text(text + "\n", encoding="utf-8")


def _load_pipeline(folder: Path, file_name: str, *, known: tuple[str, ...]) -> dict[str, Tensor]:
    """The statistics of a pipeline whose steps are all known. Missing steps show up as missing statistics."""
    path = folder / file_name
    try:
        steps = json.loads(path.read_text(encoding="utf-8"))["steps"]
        statistics: dict[str, Tensor] = {}
        for step in steps:
            name, config = str(step["registry_name"]), dict(step.get("config", {}))
            if name in _PASSED_OVER:
                if config.get("rename_map"):
                    raise CheckpointError(
                        f"{path}: {name}: rename_map expected empty, got {config['rename_map']}"
                    )
                continue
            if name not in known:
                raise CheckpointError(
                    f"{path}: step {name!r} is not one of {', '.join((*_PASSED_OVER, *known))}"
                )
            if "state_file" in step:
                _check_norm_map(path, config)
                statistics |= load_tensors(folder / Path(step["state_file"]).name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a readable processor pipeline: {error!r}") from error
    return statistics


def _check_norm_map(path: Path, config: dict[str, Any]) -> None:
    expected = {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"}
    if config.get("norm_map") != expected:
        raise CheckpointError(f"{path}: norm_map expected {expected}, got {config.get('norm_map')}")


def _mean_std(path: Path, statistics: dict[str, Tensor], key: str) -> MeanStd:
    values = {}
    for name in ("mean", "std"):
        value = statistics.get(f"{key}.{name}")
        if value is None or value.ndim != 1:
            got = "nothing" if value is None else f"shape {tuple(value.shape)}"
            raise CheckpointError(
                f"{path}: {key}.{name}: expected a vector in the normaliser's state file, got {got}"
            )
        values[name] = value.float()
    return MeanStd(mean=values["mean"], std=values["std"])
