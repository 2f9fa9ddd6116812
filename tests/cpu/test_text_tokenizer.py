"""Text tokenizers against transformers on the same folders; templates, hostile ones too."""

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from ganglion.errors import CheckpointError, FieldError
from ganglion.generation import ChatMessage
from ganglion.models.chat_template import ChatTemplate
from ganglion.models.detokenizer import Detokenizer
from ganglion.models.text_tokenizer import ByteTokenizer, HfTextTokenizer, read_tokenizer
from ganglion.service import TextTokenizer

LINES = [
    "the drawer is open",
    "put the cup on the table",
    "émile öffnet 世界 \U0001f916",
    "a  b\n\tc",
] * 20
CHATML = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content | trim }}"
    "{% if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ["<s>", "<|im_start|>", "<|im_end|>"]


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer.add_tokens(["<tool_call>"])
    return tokenizer


def sentence_piece() -> Tokenizer:
    """As Llama 2's: spaces as low lines, unknown characters as bytes, the first space dropped in decoding."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "\u2581")
    trainer = trainers.BpeTrainer(
        vocab_size=350,
        special_tokens=["<unk>", *SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    trained.train_from_iterator(LINES[:2] * 10, trainer)
    content = json.loads(trained.to_str())
    content["model"] |= {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True}
    content["added_tokens"] = [
        t for t in content["added_tokens"] if not t["content"].startswith("<0x")
    ]
    tokenizer: Tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    content = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "chat_template": CHATML,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(content | config))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {
        "byte-level": save(byte_level(), root / "bytes"),
        "sentence-piece": save(sentence_piece(), root / "pieces"),
    }


KINDS = ("byte-level", "sentence-piece")


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_texts_are_those_of_transformers(kind: str, folders: dict[str, Path]) -> None:
    ours = HfTextTokenizer.load(folders[kind])
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folders[kind])

    @settings(max_examples=60, deadline=None)
    @given(st.one_of(st.text(max_size=40), st.sampled_from([*LINES, "<|im_end|> the"])))
    def check(text: str) -> None:
        ids = ours.encode(text)
        assert list(ids) == theirs(text).input_ids
        plain = theirs(text, add_special_tokens=False).input_ids
        shown = ours.decode(plain)
        # transformers drops the space that the vocabulary puts in front of a text; ours keeps what the tokens say
        if kind == "sentence-piece":
            shown = shown.removeprefix(" ")
        assert shown == theirs.decode(plain)

    check()
    typed: TextTokenizer = ours
    assert typed.token_bytes(0)
    assert ours.vocab_size == len(theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_one_by_one_give_the_whole_text(kind: str, folders: dict[str, Path]) -> None:
    tokenizer = HfTextTokenizer.load(folders[kind])
    for line in LINES[:4]:
        ids = tokenizer.encode(line)
        detokenizer = Detokenizer()
        parts = [detokenizer.feed(tokenizer.shown_bytes(index)) for index in ids]
        assert not any("\ufffd" in part for part in parts)
        assert ("".join(parts) + detokenizer.finish()).removeprefix(" ") == line


def test_conversations_are_those_of_transformers(folders: dict[str, Path]) -> None:
    ours = HfTextTokenizer.load(folders["byte-level"])
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folders["byte-level"])
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": " où? <b> "},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
        },
    ]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    asked = [
        ChatMessage(role="system", content="be brief"),
        ChatMessage(role="user", content=" où? <b> "),
        ChatMessage(role="assistant", content="", tool_calls=(call,)),
    ]
    for given_tools in ([], tools):
        expected = theirs.apply_chat_template(
            messages, tools=given_tools or None, add_generation_prompt=True, return_dict=False
        )
        assert list(ours.chat(asked, tools=given_tools)) == expected


def test_special_tokens_are_not_shown_but_where_tool_calls_begin(folders: dict[str, Path]) -> None:
    tokenizer = HfTextTokenizer.load(folders["byte-level"])
    ids = tokenizer.encode("<tool_call>x<|im_end|>")
    assert b"".join(map(tokenizer.shown_bytes, ids)) == b"<tool_call>x"
    assert tokenizer.decode(ids) == "<s><tool_call>x<|im_end|>"
    assert tokenizer.token_bytes(tokenizer.vocab_size) == b"" == tokenizer.token_bytes(-1)


def test_older_folders_say_in_their_config_that_a_text_starts_with_bos(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    ours = HfTextTokenizer.load(save(tokenizer, tmp_path, add_bos_token=True))
    assert ours.encode("open") == (0, *tokenizer.encode("open").ids)
    assert ours.encode("<s>open") == (0, *tokenizer.encode("open").ids)


def test_a_folder_without_a_tokenizer_means_bytes(tmp_path: Path) -> None:
    tokenizer = read_tokenizer(tmp_path, vocab_size=260)
    assert isinstance(tokenizer, ByteTokenizer)
    assert tokenizer.encode("é") == (0xC3, 0xA9)
    assert tokenizer.decode((0x41, 0xC3, 256)) == "A\ufffd"
    chat = tokenizer.chat([ChatMessage(role="user", content="hi")])
    assert tokenizer.decode(chat) == "user: hi\n\nassistant:"


def test_what_does_not_fit_is_named(tmp_path: Path, folders: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match="tokens, the model 300"):
        read_tokenizer(folders["byte-level"], vocab_size=300)
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"only tokenizer\.model"):
        read_tokenizer(tmp_path, vocab_size=32000)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a tokenizer"):
        read_tokenizer(tmp_path, vocab_size=32000)
    with pytest.raises(FieldError, match="surrogate"):
        ByteTokenizer().encode("\ud800")


def say(source: str, *, role: str = "user", content: str = "hi") -> str:
    today = datetime.datetime(2026, 11, 21)
    template = ChatTemplate(source, special_tokens={"bos_token": "<s>"}, today=lambda: today)
    return template.render([ChatMessage(role=role, content=content)])


def test_what_templates_of_the_field_use() -> None:
    assert say("{{ strftime_now('%d %b %Y') }}") == "21 Nov 2026"
    assert say("{% generation %}{{ bos_token }}{% endgeneration %}") == "<s>"
    assert (
        say("{% for i in range(9) %}{% if i > 2 %}{% break %}{% endif %}{{ i }}{% endfor %}")
        == "012"
    )
    assert (
        say("{% macro f(n) %}{% for i in range(n) %}{{ i }}{% endfor %}{% endmacro %}{{ f(3) }}")
        == "012"
    )
    assert (
        say(
            "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}"
        )
        == "1"
    )


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "turns"),
        ("{% for a in range(999999) %}{% endfor %}", "range"),
        ("{{ 'a' * 99999999 }}", "too long"),
        ("{{ 2 ** 99999999 }}", "powers"),
        ("{% for a in range(20000) %}{{ 'a' * 10000 }}{% endfor %}", "characters"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ messages[7].role }}", "no element 7"),
        ("{% set _ = messages.append(1) %}", "unsafe|not safe"),
        ("{% include 'x' %}", "loader"),
    ],
)
def test_a_template_that_refuses_or_misbehaves_is_the_requests_error(source: str, why: str) -> None:
    with pytest.raises(FieldError, match=why):
        say(source)


def test_a_template_that_cannot_be_read_is_the_folders_error() -> None:
    with pytest.raises(CheckpointError, match="not readable"):
        say("{% for %}")
