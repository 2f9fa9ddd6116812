"""Text tokenizer: text <-> token ids of one language model, from the files of its folder. Thread-safe.

Called by the edge through `service.TextTokenizer`, by `pipeline.language` for the bytes of tokens and by grammars. Knows
no tensors. The words of robots' instructions are in `models.tokenizer`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer

from ganglion.errors import CheckpointError, FieldError, UnsupportedFieldError
from ganglion.generation import ChatMessage, Picture, PromptImage
from ganglion.models.chat_template import PLAIN_TEMPLATE, ChatTemplate, read_chat_template
from ganglion.plan.headers import CONFIG_FILE as MODEL_FILE
from ganglion.plan.headers import read_config

if TYPE_CHECKING:
    from ganglion.models.vision_text import VisionTokenizer

TOKENIZER_FILE, CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
MAX_FILE_BYTES = 256 * 1024 * 1024
NUM_BYTES = 256
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
# Special tokens that stand for something which a client must see: where a tool call begins.
VISIBLE_SPECIAL_TOKENS = frozenset(
    {"<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>"}
)


class HfTextTokenizer:
    """A `tokenizer.json` run by the `tokenizers` library, and the chat template beside it.

    What a token stands for is read from the vocabulary, so that the bytes of a choice are those of its tokens, one after
    the other. (The library itself drops the space in front of a text; a continuation needs it.)
    """

    def __init__(
        self, tokenizer: Tokenizer, *, template: ChatTemplate, front_ids: tuple[int, ...] = ()
    ) -> None:
        self._tokenizer, self._template, self._front_ids = tokenizer, template, front_ids
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self._bytes = _bytes_of_tokens(tokenizer, self.vocab_size)
        added: Mapping[int, AddedToken] = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(index for index, token in added.items() if token.special)
        self._hidden_ids = frozenset(
            index
            for index in self.special_ids
            if added[index].content not in VISIBLE_SPECIAL_TOKENS
        )

    @classmethod
    def load(cls, folder: Path, *, is_in_parts: bool = False) -> "HfTextTokenizer":
        """Read a model's folder. `is_in_parts`: as in ChatTemplate. Raises CheckpointError."""
        path = folder / TOKENIZER_FILE
        try:
            num_bytes = path.stat().st_size
            if num_bytes > MAX_FILE_BYTES:
                raise CheckpointError(f"{path}: {num_bytes} bytes, at most {MAX_FILE_BYTES}")
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path}: not readable text: {error}") from error
        tokenizer = _parse(path, text)
        config = _read_config(folder)
        return cls(
            tokenizer,
            template=read_chat_template(folder, config, is_in_parts=is_in_parts),
            front_ids=_front_ids(tokenizer, config),
        )

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of `text`, with the special tokens that the model puts in front of a plain prompt."""
        ids = tuple(self._tokenizer.encode(_checked(text), add_special_tokens=True).ids)
        num_front = len(self._front_ids)
        return ids if ids[:num_front] == self._front_ids else self._front_ids + ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of the ids, special tokens included; bytes that are no character become U+FFFD."""
        return b"".join(map(self.token_bytes, token_ids)).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """What one token stands for; nothing for an id that the vocabulary does not use."""
        return self._bytes[token_id] if 0 <= token_id < len(self._bytes) else b""

    def shown_bytes(self, token_id: int) -> bytes:
        """What a reader sees of one token: `token_bytes`, but nothing for special tokens."""
        return b"" if token_id in self._hidden_ids else self.token_bytes(token_id)

    def chat(
        self, messages: Sequence[ChatMessage], *, tools: Sequence[Mapping[str, Any]] = ()
    ) -> tuple[int, ...]:
        """Ids of a conversation up to where the assistant speaks next. The template writes its own special tokens."""
        return self.encode_rendered(self.render(messages, tools=tools))

    def images(self, prompt: Sequence[int], pictures: Sequence[Picture]) -> tuple[PromptImage, ...]:
        """Nothing: this model is blind. Raises UnsupportedFieldError for a picture."""
        return _refuse(pictures)

    def render(
        self, messages: Sequence[ChatMessage], *, tools: Sequence[Mapping[str, Any]] = ()
    ) -> str:
        """The conversation as the template writes it."""
        return self._template.render(messages, tools=tools)

    def encode_rendered(self, text: str) -> tuple[int, ...]:
        """Ids of what a template wrote."""
        return tuple(self._tokenizer.encode(_checked(text), add_special_tokens=False).ids)


