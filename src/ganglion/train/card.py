"""Card: the README.md of a checkpoint, written from measured results. Called by `train.recipe`. Knows no model."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from ganglion.robots.metaworld import TASKS
from ganglion.train.evaluate import TaskResult

CARD_FILE = "README.md"
RESULTS_FILE = "evaluation.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What was measured, and how: `delayed` and `undelayed` with the own instruction, `opposite` with the wrong one."""

    delayed: tuple[TaskResult, ...]
    undelayed: tuple[TaskResult, ...]
    opposite: tuple[TaskResult, ...]
    delay_ticks: int
    num_flow_steps: int
    num_samples: int
    num_steps: int
    num_parameters: int
    notes: str = ""  # what this run did differently from the recipe


def mean_success(results: tuple[TaskResult, ...]) -> float:
    """Mean over tasks."""
    return sum(result.success_rate for result in results) / len(results)


def write_card(figures: Figures, folder: Path) -> None:
    """Write CARD_FILE and, episode by episode, RESULTS_FILE."""
    content = json.dumps(asdict(figures), indent=1)
    (folder / RESULTS_FILE).write_text(content + "\n", encoding="utf-8")
    (folder / CARD_FILE).write_text(_card(figures), encoding="utf-8")


def _card(figures: Figures) -> str:
    opposite = {result.task: result for result in figures.opposite}
    undelayed = {result.task: result for result in figures.undelayed}
    num_episodes = len(figures.delayed[0].solved_ticks)
    rows = [
        f"| {result.task} | {TASKS[result.task].prompt} | {_percent(result.success_rate)} "
        f"| {_percent(undelayed[result.task].success_rate)} | {result.mean_ticks:.0f} "
        f"| {_percent(opposite[result.task].success_rate) if result.task in opposite else '-'} |"
        for result in figures.delayed
    ]
    worst = min(result.success_rate for result in figures.delayed)
    return f"""# metaworld-ten

A vision-language-action policy of {figures.num_parameters / 1e6:.1f} M parameters for ten tasks of a simulated Sawyer arm
(Meta-World 3.1.1), in LeRobot's folder layout. Shape of pi0 and SmolVLA: two convolutional view stems and instruction
tokens into a transformer trunk, whose keys and values a flow-matching action expert attends to; chunks of 48 actions.

**In**: `observation.images.corner` and `observation.images.gripper` (uint8 80 x 80 x 3), `observation.state` (hand x, y, z
in metres, gripper opening), an instruction of at most 16 words. **Out**: 48 x 4 actions in [-1, 1] (dx, dy, dz, gripper)
at 80 Hz of the demonstrations' time; 20 Hz is quarter speed. The corner camera is stock `corner2` where LeRobot's
environment puts it (the same as stock `corner4`), turned upright.

## Success
Closed loop, {num_episodes} unseen starts a task, at most 500 ticks, a new chunk every 3 ticks, {figures.num_flow_steps} flow steps,
bfloat16. Drawers and windows start half open in every second episode, without goal markers. "Delayed": a chunk arrives
{figures.delay_ticks} tick(s) after its picture. "Told the opposite": the opposite task's words; lower is better, because
only the words tell these tasks apart.

| task | instruction | delayed | undelayed | ticks to success | told the opposite |
|---|---|---|---|---|---|
{chr(10).join(rows)}
| **mean** | | **{_percent(mean_success(figures.delayed))}** | **{_percent(mean_success(figures.undelayed))}** | | \
**{_percent(mean_success(figures.opposite))}** |

Worst task, delayed: {_percent(worst)}. Episode by episode: {RESULTS_FILE}.

## Recipe
`ganglion train` has its parts: {figures.num_samples:,} samples from Meta-World's scripted experts under execution noise
(sigma 0, 0.3, 0.6), each labelled with the expert's own noise-free next 48 actions from that state; a second round on
states that a half-trained policy reached by itself (DAgger); {figures.num_steps:,} steps of 64 samples, AdamW, averaged
weights. Half of the noise draws see 1 to 20 committed actions at flow time 1 (training-time real-time chunking), so the
policy continues an `action_prefix`. Each task was also told in two other wordings. Training saw object and goal positions
through an auxiliary head that is not part of the checkpoint.
{figures.notes}

## Limits
One arm, one table, one look: simulated pictures of this renderer only. Other wordings than the trained ones may not be
understood. "Open the faucet", "press ..." and "close the door" are recognised from the scene: a wrong instruction does not
stop the arm there. In push's scenes "pick up ..." means to lift the puck over the goal; in pick-place's scenes "push ..."
means to move it on the table below the goal. Not for real robots.
"""


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%"
