"""Chat: from `chat.models` to language models with their tokenizers: shipped names or Hugging Face folders.

Called by the commands that serve, and by `Engine`. Each stays in memory as its words say: "NAME", "NAME,pinned",
"NAME,on_demand" or "NAME,ttl_s=600".
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch

from ganglion.cli.adapters import adapter_folders, adapters_of
from ganglion.config import ChatConfig
from ganglion.errors import CheckpointError, ConfigError
from ganglion.generation import LanguageSpec
from ganglion.layout import PageLayout
from ganglion.models.decoder_load import Progress, load_language, outline_language
from ganglion.models.dense_kv import DenseKv
from ganglion.models.language import KvGroup, LanguageModel, StateGroup
from ganglion.models.registry import DTYPES
from ganglion.models.text_tokenizer import read_tokenizer
from ganglion.models.vision import page_layouts
from ganglion.pipeline.residency import Stay
from ganglion.pipeline.served import InMemory, ServedLanguage
from ganglion.plan.footprint import weigh
from ganglion.plan.headers import read_folder
from ganglion.units import format_bytes

logger = logging.getLogger(__name__)

SHIPPED = Path(str(resources.files("ganglion"))) / "assets" / "language"
STAYS = "pinned, on_demand, ttl_s=SECONDS"
TRIED_TOKENS = 16
LOG_PERIOD_S = 2.0


def load_languages(
    config: ChatConfig, *, dtype: str, max_page_bytes: int, on_stage: Callable[[str], None]
) -> tuple[ServedLanguage, ...]:
    """All that `config` names: the pinned ones in memory, of the others what headers say. Called as their folders are.

    Raises ConfigError or CheckpointError for what cannot be served, whether it is loaded now or later.
    """
    found = []
    places = [(text, language_folder(read_stay(text)[0])) for text in config.models]
    adapters = adapter_folders(config.adapters, [folder.resolve().name for _, folder in places])
    for text, folder in places:
        name_or_path, stay = read_stay(text)
        on_stage(
            f"{'loading' if stay.is_pinned else 'reading headers of'} {name_or_path} in {dtype}"
        )
        source: InMemory | FolderSource
        if stay.is_pinned:
            model = _load(folder, dtype=dtype, max_page_bytes=max_page_bytes, on_progress=None)
            source = InMemory(model=model, weight_bytes=weights_of(folder, dtype))
        else:
            source = FolderSource.read(folder, dtype=dtype, max_page_bytes=max_page_bytes)
            model = _outline(folder, dtype=dtype, max_page_bytes=max_page_bytes)
        tokenizer = read_tokenizer(folder, vocab_size=source.spec.vocab_size)
        found.append(
            ServedLanguage(
                source,
                tokenizer,
                max_tokens=config.max_tokens,
                stay=stay,
                adapters=adapters_of(
                    model, adapters.get(model.spec.name, {}), max_page_bytes=max_page_bytes
                ),
            )
        )
    return tuple(found)


def read_stay(text: str) -> tuple[str, Stay]:
    """ "models/Qwen3,ttl_s=600" -> the folder, and how long it stays. Raises ConfigError for any other word."""
    path, *words = text.split(",")
    if not words or words == ["pinned"]:
        return path, Stay()
    key, _, value = words[0].partition("=")
    if words == ["on_demand"]:
        return path, Stay(is_pinned=False)
    if len(words) == 1 and key == "ttl_s" and value.isdecimal() and 0 < int(value) <= 10**9:
        return path, Stay(is_pinned=False, ttl_s=float(value))
    raise ConfigError(
        f"chat.models: {text!r}: expected one of {STAYS} after the comma, got {','.join(words)!r}",
        next_step=f"write {path}, or {path},on_demand, or {path},ttl_s=600",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderSource:
    """A LanguageSource: a folder that was checked, to be read when it is asked for."""

    folder: Path
    dtype: str
    max_page_bytes: int
    spec: LanguageSpec
    groups: tuple[KvGroup | StateGroup, ...]
    layouts: tuple[PageLayout, ...]
    weight_bytes: int

    @classmethod
    def read(cls, folder: Path, *, dtype: str, max_page_bytes: int) -> "FolderSource":
        """From config and headers. Raises CheckpointError for a folder that cannot be served."""
        outline = _outline(folder, dtype=dtype, max_page_bytes=max_page_bytes)
        return cls(
            folder=folder,
            dtype=dtype,
            max_page_bytes=max_page_bytes,
            spec=outline.spec,
            groups=outline.groups,
            layouts=page_layouts(outline),
            weight_bytes=weights_of(folder, dtype),
        )

    def load(self) -> LanguageModel:
        """The model, tried once: its weights are mapped, its kernels made, so that no robot waits for them later.

        Raises CheckpointError where the folder is not what it was.
        """
        model = _load(
            self.folder,
            dtype=self.dtype,
            max_page_bytes=self.max_page_bytes,
            on_progress=_Log(self.spec.name),
        )
        if model.spec != self.spec or model.groups != self.groups:
            raise CheckpointError(
                f"{self.folder}: version {model.spec.version}, it was {self.spec.version} when the server started",
                next_step="start the server again",
            )
        _try(model)
        return model


def weights_of(folder: Path, dtype: str) -> int:
    """Bytes of the weights once they are served in `dtype`, from headers only."""
    return weigh(read_folder(folder), dtype=dtype).served_bytes


def _load(
    folder: Path, *, dtype: str, max_page_bytes: int, on_progress: Progress | None
) -> LanguageModel:
    return load_language(
        folder,
        dtype=DTYPES[dtype],
        name=folder.resolve().name,
        max_page_bytes=max_page_bytes,
        on_progress=on_progress,
    )


def _outline(folder: Path, *, dtype: str, max_page_bytes: int) -> LanguageModel:
    return outline_language(
        folder, dtype=DTYPES[dtype], name=folder.resolve().name, max_page_bytes=max_page_bytes
    )


def _try(model: LanguageModel) -> None:
    """One forward of a few tokens, without the engine's pages."""
    num_tokens = min(TRIED_TOKENS, model.spec.max_tokens)
    kv = DenseKv(model.groups, num_rows=1, max_tokens=num_tokens)
    kv.extend([num_tokens])
    with torch.inference_mode():
        ids = torch.arange(num_tokens) % model.spec.vocab_size
        hidden = model.run(
            model.embed(ids), torch.arange(num_tokens), kv, range(model.spec.num_layers)
        )
        model.logits(hidden[-1:])


class _Log:
    """Progress of one load, in the log, every other second."""

    def __init__(self, name: str) -> None:
        self._name, self._last_s = name, time.monotonic()

    def __call__(self, loaded_bytes: int, all_bytes: int) -> None:
        now_s = time.monotonic()
        if now_s - self._last_s >= LOG_PERIOD_S:
            self._last_s = now_s
            logger.info(
                "loading %s: %s of %s",
                self._name,
                format_bytes(loaded_bytes),
                format_bytes(all_bytes),
            )


def language_folder(name_or_path: str) -> Path:
    """The folder of a shipped language model, or the path itself. Raises ConfigError naming the shipped ones."""
    shipped = shipped_languages()
    if name_or_path in shipped:
        return SHIPPED / name_or_path
    path = Path(name_or_path)
    if not path.is_dir():
        raise ConfigError(
            f"chat.models: no folder and no shipped model {name_or_path!r}",
            next_step=f"name a Hugging Face folder, or one of: {', '.join(shipped)}",
        )
    return path


def shipped_languages() -> tuple[str, ...]:
    """Names of the language models in the package."""
    return tuple(sorted(path.parent.name for path in SHIPPED.glob("*/config.json")))
