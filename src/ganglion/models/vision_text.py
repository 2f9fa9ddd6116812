"""Vision text: the prompt of a conversation with pictures, and the pixels that go with it, of one model.

Called by the edge through `service.TextTokenizer`, by `pipeline.served` for the pixels. Knows how Idefics3 and SmolVLM
write a picture: a marker for each tile, then as many placeholder tokens as the tile has features. No tensors.
"""

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ganglion.errors import CheckpointError, FieldError
from ganglion.generation import ChatMessage, Picture, PromptImage
from ganglion.models.text_tokenizer import HfTextTokenizer
from ganglion.models.vision_pixels import (
    PixelRules,
    TileGrid,
    picture_key,
    picture_size,
    read_picture,
)
from ganglion.types import UInt8Array
from ganglion.units import MIB

IMAGE_TOKEN = "<image>"
FAKE_TOKEN, WHOLE_TAG = "<fake_token_around_image>", "<global-img>"
MAX_KEPT_BYTES = (
    64 * MIB
)  # of pixels of pictures seen last: conversations send theirs again with each turn


class Sight:
    """How one model reads pictures: `tile_tokens` features of each tile. Thread-safe."""

    def __init__(self, rules: PixelRules, *, tile_tokens: int, image_token_id: int) -> None:
        self.rules, self.tile_tokens, self.image_token_id = rules, tile_tokens, image_token_id
        self._lock = threading.Lock()
        self._kept: OrderedDict[bytes, UInt8Array] = OrderedDict()
        self._kept_bytes = 0

    def grid(self, picture: Picture) -> TileGrid:
        """The tiles of a picture, from the head of its file."""
        return self.rules.grid(*picture_size(picture), is_coarse=picture.is_coarse)

    def written(self, grid: TileGrid) -> str:
        """A picture of these tiles, as text of the prompt."""
        tokens = IMAGE_TOKEN * self.tile_tokens
        whole = f"{FAKE_TOKEN}{WHOLE_TAG}{tokens}{FAKE_TOKEN}"
        if grid.num_tiles == 1:
            return whole
        lines = [
            "".join(
                f"{FAKE_TOKEN}<row_{row + 1}_col_{column + 1}>{tokens}"
                for column in range(grid.columns)
            )
            for row in range(grid.rows)
        ]
        return "\n".join(lines) + "\n\n" + whole

    def images(self, prompt: Sequence[int], pictures: Sequence[Picture]) -> tuple[PromptImage, ...]:
        """The pictures of a prompt as a model reads them. Takes a while: not for the edge's loop.

        Raises FieldError for a picture that is damaged, or when the prompt has no room for exactly these.
        """
        if not pictures:
            return ()
        size = self.tile_tokens
        at = [index for index, token in enumerate(prompt) if token == self.image_token_id]
        runs = [range(at[i], at[i] + size) for i in range(0, len(at), size)]
        is_whole = all(list(run) == at[i * size : (i + 1) * size] for i, run in enumerate(runs))
        grids = [self.grid(picture) for picture in pictures]
        num_tiles = sum(grid.num_tiles for grid in grids)
        if not is_whole or num_tiles != len(runs):
            raise FieldError(
                "prompt",
                expected=f"{num_tiles} times {size} tokens {IMAGE_TOKEN}, for {len(pictures)} pictures",
                got=f"{len(at)} of them",
            )
        images, first = [], 0
        for picture, grid in zip(pictures, grids, strict=True):
            places = tuple(runs[first : first + grid.num_tiles])
            first += grid.num_tiles
            key = picture_key(picture)
            images.append(PromptImage(key=key, pixels=self._pixels(key, picture), places=places))
        return tuple(images)

    def _pixels(self, key: bytes, picture: Picture) -> UInt8Array:
        with self._lock:
            pixels = self._kept.get(key)
            if pixels is not None:
                self._kept.move_to_end(key)
                return pixels
        pixels = self.rules.tiles(read_picture(picture), is_coarse=picture.is_coarse)
        with self._lock:
            if key not in self._kept:
                self._kept[key] = pixels
                self._kept_bytes += pixels.nbytes
            while self._kept_bytes > MAX_KEPT_BYTES:
                _, oldest = self._kept.popitem(last=False)
                self._kept_bytes -= oldest.nbytes
        return pixels


