"""Loading through transformers: a Hugging Face folder of a family that has no native decoder -> an HfLanguage.

Called by `decoder_load`. The class comes from the library by `model_type`, never from the folder, whose code is never run.
Tensors are views of the mapped files; names are translated by transformers. Before it is served, the model is held to
what the module computes by itself: a family that passes more between its layers than hidden states is refused.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging as their_logging

from ganglion.errors import CheckpointError
from ganglion.generation import LanguageSpec
from ganglion.models.dense_kv import DenseKv
from ganglion.models.hf.groups import kv_groups, state_groups, token_bytes
from ganglion.models.hf.hooks import ATTENTION, EXPERTS, SURVEYED, register
from ganglion.models.hf.model import HfLanguage, hand_through
from ganglion.models.hf.pack import pack_linears
from ganglion.models.hf.seat import Seat, take_seat
from ganglion.models.hf.states import recur_in_pages
from ganglion.models.hf.survey import ERRORS, Survey, survey

logger = logging.getLogger(__name__)

NUM_PROBED = 12  # tokens of the plain pass
_CUTS = (0, 6, 11, 12)  # and of ours: whole, several after others, one after others
_MAX_TOKENS = 1 << 20  # where a config names no limit
MAX_DIFFERENCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # of scores, relative to their length


def knows(family: object) -> bool:
    """Has the installed transformers a causal decoder of this `model_type`?"""
    return isinstance(family, str) and _class_of(family) is not None


def load_module_language(
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    *,
    source: str,
    dtype: torch.dtype,
    name: str,
    version: str,
    eos_ids: tuple[int, ...],
    max_page_bytes: int,
    snapshot_tokens: int | None = None,
) -> HfLanguage:
    """The model of a config.json and its tensors by name. `source`: the folder, for errors.

    `eos_ids`: of generation_config.json; they win. `snapshot_tokens`: from one snapshot of recurrent states to the next,
    in tokens. Raises CheckpointError for a model that cannot be run over pages, or whose weights do not fit.
    """
    module = _module(config, weights, dtype, source)
    seated = _seated(module, dtype, source)
    model = _model(
        seated,
        family=str(config["model_type"]),
        dtype=dtype,
        name=name,
        version=version,
        eos_ids=eos_ids,
        max_page_bytes=max_page_bytes,
        snapshot_tokens=snapshot_tokens,
    )
    pack_linears(module)
    with torch.inference_mode(), _quiet():
        _check(model, seated.token_ids, seated.seen.logits, dtype, source)
    return model


def outline_module_language(
    config: Mapping[str, Any],
    *,
    source: str,
    dtype: torch.dtype,
    name: str,
    version: str,
    eos_ids: tuple[int, ...],
    max_page_bytes: int,
    snapshot_tokens: int | None = None,
) -> HfLanguage:
    """The same without weights, for its `spec` and `groups`: zeros that take no memory stand for them."""
    module_class = _class_of(str(config["model_type"]))
    with torch.device("meta"), _quiet():
        sketch = module_class._from_config(_config(config, source), dtype=dtype)
    zero = torch.zeros((), dtype=dtype)
    weights = {key: zero.expand(value.shape) for key, value in sketch.state_dict().items()}
    seated = _seated(_module(config, weights, dtype, source), dtype, source)
    return _model(
        seated,
        family=str(config["model_type"]),
        dtype=dtype,
        name=name,
        version=version,
        eos_ids=eos_ids,
        max_page_bytes=max_page_bytes,
        snapshot_tokens=snapshot_tokens,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seated:
    """A module with our hooks in place, and what was seen of it with these tokens."""

    module: nn.Module
    decoder: nn.Module
    num_layers: int
    seat: Seat
    config: Any
    token_ids: Tensor
    seen: Survey


def _seated(module: nn.Module, dtype: torch.dtype, source: str) -> _Seated:
    of_module: Any = module
    decoder, layers = _layers(module, source)
    seat = Seat()
    take_seat(module, seat)
    hand_through(layers, seat)
    config = of_module.config.get_text_config()
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(config.vocab_size, (NUM_PROBED,), generator=generator)
    with torch.inference_mode(), _quiet():
        seen = survey(module, layers, seat, token_ids, source=source)
        of_module.set_attn_implementation(ATTENTION)
        for facts in seen.states.values():
            recur_in_pages(facts, seat, width=config.hidden_size, dtype=dtype)
    return _Seated(
        module=module,
        decoder=decoder,
        num_layers=len(layers),
        seat=seat,
        config=config,
        token_ids=token_ids,
        seen=seen,
    )


def _model(
    seated: _Seated,
    *,
    family: str,
    dtype: torch.dtype,
    name: str,
    version: str,
    eos_ids: tuple[int, ...],
    max_page_bytes: int,
    snapshot_tokens: int | None,
) -> HfLanguage:
    seen, config = seated.seen, seated.config
    dtype_name = str(dtype).removeprefix("torch.")
    kv = kv_groups(seen.attentions, name=name, dtype=dtype_name, max_page_bytes=max_page_bytes)
    states = state_groups(
        seen.states,
        name=name,
        max_page_bytes=max_page_bytes,
        kv_token_bytes=token_bytes(kv),
        snapshot_tokens=snapshot_tokens,
    )
    spec = LanguageSpec(
        name=name,
        family=family,
        version=version,
        vocab_size=seen.logits.shape[-1],
        max_tokens=_max_tokens(config),
        num_layers=seated.num_layers,
        width=config.hidden_size,
        eos_ids=eos_ids or _token_ids(config.eos_token_id),
        dtype=dtype_name,
    )
    return HfLanguage(seated.module, seated.decoder, seated.seat, spec=spec, groups=(*kv, *states))


def _class_of(family: str) -> Any:
    if family not in CONFIG_MAPPING:
        return None
    config_class = CONFIG_MAPPING[family]
    return MODEL_FOR_CAUSAL_LM_MAPPING.get(config_class, None)


def _module(
    config: Mapping[str, Any], weights: Mapping[str, Tensor], dtype: torch.dtype, source: str
) -> nn.Module:
    register()
    family = str(config["model_type"])
    module_class = _class_of(family)
    assert module_class is not None, f"no class for {family}"
    if not module_class._can_set_attn_implementation():
        raise CheckpointError(
            f"{source}: {module_class.__name__} of this transformers computes its attention by "
            "itself: it cannot be run over pages",
            next_step="serve a model of another family, or update transformers",
        )
    options = {"attn_implementation": SURVEYED}
    if module_class._can_set_experts_implementation():
        options["experts_implementation"] = EXPERTS
    their_config = _config(config, source)
    try:
        with _quiet():
            module, loaded = module_class.from_pretrained(
                None,
                config=their_config,
                state_dict=dict(weights),
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are told below
                **options,
            )
    except (StrictDataclassError, *ERRORS) as error:
        raise CheckpointError(f"{source}: {module_class.__name__} cannot be loaded: {error}") from (
            error
        )
    problems = [f"{key}: expected, but missing" for key in sorted(loaded["missing_keys"])]
    problems += [f"{key}: unexpected" for key in sorted(loaded["unexpected_keys"])]
    problems += [
        f"{key}: shape expected {tuple(want)}, got {tuple(got)}"
        for key, got, want in sorted(loaded["mismatched_keys"])
    ]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise CheckpointError(
            f"{source}: weights do not fit config.json as {family}: {'; '.join(problems[:3])}{more}",
            next_step="config.json and the weights must come from the same model: copy both again",
        )
    module.eval().requires_grad_(requires_grad=False)
    found: nn.Module = module
    return found


def _config(config: Mapping[str, Any], source: str) -> Any:
    values = {key: _decoded(value) for key, value in config.items() if key != "auto_map"}
    try:
        with _quiet():
            return CONFIG_MAPPING[config["model_type"]].from_dict(values)
    except (StrictDataclassError, *ERRORS) as error:
        raise CheckpointError(f"{source}: config.json: {error}") from error


def _decoded(value: Any) -> Any:
    """A config's value; transformers writes infinities, which JSON has not, as {"__float__": "Infinity"}."""
    if isinstance(value, list):
        return [_decoded(part) for part in value]
    if isinstance(value, dict):
        if set(value) == {"__float__"}:
            return float(value["__float__"])
        return {key: _decoded(part) for key, part in value.items()}
    return value


