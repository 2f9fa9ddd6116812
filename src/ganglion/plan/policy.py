"""Policy: what one chunk of a flow policy costs and keeps, from its config.json. Called by cli's plan. Pure.

A chunk is: encode each view, prefill the instruction, prefill the observation, a number of flow steps. Small policies
spend their time in calls rather than in arithmetic, so calls are counted as carefully as products.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ganglion.errors import CheckpointError
from ganglion.layout import DTYPE_BYTES
from ganglion.plan.headers import read_config
from ganglion.plan.roofline import Rates, Wall

FLOW_TYPE, GROWN_TYPE, TEMPORAL_TYPE = "ganglion_flow", "ganglion_flow_grown", "ganglion_temporal"
TYPES = (FLOW_TYPE, GROWN_TYPE, TEMPORAL_TYPE)
CALLS_PER_BLOCK = 14  # two norms, four products, attention, activation, residuals
CALLS_PER_CONVOLUTION = 4
CALLS_PER_STAGE = 60  # pages in and out, and the engine's step around it
_GROWN = ("num_layers", "num_heads", "trunk_mlp_width", "expert_mlp_width")
_MOST = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCost:
    """One stage of one robot's chunk: (rows, weights) of each product, and calls, `times` over."""

    name: str
    products: tuple[tuple[int, int], ...]
    num_calls: int
    times: int = 1

    @property
    def num_weights(self) -> int:
        """Parameters that are read."""
        return sum(values for _, values in self.products)


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyCost:
    """One chunk. `context_bytes`: pages of keys, values and features that one robot holds."""

    family: str
    horizon: int
    num_flow_steps: int
    control_hz: float
    stages: tuple[StageCost, ...]
    context_bytes: int

    @property
    def num_weights(self) -> int:
        """Parameters of all stages."""
        trunk = {stage.name: stage.num_weights for stage in self.stages if stage.name != "text"}
        return sum(trunk.values())  # text and observation go through the same trunk


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyForecast:
    """Chunks of `num_rows` robots at once."""

    num_rows: int
    chunk_ms: float
    chunks_per_s: float
    flops: float
    read_bytes: float
    wall: Wall
    stages_ms: Mapping[str, float]


def policy_cost(folder: Path, *, dtype: str) -> PolicyCost:
    """Cost of the policy in `folder`. Raises CheckpointError for a config that is not one of `TYPES`."""
    config = read_config(folder)
    family = config.get("type")
    if family not in TYPES:
        raise CheckpointError(f"{folder}: type: expected one of {', '.join(TYPES)}, got {family!r}")
    base = folder
    if family != FLOW_TYPE:
        name = config.get("base")
        if not isinstance(name, str) or not (folder / name).is_dir():
            raise CheckpointError(f"{folder}: base: expected a checkpoint folder, got {name!r}")
        base = folder / name
    sizes = dict(read_config(base))
    if family == GROWN_TYPE:
        sizes = _grown(folder, sizes, config.get("growth"))
    return _flow_cost(base, str(family), sizes, dtype)


def forecast(cost: PolicyCost, rates: Rates, *, num_rows: int) -> PolicyForecast:
    """Chunks of `num_rows` robots in one batch, nothing shared between them."""
    stages_ms: dict[str, float] = {}
    flops = read_bytes = calls_s = work_s = 0.0
    for stage in cost.stages:
        stage_s = 0.0
        for rows, values in stage.products:
            product = 2.0 * rows * num_rows * values
            weight_bytes = values * DTYPE_BYTES[rates.dtype]
            stage_s += product / rates.flops_at(rows * num_rows)
            flops += product * stage.times
            read_bytes += weight_bytes * stage.times
        work_s += stage_s * stage.times
        calls = stage.num_calls * rates.call_us * 1e-6
        calls_s += calls * stage.times
        stages_ms[stage.name] = (stage_s + calls) * stage.times * 1e3
    took_s = work_s + calls_s
    compute_s, read_s = flops / rates.peak_flops_per_s, read_bytes / rates.read_bytes_per_s
    wall = Wall.COMPUTE if compute_s >= read_s else Wall.BANDWIDTH
    return PolicyForecast(
        num_rows=num_rows,
        chunk_ms=took_s * 1e3,
        chunks_per_s=num_rows / took_s,
        flops=flops,
        read_bytes=read_bytes,
        wall=Wall.CALLS if calls_s > work_s else wall,
        stages_ms=stages_ms,
    )


