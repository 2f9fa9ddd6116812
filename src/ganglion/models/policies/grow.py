"""Grow: a FlowPolicy made deeper and wider without changing what it computes. Called by `registry` and by tests.

A policy of today takes several control ticks for one inference. To measure serving under that load nobody has to train
a second network: the shipped one is grown when it is loaded. Knows no page and no request.

| part | what is added | why the function stays |
|---|---|---|
| layers | pairs of a trunk block and the expert block that reads its keys and values | both add zero to their streams |
| heads | random queries, keys and values | their columns of the output projection are zero |
| MLPs | random hidden units | their columns of the output projection are zero |
| stems | every hidden channel `stem_factor` times (Net2Net, arXiv 1511.05641) | norms see the same mean and variance; the next convolution weighs each copy by 1 / stem_factor |

Random inputs and zero outputs are work like any other to every kernel: nothing skips it. The residual streams keep
their widths. Sums run in another order, so results are equal to rounding, not to the bit.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ganglion.errors import CheckpointError, FieldError
from ganglion.models.layers import Block, ConvStem
from ganglion.models.policies.flow import FlowPolicy
from ganglion.models.policies.flow_checkpoint import (
    CONFIG_FILE,
    FlowCheckpoint,
    load_flow_checkpoint,
)

TYPE = "ganglion_flow_grown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """Sizes after growing, none smaller than before; `seed` draws what is added. They stand in config.json."""

    num_layers: int
    num_heads: int
    trunk_mlp_width: int
    expert_mlp_width: int
    stem_factor: int = 1
    seed: int = 0


def grow(policy: FlowPolicy, growth: Growth) -> FlowPolicy:
    """A larger policy with the outputs of `policy`, which must not be packed yet; same dtype, frozen.

    The same growth gives the same weights everywhere. Raises FieldError when a size would shrink.
    """
    config = policy.config
    for name in ("num_layers", "num_heads", "trunk_mlp_width", "expert_mlp_width"):
        if getattr(growth, name) < getattr(config, name):
            expected = f"at least {getattr(config, name)}, the policy's own"
            raise FieldError(f"growth.{name}", expected=expected, got=str(getattr(growth, name)))
    if growth.stem_factor < 1:
        raise FieldError("growth.stem_factor", expected="at least 1", got=str(growth.stem_factor))
    *hidden, trunk_width = config.conv_channels
    large_config = replace(
        config,
        conv_channels=(*(channels * growth.stem_factor for channels in hidden), trunk_width),
        num_layers=growth.num_layers,
        num_heads=growth.num_heads,
        trunk_mlp_width=growth.trunk_mlp_width,
        expert_mlp_width=growth.expert_mlp_width,
    )
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they were
        torch.manual_seed(growth.seed)
        large = FlowPolicy(large_config)
    large = large.to(policy.dtype).eval().requires_grad_(requires_grad=False)
    _copy_unchanged(policy, large)
    for small_stem, large_stem in zip(policy.stems, large.stems, strict=True):
        _repeat_channels(
            cast("ConvStem", small_stem), cast("ConvStem", large_stem), growth.stem_factor
        )
    _widen_last(policy, large)
    places = _places(config.num_layers, growth.num_layers)
    # zip: the trunk has one block fewer, and its last layer is `last_kv`
    for small_blocks, large_blocks in ((policy.trunk, large.trunk), (policy.expert, large.expert)):
        kept = dict(zip(places, small_blocks, strict=False))
        for at, block in enumerate(large_blocks):
            if at in kept:
                _widen(cast("Block", kept[at]), cast("Block", block))
            else:
                _silence(cast("Block", block))
    return large


def load_checkpoint(folder: Path, *, dtype: torch.dtype = torch.bfloat16) -> FlowCheckpoint:
    """A flow checkpoint, grown when its config.json says so. Raises CheckpointError."""
    path = folder / CONFIG_FILE
    if _content(path).get("type") == TYPE:
        return load_grown_checkpoint(folder, dtype=dtype)
    return load_flow_checkpoint(folder, dtype=dtype)


def load_grown_checkpoint(folder: Path, *, dtype: torch.dtype = torch.bfloat16) -> FlowCheckpoint:
    """Read a folder whose config.json names another checkpoint (`base`, relative to it) and how it grows.

    Name and version are its own. Raises CheckpointError naming the file and key that does not fit.
    """
    path = folder / CONFIG_FILE
    content = _content(path)
    if content.get("type") != TYPE:
        raise CheckpointError(f"{path}: type: expected {TYPE!r}, got {content.get('type')!r}")
    base = content.get("base")
    if not isinstance(base, str) or not (folder / base / CONFIG_FILE).is_file():
        raise CheckpointError(
            f"{path}: base: expected a checkpoint folder, relative to this one, got {base!r}"
        )
    growth = _growth(path, content.get("growth"))
    small = load_flow_checkpoint(folder / base, dtype=dtype)
    try:
        policy = grow(small.policy, growth)
    except FieldError as error:
        raise CheckpointError(f"{path}: {error}") from error
    digest = hashlib.blake2b(small.spec.version.encode(), digest_size=8)
    digest.update(json.dumps(asdict(growth), sort_keys=True).encode())
    spec = replace(small.spec, name=folder.name, version=digest.hexdigest())
    return FlowCheckpoint(policy=policy, processor=small.processor, spec=spec)


def _content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable config: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected an object, got {type(content).__name__}")
    return content


def _growth(path: Path, values: object) -> Growth:
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: growth: expected sizes by name, got {values!r}")
    names = {field.name for field in fields(Growth)}
    if values.keys() != names:
        wrong = sorted(values.keys() ^ names)[0]
        raise CheckpointError(
            f"{path}: growth.{wrong}: expected exactly the keys {', '.join(sorted(names))}"
        )
    for name, value in values.items():
        if type(value) is not int or value < 0:
            raise CheckpointError(f"{path}: growth.{name}: expected a whole number, got {value!r}")
    return Growth(**cast("dict[str, Any]", values))


def _places(num_small: int, num_large: int) -> tuple[int, ...]:
    """Where each layer goes: spread evenly, the last one last."""
    if num_small == 1:
        return (num_large - 1,)
    return tuple(at * (num_large - 1) // (num_small - 1) for at in range(num_small))


@torch.no_grad()
def _copy_unchanged(small: FlowPolicy, large: FlowPolicy) -> None:
    """Everything outside stems and layers has the same shape in both."""
    grown = ("stems.", "trunk.", "expert.", "last_kv.")
    target = large.state_dict()
    for name, value in small.state_dict().items():
        if not name.startswith(grown):
            target[name].copy_(value)


@torch.no_grad()
def _repeat_channels(small: ConvStem, large: ConvStem, factor: int) -> None:
    last = len(small.convs) - 1
    for at, (low, high) in enumerate(zip(small.convs, large.convs, strict=True)):
        assert isinstance(low, nn.Conv2d), low
        assert isinstance(high, nn.Conv2d), high
        num_in = factor if at > 0 else 1  # pixels and the trunk's features are not repeated
        num_out = factor if at < last else 1
        assert low.bias is not None, at
        assert high.bias is not None, at
        high.weight.copy_(low.weight.repeat(num_out, num_in, 1, 1) / num_in)
        high.bias.copy_(low.bias.repeat(num_out))
    for at, (low, high) in enumerate(zip(small.norms, large.norms, strict=True)):
        num_out = factor if at < last else 1
        assert isinstance(low, nn.LayerNorm), low
        assert isinstance(high, nn.LayerNorm), high
        high.weight.copy_(low.weight.repeat(num_out))
        high.bias.copy_(low.bias.repeat(num_out))


@torch.no_grad()
def _widen_last(small: FlowPolicy, large: FlowPolicy) -> None:
    config = small.config
    for low, high in (
        (small.last_kv.weight, large.last_kv.weight),
        (small.last_kv.bias, large.last_kv.bias),
    ):
        _heads(high, 2, config.head_dim)[:, : config.num_heads] = _heads(low, 2, config.head_dim)


@torch.no_grad()
def _widen(small: Block, large: Block) -> None:
    """More heads and hidden units; what is added reads at random and writes zero."""
    heads, dim, units = small.num_heads, small.head_dim, small.mlp_in.out_features
    for name in ("attention_norm", "mlp_norm"):
        large.get_submodule(name).load_state_dict(small.get_submodule(name).state_dict())
    for low, high in (
        (small.qkv.weight, large.qkv.weight),
        (small.qkv.bias, large.qkv.bias),
    ):
        _heads(high, 3, dim)[:, :heads] = _heads(low, 3, dim)
    large.mlp_in.weight[:units] = small.mlp_in.weight
    large.mlp_in.bias[:units] = small.mlp_in.bias
    for out, wide_out, num_kept in (
        (small.attention_out, large.attention_out, heads * dim),
        (small.mlp_out, large.mlp_out, units),
    ):
        wide_out.weight.zero_()
        wide_out.weight[:, :num_kept] = out.weight
        wide_out.bias.copy_(out.bias)


@torch.no_grad()
def _silence(block: Block) -> None:
    """A new block: it reads and computes, and adds zero."""
    for layer in (block.attention_out, block.mlp_out):
        layer.weight.zero_()
        layer.bias.zero_()


def _heads(rows: Tensor, num_parts: int, head_dim: int) -> Tensor:
    """Rows of a projection as [part, head, dim, ...]: queries, keys and values lie one after the other."""
    return rows.view(num_parts, -1, head_dim, *rows.shape[1:])
