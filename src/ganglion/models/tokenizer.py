"""WordTokenizer: instruction -> a fixed number of token ids, by a small vocabulary that stands in the checkpoint.

Called by the pipeline and by `train`. Knows no network. Unknown words become UNKNOWN, so a paraphrase still runs.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ganglion.errors import CheckpointError, FieldError

PAD = "<pad>"
UNKNOWN = "<unknown>"
FILE_NAME = "tokenizer.json"


class WordTokenizer:
    """Lower-cased words in the order they stand; position 0 is the first word; the rest is PAD."""

    def __init__(self, *, words: tuple[str, ...], num_tokens: int) -> None:
        if words[:2] != (PAD, UNKNOWN):
            raise CheckpointError(f"vocabulary must start with {PAD}, {UNKNOWN}, got {words[:2]}")
        if len(set(words)) != len(words):
            raise CheckpointError(f"vocabulary has {len(words) - len(set(words))} words twice")
        self.words = words
        self.num_tokens = num_tokens
        self._ids = {word: index for index, word in enumerate(words)}

    @classmethod
    def from_prompts(
        cls, prompts: Iterable[str], *, num_tokens: int, vocab_size: int
    ) -> "WordTokenizer":
        """The vocabulary of `prompts`, padded with unused entries to `vocab_size`."""
        words = sorted({word for prompt in prompts for word in _split(prompt)})
        known = (PAD, UNKNOWN, *words)
        if len(known) > vocab_size:
            raise FieldError("vocab_size", expected=f"at least {len(known)}", got=str(vocab_size))
        spare = tuple(f"<unused {index}>" for index in range(vocab_size - len(known)))
        return cls(words=known + spare, num_tokens=num_tokens)

    @classmethod
    def load(cls, folder: Path) -> "WordTokenizer":
        """Read FILE_NAME of a checkpoint folder."""
        path = folder / FILE_NAME
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            words, num_tokens = tuple(map(str, content["words"])), int(content["num_tokens"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: no readable word list: {error!r}") from error
        return cls(words=words, num_tokens=num_tokens)

    def save(self, folder: Path) -> None:
        """Write FILE_NAME into a checkpoint folder."""
        content = {"type": "words", "num_tokens": self.num_tokens, "words": list(self.words)}
        (folder / FILE_NAME).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def encode(self, prompt: str) -> npt.NDArray[np.int64]:
        """Token ids [num_tokens]. Raises FieldError when the instruction has more words than fit."""
        words = _split(prompt)
        if len(words) > self.num_tokens:
            raise FieldError(
                "prompt", expected=f"at most {self.num_tokens} words", got=f"{len(words)} words"
            )
        ids = np.zeros(self.num_tokens, np.int64)
        ids[: len(words)] = [self._ids.get(word, 1) for word in words]
        return ids


def _split(prompt: str) -> list[str]:
    return re.findall(r"[a-z]+", prompt.lower())
