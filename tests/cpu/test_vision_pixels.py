"""Pictures -> tiles: level by level what transformers makes, whatever the size; and files that are no pictures."""

import contextlib
import io
import json

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ganglion.errors import CheckpointError, FieldError, GanglionError, UnsupportedFieldError
from ganglion.generation import Picture
from ganglion.models.vision_pixels import (
    PixelRules,
    picture_key,
    picture_size,
    read_picture,
    read_pixel_rules,
)

RULES = {
    "split": {"size": {"longest_edge": 96}, "max_image_size": {"longest_edge": 28}},
    "odd": {"size": {"longest_edge": 101}, "max_image_size": {"longest_edge": 32}},
    "one tile": {"size": {"longest_edge": 40}, "max_image_size": {"longest_edge": 64}},
    "whole": {"do_image_splitting": False, "max_image_size": {"longest_edge": 28}},
    "own size": {"do_resize": False, "max_image_size": {"longest_edge": 28}},
    "other filter": {"resample": 3, "image_mean": [0.48, 0.45, 0.4], "image_std": [0.2, 0.3, 0.25]},
}


@pytest.fixture(scope="module")
def rules(tmp_path_factory):
    def read(name: str) -> tuple[PixelRules, transformers.Idefics3ImageProcessorPil]:
        folder = tmp_path_factory.mktemp("rules")
        theirs = transformers.Idefics3ImageProcessorPil(**RULES[name])
        theirs.save_pretrained(folder)
        return read_pixel_rules(folder), theirs

    return {name: read(name) for name in RULES}


def draw(seed: int, width: int, height: int, channels: int = 3) -> Image.Image:
    shape = (height, width, channels)[: 3 if channels > 1 else 2]
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def file_of(image: Image.Image, form: str = "PNG", **how) -> Picture:
    data = io.BytesIO()
    image.save(data, form, **how)
    return Picture(data=data.getvalue(), field="there")


@settings(max_examples=12, deadline=None)
@given(
    name=st.sampled_from(list(RULES)[:5]),
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    seed=st.integers(0, 9),
)
def test_tiles_are_those_of_transformers(rules, name, width, height, seed):
    ours, theirs = rules[name]
    image = draw(seed, width, height)
    expected = theirs(images=[image], return_tensors="np", return_row_col_info=True)
    tiles, levels = ours.tiles(image, is_coarse=False), ours.levels()
    values = np.stack([levels[colour][tiles[..., colour]] for colour in range(3)], axis=1)
    assert np.array_equal(values, expected["pixel_values"][0])
    grid = ours.grid(width, height, is_coarse=False)
    assert (grid.rows, grid.columns) == (expected["rows"][0][0], expected["cols"][0][0])
    assert len(tiles) == grid.num_tiles


def test_filter_mean_and_deviation_are_the_folder_s(rules):
    ours, theirs = rules["other filter"]
    image = draw(0, 150, 90)
    expected = theirs(images=[image], return_tensors="np")["pixel_values"][0]
    tiles, levels = ours.tiles(image, is_coarse=False), ours.levels()
    values = np.stack([levels[colour][tiles[..., colour]] for colour in range(3)], axis=1)
    assert np.array_equal(values, expected)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "I;16"])
def test_every_kind_of_pixel_becomes_what_transformers_sees(rules, mode):
    ours, theirs = rules["one tile"]
    colours = draw(1, 40, 30, 4)
    image = colours.convert("L").convert("I;16") if mode == "I;16" else colours.convert(mode)
    picture = file_of(image)
    with Image.open(io.BytesIO(picture.data)) as again:
        expected = theirs(images=[again], return_tensors="np")["pixel_values"][0]
    tiles, levels = ours.tiles(read_picture(picture), is_coarse=False), ours.levels()
    values = np.stack([levels[colour][tiles[..., colour]] for colour in range(3)], axis=1)
    assert np.array_equal(values, expected)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_size_is_known_before_a_pixel_is(form, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    picture = file_of(draw(2, 40, 20), form, exif=exif)
    assert picture_size(picture) == read_picture(picture).size
    assert picture_size(picture) == ((20, 40) if orientation > 4 else (40, 20))


def test_a_key_stands_for_the_file_and_how_finely_it_is_read():
    one = file_of(draw(0, 9, 9))
    same = Picture(data=one.data, field="elsewhere")
    coarse = Picture(data=one.data, field="there", is_coarse=True)
    assert picture_key(one) == picture_key(same)
    assert len({picture_key(one), picture_key(coarse), picture_key(file_of(draw(1, 9, 9)))}) == 3


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_files_are_refused_or_read_never_worse(data):
    form = data.draw(st.sampled_from(["PNG", "JPEG", "WEBP"]))
    whole = bytearray(file_of(draw(0, 12, 9), form).data)
    for _ in range(data.draw(st.integers(1, 6))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    end = data.draw(st.integers(0, len(whole)))
    picture = Picture(data=bytes(whole[:end]), field="there")
    with contextlib.suppress(FieldError, UnsupportedFieldError):
        size = picture_size(picture)
        assert read_picture(picture).size == size


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "0 bytes that are none"),
        (b"GIF89a", "whole picture in PNG, JPEG, WEBP"),
        (file_of(Image.new("1", (30_000, 2))).data, "30000 x 2"),
        (file_of(Image.new("1", (9_000, 9_000))).data, "9000 x 9000"),
        (file_of(draw(0, 20, 20)).data[:-30], None),
    ],
)
def test_what_is_no_picture_says_what_it_is(content, told):
    picture = Picture(data=content, field="there")
    with pytest.raises(GanglionError, match=told) as caught:
        read_picture(picture)
    assert caught.value.field == "there"


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"do_normalize": False}, "do_normalize"),
        ({"resample": 77}, "resample"),
        ({"size": {"height": 3, "width": 3}}, "longest_edge"),
        ({"size": {"longest_edge": 1 << 20}}, "longest_edge"),
        ({"image_mean": [0.1]}, "image_mean"),
        ({"image_std": [0, 1, 1]}, "image_std"),
        ({"rescale_factor": "big"}, "rescale_factor"),
    ],
)
def test_rules_that_are_not_done_here_are_refused(tmp_path, changed, told):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(changed))
    with pytest.raises(CheckpointError, match=told):
        read_pixel_rules(tmp_path)


def test_a_folder_without_rules_says_which_file(tmp_path):
    with pytest.raises(CheckpointError, match="preprocessor_config"):
        read_pixel_rules(tmp_path)
