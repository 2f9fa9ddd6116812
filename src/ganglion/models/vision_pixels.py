"""Vision pixels: a picture file -> the square tiles that a tower reads, by the rules of preprocessor_config.json.

Called by `vision_text` (sizes, from a file's head alone) and by `pipeline.served` (pixels). PIL and numpy: what comes out
equals, level by level, what transformers' Idefics3 and SmolVLM processors make. Knows no tensors and no prompt.
"""

import hashlib
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from ganglion.errors import CheckpointError, FieldError, UnsupportedFieldError
from ganglion.generation import Picture
from ganglion.models.decoder_spec import ConfigReader
from ganglion.plan.headers import read_object
from ganglion.types import Float32Array, UInt8Array

RULES_FILE = "preprocessor_config.json"
FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PICTURE_PX = 40_000_000  # decoded: 120 MB for a moment
MAX_EDGE_PX = 16_384
_MAX_RESIZED_PX = 4096  # transformers' own bound of the longest edge
# EXIF's orientations that are not as the file has it; in the last four its rows are columns.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_QUARTER_TURNS = (5, 6, 7, 8)
_ANIMATED = ("PNG", "WEBP")  # a JPEG with several pictures is a photo with a preview
_KEY_BYTES = 16
_RESAMPLES = {int(kind): kind for kind in Image.Resampling}
_FIXED = {"do_rescale": True, "do_normalize": True, "do_convert_rgb": True}


