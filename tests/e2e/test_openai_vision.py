"""OpenAI's client sends pictures to a served model that sees: answers, usage and refusals."""

import base64
import io
import json
import urllib.request

import numpy as np
import openai
import pytest
import torch
import transformers
from PIL import Image

from ganglion.models.text_tokenizer import HfTextTokenizer
from tests.e2e.command import Running
from tests.language_folder import write_llama
from tests.vision_folder import processor, write_seeing

SEEING, BLIND = "tiny-smolvlm", "tiny-llama"
NUM_TOKENS = 24


def draw(seed=0, size=(40, 52)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def url_of(image, form="PNG", **how):
    data = io.BytesIO()
    image.save(data, form, **how)
    return f"data:image/{form.lower()};base64,{base64.b64encode(data.getvalue()).decode()}"


def user(*parts):
    return [{"role": "user", "content": list(parts)}]


def text(words):
    return {"type": "text", "text": words}


def picture(url, **more):
    return {"type": "image_url", "image_url": {"url": url} | more}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_seeing(tmp_path_factory.mktemp("models") / SEEING, kind="smolvlm")


@pytest.fixture(scope="module")
def address(folder, tmp_path_factory):
    blind = write_llama(tmp_path_factory.mktemp("models") / BLIND)
    line = ("serve", f"chat={folder}", f"chat={blind}", "--port", "0", "--dtype", "float32")
    with Running(*line, "--arena-bytes", "64 MiB", until="Ctrl-C stops") as server:
        yield server.find(r"OpenAI +(\S+)")


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=60) as it:
        yield it


@pytest.fixture(scope="module")
def truth(folder):
    """Parts -> ids of the prompt, and what transformers continues it with, as the words of its tokens."""
    model = transformers.SmolVLMForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32
    )
    process, ours = processor(folder), HfTextTokenizer.load(folder)
    eos_id = model.config.text_config.eos_token_id

    def told(*parts):
        pictures = [part for part in parts if not isinstance(part, str)]
        content = [text(part) if isinstance(part, str) else {"type": "image"} for part in parts]
        prompt = process.apply_chat_template(user(*content), add_generation_prompt=True)
        inputs = process(text=prompt, images=pictures or None, return_tensors="pt")
        ids = inputs["input_ids"]
        with torch.inference_mode():
            out = model.generate(
                **inputs, max_new_tokens=NUM_TOKENS, do_sample=False, pad_token_id=0
            )
        drawn_ids = out[0, ids.shape[1] :].tolist()
        end = drawn_ids.index(eos_id) if eos_id in drawn_ids else len(drawn_ids)
        words = [ours.token_bytes(one).decode(errors="replace") for one in drawn_ids[:end]]
        return ids.shape[1], words

    return told


def drawn(answer):
    return [item.token for item in answer.choices[0].logprobs.content]


def test_a_chat_about_a_picture_is_that_of_transformers_whole_and_streamed(client, truth):
    image = draw()
    num_prompt, words = truth(image, "what is this?")
    asked = {
        "model": SEEING,
        "messages": user(picture(url_of(image)), text("what is this?")),
        "temperature": 0,
        "max_tokens": NUM_TOKENS,
        "logprobs": True,
    }
    answer = client.chat.completions.create(**asked)
    assert drawn(answer) == words
    assert answer.usage.prompt_tokens == num_prompt
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    whole = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert whole == answer.choices[0].message.content
    usage = chunks[-1].usage
    assert usage.prompt_tokens == num_prompt
    assert usage.prompt_tokens_details.cached_tokens > 0, "the same picture, the same pages"


def test_several_pictures_between_words(client, truth):
    one, other = draw(1), draw(2, (90, 20))
    num_prompt, words = truth("compare ", one, " and ", other)
    answer = client.chat.completions.create(
        model=SEEING, temperature=0, max_tokens=NUM_TOKENS, logprobs=True,
        messages=user(
            text("compare "), picture(url_of(one)), text(" and "),
            picture(url_of(other, "WEBP", lossless=True), detail="high"),
        ),
    )  # fmt: skip
    assert (answer.usage.prompt_tokens, drawn(answer)) == (num_prompt, words)


