"""Weights: safetensors files into modules and back, with the header checked before a byte is believed (`plan.headers`).

Called by checkpoint loaders and by `train`. Knows no architecture: it matches names and shapes, and says which differ.
"""

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ganglion.errors import CheckpointError
from ganglion.plan import headers


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (dtype, shape) of every tensor. Raises CheckpointError as `plan.headers.read_header`."""
    return {tensor.name: (tensor.dtype, tensor.shape) for tensor in headers.read_header(path)}


@contextlib.contextmanager
def promised() -> Iterator[None]:
    """Modules made inside have the shapes of their weights, and no weights: a loader fills them."""
    with torch.device("meta"), _Undrawn():
        yield


class _Undrawn(TorchFunctionMode):
    """No first weights are drawn: where there is nothing to draw, torch loads its compiler to say so (1 s, 100 MiB)."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        if func in (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_):
            return args[0] if args else named["tensor"]
        return func(*args, **named)


def give_back_freed() -> None:
    """Memory that was freed goes back to the system: the C library keeps weights that were joined and packed since."""
    with contextlib.suppress(AttributeError, OSError):  # other C libraries have no such call
        ctypes.CDLL(None).malloc_trim(0)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a checked file."""
    read_header(path)
    return load_file(path)


def load_into(module: nn.Module, path: Path) -> None:
    """Fill every parameter of `module`, keeping the module's dtype.

    Raises CheckpointError naming the first missing, unknown or misshaped key, with expected and got.
    """
    header = read_header(path)
    expected = module.state_dict()
    missing = sorted(expected.keys() - header.keys())
    unknown = sorted(header.keys() - expected.keys())
    if missing or unknown:
        problem = f"{missing[0]}: expected in" if missing else f"{unknown[0]}: unknown key of"
        raise CheckpointError(
            f"{path}: {problem} {type(module).__name__} ({len(missing)} keys missing, {len(unknown)} unknown)",
            next_step="the sizes in config.json and the weights must come from the same training run",
        )
    for name, (_, shape) in header.items():
        if shape != tuple(expected[name].shape):
            raise CheckpointError(
                f"{path}: {name}: shape expected {tuple(expected[name].shape)}, got {shape}",
                next_step="the sizes in config.json and the weights must come from the same training run",
            )
    module.load_state_dict(load_file(path))


def save_module(module: nn.Module, path: Path, *, dtype: torch.dtype) -> None:
    """Write every parameter of `module` as `dtype`."""
    save_tensors({name: value.to(dtype) for name, value in module.state_dict().items()}, path)


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors by name."""
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, {"format": "pt"})
    path.chmod(0o644)  # the library writes files that only their owner can read