@dataclass(frozen=True, slots=True, kw_only=True)
class TileGrid:
    """Rows and columns of tiles that a picture is cut into, besides the one of the whole; 0 x 0: that one only."""

    rows: int
    columns: int

    @property
    def num_tiles(self) -> int:
        """With that of the whole."""
        return self.rows * self.columns + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PixelRules:
    """How a picture becomes tiles of `tile_px` x `tile_px`; `longest_px` None: it keeps its own size first."""

    tile_px: int
    longest_px: int | None
    is_split: bool
    resample: Image.Resampling
    rescale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def levels(self) -> Float32Array:
        """What each of the 256 levels of each colour counts for the tower: [3, 256]."""
        scaled = (np.arange(256, dtype=np.uint8).astype(np.float64) * self.rescale).astype(
            np.float32
        )
        mean, std = (np.array(row, dtype=np.float32)[:, None] for row in (self.mean, self.std))
        levels: Float32Array = (scaled[None] - mean) / std
        return levels

    def grid(self, width: int, height: int, *, is_coarse: bool) -> TileGrid:
        """The tiles of a picture of this size."""
        if is_coarse or not self.is_split:
            return TileGrid(rows=0, columns=0)
        width, height = self._tiled_size(*self._first_size(width, height))
        if width <= self.tile_px and height <= self.tile_px:
            return TileGrid(rows=0, columns=0)
        return TileGrid(rows=height // self.tile_px, columns=width // self.tile_px)

    def tiles(self, image: Image.Image, *, is_coarse: bool) -> UInt8Array:
        """uint8 [tile, tile_px, tile_px, 3], row by row, the whole last."""
        grid, tile_px = self.grid(*image.size, is_coarse=is_coarse), self.tile_px
        image = self._resized(image, self._first_size(*image.size))
        if is_coarse or not self.is_split:
            return np.asarray(self._resized(image, (tile_px, tile_px)))[None]
        image = self._resized(image, self._tiled_size(*image.size))
        if grid.num_tiles == 1:
            return np.asarray(image)[None]
        shape = (grid.rows, tile_px, grid.columns, tile_px, 3)
        parts = np.asarray(image).reshape(shape).swapaxes(1, 2).reshape(-1, tile_px, tile_px, 3)
        whole = np.asarray(self._resized(image, (tile_px, tile_px)))
        return np.concatenate([parts, whole[None]])

    def _resized(self, image: Image.Image, size: tuple[int, int]) -> Image.Image:
        return image.resize(size, resample=self.resample)

    def _first_size(self, width: int, height: int) -> tuple[int, int]:
        """With the longest edge as long as the rules want it. Roundings are transformers', to the letter."""
        if self.longest_px is None:
            return width, height
        ratio = width / height
        if width >= height:
            width = self.longest_px
            height = int(width / ratio)
            height += height % 2
        else:
            height = self.longest_px
            width = int(height * ratio)
            width += width % 2
        width, height = max(width, 1), max(height, 1)
        ratio = width / height
        if width >= height and width > _MAX_RESIZED_PX:
            width, height = _MAX_RESIZED_PX, int(_MAX_RESIZED_PX / ratio)
        elif height > width and height > _MAX_RESIZED_PX:
            width, height = int(_MAX_RESIZED_PX * ratio), _MAX_RESIZED_PX
        return max(width, 1), max(height, 1)

    def _tiled_size(self, width: int, height: int) -> tuple[int, int]:
        """Whole tiles in both directions."""
        ratio = width / height
        if width >= height:
            width = self._whole_tiles(width)
            height = self._whole_tiles(int(width / ratio))
        else:
            height = self._whole_tiles(height)
            width = self._whole_tiles(int(height * ratio))
        return width, height

    def _whole_tiles(self, edge_px: int) -> int:
        return math.ceil(edge_px / self.tile_px) * self.tile_px


def read_pixel_rules(folder: Path) -> PixelRules:
    """The rules of a model's folder. Raises CheckpointError for a file that is missing, or asks for what is not done here."""
    path = folder / RULES_FILE
    rules = read_object(path)
    reader = ConfigReader(rules, str(path))
    for key, expected in _FIXED.items():
        if reader.flag(key, default=expected) is not expected:
            raise CheckpointError(f"{path}: {key}: expected {expected}, got {not expected}")
    is_resized = reader.flag("do_resize", default=True)
    resample = reader.integer("resample", int(Image.Resampling.LANCZOS))
    if resample not in _RESAMPLES:
        raise CheckpointError(f"{path}: resample: expected 0..5, got {resample}")
    return PixelRules(
        tile_px=_edge(rules, "max_image_size", 364, str(path)),
        longest_px=_edge(rules, "size", 4 * 364, str(path)) if is_resized else None,
        is_split=reader.flag("do_image_splitting", default=True),
        resample=_RESAMPLES[resample],
        rescale=reader.number("rescale_factor", 1 / 255),
        mean=_colours(rules, "image_mean", str(path)),
        std=_colours(rules, "image_std", str(path)),
    )


def picture_key(picture: Picture) -> bytes:
    """Equal for what looks equal to the model: the file's bytes, and how finely they are read."""
    return hashlib.blake2b(
        picture.data, digest_size=_KEY_BYTES, person=b"coarse" if picture.is_coarse else b"fine"
    ).digest()


def picture_size(picture: Picture) -> tuple[int, int]:
    """Width and height as it is to be seen, from the head of the file. Raises FieldError as `read_picture`."""
    with _opened(picture) as image:
        width, height = image.size
        is_turned = _orientation(picture, image) in _QUARTER_TURNS
    return (height, width) if is_turned else (width, height)


def read_picture(picture: Picture) -> Image.Image:
    """The picture in RGB, turned as its EXIF says, on white where it is transparent.

    Raises FieldError for what is no picture, is damaged or too large.
    """
    with _opened(picture) as image:
        turn = _TURNS.get(_orientation(picture, image))
        try:
            turned = image if turn is None else image.transpose(turn)
            if "A" in turned.getbands() or turned.info.get("transparency") is not None:
                clear = turned.convert("RGBA")
                white = Image.new("RGBA", clear.size, (255, 255, 255, 255))
                return Image.alpha_composite(white, clear).convert("RGB")
            return turned.convert("RGB")
        except Exception as error:
            raise _damaged(picture, error) from error


def _opened(picture: Picture) -> Image.Image:
    """Its head is read, no pixel yet."""
    try:
        image = Image.open(io.BytesIO(picture.data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise _too_large(picture, str(error)[:60]) from error
    except Exception as error:
        raise _damaged(picture, error) from error
    width, height = image.size
    if width * height > MAX_PICTURE_PX or max(width, height) > MAX_EDGE_PX:
        raise _too_large(picture, f"{width} x {height}")
    if image.format in _ANIMATED and getattr(image, "n_frames", 1) > 1:
        raise UnsupportedFieldError(
            picture.field, why="it is an animation", next_step="send its frames as pictures"
        )
    return image


def _orientation(picture: Picture, image: Image.Image) -> int:
    """As EXIF says in the head of the file; the plain reader, since PNG's own decodes the picture to look behind it."""
    try:
        return int(Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1))
    except Exception as error:
        raise _damaged(picture, error) from error


def _too_large(picture: Picture, got: str) -> FieldError:
    return FieldError(
        picture.field,
        expected=f"at most {MAX_PICTURE_PX} pixels, no edge longer than {MAX_EDGE_PX}",
        got=got,
        next_step="make the picture smaller: models see far fewer pixels than that",
    )


def _damaged(picture: Picture, error: Exception) -> FieldError:
    return FieldError(
        picture.field,
        expected=f"a whole picture in {', '.join(FORMATS)}",
        got=f"{len(picture.data)} bytes that are none: {str(error)[:120]}",
        next_step="send the bytes of the file, in base64",
    )


def _edge(rules: Mapping[str, Any], key: str, default: int, source: str) -> int:
    value = rules.get(key, {"longest_edge": default})
    if not isinstance(value, Mapping) or "longest_edge" not in value:
        raise CheckpointError(f"{source}: {key}: expected longest_edge, got {str(value)[:80]}")
    return ConfigReader(value, f"{source}: {key}").size("longest_edge", limit=_MAX_RESIZED_PX)


def _colours(rules: Mapping[str, Any], key: str, source: str) -> tuple[float, ...]:
    value = rules.get(key, [0.5, 0.5, 0.5])
    numbers = [value] * 3 if isinstance(value, float) else value
    is_sane = isinstance(numbers, list) and len(numbers) == 3
    if not is_sane or not all(isinstance(number, int | float) for number in numbers):
        raise CheckpointError(f"{source}: {key}: expected 3 numbers, got {str(value)[:80]}")
    if key == "image_std" and not all(numbers):
        raise CheckpointError(f"{source}: {key}: expected no 0, got {numbers}")
    return tuple(float(number) for number in numbers)
