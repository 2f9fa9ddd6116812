"""Policy: from `policy.path` to a Model: a shipped name, a checkpoint folder, or a class in a Python file.

Called by the commands that serve. The only place where code of the user's own is imported.
"""

import importlib.util
import sys
from pathlib import Path

from ganglion.config import PolicyConfig
from ganglion.errors import ConfigError
from ganglion.layout import DTYPE_BYTES
from ganglion.models.base import Model
from ganglion.models.policies.plain import PlainModel, PlainPolicy
from ganglion.models.registry import load_policy, policy_folder
from ganglion.plan.policy import policy_cost
from ganglion.spec import PolicySpec


def load_model(config: PolicyConfig, *, dtype: str) -> Model:
    """The model that `config` names, ready to run in `dtype`."""
    file, colon, class_name = config.path.rpartition(":")
    if colon and file.endswith(".py"):
        return _plain(Path(file), class_name, config)
    if config.path.endswith(".py"):
        raise ConfigError(
            f"policy.path {config.path!r} names a file but no class",
            next_step=f"write {config.path}:ClassName",
        )
    num_flow_steps = config.num_flow_steps or None
    return load_policy(policy_folder(config.path), dtype=dtype, num_flow_steps=num_flow_steps)


def weights_of(config: PolicyConfig, *, dtype: str) -> int:
    """Bytes of the policy's weights, from its config alone; of a class in a Python file nothing is known: 0."""
    if not config.path or ".py" in config.path:
        return 0
    cost = policy_cost(policy_folder(config.path), dtype=dtype)
    return cost.num_weights * DTYPE_BYTES[dtype]


def _plain(file: Path, class_name: str, config: PolicyConfig) -> Model:
    if config.num_flow_steps:
        raise ConfigError(
            f"policy.num_flow_steps = {config.num_flow_steps} means nothing to the class {class_name}",
            next_step="remove --flow-steps",
        )
    if not file.is_file():
        raise ConfigError(f"policy.path: no file {file}", next_step="name a file that exists")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None, file
    assert spec.loader is not None, file
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    kind = vars(module).get(class_name)
    classes = [name for name, value in vars(module).items() if _is_policy(value, file.stem)]
    if kind is None:
        raise ConfigError(
            f"{file} has no class {class_name!r}",
            next_step=f"name one of {', '.join(classes)}"
            if classes
            else "write one; see examples/my_policy.py",
        )
    policy = kind()
    if not isinstance(policy, PlainPolicy) or not isinstance(policy.spec, PolicySpec):
        raise ConfigError(
            f"{file}:{class_name} is no policy: it needs `spec: PolicySpec` and `__call__(observations)`",
            next_step="see examples/my_policy.py",
        )
    return PlainModel(policy)


def _is_policy(value: object, module: str) -> bool:
    return isinstance(value, type) and value.__module__ == module and "__call__" in vars(value)
