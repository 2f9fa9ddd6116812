"""Pictures in the language engine: tokens as transformers draws them, features encoded once, pages back."""

import io
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from ganglion.clock import RealClock
from ganglion.engine.language import LanguageEngine
from ganglion.engine.language_requests import Ended
from ganglion.errors import CancelledError, OutOfPagesError
from ganglion.generation import ChatMessage, GenerateRequest, Picture, Sampling, TokenDelta, Usage
from ganglion.layout import PoolLayout
from ganglion.memory.arena import Arena
from ganglion.memory.ledger import Ledger
from ganglion.models.vision import page_layouts
from ganglion.models.vision_load import load_vision_language, read_vision_tokenizer
from ganglion.plan.cost import MeasuredCost
from ganglion.types import RequestId
from tests.vision_folder import processor, write_seeing

BUDGET_US = 3_000
NUM_TOKENS = 64


def draw(seed: int, *size: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def file_of(image: Image.Image) -> Picture:
    data = io.BytesIO()
    image.save(data, "PNG")
    return Picture(data=data.getvalue(), field="messages[0].content[0].image_url.url")


class Stage:
    """One engine over one model, and transformers' words for the same conversations."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder = folder
        self.model = load_vision_language(
            folder, dtype=torch.float32, name="m", max_page_bytes=1 << 15
        )
        self.tokenizer = read_vision_tokenizer(folder, vocab_size=self.model.spec.vocab_size)
        self.processor = processor(folder)
        family = {"idefics3": "Idefics3", "smolvlm": "SmolVLM"}[kind]
        kind_class = getattr(transformers, f"{family}ForConditionalGeneration")
        self.truth = kind_class.from_pretrained(folder, dtype=torch.float32).eval()
        self.open()

    def open(self, *, num_large_pages: int = 64, **how) -> None:
        layout = PoolLayout(large_page_bytes=1 << 15, layouts=page_layouts(self.model))
        self.ledger, arena = Ledger(layout, num_large_pages), Arena(layout, num_large_pages)
        self.engine = LanguageEngine(
            {"m": self.model},
            self.ledger,
            arena,
            RealClock(),
            cost=MeasuredCost(),
            **{"max_rows": 8} | how,
        )
        self.num_ids = 0

    @property
    def images(self):
        return self.engine._hosts["m"].images

    def request(self, parts, *, num_tokens=NUM_TOKENS, tenant="") -> GenerateRequest:
        content = tuple(file_of(part) if isinstance(part, Image.Image) else part for part in parts)
        message = ChatMessage(
            role="user", content="".join(p for p in parts if isinstance(p, str)), parts=content
        )
        prompt = self.tokenizer.chat([message])
        pictures = tuple(part for part in content if isinstance(part, Picture))
        return GenerateRequest(
            model="m",
            prompt=prompt,
            images=self.tokenizer.images(prompt, pictures),
            sampling=Sampling(temperature=0.0, max_tokens=num_tokens, is_eos_ignored=True),
            tenant=tenant,
        )

    def submit(self, request: GenerateRequest) -> RequestId:
        self.num_ids += 1
        self.engine.submit(RequestId(self.num_ids), request)
        return RequestId(self.num_ids)

    def finish(self, budget_us: int = BUDGET_US):
        """Tokens and outcome by request."""
        tokens, outcomes = {}, {}
        while self.engine.step(budget_us):
            self.ledger.check_integrity()
        for event in self.engine.drain():
            if isinstance(event, TokenDelta):
                tokens.setdefault(event.request_id, []).extend(event.token_ids)
            elif isinstance(event, Ended):
                outcomes[event.request_id] = event.outcome
        return tokens, outcomes

    def inputs(self, parts):
        content = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
            for part in parts
        ]
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        pictures = [part for part in parts if isinstance(part, Image.Image)]
        return self.processor(text=text, images=pictures or None, return_tensors="pt")

    def expected(self, parts, num_tokens=NUM_TOKENS) -> list[int]:
        inputs = self.inputs(parts)
        with torch.inference_mode():
            out = self.truth.generate(
                **inputs,
                max_new_tokens=num_tokens,
                do_sample=False,
                eos_token_id=-1,
                pad_token_id=0,
            )
        return out[0, inputs["input_ids"].shape[1] :].tolist()


KINDS = {
    "idefics3": {},
    "smolvlm": {"kind": "smolvlm", "image_px": 35, "patch_px": 7, "tile_px": 28},
    "whole": {"is_split": False, "image_px": 30, "patch_px": 5, "tile_px": 45, "shuffle": 3},
}


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    @cache
    def stage(kind: str) -> Stage:
        folder = write_seeing(tmp_path_factory.mktemp(kind), **KINDS[kind])
        return Stage(folder, KINDS[kind].get("kind", "idefics3"))

    return stage


ONE, OTHER, TALL = draw(0, 50, 37), draw(1, 30, 90), draw(2, 90, 11)
TALKS = (
    (ONE, "what is this?"),
    ("compare ", OTHER, " and ", TALL, "!"),
    ("no picture at all",),
    (TALL, TALL, "twice"),
)


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_prompt_features_and_logits_are_those_of_transformers(stages, kind):
    stage = stages(kind)
    tower, decoder = stage.model.encoder, stage.truth
    for parts in TALKS:
        request, inputs = stage.request(parts), stage.inputs(parts)
        assert list(request.prompt) == inputs["input_ids"][0].tolist()
        if "pixel_values" not in inputs:
            assert request.images == ()
            continue
        pixels = torch.from_numpy(np.concatenate([image.pixels for image in request.images]))
        assert torch.equal(tower.normalised(pixels), inputs["pixel_values"][0])
        with torch.inference_mode():
            ours = tower.encode(pixels)
            found = decoder.model.get_image_features(inputs["pixel_values"], return_dict=True)
        theirs = torch.cat(list(found.pooler_output))
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_those_of_transformers_alone_and_together(stages, kind):
    stage = stages(kind)
    stage.open()
    ids = {stage.submit(stage.request(parts)): parts for parts in TALKS}
    tokens, outcomes = stage.finish()
    for request_id, parts in ids.items():
        assert tokens[request_id] == stage.expected(parts), parts
        assert outcomes[request_id].num_prompt_tokens == len(stage.request(parts).prompt)
    stage.open()
    for parts in TALKS:
        request_id = stage.submit(stage.request(parts))
        assert stage.finish()[0][request_id] == stage.expected(parts), parts


def test_a_picture_is_encoded_once_however_often_it_comes(stages):
    stage = stages("idefics3")
    stage.open()
    talks = [(ONE, "a"), ("before ", ONE, "b"), (ONE, OTHER, "c")]
    ids = [stage.submit(stage.request(parts, num_tokens=8)) for parts in talks]
    cold, _ = stage.finish()
    assert stage.images.num_encoded == 2
    assert stage.images.num_found == 2
    again = [stage.submit(stage.request(parts, num_tokens=8)) for parts in talks]
    warm, outcomes = stage.finish()
    assert stage.images.num_encoded == 2
    assert [warm[i] for i in again] == [cold[i] for i in ids]
    assert all(outcomes[i].num_cached_tokens > 0 for i in again)
    stage.submit(stage.request(talks[0], num_tokens=2, tenant="another"))
    stage.finish()
    assert stage.images.num_encoded == 3, "pictures of one tenant are not another's"


def test_features_go_when_others_are_worth_more_and_are_made_again(stages):
    stage = stages("idefics3")
    stage.open(num_large_pages=14)
    parts = (ONE, "a")
    first = stage.submit(stage.request(parts, num_tokens=8))
    before = stage.finish()[0][first]
    for seed in range(3):
        stage.submit(stage.request((f"{seed}" * 900,), num_tokens=2))
        stage.finish()
    again = stage.submit(stage.request(parts, num_tokens=8))
    assert stage.finish()[0][again] == before == stage.expected(parts, 8)
    assert stage.images.num_encoded == 2


def test_the_same_words_beside_another_picture_are_another_prompt(stages):
    stage = stages("idefics3")
    stage.open()
    other = draw(9, 50, 37)
    first, second = ((picture, "what is this?") for picture in (ONE, other))
    a, b = (stage.request(parts) for parts in (first, second))
    assert a.prompt == b.prompt
    one = stage.submit(a)
    assert stage.finish()[0][one] == stage.expected(first)
    two = stage.submit(b)
    tokens, outcomes = stage.finish()
    assert tokens[two] == stage.expected(second)
    page = stage.model.groups[0].layout.slots
    assert outcomes[two].num_cached_tokens <= a.images[0].first // page * page


@pytest.mark.parametrize(
    "how", [{"policy": "layered"}, {"policy": "whole"}, {"is_deterministic": True}]
)
def test_however_a_prompt_is_cut(stages, how):
    from ganglion.engine.language_policy import POLICIES

    stage = stages("idefics3")
    stage.open(**({"policy": POLICIES[how["policy"]]} if "policy" in how else how))
    ids = {stage.submit(stage.request(parts, num_tokens=16)): parts for parts in TALKS[:2]}
    tokens, _ = stage.finish(budget_us=1)
    for request_id, parts in ids.items():
        assert tokens[request_id] == stage.expected(parts, 16)


def test_a_step_encodes_no_more_than_its_budget(stages):
    stage = stages("idefics3")
    stage.open()
    stage.submit(stage.request((ONE, "what?"), num_tokens=4))
    num_steps = 0
    while not stage.images.num_encoded:
        assert stage.engine.step(1)
        num_steps += 1
    num_tiles = len(stage.request((ONE, "what?")).images[0].places)
    assert num_steps == num_tiles * stage.model.encoder.num_units
    records = list(stage.engine.records)
    assert len(records) == num_steps
    assert not any(record.num_rows or record.num_layers for record in records)
    stage.finish()


def test_who_decodes_goes_on_while_pictures_are_encoded(stages):
    stage = stages("idefics3")
    stage.open()
    talker = stage.submit(stage.request(("just text",), num_tokens=40))
    while not any(isinstance(event, TokenDelta) for event in stage.engine.drain()):
        stage.engine.step(1)
    stage.submit(stage.request((ONE, "what?"), num_tokens=4))
    num_new = 0
    while not stage.images.num_encoded:
        stage.engine.step(1)
        num_new += sum(
            isinstance(event, TokenDelta) and event.request_id == talker
            for event in stage.engine.drain()
        )
    assert num_new >= 2
    stage.finish()


def test_cancelled_in_the_middle_of_a_picture_all_pages_are_back(stages):
    stage = stages("idefics3")
    stage.open()
    request_id = stage.submit(stage.request((ONE, "what?")))
    stage.engine.step(1)
    assert stage.images.encoding is not None
    stage.engine.cancel(request_id)
    assert stage.images.encoding is None
    _, outcomes = stage.finish()
    assert isinstance(outcomes[request_id], CancelledError)
    assert not sum(stage.ledger.stats().num_used_pages.values())


def test_preempted_requests_see_their_pictures_again(stages):
    stage = stages("idefics3")
    stage.open(num_large_pages=14)
    talks = [(draw(seed, 45, 80), f"number {seed}") for seed in range(20, 23)]
    ids = {stage.submit(stage.request(parts, num_tokens=24)): parts for parts in talks}
    for _ in range(40):
        stage.engine.step(200)
    stage.engine.preempt_latest()
    tokens, outcomes = stage.finish()
    assert all(isinstance(outcome, Usage) for outcome in outcomes.values()), outcomes
    for request_id, parts in ids.items():
        assert tokens[request_id] == stage.expected(parts, 24)
    assert stage.engine.num_preemptions
    assert not sum(stage.ledger.stats().num_used_pages.values())


def test_a_picture_that_never_fits_ends_its_request_alone(stages):
    stage = stages("idefics3")
    stage.open(num_large_pages=2)
    request_id = stage.submit(stage.request((draw(5, 90, 90), "large"), num_tokens=4))
    _, outcomes = stage.finish()
    assert isinstance(outcomes[request_id], OutOfPagesError)
    assert not sum(stage.ledger.stats().num_used_pages.values())


def test_pages_move_under_pictures(stages):
    stage = stages("idefics3")
    stage.open()
    parts = (OTHER, " beside ", draw(40, 60, 60), " what?")
    fillers = [stage.submit(stage.request((draw(seed, 80, 70), "x"))) for seed in (41, 42)]
    while stage.images.num_encoded < 1:
        stage.engine.step(1)
    request_id = stage.submit(stage.request(parts))
    while stage.images.num_encoded < 3:  # both of the fillers, and one of this request
        stage.engine.step(1)
    for filler in fillers:
        stage.engine.cancel(filler)
    num_moved, tokens = 0, []
    while stage.engine.step(1):
        moves = stage.ledger.plan_moves(1 << 16, num_spare=63)
        if moves is not None:
            stage.engine._arena.copy(moves.copies)
            num_moved += sum("image" in copy.layout for copy in moves.copies)
        stage.ledger.check_integrity()
    for event in stage.engine.drain():
        if isinstance(event, TokenDelta) and event.request_id == request_id:
            tokens += event.token_ids
    assert num_moved, "no feature moved: the test shows nothing"
    assert tokens == stage.expected(parts)
