"""Adapters: from `chat.adapters` to LoRA folders, each beside the language model that it is for. Called by `cli.chat`.

"sql=adapters/sql" names the only language model's adapter, "sql@Qwen3-0.6B=adapters/sql" that of one of several.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ganglion.errors import ConfigError
from ganglion.models.decoder import Decoder
from ganglion.models.language import LanguageModel
from ganglion.models.lora_load import AdapterSet, read_adapters

MAX_NAME_LENGTH = 128


def adapter_folders(texts: Sequence[str], models: Sequence[str]) -> dict[str, dict[str, Path]]:
    """Model -> name of an adapter -> its folder. Raises ConfigError for a name that is taken, unknown, or no name."""
    found: dict[str, dict[str, Path]] = {}
    taken = set(models)
    for text in texts:
        words, equals, folder = text.partition("=")
        name, at, model = words.partition("@")
        is_name = name.isprintable() and not set(name) & set(" ,") and len(name) <= MAX_NAME_LENGTH
        if not (name and is_name and equals and folder):
            raise ConfigError(
                f"chat.adapters: expected NAME=FOLDER, got {text[:200]!r}",
                next_step="write sql=adapters/sql, or sql@MODEL=adapters/sql beside several models",
            )
        if not at and len(models) == 1:
            model = models[0]
        if model not in models:
            served = ", ".join(models) or "none"
            raise ConfigError(
                f"chat.adapters: {text[:200]!r}: whose adapter is it? Language models here: {served}",
                next_step=f"write {name}@MODEL={folder} with one of them"
                if models
                else "name a language model too: chat=tiny-dense",
            )
        if name in taken:
            raise ConfigError(
                f"chat.adapters: the name {name!r} is taken", next_step="give the adapter another"
            )
        if not Path(folder).is_dir():
            raise ConfigError(
                f"chat.adapters: {name}: no folder {folder!r}",
                next_step="name a folder that PEFT wrote: adapter_config.json, adapter_model.safetensors",
            )
        taken.add(name)
        found.setdefault(model, {})[name] = Path(folder)
    return found


def adapters_of(
    model: LanguageModel, folders: Mapping[str, Path], *, max_page_bytes: int
) -> AdapterSet | None:
    """Those of one model, checked from headers; None where there are none. `model`: an outline is enough.

    Raises ConfigError where its family takes none, CheckpointError for a folder that cannot be served.
    """
    if not folders:
        return None
    spec = model.spec
    if not isinstance(model, Decoder):
        raise ConfigError(
            f"chat.adapters: {', '.join(folders)}: a {spec.family} takes no adapters here",
            next_step="merge the adapter into the model and serve that",
        )
    return read_adapters(
        folders,
        model.decoder_spec,
        model=spec.name,
        dtype=spec.dtype,
        max_page_bytes=max_page_bytes,
    )
