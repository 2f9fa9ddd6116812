"""Ship: the averaged weights of a training run as a checkpoint folder. Called by the CLI after `fit`."""

from pathlib import Path

import torch

from ganglion.models.policies.flow_checkpoint import save_flow_checkpoint
from ganglion.models.policies.transforms import MeanStd, Processor
from ganglion.robots.metaworld import ACTION_DIM, RATE_HZ
from ganglion.train.fit import FitResult

ACTION_LOW = (-1.0,) * ACTION_DIM
ACTION_HIGH = (1.0,) * ACTION_DIM


def ship(result: FitResult, folder: Path) -> None:
    """Write `folder` in LeRobot's layout; the model card is `train.card`'s."""
    statistics = result.statistics
    processor = Processor(
        tokenizer=result.tokenizer,
        state=MeanStd(
            mean=torch.from_numpy(statistics.state_mean), std=torch.from_numpy(statistics.state_std)
        ),
        action=MeanStd(
            mean=torch.from_numpy(statistics.action_mean),
            std=torch.from_numpy(statistics.action_std),
        ),
        action_low=ACTION_LOW,
        action_high=ACTION_HIGH,
    )
    save_flow_checkpoint(
        folder,
        result.policy,
        processor,
        control_hz=RATE_HZ,
        action_low=ACTION_LOW,
        action_high=ACTION_HIGH,
    )