def _grown(folder: Path, sizes: dict[str, Any], growth: object) -> dict[str, Any]:
    if not isinstance(growth, Mapping):
        raise CheckpointError(f"{folder}: growth: expected an object, got {json.dumps(growth)}")
    channels = sizes.get("conv_channels")
    factor = growth.get("stem_factor", 1)
    if isinstance(channels, list) and type(factor) is int:
        sizes["conv_channels"] = [*(each * factor for each in channels[:-1]), channels[-1]]
    return sizes | {name: growth[name] for name in _GROWN if name in growth}


def _flow_cost(folder: Path, family: str, sizes: Mapping[str, Any], dtype: str) -> PolicyCost:
    def size(name: str) -> int:
        value = sizes.get(name)
        if type(value) is not int or not 1 <= value <= _MOST:
            raise CheckpointError(
                f"{folder}: {name}: expected a whole number from 1 to {_MOST}, got {value!r}"
            )
        return value

    channels, views = sizes.get("conv_channels"), sizes.get("view_keys")
    if not isinstance(channels, list) or not channels or not all(type(c) is int for c in channels):
        raise CheckpointError(f"{folder}: conv_channels: expected whole numbers, got {channels!r}")
    if not isinstance(views, list) or not views:
        raise CheckpointError(f"{folder}: view_keys: expected names, got {views!r}")
    height, width = size("view_height_px"), size("view_width_px")
    stem = []
    for low, high in zip([3, *channels], channels, strict=False):
        height, width = -(-height // 2), -(-width // 2)
        stem.append((height * width, 9 * low * high))
    num_view_tokens, trunk_width = height * width, int(channels[-1])
    num_seen = len(views) * num_view_tokens + 1
    num_layers, num_text, horizon = size("num_layers"), size("num_text_tokens"), size("horizon")
    inner, num_steps = size("num_heads") * size("head_dim"), size("num_flow_steps")
    expert_width = size("expert_width")
    trunk = _block(trunk_width, inner, size("trunk_mlp_width"))
    expert = _block(expert_width, inner, size("expert_mlp_width"))
    last = 2 * inner * trunk_width  # the last layer only keeps keys and values
    calls = CALLS_PER_STAGE + CALLS_PER_BLOCK * (num_layers - 1)
    value_bytes = DTYPE_BYTES[dtype]
    return PolicyCost(
        family=family,
        horizon=horizon,
        num_flow_steps=num_steps,
        control_hz=float(sizes.get("control_hz") or 0.0),
        stages=(
            *(
                StageCost(
                    name=f"view {at}",
                    products=tuple(stem),
                    num_calls=CALLS_PER_STAGE + CALLS_PER_CONVOLUTION * len(stem),
                )
                for at in range(len(views))
            ),
            StageCost(
                name="text",
                products=((num_text, trunk * (num_layers - 1) + last),),
                num_calls=calls,
            ),
            StageCost(
                name="observation",
                products=((num_seen, trunk * (num_layers - 1) + last),),
                num_calls=calls,
            ),
            StageCost(
                name="flow steps",
                products=((horizon, expert * num_layers),),
                num_calls=CALLS_PER_STAGE + CALLS_PER_BLOCK * num_layers,
                times=num_steps,
            ),
        ),
        context_bytes=value_bytes
        * (2 * num_layers * inner * (num_text + num_seen) + (num_seen - 1) * trunk_width)
        + 4 * horizon * size("action_dim"),
    )


def _block(width: int, inner: int, mlp_width: int) -> int:
    return width * 3 * inner + inner * width + 2 * width * mlp_width
