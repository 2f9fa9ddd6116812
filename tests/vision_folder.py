"""A tiny Idefics3 or SmolVLM with random weights, written as transformers writes it, with tokenizer and processor files."""

import json
from pathlib import Path

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

IMAGE_TOKEN = "<image>"
SPECIAL = (
    "<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", IMAGE_TOKEN, "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
)  # fmt: skip
TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def write_seeing(
    folder: Path,
    *,
    kind: str = "idefics3",
    image_px: int = 42,
    patch_px: int = 7,
    tile_px: int = 42,
    longest_px: int = 100,
    shuffle: int = 2,
    is_split: bool = True,
    seed: int = 3,
) -> Path:
    """The folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = write_tokenizer(folder)
    config_class, model_class = {
        "idefics3": (transformers.Idefics3Config, transformers.Idefics3ForConditionalGeneration),
        "smolvlm": (transformers.SmolVLMConfig, transformers.SmolVLMForConditionalGeneration),
    }[kind]
    config = config_class(
        image_token_id=tokenizer.token_to_id(IMAGE_TOKEN),
        scale_factor=shuffle,
        tie_word_embeddings=False,
        vision_config={
            "hidden_size": 36, "intermediate_size": 56, "num_hidden_layers": 3,
            "num_attention_heads": 3, "image_size": image_px, "patch_size": patch_px,
        },
        text_config={
            "model_type": "llama", "vocab_size": tokenizer.get_vocab_size() + 3, "hidden_size": 48,
            "intermediate_size": 88, "num_hidden_layers": 3, "num_attention_heads": 6,
            "num_key_value_heads": 2, "max_position_embeddings": 2048, "bos_token_id": None,
            "eos_token_id": tokenizer.token_to_id("<end_of_utterance>"), "pad_token_id": None,
        },
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config)
        for name, value in model.named_parameters():
            # beside weights of 0.02 a picture would change little
            if value.ndim > 1 and ("vision_model" in name or "connector" in name):
                value.data.normal_(std=value[0].numel() ** -0.5)
            elif value.ndim > 1:
                value.data.normal_(std=1.5 * value.shape[-1] ** -0.5)
    model.generation_config.eos_token_id = config.text_config.eos_token_id
    model.save_pretrained(folder)
    processor = transformers.Idefics3ImageProcessorPil(
        size={"longest_edge": longest_px},
        max_image_size={"longest_edge": tile_px},
        do_image_splitting=is_split,
    )
    processor.save_pretrained(folder)
    return folder


def write_tokenizer(folder: Path) -> Tokenizer:
    """Bytes, the special tokens of the family, and its chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in SPECIAL]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer


def processor(folder: Path) -> transformers.Idefics3Processor:
    """transformers' own, over the same files."""
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), chat_template=TEMPLATE
    )
    images = transformers.Idefics3ImageProcessorPil.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    tile = images.max_image_size["longest_edge"] // config["vision_config"]["patch_size"]
    return transformers.Idefics3Processor(
        images,
        tokenizer,
        image_seq_len=(tile // config["scale_factor"]) ** 2,
        chat_template=TEMPLATE,
    )
