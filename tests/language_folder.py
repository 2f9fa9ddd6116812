"""A tiny Llama with random weights, written as transformers writes it, with a tokenizer that means bytes."""

from pathlib import Path

import torch
import transformers

VOCAB_SIZE = 260  # bytes, and four more of which 256 ends a text
MAX_TOKENS = 1024


def write_llama(folder: Path, *, width: int = 64, num_layers: int = 3) -> Path:
    """The folder."""
    config = transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=None,
        eos_token_id=256,
    )
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return folder


def continuation(folder: Path, prompt: str, num_tokens: int) -> list[int]:
    """What transformers continues greedily with, ends of text included."""
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = list(prompt.encode())
    for _ in range(num_tokens):
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0, -1]
        ids.append(int(logits.argmax()))
    return ids[len(prompt.encode()) :]
