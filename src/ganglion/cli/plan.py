"""`ganglion plan MODEL`: what a model needs here and how fast it can go, before anything is loaded."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ganglion.cli.rates import machine_rates
from ganglion.cli.settings import resolve
from ganglion.config import Config
from ganglion.errors import CheckpointError, FieldError, GanglionError
from ganglion.plan import policy as policies
from ganglion.plan.capacity import RUNTIME_BYTES, Capacity, fit
from ganglion.plan.footprint import (
    LanguageShape,
    Part,
    Weights,
    read_shape,
    weigh,
    with_head_apart,
)
from ganglion.plan.hardware import Hardware, read_hardware
from ganglion.plan.headers import CONFIG_FILE, read_config, read_folder
from ganglion.plan.roofline import Forecast, Rates, Wall, decode, prefill
from ganglion.units import format_bytes

DEFAULT_CONTEXT = 2048
DEFAULT_ROWS = 8
DECODE_ROWS = (1, 8, 32)
PROMPTS = (512, 2048)
CHUNK_TOKENS = 512
MAX_ROWS = 4096


def run(args: argparse.Namespace) -> int:
    """Print the plan of one folder; 1 when it does not fit into this machine's memory."""
    config = resolve(args).config
    folder = model_folder(args.model)
    hardware = read_hardware()
    dtype = config.engine.dtype
    num_rows = _count("--rows", args.rows, MAX_ROWS)
    content = read_config(folder)
    is_policy = content.get("type") in policies.TYPES
    if is_policy and args.context is not None:
        raise FieldError(
            "--context", expected="nothing: a policy has no context", got=str(args.context)
        )
    num_threads = max([1, *(len(lane) for lane in config.engine.lanes)])
    rates = machine_rates(hardware, dtype=dtype, num_threads=num_threads, again=args.measure)
    if is_policy:
        text, document = plan_policy(folder, rates, num_rows=num_rows)
        is_loadable = True
    else:
        text, document, is_loadable = plan_language(
            folder, content, config, hardware, rates, context=args.context, num_rows=num_rows
        )
    print(text)
    if args.json:
        _write(Path(args.json), document)
    return 0 if is_loadable else 1


def model_folder(name: str) -> Path:
    """The folder that MODEL names: itself, or that of a model in the package."""
    from importlib import resources

    if Path(name).is_dir():
        return Path(name)
    assets = Path(str(resources.files("ganglion"))) / "assets"
    shipped = {
        path.name: path
        for kind in ("policies", "language")
        if (assets / kind).is_dir()
        for path in sorted((assets / kind).iterdir())
        if (path / CONFIG_FILE).is_file()
    }
    if name not in shipped:
        raise FieldError(
            "MODEL",
            expected=f"a checkpoint folder or one of {', '.join(shipped)}",
            got=repr(name),
            next_step="download the model's folder first; nothing is fetched here",
        )
    return shipped[name]


def _count(flag: str, value: int | None, most: int) -> int:
    if value is None:
        return DEFAULT_ROWS
    if not 1 <= value <= most:
        raise FieldError(flag, expected=f"1..{most}", got=str(value))
    return value


def plan_language(
    folder: Path,
    content: dict[str, Any],
    config: Config,
    hardware: Hardware,
    rates: Rates,
    *,
    context: int | None,
    num_rows: int,
) -> tuple[str, dict[str, Any], bool]:
    """The tables, the same as data, and whether the model fits into memory."""
    dtype = rates.dtype
    shape = read_shape(content, where=str(folder / CONFIG_FILE))
    weights = weigh(read_folder(folder), dtype=dtype)
    if is_head_copied(weights, dtype):
        weights = with_head_apart(weights)
    length = min(DEFAULT_CONTEXT, shape.max_tokens) if context is None else context
    if not 1 <= length <= shape.max_tokens:
        raise FieldError(
            "--context", expected=f"1..{shape.max_tokens}, the model's own limit", got=str(length)
        )
    capacity = fit(
        shape,
        weights,
        dtype=dtype,
        available_bytes=hardware.available_bytes,
        arena_bytes=config.memory.arena_bytes,
        large_page_bytes=config.memory.large_page_bytes,
        context=length,
        num_rows=num_rows,
        chunk_tokens=CHUNK_TOKENS,
    )
    rows = sorted({*DECODE_ROWS, num_rows})
    decodes = [decode(shape, weights, rates, num_rows=each, context=length) for each in rows]
    prompts = sorted({min(prompt, shape.max_tokens) for prompt in PROMPTS})
    prefills = [prefill(shape, weights, rates, num_tokens=prompt) for prompt in prompts]
    served = why_not_served(folder, content)
    parts = [
        _title(folder, shape, weights, dtype, served),
        _weights_table(weights),
        _kv_table(shape, capacity, config.memory.large_page_bytes, dtype),
        _fits(capacity),
        _speed_table(decodes, prefills, capacity),
        _machine(rates),
    ]
    document = {
        "model": folder.name,
        "dtype": dtype,
        "served": not served,
        "why_not_served": served,
        "shape": asdict(shape),
        "weights": [asdict(part) for part in weights.parts],
        "kv": [
            asdict(group) | {"token_bytes": group.token_bytes, "page_bytes": group.page_bytes}
            for group in shape.kv_groups(dtype)
        ],
        "capacity": asdict(capacity)
        | {"needed_bytes": capacity.needed_bytes, "is_loadable": capacity.is_loadable},
        "decode": [_forecast_document(each, capacity) for each in decodes],
        "prefill": [_forecast_document(each, None) for each in prefills],
        "machine": asdict(rates),
    }
    return "\n\n".join(parts), document, capacity.is_loadable