class ByteTokenizer:
    """Ids 0 to 255 are bytes of UTF-8; further ids are the model's special tokens, and stand for no text."""

    special_ids: frozenset[int] = frozenset()

    def __init__(self, template: ChatTemplate | None = None) -> None:
        self._template = template or ChatTemplate(PLAIN_TEMPLATE)

    def encode(self, text: str) -> tuple[int, ...]:
        """The bytes of `text`."""
        return tuple(_checked(text).encode("utf-8"))

    def encode_rendered(self, text: str) -> tuple[int, ...]:
        """The same: nothing is put in front of a prompt."""
        return self.encode(text)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of the bytes; those that are no character become U+FFFD."""
        return b"".join(map(self.token_bytes, token_ids)).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """One byte, or nothing for a special token."""
        return bytes((token_id,)) if 0 <= token_id < NUM_BYTES else b""

    def shown_bytes(self, token_id: int) -> bytes:
        """What a reader sees of one token."""
        return self.token_bytes(token_id)

    def images(self, prompt: Sequence[int], pictures: Sequence[Picture]) -> tuple[PromptImage, ...]:
        """Nothing: this model is blind. Raises UnsupportedFieldError for a picture."""
        return _refuse(pictures)

    def chat(
        self, messages: Sequence[ChatMessage], *, tools: Sequence[Mapping[str, Any]] = ()
    ) -> tuple[int, ...]:
        """The bytes of the conversation as the template writes it."""
        return self.encode(self._template.render(messages, tools=tools))


def read_tokenizer(
    folder: Path, *, vocab_size: int
) -> "HfTextTokenizer | ByteTokenizer | VisionTokenizer":
    """The tokenizer of a model's folder; bytes where the folder has none and the model is small enough to mean bytes.

    Raises CheckpointError when its files cannot be used or do not fit a model of `vocab_size` tokens.
    """
    if (folder / MODEL_FILE).is_file() and _sees(read_config(folder)):
        from ganglion.models.vision_load import read_vision_tokenizer  # needs pillow

        return read_vision_tokenizer(folder, vocab_size=vocab_size)
    path = folder / TOKENIZER_FILE
    if path.is_file():
        tokenizer = HfTextTokenizer.load(folder)
        if tokenizer.vocab_size > vocab_size:
            raise CheckpointError(
                f"{path}: has {tokenizer.vocab_size} tokens, the model {vocab_size}",
                next_step="take the tokenizer that belongs to the model",
            )
        return tokenizer
    others = [
        name
        for name in ("tokenizer.model", "vocab.json", "tekken.json")
        if (folder / name).is_file()
    ]
    if others or vocab_size < NUM_BYTES:
        raise CheckpointError(
            f"{folder}: no {TOKENIZER_FILE}, only {', '.join(others) or 'a model of less than 256 tokens'}",
            next_step="write one: transformers.AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)",
        )
    return ByteTokenizer(read_chat_template(folder, _read_config(folder)))


def _sees(config: Mapping[str, Any]) -> bool:
    from ganglion.models.vision_spec import is_vision  # torch behind it: not for text alone

    return is_vision(config)


def _refuse(pictures: Sequence[Picture]) -> tuple[PromptImage, ...]:
    for picture in pictures:
        raise UnsupportedFieldError(
            picture.field, why="this model takes text only", next_step="ask one that takes pictures"
        )
    return ()


def _checked(text: str) -> str:
    """`text`, if it can be written as UTF-8. JSON may carry half of a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise FieldError(
            "text",
            expected="Unicode text",
            got=f"half of a surrogate pair at character {error.start}",
        ) from error
    return text


def _parse(path: Path, text: str) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception for a bad file
        raise CheckpointError(
            f"{path}: not a tokenizer of the tokenizers library: {str(error)[:300]}",
            next_step="write it again with transformers' save_pretrained",
        ) from error
    tokenizer.no_padding()
    tokenizer.no_truncation()  # a prompt that is too long is refused, never cut
    return tokenizer


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: must hold an object, holds {type(content).__name__}")
    return content


def _front_ids(tokenizer: Tokenizer, config: Mapping[str, Any]) -> tuple[int, ...]:
    """`add_bos_token` of tokenizer_config.json: older folders say it there and not in tokenizer.json."""
    if config.get("add_bos_token") is not True:
        return ()
    bos = config.get("bos_token")
    text = bos.get("content") if isinstance(bos, dict) else bos
    index = tokenizer.token_to_id(text) if isinstance(text, str) else None
    return () if index is None else (index,)


def _bytes_of_tokens(tokenizer: Tokenizer, vocab_size: int) -> list[bytes]:
    """Per id, what it stands for, by the way in which the vocabulary is written."""
    kinds = _decoder_kinds(json.loads(tokenizer.to_str()).get("decoder"))
    if "ByteLevel" in kinds:
        of_text = _byte_level
    elif kinds & {"Metaspace", "ByteFallback", "Replace"}:
        of_text = _sentence_piece
    elif kinds <= {"Fuse"}:
        of_text = _plain
    else:
        raise CheckpointError(
            f"{TOKENIZER_FILE}: decoder of {', '.join(sorted(kinds))}, known are ByteLevel and Metaspace",
            next_step="serve a model with a byte-level or SentencePiece vocabulary",
        )
    added: Mapping[int, AddedToken] = tokenizer.get_added_tokens_decoder()
    found: list[bytes] = []
    for index in range(vocab_size):
        text = tokenizer.id_to_token(index)
        if index in added:
            found.append(added[index].content.encode())
        else:
            found.append(b"" if text is None else of_text(text))
    return found


def _decoder_kinds(decoder: Any) -> set[str]:
    """The types of a decoder and of those within it."""
    if not isinstance(decoder, dict):
        return set()
    kinds = {kind for inner in decoder.get("decoders", ()) for kind in _decoder_kinds(inner)}
    if not kinds:
        kinds = {str(decoder.get("type"))}
    return kinds


def _plain(text: str) -> bytes:
    return text.encode()


def _byte_level(text: str) -> bytes:
    """GPT-2's way: each byte is written as one printable character."""
    try:
        return bytes(_BYTES[character] for character in text)
    except KeyError:
        return text.encode()  # an entry that was never made of bytes


def _sentence_piece(text: str) -> bytes:
    """SentencePiece's way: a low line is a space, "<0x0A>" is a byte."""
    byte = _BYTE.fullmatch(text)
    if byte:
        return bytes.fromhex(byte[1])
    return text.replace("\u2581", " ").encode()


def _printable_bytes() -> dict[str, int]:
    """GPT-2's table: printable bytes stand for themselves, the others for characters from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(NUM_BYTES) if byte not in set(printable)]
    table.update({chr(NUM_BYTES + index): byte for index, byte in enumerate(others)})
    return table


_BYTES = _printable_bytes()