def test_a_response_takes_pictures_too(client, truth):
    image = draw(3)
    num_prompt, words = truth(image, "name it")
    content = [
        {"type": "input_image", "image_url": url_of(image), "detail": "auto"},
        {"type": "input_text", "text": "name it"},
    ]
    answer = client.responses.create(
        model=SEEING, temperature=0, max_output_tokens=NUM_TOKENS,
        input=[{"role": "user", "content": content}], include=["message.output_text.logprobs"],
    )  # fmt: skip
    assert answer.usage.input_tokens == num_prompt
    assert [item.token for item in answer.output[0].content[0].logprobs] == words


def test_low_detail_is_one_look_at_the_whole(client):
    def num_tokens(**more):
        content = user(picture(url_of(draw(4, (90, 90))), **more), text("?"))
        answer = client.chat.completions.create(model=SEEING, messages=content, max_tokens=1)
        return answer.usage.prompt_tokens

    assert num_tokens(detail="low") < num_tokens() == num_tokens(detail="auto")


def test_a_photo_is_turned_as_its_camera_was_held(client):
    exif = Image.Exif()
    exif[274] = 6  # a quarter turn
    upright = draw(5, (30, 70))
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    asked = {"model": SEEING, "max_tokens": 4, "temperature": 0}
    answers = [
        client.chat.completions.create(messages=user(picture(url), text("?")), **asked)
        for url in (url_of(upright), url_of(turned, exif=exif))
    ]
    contents = [answer.choices[0].message.content for answer in answers]
    assert contents[0] == contents[1]
    assert answers[0].usage.prompt_tokens == answers[1].usage.prompt_tokens


GOOD = url_of(draw())
LARGE = url_of(Image.new("1", (9_000, 9_000)))
HUGE = url_of(Image.new("1", (20_000, 20_000)))
ANIMATED = url_of(draw(), "WEBP", save_all=True, append_images=[draw(1)], lossless=True)
REFUSALS = {
    "fetched": ("https://example.com/cat.png", "nothing is fetched", "unsupported_parameter"),
    "a file": ("file:///etc/passwd", "expected a data: URL", "invalid_value"),
    "another type": ("data:image/gif;base64,R0lGODlh", "expected a data: URL", "invalid_value"),
    "no base64": (GOOD[:-3] + "!!!", "base64", "invalid_value"),
    "nothing": ("data:image/png;base64,", "0 bytes", "invalid_value"),
    "no picture": ("data:image/png;base64,AAAA", "whole picture", "invalid_value"),
    "cut": (GOOD[: GOOD.index(",") + 1 + 3_000], "whole picture", "invalid_value"),
    "large": (LARGE, "9000 x 9000", "invalid_value"),
    "bomb": (HUGE, "make the picture smaller", "invalid_value"),
    "animated": (ANIMATED, "animation", "unsupported_parameter"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_no_picture_is_refused_by_its_field(client, name):
    url, told, code = REFUSALS[name]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model=SEEING, messages=user(text("look"), picture(url)), max_tokens=1
        )
    assert told in str(caught.value)
    assert caught.value.code == code
    assert caught.value.param == "messages[0].content[1].image_url.url"


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        (user(*[picture(GOOD)] * 33), "at most 32 pictures"),
        (user(*[picture(GOOD)] * 30), "tokens"),
        ([{"role": "assistant", "content": [picture(GOOD)]}, *user(text("?"))], "assistant"),
        (user(text("what does <image> mean?")), "stands for a picture"),
        (user(picture(GOOD, detail="huge")), "detail"),
        (user({"type": "input_audio", "input_audio": {}}), "neither text nor a picture"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked(client, messages, told):
    with pytest.raises(openai.BadRequestError, match=told):
        client.chat.completions.create(model=SEEING, messages=messages, max_tokens=1)


def test_a_model_that_reads_text_says_so(client):
    with pytest.raises(openai.BadRequestError, match=f"{BLIND} takes text only") as caught:
        client.chat.completions.create(model=BLIND, messages=user(picture(GOOD)), max_tokens=1)
    assert caught.value.code == "unsupported_parameter"


def test_models_say_what_they_take(client):
    taken = {model.id: model.input_modalities for model in client.models.list()}
    assert taken == {SEEING: ["text", "image"], BLIND: ["text"]}


def test_tokens_are_counted_without_an_answer(client, address, truth):
    body = {"model": SEEING, "messages": user(picture(GOOD), text("?"))}
    request = urllib.request.Request(
        address.removesuffix("/v1") + "/tokenize",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert json.load(answer)["count"] == truth(draw(), "?")[0]