def is_head_copied(weights: Weights, dtype: str) -> bool:
    """Is the head tied, and weights of `dtype` laid out anew here?"""
    from ganglion.kernels.cpu import why_not_packed
    from ganglion.models.registry import DTYPES

    is_tied = weights.values_of(Part.EMBEDDING) and not weights.values_of(Part.HEAD)
    return bool(is_tied) and not why_not_packed(DTYPES[dtype])


def why_not_served(folder: Path, content: dict[str, Any]) -> str:
    """Empty, or the reason that `serve` would give."""
    from ganglion.models.decoder_spec import read_decoder_spec
    from ganglion.models.families import ServedBy, served_by
    from ganglion.models.vision_spec import is_vision, read_text_spec

    source = str(folder / CONFIG_FILE)
    try:
        if is_vision(content):
            from ganglion.models.vision_load import read_sight

            read_text_spec(content, source=source)
            read_sight(folder)
        elif served_by(content, source=source) is ServedBy.NATIVE:
            read_decoder_spec(content, source=source)
    except CheckpointError as error:
        return f"{error}" + (f"; {error.advice}" if error.advice else "")
    return ""


def wall_of(forecast: Forecast, capacity: Capacity | None) -> Wall:
    """Capacity, where the arena does not hold the rows; else what holds the roofline."""
    if capacity is not None and forecast.num_rows > capacity.num_rows_in_arena:
        return Wall.CAPACITY
    return forecast.wall


def plan_policy(folder: Path, rates: Rates, *, num_rows: int) -> tuple[str, dict[str, Any]]:
    """The tables of a robot policy, and the same as data."""
    cost = policies.policy_cost(folder, dtype=rates.dtype)
    counts = sorted({1, num_rows, 32})
    forecasts = [policies.forecast(cost, rates, num_rows=each) for each in counts]
    alone = forecasts[0]
    lines = [
        f"{folder.name}: {cost.family}, {_short(cost.num_weights)} parameters, chunks of {cost.horizon} "
        f"actions in {cost.num_flow_steps} flow steps; served in {rates.dtype}",
        f"pages of one robot: {format_bytes(cost.context_bytes)}",
    ]
    stages = [("one chunk", "parameters", "calls", "ms")]
    stages += [
        (
            f"{stage.name}" + (f" x {stage.times}" if stage.times > 1 else ""),
            _short(stage.num_weights),
            str(stage.num_calls * stage.times),
            f"{alone.stages_ms[stage.name]:.1f}",
        )
        for stage in cost.stages
    ]
    speed = [("expected", "ms for all", "chunks/s", "each robot Hz", "wall")]
    speed += [
        (
            f"{each.num_rows} robot" + ("s" if each.num_rows > 1 else ""),
            f"{each.chunk_ms:.1f}",
            f"{each.chunks_per_s:.0f}",
            f"{each.chunks_per_s / each.num_rows:.1f}",
            each.wall,
        )
        for each in forecasts
    ]
    document = {
        "model": folder.name,
        "dtype": rates.dtype,
        "cost": asdict(cost),
        "forecasts": [asdict(each) for each in forecasts],
        "machine": asdict(rates),
    }
    text = "\n\n".join(["\n".join(lines), _table(stages), _table(speed), _machine(rates)])
    return text, document


def _title(folder: Path, shape: LanguageShape, weights: Weights, dtype: str, served: str) -> str:
    experts = (
        f", {shape.num_experts} experts ({shape.num_active_experts} a token)"
        if shape.num_experts
        else ""
    )
    title = (
        f"{folder.resolve().name}: {shape.family}, {_short(weights.num_values)} parameters, {shape.num_layers} layers "
        f"of {shape.width}{experts}, up to {shape.max_tokens:,} tokens; served in {dtype}"
    )
    return title + (f"\nnot served: {served}" if served else "")


