"""Chat: from `chat.models` to language models with their tokenizers: shipped names or Hugging Face folders.

Called by the commands that serve.
"""

from collections.abc import Callable
from importlib import resources
from pathlib import Path

from ganglion.config import ChatConfig
from ganglion.errors import ConfigError
from ganglion.models.decoder_load import load_language
from ganglion.models.registry import DTYPES
from ganglion.models.text_tokenizer import read_tokenizer
from ganglion.pipeline.served import ServedLanguage

SHIPPED = Path(str(resources.files("ganglion"))) / "assets" / "language"


def load_languages(
    config: ChatConfig, *, dtype: str, max_page_bytes: int, on_stage: Callable[[str], None]
) -> tuple[ServedLanguage, ...]:
    """All that `config` names, ready to run in `dtype`. A model is called as its folder is."""
    found = []
    for name_or_path in config.models:
        folder = language_folder(name_or_path)
        on_stage(f"loading {name_or_path} in {dtype}")
        model = load_language(
            folder, dtype=DTYPES[dtype], name=folder.resolve().name, max_page_bytes=max_page_bytes
        )
        tokenizer = read_tokenizer(folder, vocab_size=model.spec.vocab_size)
        found.append(ServedLanguage(model, tokenizer, max_tokens=config.max_tokens))
    return tuple(found)


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