class VisionTokenizer:
    """The text tokenizer of a model that sees."""

    def __init__(self, text: HfTextTokenizer, sight: Sight, *, max_tokens: int) -> None:
        self._text, self.sight, self._max_tokens = text, sight, max_tokens
        self.special_ids = text.special_ids

    @classmethod
    def load(
        cls, folder: Path, sight: Sight, *, vocab_size: int, max_tokens: int
    ) -> "VisionTokenizer":
        """Read a model's folder. Raises CheckpointError for files that do not fit the model."""
        text = HfTextTokenizer.load(folder, is_in_parts=True)
        if text.vocab_size > vocab_size:
            raise CheckpointError(
                f"{folder}: the tokenizer has {text.vocab_size} tokens, the model {vocab_size}",
                next_step="take the tokenizer that belongs to the model",
            )
        found = text.decode((sight.image_token_id,))
        if found != IMAGE_TOKEN:
            raise CheckpointError(
                f"{folder}: image_token_id {sight.image_token_id}: expected {IMAGE_TOKEN!r} in the "
                f"tokenizer, got {found[:40]!r}",
                next_step="take config.json and the tokenizer from the same model",
            )
        return cls(text, sight, max_tokens=max_tokens)

    def encode(self, text: str) -> tuple[int, ...]:
        """As TextTokenizer.encode."""
        return self._text.encode(text)

    def encode_rendered(self, text: str) -> tuple[int, ...]:
        """As TextTokenizer.encode_rendered."""
        return self._text.encode_rendered(text)

    def decode(self, token_ids: Sequence[int]) -> str:
        """As TextTokenizer.decode."""
        return self._text.decode(token_ids)

    def token_bytes(self, token_id: int) -> bytes:
        """As TextTokenizer.token_bytes."""
        return self._text.token_bytes(token_id)

    def shown_bytes(self, token_id: int) -> bytes:
        """What a reader sees of one token."""
        return self._text.shown_bytes(token_id)

    def images(self, prompt: Sequence[int], pictures: Sequence[Picture]) -> tuple[PromptImage, ...]:
        """As ShowingTokenizer.images."""
        return self.sight.images(prompt, pictures)

    def chat(
        self, messages: Sequence[ChatMessage], *, tools: Sequence[Mapping[str, Any]] = ()
    ) -> tuple[int, ...]:
        """As TextTokenizer.chat, with room for the features of every picture."""
        parts = [part for message in messages for part in message.parts]
        pictures = [part for part in parts if isinstance(part, Picture)]
        rendered = self._text.render(messages, tools=tools)
        texts = rendered.split(IMAGE_TOKEN)
        if len(texts) != len(pictures) + 1:
            raise FieldError(
                "messages",
                expected=f"no {IMAGE_TOKEN} in text, as it stands for a picture",
                got=f"{len(texts) - 1} of them beside {len(pictures)} pictures",
                next_step="write it in another way, and send pictures as parts of a user's message",
            )
        grids = [self.sight.grid(picture) for picture in pictures]
        num_tokens = sum(grid.num_tiles for grid in grids) * self.sight.tile_tokens
        if num_tokens >= self._max_tokens:
            raise FieldError(
                "messages",
                expected=f"pictures of less than {self._max_tokens} tokens together",
                got=f"{len(pictures)} pictures of {num_tokens} tokens",
                next_step='send fewer, or with "detail": "low"',
            )
        written = [self.sight.written(grid) for grid in grids]
        text = texts[0] + "".join(
            picture + after for picture, after in zip(written, texts[1:], strict=True)
        )
        return self._text.encode_rendered(text)