def _weights_table(weights: Weights) -> str:
    rows = [("weights", "parameters", "on disk", "in memory")]
    rows += [
        (
            part.part,
            _short(part.num_values) if part.num_values else "tied",
            format_bytes(part.file_bytes) if part.file_bytes else "-",
            format_bytes(part.served_bytes),
        )
        for part in weights.parts
    ]
    total = (
        _short(weights.num_values),
        format_bytes(weights.file_bytes),
        format_bytes(weights.served_bytes),
    )
    return _table([*rows, ("all", *total)])


def _kv_table(shape: LanguageShape, capacity: Capacity, large_page_bytes: int, dtype: str) -> str:
    rows = [("pages", "layers", "of a token", "page", f"of {capacity.context:,} tokens")]
    rows += [
        (
            group.name + (f" {group.window:,}" if group.window else ""),
            str(group.num_layers),
            format_bytes(group.token_bytes),
            f"{group.slots} slots, {format_bytes(group.page_bytes)}",
            format_bytes(group.row_bytes(capacity.context, large_page_bytes)),
        )
        for group in shape.kv_groups(dtype)
    ]
    return _table(rows)


def _fits(capacity: Capacity) -> str:
    verdict = "fits" if capacity.is_loadable else "DOES NOT FIT"
    rows = [
        ("memory", "bytes"),
        ("weights", format_bytes(capacity.weight_bytes)),
        ("workspace of a step", format_bytes(capacity.workspace_bytes)),
        ("arena (memory.arena_bytes)", format_bytes(capacity.arena_bytes)),
        ("Python and torch", format_bytes(RUNTIME_BYTES)),
        ("together", format_bytes(capacity.needed_bytes)),
        ("available here", f"{format_bytes(capacity.available_bytes)}: {verdict}"),
    ]
    lines = [
        _table(rows),
        f"the arena holds {_rows(capacity.num_rows_in_arena)} of {capacity.context:,} tokens, or one of "
        f"{capacity.num_tokens_in_arena:,}",
    ]
    if capacity.needed_arena_bytes > capacity.arena_bytes:
        lines.append(
            f"{_rows(capacity.num_rows)} of {capacity.context:,} tokens need an arena of "
            f"{format_bytes(capacity.needed_arena_bytes)}; there is room for {format_bytes(capacity.largest_arena_bytes)}"
        )
    return "\n".join(lines)


def _speed_table(decodes: list[Forecast], prefills: list[Forecast], capacity: Capacity) -> str:
    rows = [("expected", "tokens/s", "at most", "ms a step", "flops/byte", "wall")]
    for each in (*decodes, *prefills):
        is_decode = each.what == "decode"
        wall = wall_of(each, capacity if is_decode else None)
        note = (
            f"{wall}: arena holds {capacity.num_rows_in_arena}" if wall is Wall.CAPACITY else wall
        )
        size = _rows(each.num_rows) if is_decode else f"{each.num_tokens:,} tokens"
        rows.append(
            (
                f"{each.what}, {size}",
                _rate(each.tokens_per_s),
                _rate(each.bound_per_s),
                f"{each.step_ms:.1f}",
                f"{each.intensity:.2g}" if each.intensity < 100 else f"{each.intensity:.0f}",
                note,
            )
        )
    return _table(rows)


def _machine(rates: Rates) -> str:
    threads = "1 thread" if rates.num_threads == 1 else f"{rates.num_threads} threads"
    return (
        f"this machine, {threads}: reads {rates.read_bytes_per_s / 1e9:.1f} GB/s, multiplies up to "
        f"{rates.peak_flops_per_s / 1e12:.2f} Tflop/s in {rates.dtype}, a call takes {rates.call_us:.1f} us.\n"
        f"Below {rates.ridge:.0f} flops/byte reading is the wall, above it arithmetic. --measure measures again."
    )


def _forecast_document(forecast: Forecast, capacity: Capacity | None) -> dict[str, Any]:
    return asdict(forecast) | {
        "wall": str(wall_of(forecast, capacity)),
        "intensity": forecast.intensity,
    }


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([lines[0], "-" * max(len(line) for line in lines), *lines[1:]])


def _rows(number: int) -> str:
    return "1 row" if number == 1 else f"{number} rows"


def _rate(per_s: float) -> str:
    return f"{per_s:,.0f}" if per_s >= 100 else f"{per_s:.1f}"


def _short(number: int) -> str:
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g} {unit}"
    return str(number)


def _write(path: Path, document: dict[str, Any]) -> None:
    document = {"date": datetime.now(UTC).strftime("%Y-%m-%d"), **document}
    try:
        path.write_text(json.dumps(document, indent=1) + "\n")
    except OSError as error:
        raise GanglionError(
            f"{path}: {error.strerror}", next_step="name a file that can be written"
        ) from error