def _layers(module: nn.Module, source: str) -> tuple[nn.Module, list[nn.Module]]:
    """What embeds tokens and has the layers, and these."""
    of_module: Any = module
    num_layers = of_module.config.get_text_config().num_hidden_layers
    for decoder in (of_module.get_decoder(), of_module.base_model):
        lists = [
            part
            for part in decoder.children()
            if isinstance(part, nn.ModuleList) and len(part) == num_layers
        ]
        if len(lists) == 1:
            return decoder, list(lists[0])
    raise CheckpointError(
        f"{source}: {type(module).__name__} has no single list of {num_layers} layers: it cannot be "
        "run over pages",
        next_step="serve a model of another family",
    )


def _max_tokens(config: Any) -> int:
    """What a model was trained for. Where longer texts would turn all positions of a batch another way, up to there."""
    limits = [getattr(config, "max_position_embeddings", None) or _MAX_TOKENS]
    ropes = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in ropes.values() if isinstance(value, dict)]
    for rope in nested or [ropes]:
        if rope.get("rope_type") == "longrope":
            limits.append(rope.get("original_max_position_embeddings") or limits[0])
    return int(min(limits))


def _token_ids(value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (int(str(value)),)


def _check(
    model: HfLanguage, token_ids: Tensor, want: Tensor, dtype: torch.dtype, source: str
) -> None:
    """Our passes, cut between tokens and between layers, give what the module gave. Raises CheckpointError if not."""
    kv = DenseKv(model.groups, num_rows=1, max_tokens=len(token_ids))
    num_layers = model.spec.num_layers
    cut = max(1, num_layers // 2)
    got = []
    for start, end in pairwise(_CUTS):
        kv.extend([end - start])
        hidden = model.embed(token_ids[start:end])
        positions = torch.arange(start, end)
        for layers in (range(cut), range(cut, num_layers)):
            if layers:
                hidden = model.run(hidden, positions, kv, layers)
        got.append(model.logits(hidden))
    distance = (torch.cat(got) - want).norm(dim=-1) / want.norm(dim=-1)
    difference = float(distance.mean())
    logger.debug("%s: scores differ by %.2g of their length", source, difference)
    if not difference <= MAX_DIFFERENCE[dtype]:
        raise CheckpointError(
            f"{source}: {model.spec.family} cannot be run layer by layer over pages: scores differ "
            f"by {difference:.2g} of their length from what transformers computes",
            next_step="serve a model of another family; this one keeps more than keys, values and "
            "states from token to token, or from layer to layer",
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' reports and progress bars: what is wrong with a model is said in one error."""
    settings: Any = their_logging
    level, had_bars = settings.get_verbosity(), settings.is_progress_bar_enabled()
    settings.set_verbosity_error()
    settings.disable_progress_bar()
    try:
        yield
    finally:
        settings.set_verbosity(level)
        if had_bars:
            settings.enable_progress_bar()
