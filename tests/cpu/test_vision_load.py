"""Folders of models that see: outlines, damage, and prompts that have no room for their pictures."""

import io
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ganglion.errors import CheckpointError, FieldError
from ganglion.generation import ChatMessage, Picture
from ganglion.models.decoder_load import load_language, outline_language
from ganglion.models.text_tokenizer import read_tokenizer
from ganglion.models.vision import encoder_of, page_layouts
from tests.vision_folder import write_seeing


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    return write_seeing(tmp_path_factory.mktemp("seeing"))


@pytest.fixture
def folder(seeing, tmp_path):
    return shutil.copytree(seeing, tmp_path / "model")


def change(path, *keys, value):
    content = json.loads(path.read_text())
    inner = content
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    path.write_text(json.dumps(content))


def picture(seed=0, height=50, width=37, **more):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return Picture(data=data.getvalue(), field="there", **more)


def message(*parts):
    text = "".join(part for part in parts if isinstance(part, str))
    return ChatMessage(role="user", content=text, parts=parts)


def test_an_outline_is_the_model_without_its_weights(seeing):
    outline = outline_language(seeing, dtype=torch.float32, name="m")
    model = load_language(seeing, dtype=torch.float32, name="m")
    assert outline.spec == model.spec
    assert outline.spec.has_vision
    assert page_layouts(outline) == page_layouts(model)
    assert encoder_of(outline).num_units == encoder_of(model).num_units


def test_bfloat16_features_are_near(seeing):
    whole, half = (
        encoder_of(load_language(seeing, dtype=dtype, name="m"))
        for dtype in (torch.float32, torch.bfloat16)
    )
    pixels = torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (2, 42, 42, 3), dtype=np.uint8)
    )
    with torch.inference_mode():
        one, other = whole.encode(pixels), half.encode(pixels).float()
    assert (one - other).abs().max() < 0.05 * one.abs().max()


@pytest.mark.parametrize(
    ("file", "keys", "value", "told"),
    [
        ("config.json", ("vision_config", "num_attention_heads"), 5, "num_attention_heads"),
        ("config.json", ("vision_config", "patch_size"), 500, "at least one patch"),
        ("config.json", ("vision_config", "hidden_act"), "tanhh", "hidden_act"),
        ("config.json", ("vision_config", "num_hidden_layers"), 4, "missing"),
        ("config.json", ("vision_config", "intermediate_size"), 55, "shape expected"),
        ("config.json", ("vision_config",), "none", "vision_config: expected an object"),
        ("config.json", ("text_config", "model_type"), "mamba9", "mamba9"),
        ("config.json", ("scale_factor",), 5, "multiple of 35"),
        ("config.json", ("image_token_id",), 7, "expected '<image>'"),
        ("preprocessor_config.json", ("max_image_size", "longest_edge"), 41, "multiple of 14"),
        ("preprocessor_config.json", ("do_rescale",), False, "do_rescale"),
    ],
)
def test_files_that_do_not_fit_each_other_are_named(folder, file, keys, value, told):
    change(folder / file, *keys, value=value)
    with pytest.raises(CheckpointError, match=told):  # noqa: PT012 - whichever reads it first
        model = outline_language(folder, dtype=torch.float32, name="m")
        read_tokenizer(folder, vocab_size=model.spec.vocab_size)


def test_weights_that_are_missing_or_unknown_are_named(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.connector.other"] = tensors.pop(
        "model.connector.modality_projection.proj.weight"
    )
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"modality_projection.*missing.*other: unexpected"):
        load_language(folder, dtype=torch.float32, name="m")


def test_a_template_that_the_folder_lacks_is_replaced_by_a_plain_one(folder):
    (folder / "tokenizer_config.json").write_text("{}")
    tokenizer = read_tokenizer(folder, vocab_size=400)
    ids = tokenizer.chat([message("see ", picture(), "?")])
    text = tokenizer.decode(ids)
    assert text.startswith("user: see <fake_token_around_image>")
    assert text.endswith("?\n\nassistant:")


def test_a_coarse_picture_is_one_tile(seeing):
    tokenizer = read_tokenizer(seeing, vocab_size=400)
    size = tokenizer.sight.tile_tokens
    for is_coarse, num_tiles in ((False, 10), (True, 1)):
        one = picture(is_coarse=is_coarse)
        ids = tokenizer.chat([message(one, "?")])
        (image,) = tokenizer.images(ids, [one])
        assert len(image.places) == num_tiles == len(image.pixels)
        assert ids.count(tokenizer.sight.image_token_id) == num_tiles * size
        assert all(ids[at] == tokenizer.sight.image_token_id for p in image.places for at in p)


def test_a_prompt_has_room_for_exactly_its_pictures(seeing):
    tokenizer = read_tokenizer(seeing, vocab_size=400)
    one, coarse = picture(), picture(is_coarse=True)
    ids = tokenizer.chat([message(one, "?")])
    for pictures in ([one, one], [coarse], []):
        if pictures:
            with pytest.raises(FieldError, match="of them"):
                tokenizer.images(ids, pictures)
    assert tokenizer.images(ids, ()) == ()
    with pytest.raises(FieldError, match="of them"):
        tokenizer.images(ids[:-30], [one])


def test_more_pictures_than_a_prompt_holds_are_refused_from_their_heads(seeing):
    tokenizer = read_tokenizer(seeing, vocab_size=400)
    with pytest.raises(FieldError, match="pictures of less than 2048 tokens"):
        tokenizer.chat([message(*[picture()] * 40)])
    with pytest.raises(FieldError, match="stands for a picture"):
        tokenizer.chat([message(picture(), "<image>")])


def test_pixels_of_a_picture_that_comes_again_are_kept(seeing):
    tokenizer = read_tokenizer(seeing, vocab_size=400)
    one = picture()
    ids = tokenizer.chat([message(one, "?")])
    (first,), (again,) = (tokenizer.images(ids, [one]) for _ in range(2))
    assert first.pixels is again.pixels
    assert first.key == again.key
