"""Registry: the `type` in a checkpoint's config.json -> the code that loads it; and the policies in the package.

Called by the CLI. A literal table, so that a search finds every family.
"""

import importlib
import json
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path

import torch

from ganglion.errors import CheckpointError, FieldError
from ganglion.models.base import Model

LOADERS = {
    "ganglion_flow": "ganglion.models.registry:load_flow",
    "ganglion_flow_grown": "ganglion.models.registry:load_flow",
    "ganglion_temporal": "ganglion.models.registry:load_temporal",
}
SHIPPED = ("metaworld-ten", "metaworld-ten-large", "metaworld-ten-late", "metaworld-hidden")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def load_policy(
    folder: Path, *, dtype: str = "bfloat16", num_flow_steps: int | None = None
) -> Model:
    """The policy in `folder`, ready to serve. Raises CheckpointError for a folder that cannot be served."""
    if dtype not in DTYPES:
        raise FieldError("dtype", expected=f"one of {', '.join(DTYPES)}", got=repr(dtype))
    path = folder / "config.json"
    try:
        family = json.loads(path.read_text(encoding="utf-8"))["type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: no readable config with a type: {error!r}",
            next_step=f"name a checkpoint folder, or a shipped policy: {', '.join(SHIPPED)}",
        ) from error
    target = LOADERS.get(family)
    if target is None:
        raise CheckpointError(f"{path}: type: expected one of {', '.join(LOADERS)}, got {family!r}")
    module, _, name = target.partition(":")
    load: Callable[[Path, torch.dtype, int | None], Model] = getattr(
        importlib.import_module(module), name
    )
    return load(folder, DTYPES[dtype], num_flow_steps)


def load_flow(folder: Path, dtype: torch.dtype, num_flow_steps: int | None) -> Model:
    """The "ganglion_flow" family, as it was trained or grown."""
    from ganglion.models.packing import pack
    from ganglion.models.policies.flow_checkpoint import with_flow_steps
    from ganglion.models.policies.flow_model import FlowModel
    from ganglion.models.policies.grow import load_checkpoint

    checkpoint = load_checkpoint(folder, dtype=dtype)
    if num_flow_steps is not None:
        if not 1 <= num_flow_steps <= 10:
            raise FieldError("num_flow_steps", expected="1..10", got=str(num_flow_steps))
        checkpoint = with_flow_steps(checkpoint, num_flow_steps)
    pack(checkpoint.policy)
    return FlowModel(checkpoint.policy, checkpoint.processor, checkpoint.spec)


def load_temporal(folder: Path, dtype: torch.dtype, num_flow_steps: int | None) -> Model:
    """The "ganglion_temporal" type: a memory, and the "ganglion_flow" that it was trained for."""
    from ganglion.models.packing import pack
    from ganglion.models.policies.temporal_checkpoint import load_temporal_checkpoint
    from ganglion.models.policies.temporal_model import TemporalModel

    checkpoint = load_temporal_checkpoint(folder, dtype=dtype)
    spec = checkpoint.spec
    if num_flow_steps is not None:
        if not 1 <= num_flow_steps <= 10:
            raise FieldError("num_flow_steps", expected="1..10", got=str(num_flow_steps))
        spec = replace(spec, num_flow_steps=num_flow_steps, late_context_steps=num_flow_steps)
    pack(checkpoint.policy)
    return TemporalModel(checkpoint.policy, checkpoint.processor, spec)


def policy_folder(name_or_path: str) -> Path:
    """The folder of a shipped policy, or the path itself. Raises FieldError naming the shipped ones."""
    if name_or_path in SHIPPED:
        return Path(str(resources.files("ganglion"))) / "assets" / "policies" / name_or_path
    path = Path(name_or_path)
    if not path.is_dir():
        raise FieldError(
            "policy", expected=f"a folder or one of {', '.join(SHIPPED)}", got=repr(name_or_path)
        )
    return path
